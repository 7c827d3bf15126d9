"""Label noise: exact rates, honest masks, and the target distribution of each noise model."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from optax_sam import label_noise

CLASSES = 5
SHIFT_MAP = [1, 2, 3, 4, 0]


def features_of(labels):
    """Inputs that do not depend on the labels."""
    return np.random.default_rng(7).normal(size=(len(labels), 6))


def symmetric(labels, rate, **options):
    return label_noise.symmetric(labels, rate, CLASSES, **options)


def pair_flip(labels, rate, **options):
    return label_noise.pair_flip(labels, rate, CLASSES, **options)


def asymmetric(labels, rate, **options):
    return label_noise.asymmetric(labels, rate, SHIFT_MAP, CLASSES, **options)


def instance_dependent(labels, rate, **options):
    return label_noise.instance_dependent(features_of(labels), labels, rate, CLASSES, **options)


ALL = [symmetric, pair_flip, asymmetric, instance_dependent]
every_kind = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)


def balanced(count):
    return np.arange(count) % CLASSES


@every_kind
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.45, 0.5, 1.0])
def test_exact_rate(kind, rate):
    labels = balanced(200)
    changed = kind(labels, rate, seed=0).changed
    assert changed.sum() == round(rate * 200)


@every_kind
@pytest.mark.parametrize("rate", [0.2, 0.4, 0.8])
def test_independent_flips_have_the_rate_of_a_binomial(kind, rate):
    count = 20_000
    changed = kind(balanced(count), rate, seed=3, exact=False).changed
    p_value = scipy.stats.binomtest(int(changed.sum()), count, rate).pvalue
    assert p_value > 1e-4
    assert changed.sum() != round(rate * count)  # it is a draw, not a quota


def test_independent_instance_flips_keep_a_small_mean_rate():
    """Cutting N(rate, 0.1^2) at 0 must not raise the documented mean share of wrong labels."""
    changed = label_noise.instance_dependent(
        features_of(balanced(20_000)), balanced(20_000), 0.05, CLASSES, seed=0, exact=False
    ).changed
    assert scipy.stats.binomtest(int(changed.sum()), 20_000, 0.05).pvalue > 1e-4


@every_kind
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_properties(kind, data):
    """Never to itself, mask and labels agree, inside the classes, dtype and input kept, seeded."""
    dtype = data.draw(st.sampled_from([np.int8, np.uint8, np.int16, np.int32, np.int64]))
    values = data.draw(st.lists(st.integers(0, CLASSES - 1), max_size=40))
    labels = np.array(values, dtype)
    before = labels.copy()
    rate = data.draw(st.floats(0, 1))
    seed = data.draw(st.integers(0, 2**32 - 1))
    exact = data.draw(st.booleans())
    noisy = kind(labels, rate, seed=seed, exact=exact)
    np.testing.assert_array_equal(labels, before)
    np.testing.assert_array_equal(noisy.changed, noisy.labels != labels)
    assert noisy.changed.dtype == bool
    assert noisy.labels.shape == noisy.changed.shape == labels.shape
    assert set(noisy.labels.tolist()) <= set(range(CLASSES))
    if labels.size:
        assert noisy.labels.dtype == dtype
    again = kind(labels, rate, seed=seed, exact=exact)
    np.testing.assert_array_equal(again.labels, noisy.labels)
    if exact:
        groups = [labels]
        if kind is asymmetric:
            groups = [labels[labels == label] for label in range(CLASSES)]
        assert noisy.changed.sum() == sum(round(rate * group.size) for group in groups)


@pytest.mark.parametrize("kind", [symmetric, pair_flip], ids=lambda kind: kind.__name__)
@hypothesis.given(
    st.integers(1, 400), st.sampled_from([numerator / 200 for numerator in range(201)])
)
@hypothesis.example(10, 0.15)  # the mean of ten 0.15 is below 0.15
@hypothesis.example(10, 0.95)
@hypothesis.settings(max_examples=300)
def test_exact_count_is_python_round_at_ties_too(kind, count, rate):
    assert kind(balanced(count), rate, seed=0).changed.sum() == round(rate * count)


@every_kind
def test_seeds_differ(kind):
    first, second = (kind(balanced(100), 0.4, seed=seed) for seed in (0, 1))
    assert (first.changed != second.changed).any()


@every_kind
def test_global_random_state_is_neither_read_nor_written(kind):
    np.random.seed(0)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = kind(balanced(50), 0.4, seed=0).labels
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(kind(balanced(50), 0.4, seed=0).labels, first)


@every_kind
@pytest.mark.parametrize("exact", [True, False])
def test_every_example_is_equally_likely_to_change(kind, exact):
    """A quota must not favour early examples, nor a class."""
    labels = np.repeat(np.arange(CLASSES), 8)
    counts = sum(
        kind(labels, 0.5, seed=seed, exact=exact).changed.astype(int) for seed in range(400)
    )
    # Each count is a draw of Binomial(400, 1/2), standard deviation 10.
    assert np.abs(counts - 200).max() < 5 * 10


@every_kind
@pytest.mark.parametrize("exact", [True, False])
def test_rate_zero_and_one(kind, exact):
    labels = balanced(100)
    clean = kind(labels, 0.0, seed=0, exact=exact)
    assert not clean.changed.any()
    np.testing.assert_array_equal(clean.labels, labels)
    assert kind(labels, 1.0, seed=0, exact=exact).changed.all()


@every_kind
@pytest.mark.parametrize("empty", [[], np.array([], np.uint8)])
@pytest.mark.parametrize("exact", [True, False])
def test_empty_labels(kind, empty, exact):
    noisy = kind(empty, 0.3, seed=0, exact=exact)
    assert noisy.labels.shape == noisy.changed.shape == (0,)
    assert np.issubdtype(noisy.labels.dtype, np.integer)
    assert noisy.changed.dtype == bool


@every_kind
def test_empty_labels_keep_their_integer_dtype(kind):
    assert kind(np.array([], np.uint8), 0.3, seed=0).labels.dtype == np.uint8


@every_kind
def test_a_class_may_be_absent(kind):
    labels = np.array([0, 1, 3, 4] * 25)
    noisy = kind(labels, 0.4, seed=0)
    assert noisy.changed.sum() == 40


@every_kind
@pytest.mark.parametrize("wrap", [list, tuple, jnp.asarray], ids=["list", "tuple", "jax"])
def test_labels_of_any_kind_of_array(kind, wrap):
    noisy = kind(wrap(balanced(50).tolist()), 0.4, seed=0)
    assert isinstance(noisy.labels, np.ndarray)
    np.testing.assert_array_equal(noisy.labels, kind(balanced(50), 0.4, seed=0).labels)


def test_symmetric_targets_are_uniform_over_the_other_classes():
    labels = balanced(50_000)
    noisy = label_noise.symmetric(labels, 0.6, CLASSES, seed=0)
    for label in range(CLASSES):
        targets = noisy.labels[noisy.changed & (labels == label)]
        counts = np.delete(np.bincount(targets, minlength=CLASSES), label)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_two_classes_only_swap():
    labels = np.array([0, 1] * 50, np.int8)
    noisy = label_noise.symmetric(labels, 0.3, 2, seed=0)
    np.testing.assert_array_equal(noisy.labels[noisy.changed], 1 - labels[noisy.changed])


def test_largest_class_of_a_small_dtype():
    """Sums such as 255 + 1 must not wrap in the labels' own dtype."""
    labels = np.full(1000, 255, np.uint8)
    noisy = label_noise.symmetric(labels, 1.0, 256, seed=0)
    assert (noisy.labels != 255).all()
    counts = np.bincount(noisy.labels, minlength=256)[:255]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert label_noise.pair_flip(np.array([127], np.int8), 1.0, 128, seed=0).labels.tolist() == [0]


