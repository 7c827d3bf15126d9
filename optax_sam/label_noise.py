"""Seeded label noise for integer labels: symmetric, asymmetric, pair-flip, instance-dependent.

Every function returns the noisy labels and the mask of the changed ones. A label is never "flipped"
to itself, so the mask is exact: ``changed == (noisy != labels)``. With ``exact=True`` the number of
changed labels is ``round(rate * n)``; with ``exact=False`` each label is changed independently with
its probability. The functions run in NumPy on the host, before training.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from optax_sam._checks import check_bool
from optax_sam._hyperparameters import check_integer, check_number


class NoisyLabels(NamedTuple):
    """The result of every noise model.

    Attributes:
      labels: integer array, shape ``(n,)``, the noisy labels, in the dtype of the input.
      changed: bool array, shape ``(n,)``, True where the label is wrong.
    """

    labels: np.ndarray
    changed: np.ndarray


def symmetric(
    labels: ArrayLike, rate: float, num_classes: int, *, seed: int, exact: bool = True
) -> NoisyLabels:
    """Replaces labels by one of the other classes, each equally likely.

    Some papers draw from *all* classes, the own one included: their rate r is a rate of
    ``r * (num_classes - 1) / num_classes`` here.

    Args:
      labels: integers in ``[0, num_classes)``, shape ``(n,)``.
      rate: share of wrong labels, 0 ≤ rate ≤ 1.
      num_classes: number of classes, at least 2.
      seed: seed of the random generator; the same seed gives the same noise.
      exact: change exactly ``round(rate * n)`` labels, or each with probability ``rate``.

    Returns:
      :class:`NoisyLabels`.

    Raises:
      ValueError: for a rate outside [0, 1], labels outside the classes, or fewer than 2 classes.
      TypeError: for labels that are not integers.

    Example:
      >>> from optax_sam import label_noise
      >>> noisy = label_noise.symmetric([0, 1, 2, 3, 4] * 2, rate=0.4, num_classes=5, seed=0)
      >>> int(noisy.changed.sum())
      4
    """
    labels, rate = _check(labels, rate, num_classes, seed, exact)
    random = np.random.default_rng(seed)
    changed = _choose(np.full(labels.shape, rate), exact, random, total=rate)
    shift = random.integers(1, num_classes, labels.shape)
    return _apply(labels, (labels.astype(np.int64) + shift) % num_classes, changed)


def pair_flip(
    labels: ArrayLike, rate: float, num_classes: int, *, seed: int, exact: bool = True
) -> NoisyLabels:
    """Replaces labels by the next class, c → c + 1 modulo the number of classes.

    Args:
      labels: integers in ``[0, num_classes)``, shape ``(n,)``.
      rate: share of wrong labels, 0 ≤ rate ≤ 1.
      num_classes: number of classes, at least 2.
      seed: seed of the random generator; the same seed gives the same noise.
      exact: change exactly ``round(rate * n)`` labels, or each with probability ``rate``.

    Returns:
      :class:`NoisyLabels`.

    Raises:
      ValueError: for a rate outside [0, 1], labels outside the classes, or fewer than 2 classes.
      TypeError: for labels that are not integers.

    Example:
      >>> from optax_sam import label_noise
      >>> label_noise.pair_flip([0, 1, 2], rate=1.0, num_classes=3, seed=0).labels.tolist()
      [1, 2, 0]

    References:
      Han et al., Co-teaching, NeurIPS 2018, arXiv 1804.06872.
    """
    labels, rate = _check(labels, rate, num_classes, seed, exact)
    random = np.random.default_rng(seed)
    changed = _choose(np.full(labels.shape, rate), exact, random, total=rate)
    return _apply(labels, (labels.astype(np.int64) + 1) % num_classes, changed)


def asymmetric(
    labels: ArrayLike,
    rate: float,
    class_map: Mapping[int, int] | Sequence[int],
    num_classes: int,
    *,
    seed: int,
    exact: bool = True,
) -> NoisyLabels:
    """Replaces labels by the class they are mistaken for; unmapped classes stay clean.

    The rate is that of the mapped classes, each on its own, as in the literature: 40 % asymmetric
    noise on CIFAR-10 changes 40 % of the trucks, birds, deer, cats and dogs, 20 % of all labels.

    Args:
      labels: integers in ``[0, num_classes)``, shape ``(n,)``.
      rate: share of wrong labels within each mapped class, 0 ≤ rate ≤ 1.
      class_map: ``{class: mistaken_for}``, or a sequence with one class per class. A class that maps
        to itself stays clean. See :data:`CIFAR10_CLASS_MAP`.
      num_classes: number of classes, at least 2.
      seed: seed of the random generator; the same seed gives the same noise.
      exact: change exactly ``round(rate * n_c)`` labels of each mapped class c, or each label with
        probability ``rate``.

    Returns:
      :class:`NoisyLabels`.

    Raises:
      ValueError: for a rate outside [0, 1], or labels or a map outside the classes.
      TypeError: for labels that are not integers.

    Example:
      >>> from optax_sam import label_noise
      >>> label_noise.asymmetric([0, 1, 2], 1.0, {0: 2}, num_classes=3, seed=0).labels.tolist()
      [2, 1, 2]

    References:
      Patrini et al., Making Deep Neural Networks Robust to Label Noise, CVPR 2017, arXiv 1609.03683.
    """
    labels, rate = _check(labels, rate, num_classes, seed, exact)
    table = _class_table(class_map, num_classes)
    random = np.random.default_rng(seed)
    target = table[labels]
    changed = np.zeros(labels.shape, bool)
    for label in np.flatnonzero(table != np.arange(num_classes)):
        members = np.flatnonzero(labels == label)
        changed[members] = _choose(np.full(members.shape, rate), exact, random, total=rate)
    return _apply(labels, target, changed)


def instance_dependent(
    inputs: ArrayLike,
    labels: ArrayLike,
    rate: float,
    num_classes: int,
    *,
    seed: int,
    exact: bool = True,
    rate_deviation: float = 0.1,
) -> NoisyLabels:
    r"""Wrong labels that depend on the example: similar inputs are mistaken for the same classes.

    Example i has its own flip rate :math:`q_i \sim \mathcal{N}(\text{rate}, \sigma^2)`, where σ is
    ``rate_deviation``, cut to an interval around the rate inside [0, 1]. Its wrong class follows the
    softmax of :math:`x_i^\top W_{y_i}` over the other classes, with one standard-normal projection
    :math:`W_c` for each class c. The inputs are standardized (mean 0 and variance 1 over the data set)
    and scaled by :math:`1/\sqrt{\text{features}}`, so the strength of the dependence does not grow with
    their size.

    Args:
      inputs: real array, shape ``(n, ...)``.
      labels: integers in ``[0, num_classes)``, shape ``(n,)``.
      rate: mean share of wrong labels, 0 ≤ rate ≤ 1.
      num_classes: number of classes, at least 2.
      seed: seed of the random generator; the same seed gives the same noise.
      exact: change exactly ``round(rate * n)`` labels, label i with a probability close to q_i (Pareto
        sampling), or each label i with probability q_i.
      rate_deviation: standard deviation of the flip rates, at least 0.

    Returns:
      :class:`NoisyLabels`.

    Raises:
      ValueError: for a rate outside [0, 1], labels outside the classes, or inputs that are not one
        finite array per label.
      TypeError: for labels that are not integers.

    Example:
      >>> import numpy as np
      >>> from optax_sam import label_noise
      >>> x, y = np.random.default_rng(0).normal(size=(100, 8)), np.arange(100) % 10
      >>> int(label_noise.instance_dependent(x, y, 0.3, 10, seed=0).changed.sum())
      30

    References:
      Xia et al., Part-dependent Label Noise, NeurIPS 2020, arXiv 2006.07836, algorithm 2. The authors
      project unstandardized inputs, which makes the softmax nearly one-hot.
    """
    labels, rate = _check(labels, rate, num_classes, seed, exact)
    check_number("rate_deviation", rate_deviation, minimum=0)
    inputs = _as_array("inputs", inputs)
    real = (np.bool_, np.integer, np.floating)
    if not any(jnp.issubdtype(inputs.dtype, kind) for kind in real):
        raise TypeError(f"inputs must be real numbers, got dtype {inputs.dtype}.")
    inputs = inputs.astype(np.float64)
    if inputs.shape[:1] != labels.shape or inputs.ndim < 2:
        raise ValueError(
            f"inputs must have shape (n, ...) with n = {labels.size}, got {inputs.shape}."
        )
    if not np.isfinite(inputs).all():
        raise ValueError("inputs must be finite, got NaN or infinity; clean the data first.")
    random = np.random.default_rng(seed)
    if labels.size == 0:
        return NoisyLabels(labels, np.zeros(0, bool))
    features = inputs.reshape(labels.size, -1)
    is_constant = np.ptp(features, axis=0, keepdims=True) == 0  # whose deviation is rounding
    deviation = np.where(is_constant, 1, features.std(axis=0, keepdims=True))
    features = (features - features.mean(axis=0, keepdims=True)) / deviation
    features /= np.sqrt(features.shape[1])

    rates = _rates_around(rate, rate_deviation, labels.size, random)
    scores = np.empty((labels.size, num_classes))
    for label in range(num_classes):
        members = labels == label
        projection = random.normal(size=(features.shape[1], num_classes))  # one class at a time
        scores[members] = features[members] @ projection
    scores[np.arange(labels.size), labels] = -np.inf  # never the label itself
    # The largest score plus Gumbel noise is a draw from the softmax.
    target = np.argmax(scores + random.gumbel(size=scores.shape), axis=1)
    return _apply(labels, target, _choose(rates, exact, random, total=rate))


def _rates_around(
    rate: float, deviation: float, number: int, random: np.random.Generator
) -> np.ndarray:
    """A rate for every example."""
    # Cut on both sides alike: cutting to [0, 1] alone would shift the mean of small and large rates.
    largest = min(rate, 1 - rate)
    return rate + np.clip(random.normal(0, deviation, number), -largest, largest)


CIFAR10_CLASS_MAP = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
"""Truck → automobile, bird → airplane, deer → horse, cat ↔ dog: the usual map for CIFAR-10."""


def _check(
    labels: ArrayLike, rate: float, num_classes: int, seed: int, exact: bool
) -> tuple[np.ndarray, float]:
    if isinstance(rate, jax.core.Tracer):
        raise TypeError(
            f"label noise is drawn with NumPy, so rate must be concrete, but jit is tracing it: "
            f"{rate!r}. Draw it once, before training."
        )
    check_number("rate", rate, minimum=0, maximum=1, remedy="It is a share, not a percentage.")
    check_integer("num_classes", num_classes, minimum=2)
    check_integer("seed", seed, minimum=0)
    check_bool("exact", exact)
    labels = _as_array("labels", labels)
    if labels.ndim != 1:
        raise ValueError(
            f"labels must have shape (n,), got {labels.shape}. For one-hot labels take their "
            "argmax; make a list of a generator."
        )
    if labels.size == 0 and labels.dtype == np.float64:
        labels = labels.astype(np.int64)  # what NumPy makes of an empty list
    if not jnp.issubdtype(labels.dtype, np.integer):
        raise TypeError(
            f"labels must be integers, got dtype {labels.dtype}. Number the classes from 0: "
            "np.unique(labels, return_inverse=True)[1]."
        )
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got values from {labels.min()} to "
            f"{labels.max()}. Leave out examples without a label, or raise num_classes."
        )
    if num_classes - 1 > np.iinfo(labels.dtype).max:
        raise ValueError(f"{num_classes} classes do not fit into labels of dtype {labels.dtype}.")
    return labels, float(rate)


def _as_array(name: str, values: Any) -> np.ndarray:
    if isinstance(values, jax.core.Tracer):
        raise TypeError(
            f"label noise is drawn with NumPy, so {name} must be concrete, but jit is tracing "
            f"them: {values!r}. Draw it once, before training."
        )
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name} must be one array, got a {type(values).__name__} of rows of different "
            "lengths. Give every example the same shape."
        ) from None


def _class_table(class_map: Mapping[int, int] | Sequence[int], num_classes: int) -> np.ndarray:
    if isinstance(class_map, Mapping):
        pairs = list(class_map.items())
    else:
        sequence = np.asarray(class_map)
        if sequence.shape != (num_classes,):
            raise ValueError(
                "class_map must be a dictionary or a sequence with one class for each of the "
                f"{num_classes} classes, got {type(class_map).__name__} of shape {sequence.shape}."
            )
        pairs = list(enumerate(sequence.tolist()))
    table = np.arange(num_classes)
    for source, target in pairs:
        for label in (source, target):
            is_integer = isinstance(label, int | np.integer) and not isinstance(label, bool)
            if not is_integer or label not in range(num_classes):
                raise ValueError(
                    f"class_map must map classes in [0, {num_classes}), got {source!r}: {target!r}."
                )
        table[source] = target
    return table


def _choose(
    rates: np.ndarray, exact: bool, random: np.random.Generator, total: float
) -> np.ndarray:
    """Which labels to change: each with its rate, or exactly ``round(total * n)`` of them."""
    if not exact:
        return random.random(rates.shape) < rates
    count = round(total * rates.size)
    changed = np.zeros(rates.shape, bool)
    # Logistic noise on the log-odds of the rates; the `count` largest are the sample. With equal
    # rates that is uniform sampling without replacement.
    with np.errstate(divide="ignore"):
        odds = np.log(rates) - np.log1p(-rates)
    order = np.argsort(-(odds + random.logistic(size=rates.shape)), kind="stable")
    changed[order[:count]] = True
    return changed


def _apply(labels: np.ndarray, target: np.ndarray, changed: np.ndarray) -> NoisyLabels:
    return NoisyLabels(np.where(changed, target, labels).astype(labels.dtype), changed)
