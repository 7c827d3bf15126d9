"""Which setting is chosen, how sure that is, and what it costs against the oracle."""

import math
from typing import NamedTuple

import numpy as np

from .criteria import CRITERIA
from .grid import Setting
from .search import Result, scores


class Choice(NamedTuple):
    """The chosen setting.

    Attributes:
      setting: with the highest accuracy on held-out noisy labels.
      accuracy: on them, mean over the seeds.
      interval: its 95 % interval over the held-out rows.
      runner_up: the second one, None if there is only one.
      lead: by how much the chosen one leads.
      lead_interval: its 95 % interval, paired over the held-out rows.
    """

    setting: Setting
    accuracy: float
    interval: tuple[float, float]
    runner_up: Setting | None
    lead: float
    lead_interval: tuple[float, float]

    @property
    def sure(self) -> bool:
        """Whether the runner-up is worse beyond chance."""
        return self.runner_up is None or self.lead_interval[0] > 0


class Criterion(NamedTuple):
    """What a criterion would have chosen in the first round, where all settings took part.

    Attributes:
      name: key of ``CRITERIA``.
      setting: its choice.
      correlation: Spearman's, with the clean accuracy; None where that is not known.
      accuracy: clean accuracy of its choice.
      regret: the oracle's clean accuracy minus this.
    """

    name: str
    setting: Setting
    correlation: float | None
    accuracy: float | None
    regret: float | None


def choose(results: list[Result]) -> Choice:
    """Chooses among the settings of the last round that have not diverged.

    The intervals count the held-out rows as the only chance; the noise of a few seeds comes on top.

    Raises:
      ValueError: if all have.
    """
    ranking = scores(results)
    order = sorted(
        (setting for setting in ranking if math.isfinite(ranking[setting])),
        key=lambda setting: -ranking[setting],
    )
    if not order:
        rates = sorted({result.setting.rate for result in results})
        raise ValueError(
            f"--learning-rates: {', '.join(f'{rate:g}' for rate in rates)}: every setting diverged. "
            "Give lower ones."
        )
    best = order[0]
    hits = _hits(results, best)
    interval = _interval(hits)
    if len(order) == 1:
        return Choice(best, ranking[best], interval, None, 0.0, (0.0, 0.0))
    difference = hits - _hits(results, order[1])
    return Choice(
        best,
        ranking[best],
        interval,
        order[1],
        float(difference.mean()),
        _interval(difference),
    )


def compare_criteria(results: list[Result]) -> list[Criterion]:
    """What every criterion would choose among all settings of the first round."""
    first = [result for result in results if result.rung == 0]
    clean = scores(first, "clean_accuracy")
    rows = []
    for name in CRITERIA:
        values = scores(first, name)
        if not any(math.isfinite(value) for value in values.values()):
            continue
        best = max(values, key=lambda setting: values[setting])
        if math.isfinite(clean[best]):
            correlation = _spearman(np.array(list(values.values())), np.array(list(clean.values())))
            accuracy = clean[best]
            rows.append(
                Criterion(name, best, correlation, accuracy, max(clean.values()) - accuracy)
            )
        else:
            rows.append(Criterion(name, best, None, None, None))
    return rows


def _hits(results: list[Result], setting: Setting) -> np.ndarray:
    """Per held-out row, the share of seeds that predict its label."""
    rows = results[-1].rows
    runs = [r.correct for r in results if r.setting == setting and r.rows == rows]
    share: np.ndarray = np.mean(np.stack(runs).astype(np.float64), axis=0)
    return share


def _interval(values: np.ndarray) -> tuple[float, float]:
    mean = float(values.mean())
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def _spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    ranks = [_ranks(values) for values in (first, second)]
    if any(rank.std() == 0 for rank in ranks):
        return None
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ties share the mean of their ranks."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[position]