def test_pair_flip_goes_to_the_next_class():
    labels = balanced(100)
    noisy = label_noise.pair_flip(labels, 0.45, CLASSES, seed=0)
    expected = [(int(label) + 1) % CLASSES for label in labels[noisy.changed]]
    assert noisy.labels[noisy.changed].tolist() == expected


@pytest.mark.parametrize("wrap", [dict, lambda pairs: [dict(pairs).get(c, c) for c in range(5)]])
def test_class_map(wrap):
    labels = np.repeat(np.arange(5), [10, 20, 30, 40, 50])
    noisy = label_noise.asymmetric(labels, 0.4, wrap([(0, 2), (3, 1), (4, 4)]), 5, seed=0)
    changes_per_class = np.bincount(labels[noisy.changed], minlength=5)
    assert changes_per_class.tolist() == [4, 0, 0, 16, 0]  # 40 % of the mapped classes, each
    assert set(noisy.labels[noisy.changed & (labels == 0)].tolist()) == {2}
    assert set(noisy.labels[noisy.changed & (labels == 3)].tolist()) == {1}


def test_an_empty_class_map_changes_nothing():
    assert not label_noise.asymmetric(balanced(10), 1.0, {}, CLASSES, seed=0).changed.any()


def test_cifar10_class_map():
    """Truck to automobile, bird to airplane, deer to horse, cat and dog to each other."""
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    names.append("truck")
    class_map = label_noise.CIFAR10_CLASS_MAP
    pairs = {names[source]: names[target] for source, target in class_map.items()}
    assert pairs == {
        "truck": "automobile",
        "bird": "airplane",
        "deer": "horse",
        "cat": "dog",
        "dog": "cat",
    }
    labels = np.arange(1000) % 10
    noisy = label_noise.asymmetric(labels, 0.4, label_noise.CIFAR10_CLASS_MAP, 10, seed=0)
    assert noisy.changed.sum() == 200  # 20 % of all labels at 40 %, as documented


