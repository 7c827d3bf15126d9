"""Diagnostics: the values they should have, and the inputs that they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_sam
from optax_sam import _tree
from optax_sam.diagnostics import coordinate_shares, memorization

CLEAN = {"w": jnp.array([1.0, 1.0, -1.0, 1.0]), "b": jnp.array([-1.0, 0.0, 1.0, 1.0])}
PERTURBED = {"w": jnp.array([2.0, 0.5, -0.5, -1.0]), "b": jnp.array([-1.5, 1.0, 0.5, 0.5])}


class TestCoordinateShares:
    def test_every_set_has_its_own_share(self):
        """2 coordinates of A, 4 of B and 2 of C (one changed sign, one had no clean gradient)."""
        shares = coordinate_shares(CLEAN, PERTURBED)
        assert (shares.a, shares.b, shares.c) == (2 / 8, 4 / 8, 2 / 8)
        first_leaf = coordinate_shares(CLEAN["w"], jnp.array([2.0, 3.0, -4.0, -1.0]))
        assert (first_leaf.a, first_leaf.b, first_leaf.c) == (3 / 4, 0, 1 / 4)

    def test_more_coordinates_than_an_int32_can_count(self, monkeypatch):
        monkeypatch.setattr(_tree, "size", lambda tree: 2**33)
        assert coordinate_shares(CLEAN, PERTURBED).a == 2 / 2**33
        stage = optax_sam.down_weight(0.5)
        _, state = stage.update(PERTURBED, stage.init(CLEAN), CLEAN, clean_grads=CLEAN)
        assert state.down_weighted_fraction == 4 / 2**33

    def test_ratio_epsilon_moves_coordinates_of_its_own_size(self):
        clean, perturbed = jnp.array([1e-8, 1.0]), jnp.array([1.5e-8, 2.0])
        assert coordinate_shares(clean, perturbed).b == 0
        assert coordinate_shares(clean, perturbed, ratio_epsilon=1e-8).b == 1 / 2

    def test_leaves_without_gradients_do_not_count(self):
        clean = CLEAN | {"steps": np.zeros((), jax.dtypes.float0), "none": None}
        perturbed = PERTURBED | {"steps": np.zeros((), jax.dtypes.float0), "none": None}
        assert coordinate_shares(clean, perturbed) == coordinate_shares(CLEAN, PERTURBED)

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    @pytest.mark.parametrize(
        ("clean", "perturbed", "message"),
        [
            (jnp.ones(1), jnp.ones(4), r"\(1,\) in clean_grads, \(4,\) in perturbed_grads"),
            (jnp.ones(4), jnp.ones(()), r"\(4,\) in clean_grads, \(\) in perturbed_grads"),
            ({"a": jnp.ones(2)}, {"b": jnp.ones(2)}, "different structures"),
            ([jnp.ones(2)], [jnp.ones(2), jnp.ones(2)], "different structures"),
            (
                {"a": jnp.ones(2), "b": jnp.ones(2)},
                {"a": jnp.ones(2), "b": jnp.ones(2, int)},
                r"\['b'\].*float32 in clean_grads, int32 in perturbed_grads",
            ),
        ],
    )
    def test_refuses_trees_that_do_not_match(self, transform, clean, perturbed, message):
        """Broadcasting made shares that add up to 4 of the first pair."""
        with pytest.raises(ValueError, match=message):
            transform(coordinate_shares)(clean, perturbed)

    def test_refuses_trees_without_coordinates(self):
        with pytest.raises(
            ValueError, match=r"clean_grads must have floating coordinates, got .*int32"
        ):
            coordinate_shares({"steps": jnp.arange(3)}, {"steps": jnp.arange(3)})

    def test_refuses_a_negative_offset(self):
        with pytest.raises(ValueError, match=r"ratio_epsilon must lie in \[0, inf\), got -1"):
            coordinate_shares(jnp.ones(2), jnp.ones(2), ratio_epsilon=-1)


class TestMemorization:
    LOGITS = jnp.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 2.0, 0.0]])
    NOISY = np.array([0, 1, 2, 0])
    CHANGED = np.array([True, True, False, False])
    TRUE = np.array([1, 0, 2, 0])

    @pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray, list], ids=["numpy", "jax", "list"])
    def test_shares(self, wrap):
        """Predictions 0, 0, 2, 1: of two wrong labels one is known by heart, one is seen through."""
        result = memorization(self.LOGITS, wrap(self.NOISY), wrap(self.CHANGED), wrap(self.TRUE))
        assert (result.memorized, result.recovered, result.clean_fit) == (0.5, 0.5, 0.5)
        without = memorization(self.LOGITS, wrap(self.NOISY), wrap(self.CHANGED))
        assert (without.memorized, without.clean_fit) == (0.5, 0.5)
        assert np.isnan(without.recovered)

    def test_a_batch_may_lack_a_class(self):
        result = memorization(self.LOGITS, np.array([1, 1, 2, 1]), self.CHANGED)
        assert (result.memorized, result.clean_fit) == (0.0, 1.0)

    def test_no_such_example_is_nan(self):
        none = np.zeros(4, bool)
        assert np.isnan(memorization(self.LOGITS, self.NOISY, none).memorized)
        assert np.isnan(memorization(self.LOGITS, self.NOISY, ~none).clean_fit)

    def test_a_row_with_nan_predicts_nothing(self):
        """Argmax would say class 0, a noisy label here and a true one there."""
        diverged = jnp.full_like(self.LOGITS, jnp.nan)
        assert memorization(diverged, self.NOISY, self.CHANGED, self.TRUE) == (0, 0, 0)

    def test_under_jit(self):
        arguments = (self.LOGITS, self.NOISY, self.CHANGED, self.TRUE)
        assert jax.jit(memorization)(*arguments) == memorization(*arguments)

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"changed": CHANGED.astype(int)}, TypeError, "changed must be bools, got dtype int"),
            (
                {"changed": CHANGED[:, None]},
                ValueError,
                r"changed must .* \(4,\), got \(4, 1\)",
            ),
            ({"noisy_labels": NOISY[:, None]}, ValueError, r"noisy_labels .* \(4,\), got \(4, 1\)"),
            (
                {"noisy_labels": NOISY[:3]},
                ValueError,
                r"noisy_labels .* \(4,\), got \(3,\)",
            ),
            ({"noisy_labels": np.eye(4)}, ValueError, r"noisy_labels .*got \(4, 4\).*argmax"),
            (
                {"noisy_labels": NOISY * 1.0},
                TypeError,
                "noisy_labels must be .* dtype float",
            ),
            ({"true_labels": TRUE > 0}, TypeError, "true_labels must be integers, got dtype bool"),
            (
                {"true_labels": TRUE[:2]},
                ValueError,
                r"true_labels must have shape \(4,\), got \(2,\)",
            ),
            (
                {"logits": LOGITS[:, 0]},
                ValueError,
                r"logits .* \(n, classes\), got \(4,\)",
            ),
            ({"logits": LOGITS[None]}, ValueError, r"logits must have shape .* got \(1, 4, 3\)"),
            ({"logits": LOGITS > 0}, TypeError, "logits must be real numbers, got dtype bool"),
        ],
    )
    def test_refuses(self, transform, change, error, message):
        arguments = {
            "logits": self.LOGITS,
            "noisy_labels": self.NOISY,
            "changed": self.CHANGED,
            "true_labels": self.TRUE,
        }
        with pytest.raises(error, match=message):
            transform(memorization)(**arguments | change)

    @pytest.mark.parametrize("name", ["noisy_labels", "true_labels"])
    @pytest.mark.parametrize("bad", [-1, 3, 7])
    def test_refuses_labels_outside_of_the_classes_where_it_sees_them(self, name, bad):
        arguments = {"noisy_labels": self.NOISY, "true_labels": self.TRUE}
        arguments[name] = np.array([0, 1, 2, bad])
        with pytest.raises(
            ValueError, match=rf"{name} must lie in \[0, 3\), got values from .*{bad}"
        ):
            memorization(self.LOGITS, changed=self.CHANGED, **arguments)
        jax.jit(memorization)(self.LOGITS, changed=self.CHANGED, **arguments)  # traced: not seen
