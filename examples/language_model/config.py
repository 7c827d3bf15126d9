"""The settings of a run; every field is a command-line flag."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from .methods import METHODS, warmup_steps

BOOKKEEPING = frozenset({"output", "resume", "checkpoint_every", "keep_checkpoints", "curvature"})
"""Settings that change no result."""

ONLY = {
    "pattern": "language",
    **dict.fromkeys(
        ("text_column", "label_column", "clean_label_column", "answer_columns"), "classification"
    ),
    **dict.fromkeys(("noise_rate", "pooling"), "classification"),
}
"""Settings that only one task has."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    # Text
    task: Literal["language", "classification"] = "language"
    """What is learned: the next byte of a text, or the class of every text, by labels of which some are
    wrong."""

    text: str = "stdlib"
    """What is learned: stdlib (the source of Python's standard library), manual (Python's language
    reference, in English), or a file or folder of yours. Both built-in texts come with Python. For
    classification: a table of texts and labels (CSV, Parquet or JSON lines), or stdlib, in which the
    class of some lines is the package that they are from, and 40 % of the labels are wrong."""

    pattern: str = "*"
    """Of a folder: which file names count, for example *.py."""

    validation_share: float = 0.1
    """Share of the files that are kept for validation; of a single file, its end; of a table, the share
    of its texts."""

    # Classification
    text_column: str = "text"
    """Of a table: the column with the texts. Of a long text, the first --context bytes count."""

    label_column: str = "label"
    """Of a table: the column with the classes, integers or strings."""

    clean_label_column: str | None = None
    """Of a table: a column with the true classes, for evaluation only. It may be empty where they are
    not known."""

    answer_columns: tuple[str, ...] = ()
    """Of a table: in place of --label-column, one column for each person who answered, empty where
    somebody did not. The label is what most answered."""

    noise_rate: float | None = None
    """Make this share of the labels wrong, each by another class, to try things out."""

    pooling: Literal["mean", "last"] = "mean"
    """What the classes are told from: the mean of all positions, or the last one."""

    # Network
    layers: int = 4
    """Layers of the transformer."""

    width: int = 64
    """Features of a position."""

    heads: int = 4
    """Attention heads; width / heads must be even."""

    context: int = 128
    """Bytes that the network sees at once."""

    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Numbers in which the layers compute. Parameters, normalization, logits and loss are float32."""

    # Fine-tuning
    start_from: Path | None = None
    """Folder of a finished run of a language model, whose network is trained on. Its own text is
    evaluated too, which shows how much is forgotten; for classification it is not."""

    adapter_rank: int | None = None
    """Train adapters of this rank (LoRA) in place of the network, and perturb only them. A classifier,
    which is new, is trained and perturbed too."""

    # Method
    method: str = "adamw"
    """One of the methods in methods.py; all of them stand in front of AdamW."""

    rho: float = 0.05
    """Radius of the perturbation."""

    perturb: Literal["all", "norms"] = "all"
    """Which parameters are perturbed: all that are trained, or the scales of the normalization layers
    (SAM-ON)."""

    preconditioned: bool = False
    """Of functional_sam: climb along the gradient divided by the root of Adam's second moment."""

    method_starts: float = 0.0
    """Share of the steps that are plain AdamW before the method begins (late SAM)."""

    every_k: int | None = None
    """Take the second gradient at every k-th step only."""

    # Optimizer
    steps: int = 500
    """Training steps."""

    batch_size: int = 16
    """Windows of text per step, or labelled texts, of all devices together."""

    learning_rate: float = 3e-3
    """Highest learning rate; it falls to a tenth along a cosine."""

    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from zero."""

    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""

    clip_norm: float = 1.0
    """The method's gradient is clipped to this norm."""

    seed: int = 0
    """It decides the initial weights and the order of the text."""

    # Devices
    model_devices: int = 1
    """Devices along the mesh's model axis, between which the heads and the columns of the matrices are
    divided. All others are along its data axis."""

    # What is kept
    evaluate_every: int = 100
    """Steps between two lines of metrics.csv; the last step always has one."""

    evaluation_windows: int = 256
    """Windows of the validation text that are evaluated, evenly chosen; for classification, labelled
    texts of either part, and all of them after the last step."""

    curvature: bool = False
    """After the last step, find the largest eigenvalue of the Hessian too; it is slow to compile."""

    output: Path = Path("runs/language_model")
    """Folder of the run."""

    resume: bool = False
    """Go on from the last checkpoint in the output folder."""

    checkpoint_every: int = 500
    """Steps between two checkpoints; a multiple of --evaluate-every. The last step always has one."""

    keep_checkpoints: int = 2
    """Checkpoints to keep."""

    def __post_init__(self):
        _require_one_of(METHODS, "--method", self.method)
        for field in dataclasses.fields(self):
            choices = get_args(field.type)
            if choices and all(isinstance(choice, str) for choice in choices):
                _require_one_of(choices, _flag(field.name), getattr(self, field.name))
        for name in ("validation_share", "method_starts", "warmup", "noise_rate"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value < 1, _flag(name), value, "It is a share in [0, 1)."
            )
        _require(self.validation_share > 0, "--validation-share", self.validation_share, "Above 0.")
        for name in ("rho", "weight_decay"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, _flag(name), value, "It is finite and at least 0.")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            _require(0 < value < math.inf, _flag(name), value, "It is finite and above 0.")
        _require(0 <= self.seed < 2**32, "--seed", self.seed, "It is an integer in [0, 2^32).")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, int | None) and field.name != "seed":
                _require(value is None or value >= 1, _flag(field.name), value, "At least 1.")
        _require(
            warmup_steps(self) < self.steps,
            "--warmup",
            self.warmup,
            f"It leaves none of --steps {self.steps} for the learning rate to fall. Make it smaller.",
        )
        _require(
            self.width % (2 * self.heads) == 0,
            "--heads",
            self.heads,
            f"--width {self.width} must be a multiple of twice the number of heads.",
        )
        _require(
            self.heads % self.model_devices == 0,
            "--model-devices",
            self.model_devices,
            f"It must divide --heads {self.heads}: each device has whole heads.",
        )
        for field in dataclasses.fields(self):
            task, value = ONLY.get(field.name, self.task), getattr(self, field.name)
            _require(
                task == self.task or value == field.default,
                _flag(field.name),
                value,
                f"It is a setting of --task {task}: leave it out, or name this task.",
            )
        _require(
            self.task == "language" or self.text != "manual",
            "--text",
            self.text,
            "It has no labels. Name a table of texts and labels, or stdlib.",
        )
        _require(
            not self.answer_columns or self.label_column == "label",
            "--label-column",
            self.label_column,
            "With --answer-columns the label is what most answered: leave it out.",
        )
        _require(
            self.checkpoint_every % self.evaluate_every == 0,
            "--checkpoint-every",
            self.checkpoint_every,
            f"It must be a multiple of --evaluate-every {self.evaluate_every}.",
        )
        _require(
            self.adapter_rank is None or self.start_from is not None,
            "--adapter-rank",
            self.adapter_rank,
            "Adapters change a network that has learned: name its run with --start-from.",
        )
        _require(
            self.adapter_rank is None or self.perturb == "all",
            "--perturb",
            self.perturb,
            "With --adapter-rank only the adapters are trained and perturbed: leave it out.",
        )
        _require(
            self.method != "adamw"
            or (self.perturb, self.every_k, self.method_starts) == ("all", None, 0),
            "--method",
            self.method,
            "AdamW has no perturbation: leave --perturb, --every-k and --method-starts out, or name a "
            "method.",
        )
        _require(
            not self.preconditioned or self.method == "functional_sam",
            "--preconditioned",
            self.preconditioned,
            f"It is an option of --method functional_sam, not of {self.method}.",
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


def complete(run: dict) -> dict:
    """The settings of a run; one that its version did not have has its default."""
    return Config().to_json() | run


def differences(one: dict, other: dict) -> dict[str, tuple]:
    """The settings in which two runs differ, of those that may change the results."""
    one, other = complete(one), complete(other)
    names = sorted((one.keys() | other.keys()) - BOOKKEEPING)
    return {
        name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)
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
