"""Successive halving over the grid; finished blocks are kept, so a killed search goes on."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from . import grid
from .config import Config
from .criteria import MEASURES, Split, comparable, measure
from .data import Features
from .folder import Folder
from .grid import Rung, Setting
from .train import Lane, Trainer

MOST_LANES = 4
LANE_PARAMETERS = 2**22
CHEAP_LANE = 10**10
"""Parameters × rows × epochs below which a spare lane costs less than another compilation."""

Progress = Callable[[str, int, int], None]
"""``progress(what, done, all)``."""


class Result(NamedTuple):
    """What one training of the search gave.

    Attributes:
      setting: what was trained.
      rung: the round, from 0.
      seed: of the initial weights and the order.
      rows: that were trained on.
      measures: of :func:`.criteria.measure`.
      correct: bool, one per held-out row: whether its noisy label is predicted.
      curve: accuracy on the held-out noisy labels after every epoch.
    """

    setting: Setting
    rung: int
    seed: int
    rows: int
    measures: dict[str, float]
    correct: np.ndarray
    curve: np.ndarray


def search(
    config: Config, data: Features, parts: Split, folder: Folder, progress: Progress
) -> list[Result]:
    """Trains the grid in three rounds.

    Args:
      config: fitted to the data.
      data: the data set.
      parts: which rows train, and which choose.
      folder: keeps finished blocks.
      progress: is told after every epoch.

    Returns:
      One result per training, in the order of training.
    """
    labels = parts.labels
    if config.soft and data.soft_labels is not None:
        labels = data.soft_labels.copy()
        labels[parts.canaries] = np.eye(data.num_classes)[parts.labels[parts.canaries]]
    trainer = Trainer(data, labels, config.batch_size or 1)
    alive = grid.settings(config)
    results: list[Result] = []
    for number, rung in enumerate(grid.rungs(len(parts.train), len(alive))):
        blocks = list(_blocks(alive, rung.seeds, lanes_of(config, data)))
        total = (config.epochs or 1) * len(blocks)
        name = f"round {number + 1}: {len(alive)} settings, {rung.rows:,} rows"
        progress(name, 0, total)
        for index, block in enumerate(blocks):

            def advance(epoch: int, base: int = index, what: str = name, of: int = total) -> None:
                progress(what, base * (config.epochs or 1) + epoch, of)

            results += _run_block(
                config, trainer, parts, folder, number, rung, index, block, advance
            )
            advance(config.epochs or 1)
        alive = grid.survivors(scores(results), number, rung.keep)
    return results


def scores(results: list[Result], criterion: str = "held_out") -> dict[Setting, float]:
    """Mean over the seeds, of the settings that came furthest on the same number of rows.

    Args:
      results: of the search.
      criterion: one of the measures.

    Returns:
      Higher is better; what is not a number comes last.
    """
    last = results[-1].rung
    rows = results[-1].rows
    furthest = {result.setting for result in results if result.rung == last}
    values: dict[Setting, list[float]] = {}
    for result in results:
        if result.setting in furthest and result.rows == rows:
            values.setdefault(result.setting, []).append(result.measures[criterion])
    means = {setting: float(np.mean(value)) for setting, value in values.items()}
    return {setting: comparable(mean) for setting, mean in means.items()}


def lanes_of(config: Config, data: Features) -> int:
    """How many runs share a program: more for small heads."""
    parameters = int(data.inputs.shape[1]) * (config.hidden or 1)
    return min(max(LANE_PARAMETERS // parameters, 1), MOST_LANES)


def _blocks(
    alive: list[Setting], seeds: tuple[int, ...], size: int
) -> Iterator[list[tuple[Setting, int]]]:
    """Runs that share a compiled program."""
    for _, group in itertools.groupby(alive, key=lambda setting: setting.family):
        runs = [(setting, seed) for setting in group for seed in seeds]
        for start in range(0, len(runs), size):
            yield runs[start : start + size]


def _run_block(
    config: Config,
    trainer: Trainer,
    parts: Split,
    folder: Folder,
    number: int,
    rung: Rung,
    index: int,
    block: list[tuple[Setting, int]],
    advance: Callable[[int], None],
) -> list[Result]:
    data = trainer.data
    name = f"round_{number}_block_{index}"
    arrays = folder.load_block(name)
    if arrays is None:
        rows = parts.train[: rung.rows]
        held_out = data.inputs[parts.held_out]
        truth = data.labels[parts.held_out]
        # Where a lane is cheap, always the same number of them, so that a program is compiled once.
        work = data.inputs.shape[1] * (config.hidden or 1) * len(rows) * (config.epochs or 1)
        spare = lanes_of(config, data) - len(block) if work < CHEAP_LANE else 0
        padded = block + [block[-1]] * spare
        lanes = [Lane(setting.knobs, config.seed + seed) for setting, seed in padded]
        recipe = block[0][0].recipe(config.hidden or 1)
        curves, logits = [], np.empty(0)
        state = None
        epochs = trainer.epochs(recipe, lanes, rows, config.epochs or 1)
        for epoch, (state, _) in enumerate(epochs, start=1):
            logits = trainer.predict(state, held_out)
            curves.append((logits.argmax(-1) == truth).mean(axis=1))
            advance(epoch)
        assert state is not None
        train_logits = trainer.predict(state, data.inputs[rows])
        test_logits = None
        if data.test_inputs is not None:
            test_logits = trainer.predict(state, data.test_inputs)
        measures = [
            measure(
                data,
                parts,
                rows,
                train_logits[lane],
                logits[lane],
                None if test_logits is None else test_logits[lane],
            )
            for lane in range(len(block))
        ]
        arrays = {key: np.array([one[key] for one in measures]) for key in MEASURES}
        arrays["correct"] = (logits.argmax(-1) == truth)[: len(block)]
        arrays["curve"] = np.stack(curves, axis=1)[: len(block)]
        folder.save_block(name, arrays)
    return [
        Result(
            setting,
            number,
            seed,
            rung.rows,
            {key: float(arrays[key][lane]) for key in MEASURES},
            arrays["correct"][lane],
            arrays["curve"][lane],
        )
        for lane, (setting, seed) in enumerate(block)
    ]
