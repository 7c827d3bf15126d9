"""The methods and what holds for each: a new method is one row here, and every contract test runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_sam
from optax_sam import down_weight

NOTHING = optax.identity()


@dataclasses.dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
      make: the method as a function of ρ and the engine's options.
      base: what the method has of the base optimizer: what is left of it without a perturbation.
      zero_rho_is_base: ρ = 0 is the base optimizer, bit for bit.
      perturbation_norm_is_rho: ‖ε‖ = ρ whenever the gradient is not zero.
      perturbs_at_once: the first step already has ε ≠ 0.
      separable: a leaf that is not perturbed keeps its clean gradient in a separable loss.
      selects_coordinates: a coordinate's group hangs on comparing g' with g, where rounding counts.
      static_args: integers that ``optax.inject_hyperparams`` must not trace.
      loss_traces: how often one compilation of ``update`` traces the user's loss.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    base: optax.GradientTransformation = NOTHING
    zero_rho_is_base: bool = True
    perturbation_norm_is_rho: bool = True
    perturbs_at_once: bool = True
    separable: bool = True
    selects_coordinates: bool = False
    static_args: tuple[str, ...] = ()
    loss_traces: int = 1


def ncsam(rho, **options):
    return optax_sam.ncsam(rho, kappa=0.1, flip_ratio=0.5, **options)


ADAMS = optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)  # its second moment


def functional_sam(rho=0.05, **options):
    return optax_sam.functional_sam(rho, preconditioner=ADAMS, **options)


def le_sam(rho=0.05, **options):
    """With a budget that some gradients exceed at the largest radius and others do not."""
    return optax_sam.le_sam(0.2, rho_max=rho, **options)


def decoupled_wsam(rho=0.05, **options):
    return optax_sam.wsam(rho, base=optax.trace(0.9), **options)


def ae_sam(rho=0.05, **options):
    """With a condition that always holds: what it decides is tested elsewhere."""
    return optax_sam.sam(rho, when=optax_sam.gradient_norm_is_large(-100.0), **options)


def without_biases(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in jax.tree_util.keystr(path), params
    )


def masked_saner(rho=0.05, **options):
    return optax_sam.sam(rho, combination=down_weight(0.5, mask=without_biases), **options)


METHODS: dict[str, Method] = {
    "sam": Method(optax_sam.sam),
    "asam": Method(optax_sam.asam, perturbation_norm_is_rho=False),
    "saner": Method(optax_sam.saner, selects_coordinates=True),
    "jsam": Method(optax_sam.jsam, loss_traces=2),
    "functional_sam": Method(functional_sam, loss_traces=2),
    "lsam": Method(optax_sam.lsam, loss_traces=2),
    "ncsam": Method(
        ncsam, perturbation_norm_is_rho=False, static_args=("flip_ratio",), loss_traces=3
    ),
    # The orthogonal part is global: it mixes the leaves.
    "gsam": Method(optax_sam.gsam, separable=False, zero_rho_is_base=False),
    "friendly_sam": Method(optax_sam.friendly_sam),
    "vasso": Method(optax_sam.vasso),
    "wsam": Method(optax_sam.wsam, zero_rho_is_base=False),  # 9 g' - 8 g rounds
    "decoupled_wsam": Method(decoupled_wsam, base=optax.trace(0.9), zero_rho_is_base=False),
    "stable_sam": Method(optax_sam.stable_sam, separable=False),  # the norms mix the leaves
    "le_sam": Method(le_sam, perturbation_norm_is_rho=False),
    "looksam": Method(optax_sam.looksam, static_args=("every_k",)),
    "msam": Method(optax_sam.msam, perturbs_at_once=False),
    "ae_sam": Method(ae_sam),
    "masked_saner": Method(masked_saner, selects_coordinates=True),
    "restricted": Method(
        lambda rho=0.05, **o: optax_sam.sam(
            rho, combination=optax_sam.restrict_to_coordinates("B"), **o
        ),
        selects_coordinates=True,
    ),
}
# SANER on top of the others, as in its paper.
METHODS |= {
    f"{name}+saner": dataclasses.replace(
        METHODS[name],
        make=lambda rho=0.05, make=METHODS[name].make, **o: make(
            rho, combination=down_weight(0.5), **o
        ),
        selects_coordinates=True,
        static_args=(),
    )
    for name in ("asam", "gsam", "friendly_sam", "vasso", "ncsam", "looksam")
}


def apply_fn(params: Any, inputs: jax.Array) -> jax.Array:
    """A small network with a bias."""
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"]


def problem(dtype=jnp.float32, batch_size: int = 12, seed: int = 0):
    """Parameters, inputs and labels of a random problem with three classes."""
    keys = jax.random.split(jax.random.key(seed), 5)
    params = {
        "hidden": {
            "kernel": jax.random.normal(keys[0], (4, 6)).astype(dtype),
            "bias": 0.1 * jax.random.normal(keys[1], (6,)).astype(dtype),
        },
        "out": {"kernel": jax.random.normal(keys[2], (6, 3)).astype(dtype)},
    }
    inputs = jax.random.normal(keys[3], (batch_size, 4)).astype(dtype)
    labels = jax.random.randint(keys[4], (batch_size,), 0, 3)
    return params, inputs, labels


def objective(dtype=jnp.float32, batch_size: int = 12, seed: int = 0):
    """Parameters and the objective of :func:`problem`."""
    params, inputs, labels = problem(dtype, batch_size, seed)
    return params, optax_sam.Objective(apply_fn, inputs, labels)
