"""The tree algebra: accumulation, dtypes, leaves that do not take part."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam import _norms, _tree

pytestmark = pytest.mark.usefixtures("strict_promotion")

MIXED = {
    "half": jnp.array([1.0, -2.0], jnp.float16),
    "single": jnp.array([[3.0]]),
    "steps": jnp.array([7, 8]),
    "none": None,
    "empty": {},
}


def test_only_floating_leaves_take_part():
    assert len(_tree.floating_leaves(MIXED)) == 2
    assert _tree.size(MIXED) == 3
    assert _tree.size({}) == 0
    for leaf in (1.0, np.float32(1), jnp.ones(2, jnp.bfloat16)):
        assert _tree.is_floating(leaf)
    for leaf in (1, True, jnp.ones(2, jnp.int32), np.zeros(2, jax.dtypes.float0), 1j):
        assert not _tree.is_floating(leaf)


def test_norm_and_dot():
    np.testing.assert_allclose(_norms.norm(MIXED), 14**0.5, rtol=1e-6)
    np.testing.assert_allclose(_tree.dot(MIXED, MIXED), 14.0)
    other = MIXED | {"half": jnp.array([2.0, 1.0], jnp.float16), "single": jnp.array([[-1.0]])}
    np.testing.assert_allclose(_tree.dot(MIXED, other), -3.0)
    assert float(_norms.norm({})) == 0.0
    assert float(_norms.norm({"steps": jnp.array([3])})) == 0.0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_accumulates_in_at_least_single_precision(dtype):
    assert _tree.accumulation_dtype({"a": jnp.ones(2, dtype)}) == jnp.float32
    assert _norms.norm({"a": jnp.ones(2, dtype)}).dtype == jnp.float32
    ones = {"a": jnp.ones(100_000, dtype)}  # a float16 sum would overflow, a bfloat16 one stall
    np.testing.assert_allclose(_norms.norm(ones), 100_000**0.5, rtol=1e-4)


def test_accumulates_in_double_precision_where_there_is_any(x64):
    tree = {"single": jnp.ones(2, jnp.float32), "double": jnp.full(2, 1e-9, jnp.float64)}
    assert _tree.accumulation_dtype(tree) == jnp.float64
    assert _norms.norm(tree).dtype == jnp.float64
    assert float(_tree.dot(tree, tree)) == 2 + 2e-18
    assert float(_norms.norm({"a": jnp.full(3, 1e-30, jnp.float64)})) > 0


def test_half_precision_norms_neither_overflow_nor_vanish():
    np.testing.assert_allclose(
        _norms.norm({"a": jnp.full(10_000, 6e4, jnp.float16)}), 6e6, rtol=1e-2
    )
    tiny = jnp.full(4, 6e-8, jnp.float16)  # the smallest subnormal
    np.testing.assert_allclose(_norms.norm({"a": tiny}), 2 * float(tiny[0]), rtol=1e-5)


def test_derivative_of_the_norm():
    np.testing.assert_allclose(jax.grad(_norms.norm)(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
    assert jax.grad(_norms.norm)(jnp.zeros(2)).tolist() == [0.0, 0.0]
    assert np.isfinite(jax.hessian(_norms.norm)(jnp.zeros(2))).all()
    assert np.isnan(_norms.norm(jnp.array([jnp.nan, 1.0])))


RANGE = [1e-36, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30, 1e36]


@pytest.mark.parametrize("size", RANGE)
def test_the_norm_is_right_over_the_range_of_float32(size):
    """Squares alone leave the range below 1e-19 and above 1e19."""
    tree = {"a": jnp.array([3.0, 0.0]) * size, "b": jnp.array([[-4.0]]) * size}
    np.testing.assert_allclose(_norms.norm(tree), 5 * size, rtol=1e-6)
    slope = jax.grad(_norms.norm)(tree)
    np.testing.assert_allclose(slope["a"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(slope["b"], [[-0.8]], rtol=1e-6)


def test_the_norm_keeps_small_coordinates_beside_none_that_is_large():
    """Half of the squares are below the smallest float32, though their sum is not."""
    tree = {"a": jnp.concatenate([jnp.full(10**6, 1e-20), jnp.full(100, 1e-18)])}
    np.testing.assert_allclose(_norms.norm(tree), 1.4142136e-17, rtol=1e-5)


def test_what_is_no_number_is_passed_on():
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        result = float(_norms.norm({"a": jnp.array([1.0, bad])}))
        assert np.isnan(result) if np.isnan(bad) else result == np.inf
    assert float(_norms.norm({"a": jnp.zeros(3)})) == 0


@pytest.mark.parametrize("exponent", [-290, -160, 160, 290])
def test_the_norm_is_right_over_the_range_of_float64(x64, exponent):
    tree = {"a": jnp.array([3.0, 4.0]) * 10.0**exponent}
    np.testing.assert_allclose(_norms.norm(tree), 5 * 10.0**exponent, rtol=1e-12)


def test_the_norm_under_the_transformations_of_jax():
    rows = jnp.array([[3e-30, 4e-30], [3.0, 4.0], [3e30, 4e30], [0.0, 0.0]])
    expected = [5e-30, 5.0, 5e30, 0.0]
    np.testing.assert_allclose(jax.vmap(_norms.norm)(rows), expected, rtol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for check_vma in (True, False):
        mapped = jax.shard_map(
            lambda row: _norms.norm(row)[None],
            mesh=mesh,
            in_specs=jax.P("data"),
            out_specs=jax.P("data"),
            check_vma=check_vma,
        )
        np.testing.assert_allclose(jax.jit(mapped)(rows), expected, rtol=1e-6)


def test_the_second_pass_of_the_norm_is_skipped_and_shared():
    """Two norms of the same tree are one loop, which runs twice only outside of the range."""
    text = jax.jit(lambda x: (_norms.norm(x), 2 * _norms.norm(x))).lower(jnp.ones(7)).compile()
    assert text.as_text().count(" while(") == 1


def test_the_factor_of_dot():
    large = {"a": jnp.array([3e30, 4e30])}
    factor = jnp.array(0.2e-30)
    np.testing.assert_allclose(_tree.dot(large, large, factor), 5e30, rtol=1e-6)
    assert float(_tree.dot(large, large)) == np.inf


def test_divide_or_zero():
    def divide(numerator, denominator):
        return float(_tree.divide_or_zero(jnp.array(numerator), jnp.array(denominator)))

    assert divide(1.0, 4.0) == 0.25
    assert divide(1.0, 0.0) == 0.0
    assert divide(0.0, 0.0) == 0.0
    assert divide(1.0, np.inf) == 0.0
    assert np.isnan(divide(1.0, np.nan))
    assert np.isnan(divide(np.nan, 1.0))
    assert float(jax.grad(lambda x: _tree.divide_or_zero(jnp.array(1.0), x))(0.0)) == 0.0


def test_scale_multiplies_wide_and_keeps_the_leafs_dtype():
    scaled = _tree.scale(MIXED, jnp.array(1e5))
    chex.assert_trees_all_equal_dtypes(scaled, MIXED)
    assert scaled["single"].tolist() == [[3e5]]
    assert scaled["steps"].tolist() == [7, 8]
    # A factor outside of float16's range is fine as long as the product is inside.
    tiny = {"a": jnp.array([6e-8], jnp.float16)}
    np.testing.assert_allclose(_tree.scale(tiny, jnp.array(1e7))["a"], [0.6], rtol=1e-2)


def test_add_is_in_the_dtype_of_the_parameters():
    params = {"half": jnp.ones(2, jnp.bfloat16), "steps": jnp.array([3]), "none": None}
    perturbation = {"half": jnp.full(2, 0.5), "steps": jnp.array([9]), "none": None}
    moved = _tree.add(params, perturbation)
    chex.assert_trees_all_equal_dtypes(moved, params)
    assert moved["half"].tolist() == [1.5, 1.5]
    assert moved["steps"].tolist() == [3]


def test_linear_is_in_the_left_leafs_dtype():
    left = {"a": jnp.array([1.0, 2.0], jnp.float16), "steps": jnp.array([1])}
    right = {"a": jnp.array([10.0, 20.0]), "steps": jnp.array([2])}
    result = _tree.linear(jnp.array(2.0), left, jnp.array(-0.5), right)
    assert result["a"].dtype == jnp.float16
    assert result["a"].tolist() == [-3.0, -6.0]
    assert result["steps"].tolist() == [1]


def test_as_gradients_replaces_what_no_optimizer_can_take():
    params = {"w": jnp.ones(2, jnp.bfloat16), "steps": jnp.array([3]), "none": None}
    gradients = {
        "w": jnp.ones(2),
        "steps": np.zeros(1, jax.dtypes.float0),
        "none": None,
    }
    result = _tree.as_gradients(gradients, params)
    chex.assert_trees_all_equal_dtypes(result, params)
    assert result["steps"].tolist() == [0]


def test_zeros_are_fresh_buffers():
    zeros = jnp.zeros(2)
    assert _tree.zeros_like({"a": zeros})["a"] is not zeros
    assert (
        _tree.zeros_like({"a": zeros})["a"].unsafe_buffer_pointer() != zeros.unsafe_buffer_pointer()
    )


def test_the_norm_of_constant_zeros_is_zero_under_vmap(x64):
    """XLA folds the second pass there: the square of its factor must be finite."""
    rows = jnp.ones((4, 3))

    def of_nothing(row):
        return _norms.norm(jax.lax.cond(jnp.int32(1) == 0, lambda: row, lambda: 0 * jnp.zeros(3)))

    np.testing.assert_array_equal(jax.jit(jax.vmap(of_nothing))(rows), np.zeros(4))


def test_a_subnormal_number_divides_like_zero():
    """In float16, as CPUs take the subnormal numbers of float32 for 0 by themselves."""
    small = jnp.float16([0, 1e-6, 1e-3])
    np.testing.assert_array_equal(_tree.is_zero(small), [True, True, False])
    quotients = _tree.divide_or_zero(jnp.ones(3, jnp.float16), small)
    np.testing.assert_allclose(quotients, [0, 0, 1000], rtol=1e-2)
