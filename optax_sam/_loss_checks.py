"""What a loss function may return, and what is wrong with it otherwise."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import _tree
from optax_sam._checks import (
    call,
    check_all_parameters,
    is_array_of,
    kinds,
    known_values,
    shape_of,
    show,
)


def call_loss(loss_fn: Callable[..., Any], params: chex.ArrayTree) -> Any:
    """Calls the loss; says what is missing where it takes a module in place of its parameters."""
    try:
        return call(
            "loss_fn",
            loss_fn,
            params,
            takes="the parameters and nothing else",
            remedy="Bind the batch: loss_fn=lambda params: loss(params, inputs, labels), or pass "
            "optax_sam.Objective(apply_fn, inputs, labels).",
        )
    except TypeError as error:
        helper = _helper_for(params)
        if helper and "not callable" in str(error):
            raise TypeError(
                f"loss_fn takes a model, but a method calls it with the parameters, a "
                f"{type(params).__name__}. Turn it into a loss of the parameters, before the clean "
                f"pass: loss_fn={helper}.loss_function(model, loss_fn, *args), or "
                f"{helper}.objective(model, inputs, labels)."
            ) from error
        raise


@contextlib.contextmanager
def note_where_flattened(params: chex.ArrayTree, place: str, remedy: str) -> Iterator[None]:
    """Adds a note to the error of a loss that gets one vector in place of its parameters."""
    try:
        yield
    except Exception as error:
        if isinstance(params, jax.Array) and params.ndim == 1:
            error.add_note(
                f"The loss was called with one vector, {kinds(params)}. If your parameters are a "
                f"tree, optax.flatten around {place} made a vector of them: {remedy}."
            )
        raise


@contextlib.contextmanager
def evaluating_the_loss(stage: str, params: chex.ArrayTree) -> Iterator[None]:
    """Says what a wrapper around a stage took from the parameters with which it calls the loss."""
    check_all_parameters(
        params,
        stage,
        "To perturb some leaves only, pass mask= to the method in place of wrapping this stage.",
    )
    with note_where_flattened(params, "this stage", "leave it out"):
        yield


def _helper_for(params: chex.ArrayTree) -> str:
    """The module of this package for the framework that the parameters come from; empty if none."""
    for kind in type(params).__mro__:
        for framework, helper in (("flax.nnx", "optax_sam.nnx"), ("equinox", "optax_sam.equinox")):
            if kind.__module__.startswith(framework):
                return helper
    return ""


def split_loss_and_aux(output: Any, params: chex.ArrayTree) -> tuple[jax.Array, Any, bool]:
    """``(loss, aux, whether there is aux)`` of what a loss function returned."""
    loss, aux, has_aux = output, None, False
    if isinstance(output, tuple):
        if len(output) != 2:
            raise TypeError(
                f"loss_fn must return a scalar loss or (loss, aux), got a tuple of {len(output)}. "
                "Put "
                "all auxiliary output into one dictionary: return loss, {...}."
            )
        (loss, aux), has_aux = output, True
        if isinstance(loss, tuple) or _is_like(aux, params):
            raise TypeError(
                "loss_fn must return a scalar loss, got (value, gradients). Pass the loss itself, "
                "not jax.value_and_grad(loss). If the second value is auxiliary output that looks "
                "like the parameters, put it into a dictionary: return loss, {'aux': aux}."
            )
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float):
        raise TypeError(
            f"loss_fn must return a scalar loss, got {show(loss)}. Does it return its value?"
        )
    if jnp.shape(loss) != () or not _tree.is_floating(loss):
        raise TypeError(
            f"loss_fn must return a scalar loss, got shape {jnp.shape(loss)} and dtype "
            f"{jnp.result_type(loss)}. Take the mean over the batch inside loss_fn."
        )
    return jnp.asarray(loss), aux, has_aux


def _is_like(aux: Any, params: chex.ArrayTree) -> bool:
    """Whether auxiliary output has the structure and shapes of the parameters, as gradients do."""
    structure: Any = jax.tree.structure(params)
    if not jax.tree.leaves(params) or jax.tree.structure(aux) != structure:
        return False
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(aux)] == [
        jnp.shape(leaf) for leaf in jax.tree.leaves(params)
    ]


def check_labels(loss: Callable[..., Any], logits: Any, labels: Any) -> None:
    """Says what the default loss makes of labels that are no class numbers."""
    if loss is not optax.softmax_cross_entropy_with_integer_labels:
        return
    if not is_array_of(logits, jnp.floating):
        raise TypeError(
            "the default loss needs floating logits of shape (B, ..., classes), got logits "
            f"{kinds(logits)}. Return them from apply_fn before any argmax, or pass a loss= of "
            "your own."
        )
    if not hasattr(labels, "dtype"):
        raise TypeError(
            f"the default loss needs one array of integer labels, got labels {kinds(labels)}. "
            "Pass that array, or a loss= of your own that takes these labels."
        )
    expected = jnp.shape(logits)[:-1]
    advice = ""
    if labels.shape == jnp.shape(logits):
        advice = "For one-hot or soft labels pass loss=optax.softmax_cross_entropy."
    elif labels.shape == (*expected, 1):
        advice = "Drop the last axis: labels[..., 0]."
    elif not jnp.issubdtype(labels.dtype, jnp.integer):
        advice = "Convert class numbers with labels.astype(jnp.int32), or pass a loss= of your own."
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            "the default loss needs integer labels, got labels of dtype "
            f"{labels.dtype} and shape {labels.shape}. {advice}"
        )
    if labels.shape != expected:
        raise ValueError(
            f"the default loss needs one label per row of the logits, shape {expected}, got labels "
            "of "
            f"shape {labels.shape}. {advice}".rstrip()
        )


def check_label_range(loss: Callable[..., Any], logits: Any, labels: Any) -> None:
    """Refuses class numbers that the logits do not have, where they can be read.

    Of a negative number the default loss counts from the last class, of one too large it makes NaN.
    """
    if loss is not optax.softmax_cross_entropy_with_integer_labels:
        return
    values, classes = known_values(labels), logits.shape[-1]
    if values is not None and (values.min() < 0 or values.max() >= classes):
        raise ValueError(
            f"labels must lie in [0, {classes}) for logits of shape {logits.shape}, got values "
            f"from {values.min()} to {values.max()}. Leave examples without a label out, or give "
            "them weight 0 with weights=."
        )


def check_losses(
    losses: Any, loss: Callable[..., Any], logits: Any, labels: Any, batch_size: int
) -> None:
    """Refuses a loss that is not one value per example."""
    shape = shape_of(losses)
    if not isinstance(shape, tuple) or not is_array_of(losses, jnp.floating):
        raise TypeError(
            f"loss must return one floating array of a loss per example, got {kinds(losses)}. "
            "Metrics such as the accuracy have no gradient: compute them outside of the objective."
        )
    if shape[:1] != (batch_size,):
        raise ValueError(
            f"loss must return one value per example, shape ({batch_size}, ...), got shape "
            f"{shape}. Objective takes the mean itself: pass the loss without it."
        )
    if batch_size > 1 and batch_size in shape[1:] and _grows_twice(loss, logits, labels, shape):
        raise ValueError(
            f"loss must return one value per example, got shape {shape}: it compares every example "
            f"with every other one, because logits of shape {jax.tree.map(jnp.shape, logits)} and "
            f"labels of shape {jax.tree.map(jnp.shape, labels)} are broadcast against each other. "
            "Give both the same shape."
        )


def _grows_twice(
    loss: Callable[..., Any], logits: Any, labels: Any, shape: tuple[int, ...]
) -> bool:
    """Whether another axis of the losses grows with the batch."""

    def longer(leaf: Any) -> jax.ShapeDtypeStruct:
        first, *rest = jnp.shape(leaf)
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            (first + 1, *rest), jnp.result_type(leaf)
        )

    try:
        grown = jax.eval_shape(loss, *jax.tree.map(longer, (logits, labels)))
    except (TypeError, ValueError, IndexError):
        return False  # the user's loss knows its batch size; nothing can be told
    return any(new != old for new, old in zip(grown.shape[1:], shape[1:], strict=False))
