"""Perturbations per example or group: exact 1-SAM and m-SAM (J-SAM, L-SAM) at about the cost of SAM.

The naive way differentiates every group of m examples by itself and keeps a copy of the weights for
each. Here the loss is traced once and the parameters are followed through it (``walk``, ``places``) to
the linear operations where they meet the data (``sites``), which may be run in loops or share their
weights (``uses``). A ``plan`` says for each leaf how its perturbation is computed, from thin matrices
where that is cheaper (``factors``); ``ascent`` finds the groups' gradients, ``descent`` differentiates
at their perturbed points, and ``gradient`` runs both over microbatches of groups.
"""

from optax_sam.per_example.gradient import PerExampleResult, per_example_gradient

__all__ = ["PerExampleResult", "per_example_gradient"]
