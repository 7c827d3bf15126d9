"""Stage 3: how do the clean gradient g and the perturbed gradient g' make the update?

A combination is an ``optax.GradientTransformationExtraArgs`` that takes g' and the extra argument
``clean_grads`` (g). Chained combinations each see the direction of the one before them, and all of
them the same g.
"""

from optax_sam.combinations.coordinates import restrict_to_coordinates
from optax_sam.combinations.decomposition import (
    ReuseOrthogonalState,
    reuse_orthogonal,
    subtract_orthogonal,
)
from optax_sam.combinations.decoupling import DecouplingState, decouple
from optax_sam.combinations.down_weighting import (
    DownWeightingState,
    down_weight,
    linear_warmup_alpha,
)
from optax_sam.combinations.extrapolation import extrapolate
from optax_sam.combinations.renormalization import renormalize

__all__ = [
    "DecouplingState",
    "DownWeightingState",
    "ReuseOrthogonalState",
    "decouple",
    "down_weight",
    "extrapolate",
    "linear_warmup_alpha",
    "renormalize",
    "restrict_to_coordinates",
    "reuse_orthogonal",
    "subtract_orthogonal",
]
