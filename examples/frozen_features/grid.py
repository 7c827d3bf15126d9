"""The grid of settings, and how many rows and seeds each rung of the search gives them."""

import itertools
from typing import NamedTuple

from .config import Config
from .losses import LOSSES
from .methods import METHODS
from .recipes import Knobs, Recipe

SMALL = 4000


class Setting(NamedTuple):
    """One point of the grid."""

    head: str
    method: str
    rho: float
    decay: float
    rate: float
    loss: str = "cross_entropy"

    @property
    def family(self) -> tuple[str, str, str]:
        """What shares a compiled program."""
        return self.head, self.method, self.loss

    @property
    def knobs(self) -> Knobs:
        """The traced part."""
        return Knobs(self.rho, self.decay, self.rate, LOSSES[self.loss].strength)

    @property
    def name(self) -> str:
        """Of the method and, where it is not cross-entropy, the loss."""
        loss = f" + {LOSSES[self.loss].label}" if self.loss != "cross_entropy" else ""
        return METHODS[self.method].label + loss

    @property
    def label(self) -> str:
        """For tables."""
        radius = f" ρ={self.rho:g}" if self.method != "sgd" else ""
        return f"{self.name} {self.head}{radius} decay={self.decay:g}"

    def recipe(self, hidden: int) -> Recipe:
        """The static part."""
        return Recipe(self.method, self.head, hidden, loss=self.loss)


class Rung(NamedTuple):
    """One round of successive halving.

    Attributes:
      rows: of the training part; a subset still runs through the whole learning-rate schedule, so
        that memorization, which comes late, is seen.
      seeds: new seeds of this round.
      keep: how many settings go on, besides the best of every kind that stays for comparison.
    """

    rows: int
    seeds: tuple[int, ...]
    keep: int


def settings(config: Config) -> list[Setting]:
    """All settings; SGD has no radius, and J-SAM on a linear head is SGD."""
    points = []
    for head, method, loss in itertools.product(config.heads, config.methods, config.losses):
        row = METHODS[method]
        if head == "linear" and not row.linear and "sgd" in config.methods:
            continue
        radii = [row.radius * rho for rho in config.radii] if row.radius else [0.0]
        for rho, decay, rate in itertools.product(radii, config.decays, config.learning_rates):
            points.append(Setting(head, method, rho, decay, rate, loss))
    return points


def rungs(rows: int, count: int) -> tuple[Rung, Rung, Rung]:
    """Few rows: all of them at once, and more seeds later. Many rows: more rows later.

    Args:
      rows: of the training part.
      count: number of settings.

    Returns:
      The rounds.
    """
    first, second = max(4, count // 5), 3
    if rows <= SMALL:
        return Rung(rows, (0,), first), Rung(rows, (1, 2), second), Rung(rows, (3, 4), 1)
    few, more = max(SMALL, rows // 8), max(SMALL, 3 * rows // 8)
    return (
        Rung(few, (0,), first),
        Rung(more, (0,) if more > few else (1,), second),  # the same rows: another seed
        Rung(rows, (0, 1) if rows < 20_000 else (0,), 1),
    )


def survivors(scores: dict[Setting, float], rung: int, keep: int) -> list[Setting]:
    """The best settings, and with them the best of every family, in the last round of SGD.

    Args:
      scores: of the settings that took part, higher is better.
      rung: the round that has ended, from 0.
      keep: how many of the best go on.

    Returns:
      In the order of the grid.
    """
    ranked = sorted(scores, key=lambda setting: -scores[setting])
    kept = set(ranked[:keep])
    seen = set()
    for setting in ranked:
        kind = setting.family if rung == 0 else setting.method
        if kind not in seen and (rung == 0 or setting.method == "sgd"):
            kept.add(setting)
        seen.add(kind)
    return [setting for setting in scores if setting in kept]
