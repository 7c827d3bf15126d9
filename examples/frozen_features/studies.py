"""What the evidence compares, each contender with twelve trials, and in which order it runs."""

import dataclasses
import itertools
from typing import NamedTuple

from .compensations import READINGS
from .recipes import Knobs, Recipe
from .sets import FULL, SETS

DECAYS = (5e-4, 3e-3, 1e-2, 2e-2)
FINE = (1.5e-3, 3e-3, 5e-3, 8e-3)
"""Around 3e-3, where DECAYS has a gap: the gradient of a robust loss is smaller, so it wants less."""

MORE = (1e-2, 1.5e-2, 2e-2, 3e-2)
"""Around 2e-2, the edge of DECAYS, which SCE chose on all of CIFAR-10N's images."""

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

    drops_wrong: bool = False
    """Train without the rows whose labels are wrong: what ignoring them perfectly would give."""

    passes: int = 1
    """Times the epochs of the others: two, for the compute of two gradients per step."""

    @property
    def knows_truth(self) -> bool:
        """Whether it needs clean labels: a ceiling, and no contender."""
        return self.clean or self.drops_wrong

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


def _radii(
    radii: tuple[float, ...],
    strength: float = 0.0,
    decays: tuple[float, ...] = DECAYS,
    **recipe: object,
) -> tuple[Trial, ...]:
    made = Recipe(**recipe)  # type: ignore[arg-type]
    return tuple(
        Trial(made, Knobs(rho, decay, 0.02, strength))
        for rho, decay in itertools.product(radii, decays)
    )


def _strengths(
    strengths: tuple[float, ...], decays: tuple[float, ...] = DECAYS, **recipe: object
) -> tuple[Trial, ...]:
    made = Recipe(**recipe)  # type: ignore[arg-type]
    return tuple(
        Trial(made, Knobs(0.0, decay, 0.02, strength))
        for strength, decay in itertools.product(strengths, decays)
    )


def _dropouts() -> tuple[Trial, ...]:
    return tuple(
        Trial(Recipe(dropout=dropout), Knobs(0.0, decay, 0.02))
        for dropout, decay in itertools.product((0.2, 0.5), (*DECAYS, 3e-2, 6e-2))
    )


LITTLE_DECAY_RADII = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8)


def _little_decay(method: str, **recipe: object) -> tuple[Trial, ...]:
    """Twelve radii and the smallest decay, as the papers compare."""
    made = Recipe(method, **recipe)  # type: ignore[arg-type]
    return tuple(Trial(made, Knobs(rho, DECAYS[0], 0.02)) for rho in LITTLE_DECAY_RADII)


def _kappas(reading: str, **recipe: object) -> tuple[Trial, ...]:
    """Both signs and two decades of κ at two radii, with little decay: where SAM helps most."""
    made = Recipe(reading=reading, **recipe)  # type: ignore[arg-type]
    return tuple(
        Trial(made, Knobs(rho, DECAYS[0], 0.02, kappa))
        for rho, kappa in itertools.product((0.2, 0.4), (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0))
    )


WIDE = (0.1, 0.2, 0.4)
TENTH = (0.01, 0.02, 0.04)
THIRD = (0.03, 0.06, 0.12)
POWERS = (0.3, 0.5, 0.7)

METHODS = (
    Contender("SGD", _plain()),
    Contender("SAM", _radii(WIDE, method="sam")),
    Contender("SANER", _radii(WIDE, method="saner")),
    Contender("J-SAM", _radii(WIDE, method="jsam")),
    Contender("1-SAM", _radii(TENTH, method="1-sam")),
    Contender("L-SAM", _radii(WIDE, method="lsam")),
    Contender("SGD, twice the epochs", _plain(), passes=2),
    Contender("clean labels", _plain(), clean=True),
    Contender("without wrong labels", _plain(), drops_wrong=True),
    Contender("last-layer penalty", _strengths((0.003, 0.01, 0.03), penalty=True)),
    Contender("m-SAM", _radii(THIRD, method="m-sam")),
    Contender("NCSAM", _radii(WIDE, method="ncsam")),
)

