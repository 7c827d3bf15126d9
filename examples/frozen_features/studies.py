"""What the evidence compares: contenders, each with twelve trials, and the data sets."""

import dataclasses
import itertools
from typing import NamedTuple

from .recipes import Knobs, Recipe

DECAYS = (5e-4, 3e-3, 1e-2, 2e-2)
TRIALS = 12


class Trial(NamedTuple):
    """One setting of a contender."""

    recipe: Recipe
    knobs: Knobs


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the comparison: twelve trials, of which held-out noisy labels choose one."""

    name: str
    trials: tuple[Trial, ...]

    early_stopping: bool = False
    """Report the epoch with the best held-out noisy accuracy, in place of the last one."""

    drops_suspects: bool = False
    """Train without the rows that cleanlab calls label issues."""

    clean: bool = False
    """Train on the correct labels: the ceiling, no contender."""

    def __post_init__(self) -> None:
        if len(self.trials) != TRIALS:
            raise ValueError(f"{self.name} has {len(self.trials)} trials, all others {TRIALS}.")


def _plain(**recipe: object) -> tuple[Trial, ...]:
    """Without a radius: decay and learning rate."""
    made = Recipe(**recipe)  # type: ignore[arg-type]
    decays = (5e-4, 3e-3, 1e-2, 2e-2, 3e-2, 6e-2)
    return tuple(
        Trial(made, Knobs(0.0, decay, rate))
        for rate, decay in itertools.product((0.02, 0.005), decays)
    )


def _radii(radii: tuple[float, ...], strength: float = 0.0, **recipe: object) -> tuple[Trial, ...]:
    made = Recipe(**recipe)  # type: ignore[arg-type]
    return tuple(
        Trial(made, Knobs(rho, decay, 0.02, strength))
        for rho, decay in itertools.product(radii, DECAYS)
    )


def _strengths(strengths: tuple[float, ...], **recipe: object) -> tuple[Trial, ...]:
    made = Recipe(**recipe)  # type: ignore[arg-type]
    return tuple(
        Trial(made, Knobs(0.0, decay, 0.02, strength))
        for strength, decay in itertools.product(strengths, DECAYS)
    )


def _dropouts() -> tuple[Trial, ...]:
    return tuple(
        Trial(Recipe(dropout=dropout), Knobs(0.0, decay, 0.02))
        for dropout, decay in itertools.product((0.2, 0.5, 0.8), DECAYS)
    )


WIDE = (0.1, 0.2, 0.4)
TENTH = (0.01, 0.02, 0.04)
THIRD = (0.03, 0.06, 0.12)

METHODS = (
    Contender("SGD", _plain()),
    Contender("SAM", _radii(WIDE, method="sam")),
    Contender("SANER", _radii(WIDE, method="saner")),
    Contender("J-SAM", _radii(WIDE, method="jsam")),
    Contender("1-SAM", _radii(TENTH, method="1-sam")),
    Contender("L-SAM", _radii(WIDE, method="lsam")),
    Contender("clean labels", _plain(), clean=True),
    Contender("m-SAM", _radii(THIRD, method="m-sam")),
    Contender("NCSAM", _radii(WIDE, method="ncsam")),
)

BASELINES = (
    Contender("linear", _plain(head="linear")),
    Contender("early stopping", _plain(), early_stopping=True),
    Contender("label smoothing", _strengths((0.1, 0.3, 0.6), loss="label_smoothing")),
    Contender("GCE", _strengths((0.3, 0.5, 0.7), loss="gce")),
    Contender("SCE", _strengths((0.1, 0.5, 2.0), loss="sce")),
    Contender("ELR", _strengths((1.0, 3.0, 7.0), loss="elr")),
    Contender("mixup", _strengths((0.2, 1.0, 4.0), mixup=True)),
    Contender("dropout", _dropouts()),
    Contender("without suspects", _plain(), drops_suspects=True),
)

CROSSINGS = (
    Contender("1-SANER", _radii(TENTH, method="sam", group_size=1, saner=True)),
    Contender("SAM + weight average", _radii(WIDE, method="sam", weight_average=0.999)),
    Contender("SANER + weight average", _radii(WIDE, method="saner", weight_average=0.999)),
    Contender("SANER + GCE", _radii(WIDE, 0.5, method="saner", loss="gce")),
    Contender("SAM + GCE", _radii(WIDE, 0.5, method="sam", loss="gce")),
    Contender("SANER + SCE", _radii(WIDE, 0.5, method="saner", loss="sce")),
    Contender("SAM + ELR", _radii(WIDE, 3.0, method="sam", loss="elr")),
    Contender("SANER + label smoothing", _radii(WIDE, 0.3, method="saner", loss="label_smoothing")),
    Contender("SAM along averages", _radii(WIDE, method="sam", average=0.4)),
    Contender("SANER along averages", _radii(WIDE, method="sam", average=0.4, saner=True)),
    Contender("SAM from half", _radii(WIDE, method="sam", start=0.5)),
    Contender("SANER from half", _radii(WIDE, method="saner", start=0.5)),
    Contender("8-SANER", _radii(THIRD, method="sam", group_size=8, saner=True)),
    Contender("1-J-SAM", _radii(TENTH, method="jsam", group_size=1)),
    Contender("1-SAM + GCE", _radii(TENTH, 0.5, method="sam", group_size=1, loss="gce")),
    Contender("1-SAM + weight average", _radii(TENTH, method="1-sam", weight_average=0.999)),
    Contender(
        "GCE + weight average", _strengths((0.3, 0.5, 0.7), loss="gce", weight_average=0.999)
    ),
)

STUDIES = {"methods": METHODS, "baselines": BASELINES, "crossings": CROSSINGS}
"""In the order in which they run."""

DATA = (
    "cifar10n_worse",
    "news",
    "reviews",
    "digits",
    "cifar10n_aggregate",
    "cifar10n_random1",
    "cifar10n_symmetric_40",
    "cifar10n_asymmetric_40",
    "cifar10n_symmetric_20",
    "cifar10n_symmetric_60",
    "cifar10n_asymmetric_20",
)
"""In the order in which they run."""


def schedule() -> list[tuple[str, Contender]]:
    """Which contender runs on which data: the most informative first."""
    first = [("cifar10n_worse", contender) for contender in METHODS[:7]]
    small = [(data, c) for data in ("news", "reviews", "digits") for c in METHODS + BASELINES]
    pairs = [*first, *small]
    pairs += [("cifar10n_worse", c) for c in BASELINES + CROSSINGS + METHODS]
    pairs += [(data, c) for data in DATA for c in METHODS + BASELINES + CROSSINGS]
    return list(dict.fromkeys(pairs))
