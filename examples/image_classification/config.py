"""The settings of a run; every field is a command-line flag."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from .methods import METHODS

Augmentation = Literal["crop", "flip", "cutout"]
NOISE = ("none", "symmetric", "asymmetric", "pair_flip", "instance_dependent")

BOOKKEEPING = frozenset({"output", "resume", "checkpoint_every", "keep_checkpoints"})
"""Settings that change no result."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    # Data and its labels
    data: str = "digits"
    """digits (built in), a folder with CIFAR-10, CIFAR-100, MNIST or Fashion-MNIST as published,
    or a .npz file."""

    human_labels: Path | None = None
    """File of CIFAR-N labels, if it is not in the data folder."""

    subset: int | None = None
    """Train on this many examples, chosen evenly from the classes."""

    noise: str = "symmetric"
    """Kind of label noise: none, symmetric, asymmetric, pair_flip, instance_dependent, or
    human:ANNOTATION with an annotation of the data set, such as human:worse."""

    noise_rate: float = 0.4
    """Share of wrong training labels, in [0, 1]; asymmetric noise: of the classes that are mistaken.
    Human labels have their own."""

    held_out: float = 0.0
    """Share of the training examples that are kept out of training. How often the network agrees with
    their noisy labels, held_out_accuracy, chooses between settings without a clean label."""

    augmentation: tuple[Augmentation, ...] = ()
    """Random changes of the training images, made on the device."""

    data_on: Literal["device", "host"] = "device"
    """Where the images wait: host is for data sets that do not fit into the device's memory."""

    # Network
    model: Literal["cnn", "preact_resnet18", "preact_resnet34", "wide_resnet"] = "cnn"
    """The network."""

    norm: Literal["batch", "group", "layer"] = "group"
    """Its normalization. Batch normalization mixes the examples of a batch, so perturbations per
    example need one of the others."""

    width: int = 64
    """Channels of the first stage of a PreAct ResNet, of the CNN's first layer, or 16 times the
    widening factor of the WideResNet."""

    depth: int = 28
    """Layers of the WideResNet: 6 n + 4."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Numbers in which the network computes; the parameters are always float32."""

    # Method
    method: str = "saner"
    """One of the methods in methods.py."""

    rho: float = 0.1
    """Radius of the perturbation; LE-SAM's largest one."""

    down_weight: float | None = None
    """SANER's strength α in [0, 1], on top of any method; saner takes 0.5 if it is left out."""

    down_weight_warmup: float = 0.0
    """Share of the epochs over which α grows linearly, as the SANER paper does (a quarter)."""

    kappa: float = 0.1
    """NCSAM's final strength of the noise compensation."""

    flip_ratio: float | None = None
    """NCSAM's share of flipped examples; without it the share of wrong labels, but at least 0.1 and
    at most 0.4."""

    sigma: float | None = None
    """LE-SAM's rise of the loss, in place of a fixed radius; 0.1 if it is left out."""

    method_starts: float = 0.0
    """Share of the epochs that are plain SGD before the method begins."""

    group_size: int | None = None
    """Examples that share a perturbation; 1 is one perturbation per example. For SGD, which has none,
    it changes nothing."""

    every_k: int | None = None
    """Take the second gradient at every k-th step only."""

    # Optimizer
    epochs: int = 20
    """Passes over the training set."""

    batch_size: int = 128
    """Examples per step, of all devices together; the incomplete last batch is left out."""

    learning_rate: float = 0.1
    """Initial learning rate of SGD."""

    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    """How the learning rate falls: not at all, to zero along a cosine, or to a tenth at 50 % and again
    at 75 % of the epochs."""

    momentum: float = 0.9
    """Momentum of SGD, in [0, 1), and of Momentum-SAM."""

    weight_decay: float = 5e-4
    """Coupled L2 weight decay, added to the gradient after the method."""

    seed: int = 0
    """It decides the wrong labels, the initial weights, the order of the data and the augmentation."""

    # Devices
    parallel: Literal["jit", "pmap", "shard_map"] = "jit"
    """How the batch is spread over the devices; all give the same result."""

    perturbation: Literal["global", "per_device"] = "global"
    """One perturbation for the whole batch, or one for each device's share of it (m-sharpness). For
    SGD it changes nothing."""

    epoch_loop: Literal["auto", "compiled", "python"] = "auto"
    """A whole epoch as one program, or a loop of compiled steps. auto: compiled, but not on a CPU,
    where there is little to gain."""

    # What is kept
    evaluate_every: int = 1
    """Epochs between two evaluations on all training and test images; the last one is always
    evaluated."""

    output: Path = Path("runs/image_classification")
    """Folder of the run."""

    resume: bool = False
    """Go on from the last checkpoint in the output folder."""

    checkpoint_every: int = 1
    """Epochs between two checkpoints."""

    keep_checkpoints: int = 2
    """Checkpoints to keep."""

    def __post_init__(self):
        _require_one_of(METHODS, "--method", self.method)
        for field in dataclasses.fields(self):
            choices = get_args(field.type)
            if choices and all(isinstance(choice, str) for choice in choices):
                _require_one_of(choices, _flag(field.name), getattr(self, field.name))
        for kind in self.augmentation:
            _require_one_of(get_args(Augmentation), "--augmentation", kind)
        if not self.noise.startswith("human:") or self.noise == "human:":
            _require_one_of((*NOISE, "human:ANNOTATION"), "--noise", self.noise)
        for name in (
            "noise_rate",
            "held_out",
            "down_weight_warmup",
            "method_starts",
            "down_weight",
            "flip_ratio",
        ):
            value = getattr(self, name)
            inside = value is None or 0 <= value <= 1
            _require(inside, _flag(name), value, "It is a share in [0, 1], not a percentage.")
        _require(
            self.held_out < 1, "--held-out", self.held_out, "Some are left to train on below 1."
        )
        for name in ("rho", "kappa", "weight_decay"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, _flag(name), value, "It is finite and at least 0.")
        _require(
            0 < self.learning_rate < math.inf, "--learning-rate", self.learning_rate, "Above 0."
        )
        _require(0 <= self.momentum < 1, "--momentum", self.momentum, "It lies in [0, 1).")
        _require(0 <= self.seed < 2**32, "--seed", self.seed, "It is an integer in [0, 2^32).")
        for name in (
            "epochs",
            "batch_size",
            "width",
            "checkpoint_every",
            "evaluate_every",
            "keep_checkpoints",
            "group_size",
            "every_k",
            "subset",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, _flag(name), value, "It is at least 1.")
        wide = self.model == "wide_resnet"
        _require(
            not wide or (self.depth >= 10 and (self.depth - 4) % 6 == 0),
            "--depth",
            self.depth,
            "A WideResNet has 6 n + 4 layers: 10, 16, 22, 28, 34, 40.",
        )
        _require(
            not wide or self.width % 16 == 0,
            "--width",
            self.width,
            "The width of a WideResNet is 16 times its widening factor: 160 for WRN-28-10.",
        )
        _require(
            self.method != "sgd" or (self.down_weight, self.every_k) == (None, None),
            "--method",
            self.method,
            "SGD has no second gradient: leave --down-weight and --every-k out, or name a method.",
        )
        _require(
            self.flip_ratio is None or self.method == "ncsam",
            "--flip-ratio",
            self.flip_ratio,
            "Only --method ncsam flips labels: leave it out.",
        )
        _require(
            self.sigma is None or (self.method == "le_sam" and 0 <= self.sigma < math.inf),
            "--sigma",
            self.sigma,
            "It is finite and at least 0, and only --method le_sam has one.",
        )
        _require(
            self.group_size is None or self.perturbation == "global",
            "--perturbation",
            self.perturbation,
            "One perturbation per device is a group size of its own: leave --group-size out.",
        )
        _require(
            self.group_size is None or self.batch_size % self.group_size == 0,
            "--group-size",
            self.group_size,
            f"It must divide --batch-size {self.batch_size}.",
        )
        _require(
            self.group_size is None or self.norm != "batch",
            "--norm",
            self.norm,
            "Batch normalization mixes the examples of all groups. With --group-size, choose --norm "
            "group or --norm layer.",
        )
        _require(
            self.norm != "group" or self.width % 16 == 0,
            "--width",
            self.width,
            "Group normalization takes groups of 16 channels: make it a multiple of 16.",
        )
        _require(
            self.schedule != "multistep" or self.epochs >= 3,
            "--epochs",
            self.epochs,
            "The multistep schedule falls twice, so it takes 3 epochs at least.",
        )
        _require(
            self.epoch_loop != "compiled" or self.data_on == "device",
            "--epoch-loop",
            self.epoch_loop,
            "An epoch is one program only with --data-on device.",
        )
        _require(
            self.method != "msam" or (self.group_size is None and self.perturbation == "global"),
            "--method",
            self.method,
            "Momentum-SAM climbs along one momentum: leave --group-size and --perturbation out.",
        )
        _require(
            not self.output.exists() or self.output.is_dir(),
            "--output",
            str(self.output),
            "It must be a folder, but a file has this name.",
        )

    def to_json(self) -> dict:
        """The settings as JSON can hold them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def differences(one: dict, other: dict) -> dict[str, tuple]:
    """The settings in which two runs differ, of those that may change the results."""
    return {
        name: (one.get(name), other.get(name))
        for name in sorted((one.keys() | other.keys()) - BOOKKEEPING)
        if one.get(name) != other.get(name)
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require_one_of(choices: Iterable[str], flag: str, value: str) -> None:
    choices = list(choices)
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    _require(value in choices, flag, value, f"{hint}Choose from {', '.join(choices)}.")


def _require(condition: object, flag: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{flag}: {value!r} is not valid. {remedy}")