BASELINES = (
    Contender("GCE", _strengths(POWERS, loss="gce")),
    Contender("label smoothing", _strengths((0.1, 0.3, 0.6), loss="label_smoothing")),
    Contender("early stopping", _plain(), early_stopping=True),
    Contender("ELR", _strengths((1.0, 3.0, 7.0), loss="elr")),
    Contender("SCE", _strengths((0.1, 0.5, 2.0), loss="sce")),
    Contender("dropout", _dropouts()),
    Contender("mixup", _strengths((0.2, 1.0, 4.0), mixup=True)),
    Contender("linear", _plain(head="linear")),
    Contender("without suspects", _plain(), drops_suspects=True),
    Contender("GCE, twice the epochs", _strengths(POWERS, loss="gce"), passes=2),
    Contender("GCE, fine decay", _strengths((0.4, 0.5, 0.6), FINE, loss="gce")),
    Contender("SCE, fine decay", _strengths((0.1, 0.3, 0.5), (*FINE[1:], 1.2e-2), loss="sce")),
    Contender("SCE, more decay", _strengths((0.1, 0.3, 0.5), MORE, loss="sce")),
    Contender("SCE, twice the epochs", _strengths((0.1, 0.3, 0.5), MORE, loss="sce"), passes=2),
)

CROSSINGS = (
    Contender("1-SANER", _radii(TENTH, method="sam", group_size=1, saner=True)),
    Contender("SAM + GCE", _radii(WIDE, 0.5, method="sam", loss="gce")),
    Contender("SAM + weight average", _radii(WIDE, method="sam", weight_average=0.999)),
    Contender("SAM from half", _radii(WIDE, method="sam", start=0.5)),
    Contender("SAM + label smoothing", _radii(WIDE, 0.3, method="sam", loss="label_smoothing")),
    Contender("SANER + weight average", _radii(WIDE, method="saner", weight_average=0.999)),
    Contender("SANER + GCE", _radii(WIDE, 0.5, method="saner", loss="gce")),
    Contender("SANER from half", _radii(WIDE, method="saner", start=0.5)),
    Contender("SAM along averages", _radii(WIDE, method="sam", average=0.4)),
    Contender("SANER + SCE", _radii(WIDE, 0.5, method="saner", loss="sce")),
    Contender("1-SAM + SCE", _radii(TENTH, 0.5, method="sam", group_size=1, loss="sce")),
    Contender("SANER + SCE + dropout", _radii(WIDE, 0.5, method="saner", loss="sce", dropout=0.2)),
    Contender(
        "SANER + SCE + weight average",
        _radii(WIDE, 0.5, method="saner", loss="sce", weight_average=0.999),
    ),
    Contender("SAM + ELR", _radii(WIDE, 3.0, method="sam", loss="elr")),
    Contender("SANER + label smoothing", _radii(WIDE, 0.3, method="saner", loss="label_smoothing")),
    Contender("SANER along averages", _radii(WIDE, method="sam", average=0.4, saner=True)),
    Contender("8-SANER", _radii(THIRD, method="sam", group_size=8, saner=True)),
    Contender("1-J-SAM", _radii(TENTH, method="jsam", group_size=1)),
    Contender("1-SAM + GCE", _radii(TENTH, 0.5, method="sam", group_size=1, loss="gce")),
    Contender("1-SAM + weight average", _radii(TENTH, method="1-sam", weight_average=0.999)),
    Contender("GCE + weight average", _strengths(POWERS, loss="gce", weight_average=0.999)),
    Contender(
        "SAM + GCE, fine decay", _radii((0.05, 0.1, 0.2), 0.5, FINE, method="sam", loss="gce")
    ),
    Contender("SAM + SCE, fine decay", _radii(WIDE, 0.5, FINE, method="sam", loss="sce")),
    Contender("SANER + SCE, fine decay", _radii(WIDE, 0.5, FINE, method="saner", loss="sce")),
    Contender("GCE + label smoothing", _strengths(POWERS, loss="smooth_gce")),
    Contender("GCE, linear", _strengths(POWERS, loss="gce", head="linear")),
    Contender("GCE without suspects", _strengths(POWERS, loss="gce"), drops_suspects=True),
    Contender("SAM without suspects", _radii(WIDE, method="sam"), drops_suspects=True),
    Contender(
        "SANER + SCE without suspects",
        _radii(WIDE, 0.5, method="saner", loss="sce"),
        drops_suspects=True,
    ),
)

