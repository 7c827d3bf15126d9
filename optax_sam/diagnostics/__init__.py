"""Instruments to look into a training with label noise.

Which labels are suspect without a correct one (training dynamics), how much of the noise is memorized,
and the SANER paper's sets of coordinates.
"""

from optax_sam.diagnostics.coordinates import CoordinateShares, coordinate_shares
from optax_sam.diagnostics.dynamics import (
    Recording,
    TrainingDynamics,
    record_batch,
    record_epoch,
    start_recording,
    training_dynamics,
)
from optax_sam.diagnostics.memorization import Memorization, memorization
from optax_sam.diagnostics.suspects import Suspects, auroc, rank_suspects

__all__ = [
    # Training dynamics
    "Recording",
    "TrainingDynamics",
    "record_batch",
    "record_epoch",
    "start_recording",
    "training_dynamics",
    "Suspects",
    "rank_suspects",
    "auroc",
    # Memorization
    "Memorization",
    "memorization",
    # Coordinates of the gradient
    "CoordinateShares",
    "coordinate_shares",
]