def wrong_class_table(noisy, rows):
    """Counts of each wrong class in each group of rows."""
    return np.stack([np.bincount(noisy.labels[row & noisy.changed], minlength=8) for row in rows])


@functools.cache
def two_clusters():
    """Two far clusters with the same mixture of two labels, all labels wrong."""
    random = np.random.default_rng(0)
    cluster = np.arange(12_000) % 2
    centers = np.where(cluster[:, None] == 0, -1.0, 1.0) * np.ones((1, 9))
    inputs = (centers + 0.05 * random.normal(size=centers.shape)).reshape(-1, 3, 3)
    labels = (np.arange(12_000) // 2) % 2
    return cluster, inputs, labels, label_noise.instance_dependent(inputs, labels, 1.0, 8, seed=2)


def test_instance_dependent_noise_depends_on_the_inputs():
    cluster, _, labels, noisy = two_clusters()
    for label in (0, 1):
        rows = [(cluster == which) & (labels == label) for which in (0, 1)]
        table = wrong_class_table(noisy, rows)
        table = table[:, table.sum(0) > 0]
        assert scipy.stats.chi2_contingency(table).pvalue < 1e-12


def test_nearby_inputs_share_their_wrong_classes():
    cluster, _, labels, noisy = two_clusters()
    half = np.arange(cluster.size) < cluster.size // 2
    inside = (cluster == 0) & (labels == 0)
    table = wrong_class_table(noisy, [inside & half, inside & ~half])
    table = table[:, table.sum(0) > 10]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


def test_instance_dependent_noise_depends_on_the_label():
    """One projection per class: the same inputs are mistaken differently under another label."""
    cluster, _, labels, noisy = two_clusters()
    rows = [(cluster == 0) & (labels == label) for label in (0, 1)]
    table = wrong_class_table(noisy, rows)[:, 2:]  # the classes open to both labels
    assert scipy.stats.chi2_contingency(table).pvalue < 1e-12


def test_a_constant_column_counts_nothing_though_its_deviation_is_rounding():
    labels = np.arange(60_000) % 10
    inputs = np.random.default_rng(0).normal(size=(60_000, 2))
    border = np.full(60_000, (0 - 0.1307) / 0.3081)
    assert border.std() > 0
    found = [
        label_noise.instance_dependent(np.column_stack([inputs, column]), labels, 0.3, 10, seed=1)
        for column in (border, np.zeros(60_000))
    ]
    np.testing.assert_array_equal(found[0].labels, found[1].labels)


def test_instance_dependent_noise_ignores_units_and_size_of_the_inputs():
    """Standardized features: another unit, or every feature repeated, keeps the mistakes soft."""
    _, inputs, labels, noisy = two_clusters()
    other_unit = label_noise.instance_dependent(inputs * 255 + 3, labels, 1.0, 8, seed=2)
    assert np.mean(other_unit.labels == noisy.labels) > 0.999
    wide = np.repeat(inputs.reshape(len(inputs), -1), 20, axis=1)
    wide_noise = label_noise.instance_dependent(wide, labels, 1.0, 8, seed=2)
    share = np.bincount(wide_noise.labels[labels == 0], minlength=8) / (labels == 0).sum()
    assert share.max() < 0.9


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_rates_are_normal_around_the_rate_and_cut_on_both_sides_alike(rate):
    def rates(deviation):
        return label_noise._rates_around(rate, deviation, 40_000, np.random.default_rng(0))

    np.testing.assert_array_equal(rates(0.0), rate)
    np.testing.assert_allclose(
        rates(0.02).std(), 0.02, rtol=0.02
    )  # five deviations: nothing is cut
    largest = min(rate, 1 - rate)
    for deviation in (0.02, 0.3, 10.0):
        np.testing.assert_allclose(rates(deviation).mean(), rate, atol=0.015)
        assert np.abs(rates(deviation) - rate).max() <= largest + 1e-12
    at_the_ends = np.isclose(np.abs(rates(10.0) - rate), largest)
    assert at_the_ends.mean() > 0.9


def test_flip_rates_spread_by_rate_deviation():
    """With deviation 0 every example has the same rate; the draw of the rates is per example."""
    labels = balanced(4000)
    inputs = features_of(labels)
    draw = functools.partial(
        label_noise.instance_dependent, inputs, labels, 0.5, CLASSES, exact=False
    )
    none = draw(seed=0, rate_deviation=0.0).changed
    wide = draw(seed=0, rate_deviation=10.0).changed
    assert 0.4 < none.mean() < 0.6
    assert 0.4 < wide.mean() < 0.6
    assert (none != wide).any()


def test_constant_features_are_harmless():
    labels = balanced(50)
    noisy = label_noise.instance_dependent(np.ones((50, 4)), labels, 0.4, CLASSES, seed=0)
    assert noisy.changed.sum() == 20


@every_kind
@pytest.mark.parametrize(
    "rate", [-0.1, 1.5, 40, math.nan, np.float32(1.5), np.array(-1.0), jnp.float32(40)]
)
def test_refuses_a_rate_outside_of_0_and_1(kind, rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\], got .*share"):
        kind(balanced(10), rate, seed=0)


@every_kind
@pytest.mark.parametrize("rate", [None, "0.4", True])
def test_refuses_a_rate_that_is_no_number(kind, rate):
    with pytest.raises(TypeError, match=f"rate must be a number.*{rate!r}"):
        kind(balanced(10), rate, seed=0)


@every_kind
def test_refuses_labels_that_are_no_classes(kind):
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\), got values from 0 to 5"):
        kind([0, 5], 0.1, seed=0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\), got values from -1 to 0"):
        kind([-1, 0], 0.1, seed=0)
    with pytest.raises(TypeError, match="labels must be integers, got dtype float64"):
        kind([0.0, 1.0], 0.1, seed=0)
    with pytest.raises(TypeError, match="labels must be integers, got dtype bool"):
        kind([True, False], 0.1, seed=0)
    with pytest.raises(ValueError, match=r"labels must have shape \(n,\), got \(2, 5\).*argmax"):
        kind(np.eye(5, dtype=int)[:2], 0.1, seed=0)