LONG = {"start": 0.25, "step_decay": True}

READINGS_OF_NCSAM = (
    Contender("SAM, little decay", _little_decay("sam")),
    *(Contender(f"NCSAM, {reading}", _kappas(reading)) for reading in READINGS),
    Contender("NCSAM, warm-up by SGD", _kappas("warm-up", start=0.25)),
    Contender("SAM, long", _little_decay("sam", **LONG), passes=3),
    Contender("NCSAM, long", _kappas("paper", **LONG), passes=3),
)
"""The paper begins after a quarter of SGD, and trains for 200 epochs in steps: "long" does the same.

During SGD ρ is 0, and with it the compensation, which is projected to the ball or scaled to ρ.
"""

COORDINATES = ("A", "B", "C", "AB", "AC", "BC")
"""Where SAM's gradient is taken; SANER's set B is where it is smaller than the clean one."""

ABLATIONS = (
    Contender("SANER, little decay", _little_decay("saner")),
    *(
        Contender(f"SAM on {letters}, little decay", _little_decay("sam", coordinates=letters))
        for letters in COORDINATES
    ),
    *(
        Contender(f"SAM on {letters}", _radii(WIDE, method="sam", coordinates=letters))
        for letters in COORDINATES
    ),
)

STUDIES = {
    "methods": METHODS,
    "baselines": BASELINES,
    "crossings": CROSSINGS,
    "ncsam": READINGS_OF_NCSAM,
    "coordinates": ABLATIONS,
}

MAIN = (
    "cifar10n_reduced_worse",
    "digits_symmetric_40",
    "digits_asymmetric_30",
    "reviews_reduced",
    "news_reduced",
)
"""Every contender runs on these."""


def trials(contender: Contender, name: str) -> tuple[Trial, ...]:
    """The twelve trials of a contender on a data set, which has its own scale of weight decay."""
    scale = SETS[name].decay
    return tuple(
        trial._replace(knobs=trial.knobs._replace(decay=round(scale * trial.knobs.decay, 6)))
        for trial in contender.trials
    )


def schedule() -> list[tuple[str, Contender]]:
    """Which contender runs on which data: the most informative first."""
    ceiling = tuple(c for c in METHODS if c.knows_truth)
    rest = tuple(name for name in SETS if name not in MAIN + FULL)
    people, digits = ("cifar10n_reduced_worse", "reviews_reduced", "news_reduced"), MAIN[1]
    first = (*people[:2], digits, people[2])
    methods = {c.name: c for c in METHODS}
    claims = tuple(methods[name] for name in ("L-SAM", "SGD, twice the epochs"))
    dear = tuple(methods[name] for name in ("last-layer penalty", "NCSAM", "m-SAM"))
    few = (*METHODS[:3], BASELINES[0])
    rounds = [
        (first, few),
        (first, (methods["J-SAM"], BASELINES[1], methods["1-SAM"])),
        ((digits,), READINGS_OF_NCSAM[:6]),
        (first, (*claims, CROSSINGS[1])),
        (first[::2], dear),
        (first, (BASELINES[2], BASELINES[3])),
        (tuple(name for name in SETS if name.startswith("digits")), few),
        (first, (*ceiling, CROSSINGS[0], *CROSSINGS[2:4], *BASELINES[4:6])),
        (MAIN, METHODS + BASELINES),
        ((digits,), READINGS_OF_NCSAM),
        (rest, (*few, *ceiling)),
        (MAIN, CROSSINGS),
        (MAIN[:1], (READINGS_OF_NCSAM[0], *ABLATIONS)),
        (rest, METHODS + BASELINES),
        (rest, CROSSINGS),
        (FULL, METHODS + BASELINES + CROSSINGS),
    ]
    pairs = [(name, c) for names, some in rounds for c in some for name in names]
    return list(dict.fromkeys(pairs))
