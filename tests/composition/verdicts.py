"""What is expected of every cell, and what the page says about it."""

import dataclasses
import traceback
from typing import Literal

from tests.composition.cells import POSITIONS, SCHEDULED, TOLERANCE, Result
from tests.composition.inventory import ROWS, SCHEDULES

Word = Literal["right", "refused", "backwards", "undefined"]


@dataclasses.dataclass(frozen=True)
class Note:
    """A remark on some cells.

    Attributes:
      text: what the reader is told.
      pattern: for a refusal, a part of its message.
      is_ours: whether the message is this package's.
    """

    text: str
    pattern: str = ""
    is_ours: bool = True


NOTES: dict[str, Note] = {
    "order": Note(
        "Computed as said, but backwards: an optimizer passes on minus the learning rate times its "
        "direction, so a climb that follows it goes downhill, and its learning rate is lost. No "
        "program can tell this from a gradient. Put it behind the method."
    ),
    "linesearch": Note(
        "The line search's `value_fn` must name every extra argument of its place (`**kwargs` "
        "does not count): `loss_fn` behind a method, and `logits`, as a combination also "
        "`clean_grads`, inside of one. Otherwise optax says that they were `not consumed by "
        "value_fn`."
    ),
    "per example in": Note(
        "In front of a method it takes the gradients of the examples and passes on their noisy "
        "mean, which is the gradient that a method takes. The gradient at w + ε is not "
        "privatized."
    ),
    "per example": Note(
        "It takes one gradient per example and a method gives one of the batch: optax takes the "
        "first axis of every parameter for the examples. See *before*."
    ),
    "per example inside": Note(
        "It takes one gradient per example, and a stage has one of the batch.",
        "must have the shape",
    ),
    "finite": Note("It looks at the incoming gradients, not at g'."),
    "condition": Note(
        "Where the condition does not hold, the clean gradient, not an update of SGD, is handed "
        "on; around the method alone that is a step of the base optimizer, as with `start_step=`, "
        "`every_k=` and `when=`."
    ),
    "condition inside": Note(
        "ε would be the whole gradient on the other steps. Write `optax.conditionally_mask` (ε = "
        "0 there), or `start_step=`, `every_k=`, `when=` of the method.",
        "conditionally_transform: where its condition",
    ),
    "accumulation": Note(
        "The averaged gradient decides ε, and g' is that of the `loss_fn` of the last call: right "
        "if `loss_fn` covers all microbatches. Otherwise put `MultiSteps` behind the method, or "
        "use `Objective(…, microbatch_size=)`."
    ),
    "accumulation drops": Note(
        "`MultiSteps(…).gradient_transformation()` takes no extra arguments. Put it behind the method.",
        "drop them too",
    ),
    "drops clean_grads": Note(
        "It drops `clean_grads`, which the combinations of this package compare with. Leave it "
        "out; around a combination that needs none (clipping) it is right.",
        "drops extra arguments: leave that out",
    ),
    "hidden": Note(
        "The loss needs all parameters. Perturb some only with `mask=` of the method, and train "
        "some only with `masked(set_to_zero(), frozen)` or `partition` behind it.",
        "pass mask= to the method",
    ),
    "masked inside": Note(
        "`masked` passes on the other leaves as they are, so their ε would be the gradient. Write "
        "`mask=` of the method, or `partition` with a perturbation or `set_to_zero` for each "
        "part.",
        "passes on the gradient of",
    ),
    "loss inside": Note(
        "With `ncsam` refused: its first stage evaluates the loss, which needs all parameters. Pass "
        "`mask=` to the method.",
        "pass mask= to the method in place of wrapping this stage",
    ),
    "flatten inside": Note(
        "With `ncsam` the loss is called with one vector and fails; a note on its error says why. "
        "Leave `flatten` out.",
        "optax.flatten around this stage",
    ),
    "dropped inside": Note(
        "With `ncsam` refused: its first stage evaluates the loss, and the wrapper drops `loss_fn`. "
        "Leave it out.",
        "drops extra arguments",
    ),
    "galore inside": Note(
        "With `asam` refused: its first stage reads the parameters, and the wrapper drops them. "
        "Leave it out.",
        "as optax.contrib.scale_by_galore does",
    ),
    "flatten": Note(
        "The loss is called with one vector and fails; a note on its error says why. Put the "
        "method in front: `chain(method, flatten(optimizer))`. It is right where the parameters "
        "are a vector to begin with.",
        "made a vector of them",
    ),
    "flatten combination": Note(
        "It flattens the direction and not `clean_grads`. Leave it out.", "changes the updates only"
    ),
    "lookahead": Note(
        "Its parameters are two sets. Call the method by itself, then it: `direction, "
        "method_state = method.update(grads, method_state, params.fast, loss_fn=loss_fn)`, "
        "`updates, opt_state = lookahead.update(direction, opt_state, params)`.",
        "holds two sets of parameters",
    ),
    "lookahead around": Note(
        "It takes no extra arguments: inside of `chain` they are dropped, and the method says so; "
        "by itself it answers `unexpected keyword argument 'loss_fn'`. Call the two one after the "
        "other, as above.",
        "optax.lookahead and",
    ),
    "split": Note(
        "It takes no extra arguments: inside of `chain` they are dropped, and the method says so; "
        "by itself it answers `unexpected keyword argument 'loss_fn'`. A method takes real "
        "parameters only: put it in front.",
        "split_real_and_imaginary drop them",
    ),
    "contrib.sam": Note(
        "optax's own SAM takes no keyword that it does not know, and answers before anything of "
        "this package is called: `unexpected keyword argument`. Use one of the two: "
        "`chain(optax_sam.sam(rho), optimizer)` is a transparent SAM in one call.",
        "unexpected keyword argument",
        is_ours=False,
    ),
    "galore": Note(
        "Its base optimizer gets neither parameters nor extra arguments. Put the method in front: "
        "`chain(method, contrib.galore(…))`.",
        "as optax.contrib.galore does",
    ),
}

