"""Pictures: colors that everybody can tell apart on white and on dark; names that do not overlap."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from optax_sam import plots
from optax_sam.diagnostics import CoordinateShares, Spectrum, TrainingDynamics

WHITE, DARK = "#FFFFFF", "#131416"  # paper, and the dark page of the documentation

# Machado, Oliveira, Fernandes, IEEE TVCG 15, 2009: a color as seen without one kind of cones.
COLOR_VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear_rgb(color):
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(first, second):
    """WCAG's ratio of luminances."""
    darker, lighter = sorted(
        linear_rgb(color) @ [0.2126, 0.7152, 0.0722] for color in (first, second)
    )
    return (lighter + 0.05) / (darker + 0.05)


def lab(rgb):
    """CIELAB, in which distances are about what eyes see; 2.3 is just noticeable."""
    to_xyz = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", [WHITE, DARK])
def test_colors_stand_out(page):
    """3 : 1 is what WCAG asks of graphics; on white it is also that of white letters in bars."""
    assert min(contrast(color, page) for color in (*plots.COLORS, plots.TEXT)) > 3.4


@pytest.mark.parametrize("vision", COLOR_VISIONS)
def test_colors_are_apart(vision):
    seen = [lab(np.asarray(COLOR_VISIONS[vision]) @ linear_rgb(color)) for color in plots.COLORS]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0, 100, 50], [0, 100, 50]),  # nothing to do
        ([10, 10], [5, 15]),  # both give way
        ([40, 10, 11, 12], [40, 1, 11, 21]),
        ([0, 9, 18], [-1, 9, 19]),
    ],
)
def test_names_are_moved_apart_as_little_as_needed(heights, expected):
    assert plots._spread(heights, [10] * len(heights)) == pytest.approx(expected)


def test_curves_are_named_at_their_ends_and_differ_without_color():
    """Nine of them end within 1 % of the height."""
    series = {f"line {index}": [1.0, 0.001 * index] for index in range(10)}
    axes = plots.curves(series)
    figure = axes.figure
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list(series)
    for upper, lower in itertools.combinations(boxes, 2):
        assert not (upper.y0 < lower.y1 - 1 and lower.y0 < upper.y1 - 1)
    assert max(box.x1 for box in boxes) <= figure.bbox.x1 + 1
    assert all(
        text.get_color() == line.get_color()
        for text, line in zip(axes.texts, axes.lines, strict=True)
    )
    looks = {(line.get_color(), str(line._dash_pattern)) for line in axes.lines}
    assert len(looks) == 10
    assert figure.get_facecolor()[3] == axes.get_facecolor()[3] == 0  # transparent


def test_a_line_that_ends_early_has_its_name_there_and_names_may_have_two_lines():
    nan = float("nan")
    values = {"two\nlines": [3.0, 1.0, nan], "point": [nan, 1.0, nan], "c": [1.0, 1.0, 1.0]}
    axes = plots.curves(values | {"nothing": [nan] * 3})
    axes.figure.draw_without_rendering()
    assert [tuple(text.xy) for text in axes.texts[:3]] == [(2, 1), (2, 1), (3, 1)]
    assert [line.get_marker() for line in axes.lines] == ["", "o", "", ""]
    first, second = sorted(
        (text.get_window_extent() for text in axes.texts[:2]), key=lambda box: box.y0
    )
    assert first.y1 - 1 < second.y0
    assert axes.texts[2].xyann == (6, 0)  # no other name is above or below it


def test_curves_of_several_runs_have_their_mean_and_band():
    axes = plots.curves({"a": [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]}, [10, 20, 30])
    assert axes.lines[0].get_xydata().tolist() == [[10, 2], [20, 3], [30, 4]]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((2 - np.sqrt(2), 4 + np.sqrt(2)))


@pytest.mark.filterwarnings("error")
def test_a_run_without_a_value_leaves_mean_and_band_to_the_others():
    nan = float("nan")
    axes = plots.curves({"a": [[1.0, 2.0, nan], [3.0, 4.0, nan], [nan, nan, nan]]})
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2, 3, nan])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((2 - np.sqrt(2), 3 + np.sqrt(2)))


def test_draws_on_given_axes():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.curves({"a": [1.0]}, axes=left) is left
    bars = {"all": CoordinateShares(0.9, 0.07, 0.03)}
    assert plots.coordinate_bars(bars, axes=right) is right
    assert [text.get_text() for text in right.texts] == ["A 90 %", "B", ""]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in right.patches]
    assert np.array(ends) == pytest.approx(np.array([(0, 90), (90, 97), (97, 100)]))


def test_data_map_has_a_shape_for_each_kind():
    values = [np.array([0.1, 0.2, 0.3])] * 7
    axes = plots.data_map(TrainingDynamics(*values), np.array([True, False, False]))
    assert [len(points.get_offsets()) for points in axes.collections] == [2, 1]
    assert [text.get_text() for text in axes.texts] == ["● right labels", "× wrong labels"]


def test_density_has_the_weight_of_all_eigenvalues():
    spectrum = Spectrum(np.array([[-1.0, 0.0, 4.0]]), np.array([[0.2, 0.7, 0.1]]))
    x, y = plots.density(spectrum).lines[0].get_xydata().T
    assert np.trapezoid(y, x) == pytest.approx(1, rel=1e-3)
    assert x[y.argmax()] == pytest.approx(0, abs=0.02)
    assert np.trapezoid(y[x > 2], x[x > 2]) == pytest.approx(0.1, rel=1e-3)


def test_contours_have_the_first_direction_to_the_right():
    a, b = np.linspace(0, 1, 4), np.linspace(0, 5, 6)
    axes = plots.contours(np.tile(a[:, None], (1, 6)), a, b, arrows={"ε": (0.5, 2.0)})
    lines = axes.collections[0].get_paths()
    upright = [path.vertices for path in lines if len(path.vertices)]
    assert all(np.ptp(vertices[:, 0]) < 1e-9 for vertices in upright)
    assert {text.get_text() for text in axes.texts} >= {"ε"}
