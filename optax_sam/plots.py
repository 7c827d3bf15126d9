"""Pictures of what :mod:`optax_sam.diagnostics` measures; needs ``pip install 'optax_sam[plots]'``.

Every picture is transparent, with text and colors that stand out from white paper and from a dark page,
and colors that are told apart with any kind of color vision. Color is never alone: lines have dashes,
points have shapes, areas of 4 % and more have letters, and each line is named at its end instead of in
a legend.

Each function draws on the ``axes`` of Matplotlib that it is given, or on new ones, and returns them:
``plots.curves(...).figure.savefig("curves.svg")``. pyplot is not used, so nothing is left open.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from optax_sam.diagnostics import CoordinateShares, Spectrum, TrainingDynamics

__all__ = ["contours", "coordinate_bars", "curves", "data_map", "density"]

# Contrast of at least 3.4 : 1 to white and to a dark page, and apart for all color visions; tested.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#C0609A", "#767676")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
TEXT = "#767676"
_MOST_LINES = len(COLORS) * 2
_SIZE = (5.0, 3.4)


def curves(
    series: Mapping[str, ArrayLike],
    x: ArrayLike | None = None,
    *,
    xlabel: str = "epoch",
    ylabel: str = "",
    axes: Axes | None = None,
) -> Axes:
    """Lines, each named at its end.

    For accuracies and losses over the epochs, :func:`optax_sam.diagnostics.loss_line`, shares of
    coordinates, sharpness, damping.

    Args:
      series: name → values, shape ``(k,)``, or ``(runs, k)`` for a mean with a band of one standard
        deviation over the runs; NaN where there is no value: mean and band are those of the runs that
        have one. At most 10. A name may have several lines of text.
      x: shape ``(k,)``; None counts from 1.
      xlabel: the name of x.
      ylabel: what the values are, with the unit.
      axes: where to draw; None makes a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: if there is no series, or there are too many, or their lengths differ.
      TypeError: if ``series`` is no mapping.

    Example:
      >>> from optax_sam import plots
      >>> axes = plots.curves({"SGD": [70.0, 65.0], "SANER": [70.0, 80.0]}, ylabel="accuracy, %")
      >>> [text.get_text() for text in axes.texts]
      ['SGD', 'SANER']
    """
    if not isinstance(series, Mapping):
        raise TypeError(f"series must map names to values, got {type(series).__name__}.")
    if not 0 < len(series) <= _MOST_LINES:
        raise ValueError(
            f"series must have 1 to {_MOST_LINES} lines, which can be told apart, got {len(series)}. "
            "Draw more on several axes."
        )
    values = {name: np.atleast_2d(np.asarray(line, float)) for name, line in series.items()}
    lengths = {name: line.shape[-1] for name, line in values.items()}
    along = np.arange(1, 1 + max(lengths.values())) if x is None else np.asarray(x, float)
    if any(line.ndim != 2 for line in values.values()) or set(lengths.values()) != {along.size}:
        raise ValueError(
            f"series must have shape (k,) or (runs, k) with one k, that of x, {along.shape}, got "
            f"{ {name: np.shape(line) for name, line in series.items()} }."
        )
    axes = _prepared(axes)
    lines = []
    for index, (name, runs) in enumerate(values.items()):
        color = COLORS[index % len(COLORS)]
        dashes = DASHES[(index + index // len(COLORS)) % len(DASHES)]
        runs = np.ma.masked_array(runs, np.isnan(runs))
        mean = runs.mean(axis=0).filled(np.nan)
        marker = "o" if np.isfinite(mean).sum() == 1 else ""
        lines += axes.plot(along, mean, color=color, linestyle=dashes, marker=marker, label=name)
        if len(runs) > 1:
            deviation = runs.std(axis=0, ddof=1).filled(np.nan)
            axes.fill_between(
                along, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0
            )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    _name_at_ends(axes, lines)
    return axes


def data_map(
    dynamics: TrainingDynamics, wrong: ArrayLike | None = None, *, axes: Axes | None = None
) -> Axes:
    """The data map: a point per example, confidence above variability.

    Easy examples are at the top left, ambiguous ones on the right, and at the bottom left those that
    are never learned: where wrong labels gather.

    Args:
      dynamics: of :func:`optax_sam.diagnostics.training_dynamics`.
      wrong: bools, shape ``(n,)``, True where the label is wrong, if that is known.
      axes: where to draw; None makes a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if ``dynamics`` is not a :class:`optax_sam.diagnostics.TrainingDynamics`, or ``wrong``
        is not an array of bools.
      ValueError: if ``wrong`` does not have one value per example.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics, plots
      >>> recording = diagnostics.record_batch(
      ...     diagnostics.start_recording([0, 1]), jnp.eye(2), jnp.arange(2))
      >>> plots.data_map(diagnostics.training_dynamics(recording)).get_ylabel()
      'confidence in the label'

    References:
      Swayamdipta et al., Dataset Cartography, EMNLP 2020, arXiv 2009.10795, figure 1.
    """
    if not isinstance(dynamics, TrainingDynamics):
        raise TypeError(
            f"dynamics must come from training_dynamics(recording), got {type(dynamics).__name__}."
        )
    x, y = np.asarray(dynamics.variability), np.asarray(dynamics.confidence)
    kinds = {"": np.ones(x.shape, bool)}
    if wrong is not None:
        wrong = np.asarray(wrong)
        if wrong.dtype != bool:
            raise TypeError(
                f"wrong must be bools, got dtype {wrong.dtype}. Pass labels != true_labels, or "
                "wrong.astype(bool)."
            )
        if wrong.shape != x.shape:
            raise ValueError(f"wrong must have shape {x.shape}, got {wrong.shape}.")
        kinds = {"right labels": ~wrong, "wrong labels": wrong}
    axes = _prepared(axes)
    # Right ones are drawn first, so that the few wrong ones are seen.
    for index, (name, chosen) in enumerate(kinds.items()):
        axes.scatter(x[chosen], y[chosen], color=COLORS[index], marker="ox"[index], s=12, alpha=0.6)
        if name and chosen.any():
            height = (0.97, 0.03)[index]
            axes.text(
                0.98, height, f"{'●×'[index]} {name}", color=COLORS[index], ha="right",
                va=("top", "bottom")[index], transform=axes.transAxes,
            )  # fmt: skip
    axes.set(xlabel="variability", ylabel="confidence in the label", ylim=(-0.02, 1.02))
    return axes


def density(spectrum: Spectrum, *, width: float = 0.01, axes: Axes | None = None) -> Axes:
    """The density of the Hessian's eigenvalues, on a logarithmic scale.

    Args:
      spectrum: of :func:`optax_sam.diagnostics.hessian_spectrum`.
      width: of the Gaussian that stands for a point, as a share of the range of the eigenvalues and 0,
        above 0.
      axes: where to draw; None makes a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if ``spectrum`` is no :class:`optax_sam.diagnostics.Spectrum`.
      ValueError: if ``width`` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam import diagnostics, plots
      >>> points = diagnostics.Spectrum(jnp.array([[0.0, 9.0]]), jnp.array([[0.9, 0.1]]))
      >>> plots.density(points).get_xlabel()
      'eigenvalue of the Hessian'

    References:
      Ghorbani, Krishnan, Xiao, ICML 2019, arXiv 1901.10159, section 2.
    """
    if not isinstance(spectrum, Spectrum):
        raise TypeError(f"spectrum must come from hessian_spectrum, got {type(spectrum).__name__}.")
    if not width > 0:
        raise ValueError(f"width must be above 0, got {width!r}.")
    points, weights = (np.ravel(np.asarray(part, float)) for part in spectrum)
    extent = max(np.ptp(points), np.abs(points).max(), 1e-12)
    sigma = width * extent
    grid = np.linspace(points.min() - 5 * sigma, points.max() + 5 * sigma, 1000)
    bumps = np.exp(-0.5 * ((grid[:, None] - points) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    heights = bumps @ weights
    axes = _prepared(axes)
    axes.plot(grid, heights, color=COLORS[0])
    axes.set_yscale("log")
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.set_ylim(1e-7 * heights.max(), 3 * heights.max())
    return axes


def contours(
    losses: ArrayLike,
    first_positions: ArrayLike,
    second_positions: ArrayLike,
    *,
    arrows: Mapping[str, Sequence[float]] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Lines of equal loss on a plane, each with its value, and arrows from the origin.

    Args:
      losses: of :func:`optax_sam.diagnostics.loss_plane`, shape ``(k, m)``.
      first_positions: shape ``(k,)``, drawn to the right.
      second_positions: shape ``(m,)``, drawn upwards.
      arrows: name → the two coordinates of its end, such as g, ε and g′ in the plane; at most 5.
      axes: where to draw; None makes a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: if the shapes do not fit, or there are more than 5 arrows.

    Example:
      >>> import numpy as np
      >>> from optax_sam import plots
      >>> a = np.linspace(-1, 1, 5)
      >>> axes = plots.contours(a[:, None] ** 2 + a**2, a, a, arrows={"ε": (0.5, 0.5)})
      >>> "ε" in [text.get_text() for text in axes.texts]
      True
    """
    losses = np.asarray(losses, float)
    a, b = np.asarray(first_positions, float), np.asarray(second_positions, float)
    if losses.shape != (a.size, b.size) or min(losses.shape) < 2:
        raise ValueError(
            f"losses must have shape (k, m) of the positions, {(a.size, b.size)}, at least 2 each, got "
            f"{losses.shape}."
        )
    ends = dict(arrows or {})
    if len(ends) > len(COLORS):
        raise ValueError(f"arrows must be at most {len(COLORS)}, got {len(ends)}.")
    axes = _prepared(axes)
    axes.grid(False)
    drawn = axes.contour(a, b, losses.T, levels=10, colors=TEXT, linewidths=0.8)
    axes.clabel(drawn, fontsize=8)
    for color, (name, (x, y)) in zip(COLORS, ends.items(), strict=False):
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=(x, y), xytext=(0, 0), arrowprops=style)
        side = "left" if x >= 0 else "right"
        axes.annotate(
            name, (x, y), (4 if x >= 0 else -4, 4), textcoords="offset points", color=color, ha=side
        )
    return axes


