"""What the papers plot: memorization of wrong labels, and the sets A, B and C of coordinates."""

from optax_sam.diagnostics.coordinates import CoordinateShares, coordinate_shares
from optax_sam.diagnostics.memorization import Memorization, memorization

__all__ = ["CoordinateShares", "Memorization", "coordinate_shares", "memorization"]
