"""The settings of a comparison; every field is a command-line flag."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from data import NOISE, NUM_TRAIN
from methods import METHODS


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a comparison."""

    methods: tuple[str, ...] = ("sgd", "sam", "saner", "jsam", "lsam")
    """Methods to compare, in this order; methods.py lists them all."""

    rho: float | None = None
    """Radius of every method; without it each takes its own default from methods.py."""

    alpha: float = 0.5
    """Strength of SANER's down-weighting, in [0, 1]; 0 is SAM."""

    kappa: float = 0.1
    """Final strength of NCSAM's noise compensation, at least 0; 0 is SAM."""

    noise: Literal["symmetric", "asymmetric", "pair_flip", "instance_dependent"] = "symmetric"
    """Kind of label noise."""

    noise_rate: float = 0.4
    """Share of wrong training labels, in [0, 1] (asymmetric: within each confused class)."""

    model: Literal["mlp", "cnn"] = "mlp"
    """Network: two hidden layers of 256 units, or two convolutions and a dense layer."""

    epochs: int = 60
    """Passes over the training set."""

    batch_size: int = 64
    """Examples per step; the incomplete last batch of an epoch is left out."""

    learning_rate: float = 0.1
    """Learning rate of SGD, constant."""

    momentum: float = 0.0
    """Momentum of SGD, in [0, 1)."""

    weight_decay: float = 0.0
    """Coupled L2 weight decay, added to the gradient after the method."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run per seed; a seed fixes the wrong labels, the initial weights and the data order."""

    output: Path = Path("runs/label_noise")
    """Folder of the results: epochs.csv, results.json, table.md and the figure."""

    def __post_init__(self):
        names = ", ".join(METHODS)
        _require(self.methods, "--methods", self.methods, f"Name at least one of {names}.")
        for name in self.methods:
            _require_one_of(METHODS, "--methods", name)
        _require_distinct("--methods", self.methods)
        _require(self.seeds, "--seeds", self.seeds, "Give at least one, e.g. --seeds 0 1 2.")
        for seed in self.seeds:
            _require(0 <= seed < 2**32, "--seeds", seed, "A seed is an integer in [0, 2^32).")
        _require_distinct("--seeds", self.seeds)
        _require_one_of(get_args(type(self).__annotations__["model"]), "--model", self.model)
        _require_one_of(NOISE, "--noise", self.noise)
        _require(
            0 <= self.noise_rate <= 1,
            "--noise-rate",
            self.noise_rate,
            "It is a share in [0, 1], not a percentage.",
        )
        _require(
            self.rho is None or 0 <= self.rho < math.inf,
            "--rho",
            self.rho,
            "A radius is at least 0; leave it out for each method's default.",
        )
        _require(0 <= self.kappa < math.inf, "--kappa", self.kappa, "It is at least 0; 0 is SAM.")
        _require(0 <= self.alpha <= 1, "--alpha", self.alpha, "It lies in [0, 1]; 0 is SAM.")
        _require(self.epochs >= 1, "--epochs", self.epochs, "Train for at least 1 epoch.")
        _require(
            1 <= self.batch_size <= NUM_TRAIN,
            "--batch-size",
            self.batch_size,
            f"It lies in [1, {NUM_TRAIN}], the size of the training set.",
        )
        _require(
            0 < self.learning_rate < math.inf,
            "--learning-rate",
            self.learning_rate,
            "It must be positive.",
        )
        _require(0 <= self.momentum < 1, "--momentum", self.momentum, "It lies in [0, 1).")
        _require(
            0 <= self.weight_decay < math.inf,
            "--weight-decay",
            self.weight_decay,
            "It is at least 0.",
        )
        _require(
            not self.output.exists() or self.output.is_dir(),
            "--output",
            str(self.output),
            "It must be a folder, but a file has this name.",
        )

    def rho_of(self, method: str) -> float:
        """The radius a method runs with."""
        return METHODS[method].rho if self.rho is None else self.rho


def _require(condition: object, flag: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{flag}: {value!r} is not valid. {remedy}")


def _require_one_of(choices: Iterable[str], flag: str, value: str) -> None:
    choices = list(choices)
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    _require(value in choices, flag, value, f"{hint}Choose from {', '.join(choices)}.")


def _require_distinct(flag: str, values: tuple) -> None:
    _require(len(set(values)) == len(values), flag, values, "Name each one once.")
