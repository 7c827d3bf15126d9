"""Device-varying zeros, for ``shard_map``."""

import chex
import jax

from optax_sam import _axes


def to_varying_like(tree: chex.ArrayTree, reference: chex.ArrayTree) -> chex.ArrayTree:
    """Marks every leaf as differing along the axes along which any leaf of ``reference`` differs.

    Fresh zeros are replicated. Differentiating in them would sum over the devices, and a loop that
    starts from them would not accept the varying sums it produces.
    """
    axes = frozenset().union(*(_axes._varying_axes(leaf) for leaf in jax.tree.leaves(reference)))
    return _axes.to_varying(tree, tuple(axes))
