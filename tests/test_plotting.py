"""Pictures: frames differ where shapes do, text dots lie where points do, sheets have their size."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from prefenv import plotting
from prefenv.tasks.shapes import Shapes

TASK = Shapes()


@pytest.fixture
def shapes():
    x, _ = TASK.data(9, torch.Generator().manual_seed(0))
    return x.numpy()


def dots(text):
    """Dots of a braille picture, as (row, column); Unicode numbers a cell's 1 2 3 7 and 4 5 6 8, downwards."""
    bits = {
        (r, c): 1 << (n - 1)
        for c, col in enumerate(("1237", "4568"))
        for r, n in enumerate(map(int, col))
    }
    return {
        (4 * i + r, 2 * j + c)
        for i, line in enumerate(text.split("\n"))
        for j, char in enumerate(line)
        for (r, c), bit in bits.items()
        if (ord(char) - 0x2800) & bit
    }


def test_frames_are_pictures_and_differ_between_shapes(shapes):
    frames = [plotting.frame(TASK, x) for x in shapes]
    for frame in frames:
        assert frame.dtype == np.uint8
        assert frame.shape == (128, 128, 3)
        assert frame.flags.owndata
    assert len({f.tobytes() for f in frames}) == len(frames)
    np.testing.assert_array_equal(plotting.frame(TASK, shapes[0]), frames[0])
    assert plotting.frame(TASK, shapes[0], pixels=64).shape == (64, 64, 3)
    green = plotting.frame(TASK, shapes[0], plotting.GREEN).astype(int)
    red = frames[0].astype(int)
    assert (green[..., 1] - green[..., 0]).max() > 50
    assert (red[..., 0] - red[..., 1]).max() > 50


def test_text_dots_lie_where_the_points_do():
    """Corners, middle, and a point outside, on a grid of 48 x 48 dots over [-2.6, 2.6]^2, y upwards."""
    points = np.array([[-2.6, 2.6], [2.6, 2.6], [-2.6, -2.6], [2.6, -2.6], [0.1, -0.1], [3, 0]])
    text = plotting.text(TASK, points)
    lines = text.split("\n")
    assert (len(lines), {len(line) for line in lines}) == (12, {24})
    assert dots(text) == {(0, 0), (0, 47), (47, 0), (47, 47), (24, 24)}


def test_text_of_a_shape_has_a_dot_for_every_point(shapes):
    step = 5.2 / 47
    for x in shapes:
        found = dots(plotting.text(TASK, x))
        assert 32 < len(found) <= 64
        nearest = {(round((2.6 - y) / step), round((u + 2.6) / step)) for u, y in x.tolist()}
        assert found == nearest
    assert dots(plotting.text(TASK, np.full((64, 2), 9.0))) == set()


def test_a_sheet_has_a_row_for_each_group_and_a_cell_for_each_sample(shapes):
    sheet = plotting.sheet(
        TASK, [shapes[:4], shapes[4:9]], [plotting.RED, plotting.GREEN], ["model A", "model B"]
    )
    assert len(sheet.axes) == 9
    np.testing.assert_allclose(sheet.get_size_inches(), (1 + 5 * 0.85, 2 * 0.85))
    assert [text.get_text() for text in sheet.texts] == ["model A", "model B"]
    boxes = np.array([axes.get_position().bounds for axes in sheet.axes])
    np.testing.assert_allclose(boxes[:4, 1], 0.5)
    np.testing.assert_allclose(boxes[4:, 1], 0, atol=1e-12)
    assert (np.diff(boxes[4:, 0]) > 0).all()
    assert len({axes.get_window_extent().bounds for axes in sheet.axes}) == 9
    plain = plotting.sheet(TASK, [shapes[:2]], [plotting.BLUE])
    np.testing.assert_allclose(plain.get_size_inches(), (1.7, 0.85))
    assert not plain.texts


def test_long_labels_lie_within_the_sheet_and_off_the_samples(shapes):
    sheet = plotting.sheet(TASK, [shapes[:2]] * 2, ["r", "g"], ["learned-reward", "m" * 30])
    FigureCanvasAgg(sheet).draw()
    for text, axes in zip(sheet.texts, sheet.axes[::2], strict=True):
        box = text.get_window_extent()
        assert 0 < box.x0 < box.x1 < axes.get_window_extent().x0


@pytest.mark.parametrize(
    ("n", "rows"), [(1, [1]), (2, [2]), (3, [2, 1]), (4, [2, 2]), (16, [4] * 4), (7, [3, 3, 1])]
)
def test_a_grid_is_nearly_square_and_loses_nothing(n, rows):
    samples = np.arange(n)
    grid = plotting.grid(samples)
    assert [len(row) for row in grid] == rows
    np.testing.assert_array_equal(np.concatenate(grid), samples)


def test_the_style_ends_with_its_block():
    before = matplotlib.rcParams["axes.spines.top"]
    with plotting.style():
        assert not matplotlib.rcParams["axes.spines.top"]
    assert matplotlib.rcParams["axes.spines.top"] == before


@pytest.mark.parametrize("backend", ["agg", "svg"])
def test_a_window_without_a_screen_is_silent(backend, shapes, recwarn):
    import matplotlib.pyplot as plt

    before = plt.get_backend()
    plt.switch_backend(backend)
    try:
        window = plotting.Window()
        window.draw(TASK, shapes[:1])
        window.draw(TASK, shapes)
        assert len(window._figure.axes) == 9
        assert len(plt.get_fignums()) == 1
        window.close()
        window.close()
        assert not plt.get_fignums()
    finally:
        plt.switch_backend(before)
    assert not recwarn.list