def coordinate_bars(shares: Mapping[str, CoordinateShares], *, axes: Axes | None = None) -> Axes:
    """The sets A, B and C of the SANER paper as bars of 100 %, the letters inside.

    Args:
      shares: name → shares, for example ``{"all": s.all, "right": s.right, "wrong": s.wrong}`` of
        :func:`optax_sam.diagnostics.shares_by_label`.
      axes: where to draw; None makes a new figure.

    Returns:
      The axes.

    Raises:
      TypeError: if ``shares`` do not map names to :class:`optax_sam.diagnostics.CoordinateShares`.
      ValueError: if there are none.

    Example:
      >>> from optax_sam import diagnostics, plots
      >>> axes = plots.coordinate_bars({"all": diagnostics.CoordinateShares(0.5, 0.3, 0.2)})
      >>> [text.get_text() for text in axes.texts]
      ['A 50 %', 'B 30 %', 'C 20 %']
    """
    if not isinstance(shares, Mapping) or not all(
        isinstance(value, CoordinateShares) for value in shares.values()
    ):
        raise TypeError(f"shares must map names to CoordinateShares, got {type(shares).__name__}.")
    if not shares:
        raise ValueError("shares must have one entry at least, got {}.")
    axes = _prepared(axes)
    axes.grid(False)
    for row, value in enumerate(shares.values()):
        left = 0.0
        for letter, color, share in zip("ABC", COLORS, value, strict=False):
            size = 100 * float(share)
            axes.barh(row, size, left=left, height=0.7, color=color)
            # White on these colors is as legible as they are on white paper.
            text = f"{letter} {size:.0f} %" if size >= 13 else letter if size >= 4 else ""
            axes.text(
                left + size / 2, row, text, color="white", ha="center", va="center", fontsize=9,
                fontweight="bold",
            )  # fmt: skip
            left += size
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of coordinates, %")
    return axes


