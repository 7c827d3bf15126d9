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


def stable_sam_of_its_authors(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, lr: float
) -> list[Arrays]:
    """cltan023: the gradient at the perturbed weights, scaled to the norm of the first one."""
    params, path = start, []
    for t in range(steps):
        g = gradient(params, t)
        length = global_norm(g)
        after = gradient(moved(params, g, rho / (length + 1e-12)), t)
        params = moved(params, after, -lr * length / (global_norm(after) + 1e-12))
        path.append(params)
    return path


def saner_in_the_last_layer(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, alpha: float, last: str, lr: float
) -> list[Arrays]:
    """lhchau: set B of the last layer's weight times their alpha, with r = g' / (g + 1e-12)."""
    params, path = start, []
    for t in range(steps):
        g = gradient(params, t)
        direction = gradient(moved(params, g, rho / (global_norm(g) + 1e-12)), t)
        r = direction[last] / (g[last] + 1e-12)
        direction[last] = np.where((r > 0) & (r < 1), alpha, 1) * direction[last]
        params = moved(params, direction, -lr)
        path.append(params)
    return path


def sam_on_some_layers(
    gradient: Gradient, start: Arrays, steps: int, *, names: tuple[str, ...], rho: float, lr: float
) -> list[Arrays]:
    """Only what has one of the names in its own is perturbed, and counts in the norm.

    mueller-mp: norm and bn. RitianLuo: the weight of the output head.
    """
    params, path = start, []
    for t in range(steps):
        g = gradient(params, t)
        chosen = {name: g[name] for name in g if any(part in name for part in names)}
        length = global_norm(chosen) + 1e-16
        perturbed = dict(params)
        for name, direction in chosen.items():
            perturbed[name] = params[name] + rho / length * direction
        params = moved(params, gradient(perturbed, t), -lr)
        path.append(params)
    return path


def centralized_sam_of_its_authors(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, lr: float
) -> list[Arrays]:
    """Mohamed-Hassan22: the mean of each output's weights leaves the ascent, after the norm is taken.

    The outputs are the last axis here, and the first in PyTorch.
    """
    params, path = start, []
    for t in range(steps):
        g = gradient(params, t)
        length = global_norm(g) + 1e-12
        central = {k: v - v.mean(0, keepdims=True) if v.ndim > 1 else v for k, v in g.items()}
        params = moved(params, gradient(moved(params, central, rho / length), t), -lr)
        path.append(params)
    return path


def sam_in_the_maximum_norm(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, lr: float
) -> list[Arrays]:
    """Foret et al.: every coordinate climbs by rho."""
    params, path = start, []
    for t in range(steps):
        signs = {name: np.sign(array) for name, array in gradient(params, t).items()}
        params = moved(params, gradient(moved(params, signs, rho), t), -lr)
        path.append(params)
    return path


def sam_layer_by_layer(
    gradient: Gradient, start: Arrays, steps: int, *, rho: float, lr: float
) -> list[Arrays]:
    """Every tensor climbs by rho along its own gradient."""
    params, path = start, []
    for t in range(steps):
        units = {k: v / np.sqrt(np.sum(v**2)) for k, v in gradient(params, t).items()}
        params = moved(params, gradient(moved(params, units, rho), t), -lr)
        path.append(params)
    return path


def efficient_sam(
    gradient: Callable[[Arrays, int, np.ndarray | None], Arrays],
    losses: Callable[[Arrays, int], np.ndarray],
    masks: Callable[[int], Arrays],
    start: Arrays,
    steps: int,
    *,
    rho: float,
    beta: float,
    gamma: float,
    lr: float,
) -> list[Arrays]:
    """ESAM of the paper: a random part of ε, and descent on the examples whose loss rises most."""
    params, path = start, []
    for t in range(steps):
        g, kept = gradient(params, t, None), masks(t)
        length = global_norm(g)
        epsilon = {name: rho / length * g[name] * kept[name] / beta for name in g}
        perturbed = moved(params, epsilon, 1)
        rise = losses(perturbed, t) - losses(params, t)
        chosen = np.argsort(-rise)[: int(gamma * len(rise))]
        params = moved(params, gradient(perturbed, t, chosen), -lr)
        path.append(params)
    return path
