"""Draws what every method does with two weights: docs/images/methods/NAME.svg.

python docs/pictures.py

The loss is that of a network with two weights on a few examples, some with a wrong label. Nothing is
drawn by a formula of its own: ε is where the library evaluates the loss, and d is what it returns.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import optax_sam  # noqa: E402

# Seen on white and on black; orange and blue differ for the color-blind too.
ASCENT, DESCENT, OTHER, QUIET = "#d9662b", "#2b83ba", "#8a6fb3", "#828282"
RHO = 0.5

# Points in the plane and their classes; the labels of the first three are wrong.
INPUTS = jnp.array(
    [
        [2.0, -2.6],
        [0.4, -0.6],
        [-0.5, -0.2],
        [-2.0, -0.2],
        [-0.9, 3.3],
        [0.2, -0.4],
        [-0.3, -0.7],
        [-1.1, -0.4],
        [0.5, -0.2],
        [1.0, -0.2],
        [0.0, 1.5],
        [0.5, -0.5],
    ]
)
LABELS = jnp.array([0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1])
START = jnp.array([-0.9, 0.35])


def apply_fn(w, x):
    """A network with one hidden unit, whose two weights are w, and two classes."""
    z = 1.5 * jnp.tanh(x @ w) / 2
    return jnp.stack([-z, z], axis=-1)


def objective_of(examples=slice(None)) -> optax_sam.Objective:
    """The loss on some of the examples."""
    return optax_sam.Objective(apply_fn, INPUTS[examples], LABELS[examples])


@dataclasses.dataclass
class Step:
    """What a step of a method did: gradient, perturbation and direction, and its state after it."""

    objective: optax_sam.Objective
    w: jax.Array
    g: jax.Array
    epsilon: jax.Array
    d: jax.Array
    state: optax.OptState

    @property
    def perturbed(self) -> jax.Array:
        """g', the full gradient at w + ε."""
        return optax_sam.full_gradient(self.objective, self.w, self.epsilon)[1]


def step_of(method, state=None, w=START, objective=None) -> Step:
    """One step of a method, watched: the evaluation farthest from w is the one at w + ε."""
    objective = objective or objective_of()
    seen: list[np.ndarray] = [np.asarray(w)]

    def watched(w, x):
        jax.debug.callback(lambda w: seen.append(np.asarray(w)), w)
        return apply_fn(w, x)

    state = method.init(w) if state is None else state
    g = jax.grad(objective)(w)
    d, state = method.update(g, state, w, loss_fn=objective.replace(apply_fn=watched))
    jax.effects_barrier()
    farthest = max(seen, key=lambda point: float(np.linalg.norm(point - w)))
    return Step(objective, w, g, jnp.asarray(farthest) - w, d, state)


@dataclasses.dataclass
class Arrow:
    """From ``start`` by ``vector``; its name stands beyond the tip, moved by ``nudge`` points."""

    name: str
    start: jax.Array
    vector: jax.Array
    color: str
    nudge: tuple[float, float] = (0, 0)
    dashed: bool = False


@dataclasses.dataclass
class Picture:
    """A step, further arrows, and the shape of the ball.

    Attributes:
      step: the step.
      ascents: further arrows in the units of the weights.
      descents: further gradients, drawn against their direction: ``(name, vector)``.
      scales: half axes of the ball in units of ρ; ASAM's is an ellipse.
      nudges: what moves the name of an arrow, in points.
    """

    step: Step
    ascents: list[Arrow] = dataclasses.field(default_factory=list)
    descents: list[tuple[str, jax.Array]] = dataclasses.field(default_factory=list)
    scales: jax.Array | None = None
    nudges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def write(axes, text: str, point, offset, color: str) -> None:
    """A name, so many points away from a point of the picture."""
    axes.annotate(
        text,
        xy=np.asarray(point),
        xytext=tuple(offset),
        textcoords="offset points",
        ha="center",
        va="center",
        color=color,
        fontsize=14,
        fontweight="bold",
    )


