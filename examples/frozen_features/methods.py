"""The methods that the program tries, one row each."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

import optax_sam


class Method(NamedTuple):
    """One row.

    Attributes:
      label: name in tables and figures.
      color: color in figures.
      build: from the radius, which may be traced, the transformation before momentum in the chain.
      radius: what the grid's radii are multiplied by: ε per example wants a tenth of SAM's.
      linear: whether it differs from the others on a linear head (J-SAM is SGD there).
    """

    label: str
    color: str
    build: Callable[..., optax.GradientTransformation]
    radius: float = 1.0
    linear: bool = True


def _ncsam(rho: jax.Array) -> optax.GradientTransformation:
    return optax_sam.ncsam(rho, kappa=0.1, flip_ratio=0.4)


METHODS = {
    "sgd": Method("SGD", "#7f7f7f", lambda rho: optax.identity(), radius=0.0),
    "sam": Method("SAM", "#1f77b4", lambda rho: optax_sam.sam(rho)),
    "saner": Method("SANER", "#d1495b", lambda rho: optax_sam.saner(rho)),
    "jsam": Method("J-SAM", "#8e5bb5", lambda rho: optax_sam.jsam(rho), linear=False),
    "lsam": Method("L-SAM", "#e09f3e", lambda rho: optax_sam.lsam(rho)),
    "1-sam": Method("1-SAM", "#17a2a2", lambda rho: optax_sam.sam(rho, group_size=1), radius=0.1),
    "m-sam": Method("m-SAM", "#5c7a29", lambda rho: optax_sam.sam(rho, group_size=8), radius=0.3),
    "ncsam": Method("NCSAM", "#2f9e5b", _ncsam),
}
