"""What the papers plot: memorization of wrong labels, and the groups of coordinates."""

from optax_sam.diagnostics.gradient_groups import GroupShares, gradient_group_shares
from optax_sam.diagnostics.memorization import Memorization, memorization

__all__ = ["GroupShares", "Memorization", "gradient_group_shares", "memorization"]