def draw(picture: Picture, path: Path) -> None:
    """Contours of the loss, the ball, and the arrows of one step."""
    step, nudges = picture.step, picture.nudges
    has_ball = bool(jnp.any(step.epsilon != 0))
    # Gradients have another unit than weights: all of a picture are drawn at one scale.
    gradients = [*picture.descents, ("g", step.g), ("d", step.d)]
    scale = 0.8 / max(float(jnp.linalg.norm(vector)) for _, vector in gradients)
    arrows = [
        Arrow(f"−{name}", step.w, -scale * vector, QUIET, nudges.get(name, (0, 0)), name != "g")
        for name, vector in gradients[:-1]
    ]
    arrows.append(Arrow("−d", step.w, -scale * step.d, DESCENT, nudges.get("d", (0, 0))))
    arrows += picture.ascents
    if has_ball:
        arrows.append(Arrow("ε", step.w, step.epsilon, ASCENT, nudges.get("ε", (0, 0))))

    figure, axes = plt.subplots(figsize=(4.2, 3.5))
    angle = np.linspace(0, 2 * np.pi, 200)
    scales = np.ones(2) if picture.scales is None else np.asarray(picture.scales)
    ball = np.asarray(step.w)[:, None] + RHO * scales[:, None] * np.stack(
        [np.cos(angle), np.sin(angle)]
    )
    points = np.array([np.asarray(p) for a in arrows for p in (a.start, a.start + a.vector)])
    if has_ball:
        points = np.concatenate([points, ball.T])
        axes.plot(*ball, color=ASCENT, linewidth=1.2, linestyle=(0, (4, 3)))
    low, high = points.min(axis=0) - 0.25, points.max(axis=0) + 0.25
    # The same length in both directions, and a window of one shape.
    half = max((high[0] - low[0]) / 1.2, high[1] - low[1]) / 2
    center = (low + high) / 2
    axes.set_xlim(center[0] - 1.2 * half, center[0] + 1.2 * half)
    axes.set_ylim(center[1] - half, center[1] + half)
    grid = np.meshgrid(np.linspace(*axes.get_xlim(), 60), np.linspace(*axes.get_ylim(), 60))
    loss = jax.vmap(jax.vmap(step.objective))(jnp.stack([jnp.asarray(g) for g in grid], axis=-1))
    axes.contour(*grid, np.asarray(loss), levels=12, colors=QUIET, alpha=0.45, linewidths=0.8)

    for arrow in arrows:
        tip = np.asarray(arrow.start + arrow.vector)
        style = {
            "arrowstyle": "-|>",
            "color": arrow.color,
            "linewidth": 2,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        if arrow.dashed:
            style |= {"linestyle": (0, (3, 2)), "linewidth": 1.4}
        axes.annotate("", xy=tip, xytext=np.asarray(arrow.start), arrowprops=style)
        beyond = 13 * arrow.vector / jnp.linalg.norm(arrow.vector)
        write(axes, arrow.name, tip, np.asarray(beyond) + arrow.nudge, arrow.color)
    axes.plot(*np.asarray(step.w), "o", color=QUIET, markersize=6)
    write(axes, "w", step.w, nudges.get("w", (12, -8)), QUIET)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.savefig(
        path, transparent=True, bbox_inches="tight", pad_inches=0.02, metadata={"Date": None}
    )
    plt.close(figure)


def plain(make: Callable) -> Picture:
    """The first step of a method."""
    return Picture(step_of(make(RHO)))


def against_sam(make: Callable, **nudges: tuple[float, float]) -> Picture:
    """The first step of a method, with −g′, the direction of SAM for the same ε."""
    step = step_of(make(RHO))
    return Picture(step, descents=[("g′", step.perturbed)], nudges=nudges)


def asam() -> Picture:
    """ε ends on an ellipse, whose half axes are as long as the weights, times ρ."""
    rho = 0.9
    sam = step_of(optax_sam.sam(RHO)).epsilon
    return Picture(
        step_of(optax_sam.asam(rho)),
        ascents=[Arrow("ε of SAM", START, sam, QUIET, (-12, -4), True)],
        scales=rho / RHO * (jnp.abs(START) + 0.01),
        nudges={"g": (12, 0)},
    )


def ncsam() -> Picture:
    """SAM's ε, the compensation added to it, and the sum projected to the ball."""
    options = {"kappa": 1.6, "flip_ratio": 0.25, "deterministic": True}
    sam = step_of(optax_sam.sam(RHO)).epsilon
    whole = step_of(optax_sam.ncsam(RHO, projection=False, **options)).epsilon
    return Picture(
        step_of(optax_sam.ncsam(RHO, **options)),
        ascents=[
            Arrow("ρ g/‖g‖", START, sam, QUIET, (-16, -4), True),
            Arrow("s g*", START + sam, whole - sam, OTHER, (0, 2)),
        ],
        nudges={"ε": (22, 12)},
    )


def averaged(method: optax.GradientTransformationExtraArgs, **nudges) -> Picture:
    """The second step, on other examples than the first, whose gradient is the average m so far."""
    first = step_of(method, objective=objective_of(slice(0, 7)))
    second = step_of(method, first.state, objective=objective_of(slice(5, 12)))
    average = 1.2 * RHO * first.g / jnp.linalg.norm(first.g)
    arrow = Arrow("m", START, average, OTHER, nudges.pop("m", (0, 0)), dashed=True)
    return Picture(second, ascents=[arrow], nudges=nudges)


def looksam() -> Picture:
    """A step between two second gradients: g, and the part of an old g′ across an old g."""
    method = optax_sam.looksam(RHO, every_k=5)
    first = step_of(method)
    second = step_of(method, first.state, w=START - 0.3 * first.d)
    return Picture(second, descents=[("v", second.d - second.g)])


def msam() -> Picture:
    """The fourth step, along the momentum of the first three."""
    method = optax_sam.msam(RHO, momentum=0.9)
    w, state = jnp.array([-0.9, -0.7]), None
    for _ in range(4):
        step = step_of(method, state, w=w)
        state, w = step.state, w - 1.2 * step.d
    return Picture(step)


def functional_sam() -> Picture:
    """The second step: the second moment is also that of other examples."""
    rms = optax.scale_by_rms(0.9, eps_in_sqrt=False, bias_correction=True)
    method = optax_sam.functional_sam(RHO, preconditioner=rms)
    first = step_of(method, objective=objective_of(slice(9, 12)))
    second = step_of(method, first.state)
    unconditioned = step_of(optax_sam.jsam(RHO)).epsilon
    return Picture(
        second,
        ascents=[Arrow("ε of J-SAM", START, unconditioned, QUIET, (-40, 4), True)],
        descents=[("g′", second.perturbed)],
        nudges={"ε": (4, -2), "d": (14, -8), "g′": (-6, 0)},
    )


def le_sam() -> Picture:
    """The budget ends the climb inside of the ball of the largest radius."""
    sigma = 0.6 * RHO * float(jnp.linalg.norm(jax.grad(objective_of())(START)))
    return Picture(step_of(optax_sam.le_sam(sigma, rho_max=RHO)))


PICTURES: dict[str, Callable[[], Picture]] = {
    "sam": lambda: plain(optax_sam.sam),
    "asam": asam,
    "saner": lambda: against_sam(optax_sam.saner),
    "jsam": lambda: against_sam(optax_sam.jsam, **{"d": (14, -10), "g′": (-4, 0)}),
    "functional_sam": functional_sam,
    "lsam": lambda: against_sam(optax_sam.lsam, d=(0, 6), g=(4, -8)),
    "ncsam": ncsam,
    "gsam": lambda: against_sam(lambda rho: optax_sam.gsam(rho, alpha=0.6)),
    "friendly_sam": lambda: averaged(optax_sam.friendly_sam(RHO)),
    "vasso": lambda: averaged(optax_sam.vasso(RHO)),
    "wsam": lambda: against_sam(lambda rho: optax_sam.wsam(rho, gamma=0.7)),
    "stable_sam": lambda: against_sam(optax_sam.stable_sam, **{"d": (-14, 4), "g′": (20, -4)}),
    "le_sam": le_sam,
    "looksam": looksam,
    "msam": msam,
}


def main() -> None:
    """Draws all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=[*PICTURES], help="methods (default: all)")
    parser.add_argument("--output", type=Path, default=DOCS / "images" / "methods")
    options = parser.parse_args()
    matplotlib.use("svg")
    plt.rcParams.update({"svg.hashsalt": "optax_sam", "font.family": "DejaVu Sans"})
    for name in options.names:
        draw(PICTURES[name](), options.output / f"{name}.svg")


if __name__ == "__main__":
    main()