# What turns the gradient around without being an optimizer.
BACKWARDS = ("scale_by_learning_rate", "contrib.scale_by_cocob", "contrib.scale_by_madgrad")

_LINESEARCHES = ("lbfgs", "scale_by_backtracking_linesearch", "scale_by_zoom_linesearch")
_PER_EXAMPLE = ("contrib.dpsgd", "contrib.differentially_private_aggregate")
_HIDING = ("masked (some leaves)", "partition (some leaves)", "selective_transform")

_SINGLE: dict[tuple[str, str], tuple[Word, str]] = {
    ("apply_if_finite", "around"): ("right", "finite"),
    ("conditionally_transform", "around"): ("right", "condition"),
    ("conditionally_transform", "stage 1"): ("refused", "condition inside"),
    ("MultiSteps", "around"): ("right", "accumulation"),
    ("MultiSteps.gradient_transformation", "around"): ("refused", "accumulation drops"),
    ("MultiSteps.gradient_transformation", "combination"): ("refused", "drops clean_grads"),
    ("masked (some leaves)", "stage 1"): ("refused", "masked inside"),
    ("flatten", "around"): ("refused", "flatten"),
    ("flatten", "combination"): ("refused", "flatten combination"),
    ("contrib.split_real_and_imaginary", "around"): ("refused", "split"),
    ("contrib.split_real_and_imaginary", "combination"): ("refused", "drops clean_grads"),
    ("contrib.scale_by_galore (base_optimizer)", "around"): ("refused", "galore"),
    ("contrib.scale_by_galore (base_optimizer)", "combination"): ("refused", "drops clean_grads"),
}

# First stages that ask for more than the gradient: what a wrapper makes of those of one method.
WITH_ONE_METHOD: dict[tuple[str, str], dict[str, tuple[Word, str]]] = {
    **{(name, "stage 1"): {"ncsam": ("refused", "loss inside")} for name in _HIDING},
    ("flatten", "stage 1"): {"ncsam": ("refused", "flatten inside")},
    ("MultiSteps.gradient_transformation", "stage 1"): {"ncsam": ("refused", "dropped inside")},
    ("contrib.split_real_and_imaginary", "stage 1"): {"ncsam": ("refused", "dropped inside")},
    ("contrib.scale_by_galore (base_optimizer)", "stage 1"): {
        "ncsam": ("refused", "dropped inside"),
        "asam": ("refused", "galore inside"),
    },
}


def columns(name: str) -> tuple[str, ...]:
    """The columns of the table that a row is in."""
    if name in SCHEDULES:
        return SCHEDULED
    if ROWS[name].kind == "wrapper":
        return POSITIONS
    return tuple(position for position in POSITIONS if position != "around")


def verdict(name: str, position: str, method: str = "") -> tuple[Word, str | None]:
    """The word of a cell, and the key of its note; with a method, where that is an exception."""
    exceptions = WITH_ONE_METHOD.get((name, position), {})
    if method in exceptions:
        return exceptions[method]
    if name in SCHEDULES:
        return "right", None
    if (name, position) in _SINGLE:
        return _SINGLE[name, position]
    if name == "contrib.sam":
        return "refused", "contrib.sam"
    if name == "lookahead":
        return "refused", "lookahead around" if position == "around" else "lookahead"
    if name in _HIDING and position == "around":
        return "refused", "hidden"
    if name in _PER_EXAMPLE and position != "before":
        return (
            ("undefined", "per example")
            if position == "behind"
            else ("refused", "per example inside")
        )
    if position in ("before", "stage 1") and (ROWS[name].kind == "optimizer" or name in BACKWARDS):
        return "backwards", "order"
    if name in _PER_EXAMPLE:
        return "right", "per example in"
    if name in _LINESEARCHES and position != "before":
        return "right", "linesearch"
    return "right", None


def notes(name: str, position: str) -> list[str]:
    """The keys of the notes of a cell: its own, and those of the methods that are exceptions."""
    exceptions = WITH_ONE_METHOD.get((name, position), {})
    keys = [verdict(name, position)[1], *(key for _, key in exceptions.values())]
    return [key for key in keys if key]


def mismatch(name: str, position: str, method: str, result: Result) -> str:
    """Why a result is not what is expected of its cell; empty if it is."""
    word, key = verdict(name, position, method)
    error = result.error
    if word == "refused":
        note = NOTES[key or ""]
        if error is None:
            return "should have been refused"
        message = "\n".join([str(error), *getattr(error, "__notes__", ())])
        if not isinstance(error, TypeError | ValueError) or note.pattern not in message:
            return f"should have been refused with {note.pattern!r}, got {error!r}"
        has_note = note.pattern not in str(error)
        if note.is_ours and not has_note and "optax_sam" not in _raised_in(error):
            return f"the message should be ours, and is from {_raised_in(error)}"
        return ""
    if error is not None:
        return "" if word == "undefined" else f"raised {error!r}"
    if not result.difference <= TOLERANCE:
        return f"differs from the step by hand by {result.difference:.1e}"
    return ""


def _raised_in(error: Exception) -> str:
    return traceback.extract_tb(error.__traceback__)[-1].filename
