"""The settings of a fit; every field is a command-line flag."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import tyro

from .data import Features
from .methods import METHODS


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a fit."""

    data: tyro.conf.Positional[Path | None] = None
    """An .npz, .csv or .parquet file; without it scikit-learn's digits with 40 % wrong labels."""

    output: Path = Path("runs/frozen_features")
    """Folder of the results."""

    label_column: str | None = None
    """Column of a table, or array, with the labels; by default label, or labels."""

    clean_label_column: str | None = None
    """Of a table: a column with correct labels, for evaluation only."""

    ignore_columns: tuple[str, ...] = ()
    """Of a table: columns that are no features."""

    soft: bool = False
    """Train on the shares of a crowd's answers in place of the majority."""

    methods: tuple[str, ...] = ("sgd", "sam", "saner", "jsam")
    """Methods to try; also lsam, 1-sam, m-sam, ncsam."""

    losses: tuple[str, ...] = ("cross_entropy",)
    """Losses to try, each with every method; also gce (q = 0.5), sce (α = 0.5), elr (λ = 3) and
    label_smoothing (0.3)."""

    heads: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
    """Heads to try."""

    radii: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Radii ρ to try (1-SAM takes a tenth of them, m-SAM 0.3)."""

    decays: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Weight decays to try."""

    learning_rates: tuple[float, ...] = (0.02,)
    """Learning rates to try; each falls to 0 along a cosine."""

    epochs: int | None = None
    """Passes over the rows; by default 1,000,000 / rows, within 20 and 60."""

    batch_size: int | None = None
    """Rows per step; by default 64 below 10,000 rows and 256 above."""

    hidden: int | None = None
    """Units of the MLP's hidden layer; by default 256 below 256 features and 512 above."""

    validation_share: float = 0.15
    """Share of the rows whose (noisy) labels choose the setting."""

    canary_share: float = 0.03
    """Share of the rows whose label is changed on purpose during the search, as a second opinion."""

    seed: int = 0
    """The same seed gives the same bits."""

    memory_limit_gib: float = 4.0
    """Data that would take more is refused before it is read."""

    resume: bool = False
    """Go on where a killed run in the same folder stopped."""

    def __post_init__(self) -> None:
        names = ", ".join(METHODS)
        for method in self.methods:
            _require(method in METHODS, "--methods", method, f"Choose from {names}.")
        for loss in self.losses:
            names = "cross_entropy, gce, sce, elr, label_smoothing"
            _require(loss in names.split(", "), "--losses", loss, f"Choose from {names}.")
        for head in self.heads:
            _require(head in ("linear", "mlp"), "--heads", head, "Choose from linear, mlp.")
        for name in ("methods", "losses", "heads", "radii", "decays", "learning_rates"):
            values = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            _require(len(values) > 0, flag, values, "Give at least one.")
            _require(len(set(values)) == len(values), flag, values, "Name each one once.")
        for name, least in (("radii", 0.0), ("decays", 0.0), ("learning_rates", 1e-12)):
            for value in getattr(self, name):
                fits = least <= value < math.inf
                sign = "at least 0" if least == 0 else "positive"
                _require(fits, f"--{name.replace('_', '-')}", value, f"It is {sign} and finite.")
        for name in ("epochs", "batch_size", "hidden"):
            value = getattr(self, name)
            fits = value is None or value >= 1
            _require(fits, f"--{name.replace('_', '-')}", value, "It is at least 1.")
        _require(
            0 < self.validation_share < 1,
            "--validation-share",
            self.validation_share,
            "It lies between 0 and 1, such as 0.15.",
        )
        _require(
            0 <= self.canary_share <= 0.5,
            "--canary-share",
            self.canary_share,
            "It lies in [0, 0.5], such as 0.03.",
        )
        _require(0 <= self.seed < 2**31, "--seed", self.seed, "It lies in [0, 2^31).")
        _require(
            not (self.soft and "ncsam" in self.methods),
            "--methods",
            "ncsam",
            "It flips labels, so it takes no --soft ones; leave one of them out.",
        )
        _require(
            not ("ncsam" in self.methods and set(self.losses) != {"cross_entropy"}),
            "--losses",
            self.losses,
            "ncsam knows cross_entropy only; leave one of them out.",
        )

    def fitted_to(self, data: Features) -> "Config":
        """The settings with every default that depends on the data filled in.

        Raises:
          ValueError: if the data does not allow them.
        """
        rows, features = data.inputs.shape
        _require(
            not self.soft or data.soft_labels is not None,
            "--soft",
            True,
            "The labels are no crowd's answers, shape (rows, annotators); leave it out.",
        )
        held_out = round(self.validation_share * rows)
        _require(
            held_out >= 2 * data.num_classes and rows - held_out >= 2 * data.num_classes,
            "--validation-share",
            self.validation_share,
            f"Of {rows:,} rows it leaves too few for {data.num_classes} classes: give more rows.",
        )
        epochs = min(max(1_000_000 // rows, 20), 60)
        return dataclasses.replace(
            self,
            epochs=self.epochs or epochs,
            batch_size=self.batch_size or (64 if rows < 10_000 else 256),
            hidden=self.hidden or (256 if features < 256 else 512),
        )


def _require(condition: object, flag: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{flag}: {value!r} is not valid. {remedy}")
