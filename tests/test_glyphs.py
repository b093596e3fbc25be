import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest

from fewshot import InputError
from fewshot.data import glyphs
from fewshot.data.glyphs import glyph, scene

CLASSES = range(40, 60)


def test_a_glyph_is_a_function_of_its_arguments_alone():
    jobs = [(class_id, seed, index) for class_id in (0, 7) for seed in (0, 1) for index in (0, 1)]
    first = {job: glyph(*job).tobytes() for job in jobs}
    assert len(set(first.values())) == len(jobs)
    assert {job: glyph(*job).tobytes() for job in reversed(jobs)} == first
    picture = glyph(7, 0, 0, size=28)
    assert picture.shape == (28, 28, 3) and picture.dtype == np.uint8


def test_a_fresh_process_draws_the_same():
    code = (
        "import zlib; from fewshot.data.glyphs import glyph, scene;"
        "print(zlib.crc32(glyph(7, 3, 5)), zlib.crc32(scene(range(40, 60), 3, 5).draw()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == [
        str(zlib.crc32(glyph(7, 3, 5))),
        str(zlib.crc32(scene(CLASSES, 3, 5).draw())),
    ]


def test_programs_and_layouts_never_change():
    """Stored numbers: a trained model would be worthless if a release changed the classes or the
    pictures.
    """
    program = [
        [[0.4715, 0.9825], [-1.1738, 0.2393], [0.6481, -0.8142], [0.4715, 0.9825]],
        [[0.4715, 0.9825], [0.6413, 0.9978], [0.8163, 1.0135], [0.9861, 1.0287]],
        [[0.4715, 0.9825], [0.6690, 0.8007], [0.8724, 0.6134], [1.0698, 0.4315]],
    ]
    np.testing.assert_allclose(glyphs._program(7), program, atol=1e-4)
    boxes = [
        [66.5455, 91.5188, 120.272, 130.624],
        [115.4309, 56.0898, 156.7821, 114.1051],
        [13.1134, 69.876, 42.4765, 100.9951],
        [100.2505, 0.1256, 139.4088, 33.6835],
        [86.3895, 37.9413, 111.8214, 79.0939],
        [7.0074, 11.6482, 33.9203, 46.7612],
    ]
    layout = scene(range(20), 3, 11)
    np.testing.assert_allclose(layout.boxes, boxes, atol=1e-3)
    assert layout.labels.tolist() == [4, 0, 2, 8, 5, 0]


def test_layouts_are_what_they_say():
    layouts = [scene(CLASSES, 0, index) for index in range(400)]
    boxes = np.concatenate([layout.boxes for layout in layouts])
    labels = np.concatenate([layout.labels for layout in layouts])
    assert boxes.dtype == np.float32 and labels.dtype == np.int64
    assert {len(layout.labels) for layout in layouts} == {1, 2, 3, 4, 5, 6}
    assert all(len(s.boxes) == len(s.labels) == len(s.strokes) == len(s.widths) for s in layouts)
    assert set(labels.tolist()) == set(range(20))
    assert boxes.min() >= 0 and boxes.max() <= 160
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert sides.min() >= 28 - 1e-3 and sides.max() <= 80 + 1e-3
    # Half of a log-uniform lies below the geometric mean; crowding takes some of the large ones
    # away.
    assert 0.45 < (sides < np.sqrt(28 * 80)).mean() < 0.6


def test_glyphs_of_a_scene_hardly_overlap():
    for index in range(100):
        boxes = scene(CLASSES, 1, index).boxes
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
        shared = (high - low).clip(0).prod(-1)  # (n, n), the areas on the diagonal
        areas = np.diag(shared).copy()
        np.fill_diagonal(shared, 0)
        assert (shared <= 0.1 * np.minimum(areas[:, None], areas) + 1e-2).all()


@pytest.mark.parametrize("index", range(6))
def test_boxes_hold_exactly_the_ink(index):
    """Drawn without one glyph, a scene differs from the whole one inside that glyph's box, and up
    to its borders.
    """
    layout = scene(CLASSES, 2, index)
    whole = layout.draw().astype(int)
    for i, box in enumerate(layout.boxes):
        # Only strokes on top of it could hide a glyph's ink, so the later ones go from both
        # pictures.
        strokes = layout.strokes[: i + 1]
        with_it = replace(layout, strokes=strokes).draw().astype(int)
        without = replace(layout, strokes=strokes[:i]).draw().astype(int)
        ys, xs = np.nonzero(np.abs(with_it - without).max(-1) > 30)
        ink = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        np.testing.assert_allclose(ink, box, atol=1.5)
    assert (with_it == whole).all()


def test_drawing_leaves_the_layout_alone():
    layout, drawn = scene(CLASSES, 4, 9), scene(CLASSES, 4, 9)
    picture = drawn.draw()
    assert picture.shape == (160, 160, 3) and picture.dtype == np.uint8
    assert (drawn.draw() == picture).all()
    assert (drawn.boxes == layout.boxes).all() and (drawn.labels == layout.labels).all()
    assert (scene(CLASSES, 4, 10).draw() != picture).any()


def test_a_larger_scene_is_the_same_scene():
    small, large = scene(CLASSES, 5, 0), scene(CLASSES, 5, 0, size=320)
    np.testing.assert_allclose(large.boxes, 2 * small.boxes, rtol=1e-5)
    assert large.draw().shape == (320, 320, 3)


def test_ink_stands_out_from_paper():
    for class_id in range(100):
        grey = glyph(class_id, 0, 0).mean(-1)
        paper = np.median(grey)
        ink = np.abs(grey - paper).max()
        assert ink > 0.7 * glyphs.CONTRAST


def _vector(picture: np.ndarray) -> np.ndarray:
    """Grey pixels of unit norm with the paper at zero and the ink, which is the rarer of the two,
    positive.
    """
    grey = picture.mean(-1).ravel()
    grey = grey - np.median(grey)
    return grey * np.sign((grey**3).sum()) / np.linalg.norm(grey)


def test_classes_can_be_told_apart_by_their_mean_picture():
    """No learning at all, raw pixels: 5 % and 1 % would be chance, 60 to 68 % and 43 to 47 % are
    usual.
    """
    classes = range(100)
    means = np.stack(
        [np.mean([_vector(glyph(c, 0, i, 28)) for i in range(12)], 0) for c in classes]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    fresh = np.stack(
        [[_vector(glyph(c, 1, i, 28)) for i in range(4)] for c in classes]
    )  # (100, 4, 784)
    truth = np.arange(100)[:, None]
    assert ((fresh @ means.T).argmax(-1) == truth).mean() > 0.35
    assert ((fresh[:20] @ means[:20].T).argmax(-1) == truth[:20]).mean() > 0.5
    similarity = means @ means.T - np.eye(100)
    assert similarity.max() < 0.95


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: scene([], 0, 0), "class_ids"),
        (lambda: glyph(0, -1, 0), "seed -1"),
        (lambda: glyph(0, 0, 0, size=8), "size 8"),
    ],
)
def test_bad_arguments_are_named(call, names):
    with pytest.raises(InputError, match=names):
        call()


def test_the_picture_of_the_readme():
    picture = glyphs.picture()
    assert picture.size == (1000, 420) and picture.mode == "RGB"