@pytest.mark.parametrize(
    "kind",
    [
        label_noise.symmetric,
        label_noise.pair_flip,
        lambda labels, rate, classes, seed: label_noise.asymmetric(
            labels, rate, {}, classes, seed=seed
        ),
        lambda labels, rate, classes, seed: label_noise.instance_dependent(
            features_of(labels), labels, rate, classes, seed=seed
        ),
    ],
    ids=["symmetric", "pair_flip", "asymmetric", "instance_dependent"],
)
def test_refuses_a_wrong_number_of_classes(kind):
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        kind([0], 0.1, 1, seed=0)
    with pytest.raises(TypeError, match=r"num_classes must be an integer, got 10\.0"):
        kind([0], 0.1, 10.0, seed=0)
    with pytest.raises(ValueError, match="300 classes do not fit into labels of dtype uint8"):
        kind(np.array([0], np.uint8), 0.1, 300, seed=0)


@every_kind
@pytest.mark.parametrize("seed", [None, 0.5, True, "0", jnp.array(0)], ids=repr)
def test_refuses_a_seed_that_is_no_integer(kind, seed):
    """NumPy would draw other noise at every run with None."""
    with pytest.raises(TypeError, match="seed must be an integer"):
        kind(balanced(10), 0.1, seed=seed)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        kind(balanced(10), 0.1, seed=-1)