def _prepared(axes: Axes | None) -> Axes:
    """New axes, or the given ones, that can be read on white and on dark."""
    if axes is None:
        axes = Figure(figsize=_SIZE, layout="constrained", facecolor="none").subplots()
    axes.set_facecolor("none")
    axes.grid(True, color=TEXT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(TEXT)
    axes.tick_params(colors=TEXT, which="both", labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(TEXT)
    return axes


def _name_at_ends(axes: Axes, lines: list[Line2D]) -> None:
    """Writes each line's name beside its last point, moved apart where they would overlap."""
    figure: Any = axes.get_figure(root=True)
    figure.draw_without_rendering()  # the layout and the limits are known after it
    corner = axes.get_xlim()[1], axes.get_ylim()[0]  # for a line without any value
    points = [np.asarray(line.get_xydata()) for line in lines]
    ends = [[corner, *values[np.isfinite(values[:, 1])]][-1] for values in points]
    heights = [axes.transData.transform(end)[1] * 72 / figure.dpi for end in ends]
    sizes = [11.0 * (1 + str(line.get_label()).count("\n")) for line in lines]
    moved = np.array(heights)
    for x in {end[0] for end in ends}:  # only names that stand above each other can touch
        here = [index for index, end in enumerate(ends) if end[0] == x]
        moved[here] = _spread([heights[i] for i in here], [sizes[i] for i in here])
    for line, end, height, placed in zip(lines, ends, heights, moved, strict=True):
        axes.annotate(
            str(line.get_label()), end, (6, placed - height), textcoords="offset points",
            color=line.get_color(), va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _spread(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The heights in the same order, moved as little as needed for names of these sizes."""
    order = np.argsort(heights, kind="stable")
    ordered = np.asarray(sizes)[order]
    steps = np.append(0.0, np.cumsum((ordered[1:] + ordered[:-1]) / 2))
    # Sorted heights minus these steps must not fall: the nearest such sequence pools neighbors.
    blocks: list[list[float]] = []
    for index, step in zip(order, steps, strict=True):
        blocks.append([heights[index] - step])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    pooled = [float(np.mean(block)) for block in blocks for _ in block]
    placed = np.empty(len(order))
    placed[order] = np.asarray(pooled) + steps
    return [float(height) for height in placed]
