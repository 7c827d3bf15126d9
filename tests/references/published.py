"""Published updates that are no golden trajectory, by hand: NumPy on a dictionary of arrays.

Each function takes ``gradient(params, t)``, the gradient of step t's batch, the parameters at the
start and the number of steps, and returns the parameters after every step. The order of operations
is that of the public code which is named; the code itself is not copied.
"""

from collections.abc import Callable, Mapping

import numpy as np

Arrays = dict[str, np.ndarray]
Gradient = Callable[[Arrays, int], Arrays]


def global_norm(arrays: Mapping[str, np.ndarray]) -> float:
    """The square root of the sum of all squares."""
    return float(np.sqrt(sum(np.sum(array**2) for array in arrays.values())))


def moved(params: Arrays, by: Arrays, factor: float) -> Arrays:
    """``params + factor * by``."""
    return {name: params[name] + factor * by[name] for name in params}


def asam_of_its_authors(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, eta: float, lr: float
) -> list[Arrays]:
    """SamsungLabs: what is called weight is measured in its own size, scales of BatchNorm included."""
    params, path = start, []
    for t in range(steps):
        g = gradient(params, t)
        size = {
            k: np.abs(p) + eta if "bias" not in k else np.ones_like(p) for k, p in params.items()
        }
        stretched = {name: size[name] * g[name] for name in g}
        length = global_norm(stretched) + 1e-16
        perturbation = {name: size[name] * stretched[name] * rho / length for name in g}
        params = moved(params, gradient(moved(params, perturbation, 1), t), -lr)
        path.append(params)
    return path


def sam_with_a_radius_per_parameter_group(
    gradient: Gradient, start: Arrays, steps: int, *, radii: Mapping[str, float], lr: float
) -> list[Arrays]:
    """davda54: every parameter group has its own rho, and all of them share one norm."""
    params, path = start, []
    for t in range(steps):
        g = gradient(params, t)
        length = global_norm(g) + 1e-12
        perturbation = {name: radii[name] / length * g[name] for name in g}
        params = moved(params, gradient(moved(params, perturbation, 1), t), -lr)
        path.append(params)
    return path


def momentum_sam_of_its_authors(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, momentum: float, lr: float
) -> list[Arrays]:
    """MarlonBecker: the stored weights are the perturbed ones, and each step moves them back first."""
    perturbed, path = start, []
    buffer = {name: np.zeros_like(array) for name, array in start.items()}
    inverse_norm = 0.0
    for t in range(steps):
        g = gradient(perturbed, t)
        params = moved(perturbed, buffer, rho * inverse_norm)
        buffer = moved(g, buffer, momentum)
        params = moved(params, buffer, -lr)
        path.append(params)
        inverse_norm = 1 / (global_norm(buffer) + 1e-12)
        perturbed = moved(params, buffer, -rho * inverse_norm)
    return path


def sam_on_one_set(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, which: str, lr: float
) -> list[Arrays]:
    """lhchau's ablation: SAM on r > 1, 0 < r < 1 or r < 0, with r = g' / (g + 1e-8); SGD elsewhere."""
    params, path = start, []
    for t in range(steps):
        g = gradient(params, t)
        after = gradient(moved(params, g, rho / (global_norm(g) + 1e-12)), t)
        direction = {}
        for name in g:
            r = after[name] / (g[name] + 1e-8)
            chosen = {"A": r > 1, "B": (r > 0) & (r < 1), "C": r < 0}[which]
            direction[name] = np.where(chosen, after[name], g[name])
        params = moved(params, direction, -lr)
        path.append(params)
    return path