@every_kind
def test_a_rate_may_be_any_scalar(kind):
    expected = kind(balanced(100), 0.25, seed=0)
    for rate in (np.float32(0.25), np.array(0.25), jnp.float32(0.25)):
        np.testing.assert_array_equal(kind(balanced(100), rate, seed=0).labels, expected.labels)
    with pytest.raises(ValueError, match=r"rate must be a scalar, got an array of shape \(10,\)"):
        kind(balanced(10), np.full(10, 0.1), seed=0)


@every_kind
def test_refuses_to_be_traced(kind):
    with pytest.raises(TypeError, match=r"must be concrete, but jit is tracing (it|them)"):
        jax.jit(lambda rate: kind(balanced(10), rate, seed=0).labels)(0.1)


@pytest.mark.parametrize("class_map", [np.eye(5), [1, 2], [0, 1, 2, 3, 4, 0], 3], ids=repr)
def test_refuses_a_class_map_of_another_shape(class_map):
    """A matrix of transition probabilities is another noise model."""
    message = (
        r"class_map must be a dictionary or a sequence with one class for each of the 5 .* got "
    )
    with pytest.raises(ValueError, match=message):
        label_noise.asymmetric([0], 0.1, class_map, 5, seed=0)


@pytest.mark.parametrize("class_map", [{0: 5}, {-1: 0}, {0: 1.5}, {0: True}, [0, 1, 2, 3, 1.5]])
def test_refuses_a_class_map_outside_of_the_classes(class_map):
    with pytest.raises(ValueError, match=r"class_map must map classes in \[0, 5\), got"):
        label_noise.asymmetric([0], 0.1, class_map, 5, seed=0)


def test_refuses_inputs_that_do_not_fit():
    call = functools.partial(label_noise.instance_dependent, rate=0.1, num_classes=5, seed=0)
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, \.\.\.\) with n = 3, got"):
        call(np.zeros((2, 4)), [0, 1, 2])
    with pytest.raises(ValueError, match=r"inputs must have shape .* got \(3,\)"):
        call(np.zeros(3), [0, 1, 2])
    with pytest.raises(TypeError, match="inputs must be real numbers, got dtype complex128"):
        call(np.zeros((3, 1), complex), [0, 1, 2])
    with pytest.raises(ValueError, match="inputs must be finite"):
        call(np.full((3, 1), np.nan), [0, 1, 2])
    with pytest.raises(ValueError, match=r"rate_deviation must lie in .* got -0\.1"):
        call(np.zeros((3, 1)), [0, 1, 2], rate_deviation=-0.1)
