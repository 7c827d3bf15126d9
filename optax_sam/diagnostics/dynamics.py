"""How training treats every example over the epochs, without knowing a correct label."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam import _batches, _tree
from optax_sam._checks import call, check_callable, is_array_of, kinds, known_values, show
from optax_sam._hyperparameters import check_integer
from optax_sam.diagnostics._compiled import bind
from optax_sam.diagnostics._labels import as_labels, predicted


class Recording(NamedTuple):
    """What is kept of every example: 37 bytes (53 where JAX computes in float64), however
    many classes and epochs there are.

    Attributes:
      labels: int32, shape ``(n,)``, the labels that are trained on.
      times: int32, shape ``(n,)``, how often an example was recorded.
      loss: shape ``(n,)``, mean cross-entropy so far.
      margin: shape ``(n,)``, mean margin so far.
      confidence: shape ``(n,)``, mean probability of the label so far.
      squared_deviations: shape ``(n,)``, sum of squared deviations of that probability from its mean.
      agreements: int32, shape ``(n,)``, how often the label was predicted.
      forgetting_events: int32, shape ``(n,)``, how often it was predicted, and the next time not.
      agrees: bools, shape ``(n,)``, whether it was predicted the last time; logits with NaN predict
        nothing.
      rival: int32, shape ``(n,)``, the likeliest other class the last time.
    """

    labels: jax.Array
    times: jax.Array
    loss: jax.Array
    margin: jax.Array
    confidence: jax.Array
    squared_deviations: jax.Array
    agreements: jax.Array
    forgetting_events: jax.Array
    agrees: jax.Array
    rival: jax.Array


class TrainingDynamics(NamedTuple):
    """The result of :func:`training_dynamics`.

    Where an example was never recorded the integers are 0 and the rest is NaN.

    Attributes:
      times: int32, shape ``(n,)``, how often an example was recorded.
      loss: shape ``(n,)``, mean cross-entropy.
      margin: shape ``(n,)``, mean of the label's logit minus the largest other one: the area under
        the margin (AUM) of Pleiss et al. Low for wrong labels.
      confidence: shape ``(n,)``, mean probability of the label. Low for wrong labels.
      variability: shape ``(n,)``, standard deviation of that probability over the epochs.
      agreement: shape ``(n,)``, share of the epochs in which the label was predicted.
      forgetting_events: int32, shape ``(n,)``, how often an example went from predicted to not.
    """

    times: jax.Array
    loss: jax.Array
    margin: jax.Array
    confidence: jax.Array
    variability: jax.Array
    agreement: jax.Array
    forgetting_events: jax.Array


def start_recording(labels: ArrayLike) -> Recording:
    """An empty recording of the training dynamics.

    Args:
      labels: integers, shape ``(n,)``: the labels that are trained on, in the order of the data set.

    Returns:
      A :class:`Recording`, a pytree of arrays: it goes through ``jit`` and into checkpoints.

    Raises:
      ValueError: if ``labels`` do not have one axis, or a concrete one is negative.
      TypeError: if they are not integers, such as the names of classes.

    Example:
      >>> from optax_sam.diagnostics import start_recording
      >>> start_recording([0, 1, 1]).times.tolist()
      [0, 0, 0]
    """
    labels = as_labels("labels", labels)
    labels = jnp.array(labels, jnp.int32)  # a copy: the recording may be donated

    def zeros(dtype: Any) -> jax.Array:
        return jnp.zeros(labels.shape, dtype)

    return Recording(
        labels=labels,
        times=zeros(jnp.int32),
        loss=zeros(float),
        margin=zeros(float),
        confidence=zeros(float),
        squared_deviations=zeros(float),
        agreements=zeros(jnp.int32),
        forgetting_events=zeros(jnp.int32),
        agrees=zeros(bool),
        rival=zeros(jnp.int32),
    )


def record_batch(recording: Recording, logits: ArrayLike, indices: ArrayLike) -> Recording:
    """Adds what a training step saw of its batch, without another forward pass.

    Call it inside the jitted training step, with the logits of its own pass; it adds some operations
    on ``(B, classes)`` numbers. These are the logits of the parameters before the step, in training
    mode (dropout, augmentation), as in the papers on margins and forgetting. Over several devices it
    needs the logits of the whole batch: under ``jit`` with sharded arrays they are; under ``pmap`` and
    ``shard_map`` gather logits and indices first (``jax.lax.all_gather(..., tiled=True)``).

    Args:
      recording: what was recorded so far.
      logits: shape ``(B, classes)``.
      indices: integers, shape ``(B,)``, which examples of the data set these are. No example may occur
        twice. -1 stands for padding, which is not recorded.

    Returns:
      The new :class:`Recording`.

    Raises:
      ValueError: if a shape does not fit, or a concrete index occurs twice or is outside of the data.
      TypeError: if ``recording`` is no :class:`Recording`, the logits are not real or the indices not
        integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import record_batch, start_recording
      >>> recording = start_recording([0, 1, 1])
      >>> logits = jnp.array([[1.0, 3.0], [2.0, 0.0]])
      >>> recording = record_batch(recording, logits, jnp.array([2, 0]))
      >>> recording.margin.tolist(), recording.times.tolist()
      ([2.0, 0.0, 2.0], [1, 0, 1])
    """
    _check_recording(recording)
    logits, indices = jnp.asarray(logits), jnp.asarray(indices)
    size = recording.labels.shape[0]
    if indices.ndim != 1:
        raise ValueError(f"indices must have shape (B,), got {indices.shape}.")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"indices must be integers, got dtype {indices.dtype}. They say which rows of the data set "
            "the batch has."
        )
    values = known_values(indices)
    if values is not None and values.size:
        if values.min() < -1 or values.max() >= size:
            raise ValueError(
                f"indices must lie in [0, {size}), the examples of the recording, or be -1 for "
                f"padding, got values from {values.min()} to {values.max()}."
            )
        rows, counts = np.unique(values[values >= 0], return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"indices must differ, got {rows[counts > 1][0]} twice. Record the batches of a step "
                "with repeated examples one after the other."
            )
    known = known_values(recording.labels)
    largest = None if known is None else int(known.max())
    _check_logits(logits, indices.shape[0], largest)
    changed: Recording = _record(recording, logits, indices)
    return changed


def record_epoch(
    recording: Recording,
    apply_fn: Callable[[Any, Any], Any],
    params: chex.ArrayTree,
    inputs: chex.ArrayTree,
    *,
    chunk_size: int = 1024,
) -> Recording:
    """Adds the network's outputs for all examples: one forward pass over the data set.

    Chunk by chunk, in the memory of one, by one compiled program for all chunks. The inputs may stay on
    the host: only a chunk at a time is sent to the device.

    Args:
      recording: what was recorded so far.
      apply_fn: ``apply_fn(params, inputs) -> logits``, in inference mode. A plain function is compiled
        anew in each call, as what it closes over may have changed. To compile once over the epochs,
        pass ``jax.tree_util.Partial(model.apply)``.
      params: what ``apply_fn`` takes first; may hold batch statistics too.
      inputs: array or pytree of arrays, of JAX or NumPy, with n rows in the order of the labels.
      chunk_size: how many examples to compute at once, at least 1.

    Returns:
      The new :class:`Recording`.

    Raises:
      ValueError: if the inputs do not have one row per label, the logits no class of a label, or
        ``chunk_size`` is below 1.
      TypeError: if ``apply_fn`` is not callable or does not return real logits, one row per example.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import record_epoch, start_recording, training_dynamics
      >>> recording = start_recording([0, 1, 1])
      >>> for scale in (-1.0, 2.0):
      ...     recording = record_epoch(recording, jnp.multiply, scale, jnp.eye(2)[jnp.array([0, 1, 0])])
      >>> training_dynamics(recording).margin.tolist()
      [0.5, 0.5, -0.5]
    """
    _check_recording(recording)
    check_callable("apply_fn", apply_fn, "Pass a function (params, inputs) -> logits.")
    chunk_size = check_integer("chunk_size", chunk_size, minimum=1)
    size = recording.labels.shape[0]
    if {np.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)} != {(size,)}:
        raise ValueError(
            f"inputs must have one row for each of the {size} labels of the recording, got "
            f"{kinds(inputs)}. Give the whole data set, in the order of the labels."
        )
    labels = jnp.asarray(recording.labels)
    is_known = not isinstance(labels, jax.core.Tracer) and labels.is_fully_addressable
    measure = bind(_measure, apply_fn, largest=int(labels.max()) if is_known else None)
    seen = []
    for rows, new in _chunks(size, chunk_size):
        observation = measure(params, *_take((inputs, labels), rows))
        seen.append(_take(observation, new))
    whole: _Observation = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seen)
    changed: Recording = _add_epoch(recording, whole)
    return changed


def training_dynamics(recording: Recording) -> TrainingDynamics:
    """The statistics of every example over all recorded epochs.

    Args:
      recording: what was recorded.

    Returns:
      :class:`TrainingDynamics`.

    Raises:
      TypeError: if ``recording`` is no :class:`Recording`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import record_batch, start_recording, training_dynamics
      >>> recording = start_recording([0])
      >>> for logit in (1.0, -1.0, 1.0, -1.0):
      ...     recording = record_batch(recording, jnp.array([[logit, 0.0]]), jnp.array([0]))
      >>> dynamics = training_dynamics(recording)
      >>> float(dynamics.agreement[0]), int(dynamics.forgetting_events[0])
      (0.5, 2)

    References:
      Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, NeurIPS 2020,
      arXiv 2001.10528 (margin). Toneva et al., An Empirical Study of Example Forgetting, ICLR 2019,
      arXiv 1812.05159 (forgetting events). Swayamdipta et al., Dataset Cartography, EMNLP 2020, arXiv
      2009.10795 (confidence, variability; their correctness is the agreement).
    """
    _check_recording(recording)
    times = recording.times.astype(recording.loss.dtype)
    never = recording.times == 0

    def where_recorded(values: jax.Array) -> jax.Array:
        return jnp.where(never, jnp.nan, values)

    def per_time(values: jax.Array) -> jax.Array:
        return where_recorded(values.astype(times.dtype) / jnp.where(never, 1, times))

    return TrainingDynamics(
        times=recording.times,
        loss=where_recorded(recording.loss),
        margin=where_recorded(recording.margin),
        confidence=where_recorded(recording.confidence),
        variability=jnp.sqrt(per_time(recording.squared_deviations)),
        agreement=per_time(recording.agreements),
        forgetting_events=recording.forgetting_events,
    )


class _Observation(NamedTuple):
    """What the logits say about some examples, one number each."""

    loss: jax.Array
    margin: jax.Array
    confidence: jax.Array
    agrees: jax.Array
    rival: jax.Array


def _observe(logits: jax.Array, labels: jax.Array) -> _Observation:
    logits = logits.astype(_tree.accumulation_dtype(logits))
    is_label = jnp.arange(logits.shape[1]) == labels[:, None]
    # NaN where the logits have no such class, which a traced label does not show.
    own = jnp.take_along_axis(logits, labels[:, None], axis=1, mode="fill")[:, 0]
    others = jnp.where(is_label, -jnp.inf, logits)
    log_probability = own - jax.nn.logsumexp(logits, axis=1)
    return _Observation(
        loss=-log_probability,
        margin=own - jnp.max(others, axis=1),
        confidence=jnp.exp(log_probability),
        agrees=predicted(logits) == labels,
        # Not the label, also where all other classes are excluded, by logits of minus infinity.
        rival=jnp.argmax(
            jnp.where(is_label, -jnp.inf, jnp.nan_to_num(logits, nan=jnp.nan)), axis=1
        ),
    )


def _add(recording: Recording, seen: _Observation) -> Recording:
    """The recording of examples that were all seen once more."""
    times = recording.times + 1

    def mean(name: str) -> jax.Array:
        old: jax.Array = getattr(recording, name)
        new: jax.Array = getattr(seen, name).astype(old.dtype)
        # An infinite mean stays what it is; inf − inf would be no number.
        stays = jnp.isinf(old) & (jnp.isfinite(new) | (new == old))
        return jnp.where(stays, old, old + (new - old) / times.astype(old.dtype))

    confidence = mean("confidence")
    value = seen.confidence.astype(confidence.dtype)
    return Recording(
        labels=recording.labels,
        times=times,
        loss=mean("loss"),
        margin=mean("margin"),
        confidence=confidence,
        # Welford's sum loses no digits where the deviations are small.
        squared_deviations=recording.squared_deviations
        + (value - recording.confidence) * (value - confidence),
        agreements=recording.agreements + seen.agrees,
        forgetting_events=recording.forgetting_events + (recording.agrees & ~seen.agrees),
        agrees=seen.agrees,
        rival=seen.rival.astype(jnp.int32),
    )


@jax.jit
def _record(recording: Recording, logits: jax.Array, indices: jax.Array) -> Recording:
    """Adds some examples; what is outside of the data is neither read nor written."""
    logits, indices = _batches.gathered((logits, indices))  # explicit shards cannot be indices
    indices = jnp.where(indices < 0, recording.labels.shape[0], indices)
    old = jax.tree.map(lambda leaf: leaf.at[indices].get(mode="clip"), recording)
    new = _add(old, _observe(logits, old.labels))
    changed: Recording = jax.tree.map(
        lambda leaf, part: leaf.at[indices].set(part, mode="drop"), recording, new
    )
    return changed


_add_epoch = jax.jit(_add)


@functools.partial(jax.jit, static_argnames="largest")
def _measure(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    labels: jax.Array,
    *,
    largest: int | None,
) -> _Observation:
    logits = call(
        "apply_fn",
        apply_fn,
        params,
        inputs,
        takes="(params, inputs)",
        remedy="Bind the rest: apply_fn=lambda params, inputs: ...",
    )
    _check_logits(logits, labels.shape[0], largest)
    return _observe(logits, labels)


def _chunks(size: int, chunk_size: int) -> Iterator[tuple[slice, slice]]:
    """The rows of chunks of one length, and which rows of the chunk are new.

    The last chunk reaches back to rows that another one has, in place of a second compilation.
    """
    chunk_size = min(chunk_size, size)
    for done in range(0, size, chunk_size):
        start = min(done, size - chunk_size)
        yield slice(start, start + chunk_size), slice(done - start, None)


def _take(tree: Any, rows: slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def _check_recording(recording: Any) -> None:
    if not isinstance(recording, Recording):
        raise TypeError(
            f"recording must come from start_recording(labels), got {show(recording)}. Keep what each "
            "call returns: recording = record_batch(recording, ...)."
        )


def _check_logits(logits: Any, count: int, largest: int | None) -> None:
    """Refuses what is no logit for each of so many examples; ``largest`` is the largest known label."""
    if not is_array_of(logits, jnp.floating) and not is_array_of(logits, jnp.integer):
        raise TypeError(
            f"logits must be one array of real numbers, got {kinds(logits)}. Let apply_fn return the "
            "logits alone."
        )
    if logits.ndim != 2 or logits.shape[0] != count or logits.shape[1] < 2:
        raise ValueError(
            f"logits must have shape ({count}, classes) with at least 2 classes, got {logits.shape}. "
            "For one logit z of two classes stack zeros and z."
        )
    if largest is not None and largest >= logits.shape[1]:
        raise ValueError(
            f"logits of shape {logits.shape} have no class {largest}, which is among the labels "
            "of the recording. Return a logit for every class."
        )
