"""Pictures for people: which are chosen, that names can be read and stay inside, curves."""

import json
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from fewshot import show
from fewshot.data.annotations import make_record
from fewshot.data.detection import Detections, DetectionSet, open_detection

GREY = torch.full((3, 100, 150), 128, dtype=torch.uint8)


def ink(picture: torch.Tensor, color: tuple[int, int, int]) -> torch.Tensor:
    """Where a picture (3, H, W) has exactly this colour, (H, W)."""
    return (picture == torch.tensor(color, dtype=torch.uint8)[:, None, None]).all(0)


def test_names_stand_on_their_colour_inside_the_picture():
    orange, long = (
        (255, 165, 0),
        "a very long name of a class, longer than the whole picture is wide",
    )
    for box, name in (
        ((140.0, -5, 149, 3), "corner 0.97"),
        ((0.0, 90, 149, 99), "bottom"),
        ((-50.0, -50, 300, 300), "everything"),
        ((5.0, 40, 50, 70), long),
    ):
        drawn = show.boxes_on(GREY, torch.tensor([box]), [name], ["orange"], 200)
        assert drawn.shape == (3, 200, 300)
        label = ink(drawn, orange)
        rows = label.sum(1) > 20  # more than the box's two sides: its background
        assert rows.sum() >= 10 and (drawn[:, rows] == 0).any(), "black text on orange"
    # two boxes with the same corner have two names to be read
    two = torch.tensor([[20.0, 30, 120, 90], [20, 30, 110, 80]])
    drawn = show.boxes_on(GREY, two, ["one", "other"], ["orange", "royalblue"], 200)
    for alone, color in ((0, (0, 0, 0)), (1, (255, 255, 255))):  # of the text
        name, its = ["one", "other"][alone], ["orange", "royalblue"][alone]
        one = show.boxes_on(GREY, two[alone][None], [name], [its], 200)
        assert ink(drawn, color).sum() == ink(one, color).sum() > 0
    assert torch.equal(show.boxes_on(GREY, two[:0], [], [], 100), GREY)


def test_detections_show_novel_classes_first():
    dataset = open_detection("glyphs", "", part="test")
    dataset = dataset.with_records(dataset.records[:200])
    order = list(show._novel_first(dataset))
    assert sorted(order) == list(range(200)) and order == list(show._novel_first(dataset))
    for label, index in enumerate(order[:5], 15):  # of each novel class one
        assert label in dataset.records[index].labels
    novel = [bool((record.labels >= 15).any()) for record in dataset.records]
    assert [novel[i] for i in order] == sorted(novel, reverse=True)
    base = dataset.restrict(dataset.base)
    assert list(show._novel_first(base)) == list(range(200))
    assert list(show._novel_first(dataset.restrict(dataset.novel)))[:5] == order[:5]

    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    found = {
        r.id: Detections(r.boxes, np.linspace(0.2, 1, len(r.labels)), r.labels)
        for r in dataset.records[:190]
    }
    found |= {r.id: nothing for r in dataset.records[190:]}
    picture = show.detections(dataset, found, pictures=4, side=160)
    assert (
        isinstance(picture, Image.Image)
        and picture.width > 4 * 160
        and picture.height > 2 * 160 + 20
    )
    assert show.detections(dataset, found, pictures=4, side=160) == picture
    hard = [replace(r, difficult=np.ones_like(r.difficult)) for r in dataset.records]
    assert show.detections(dataset.with_records(hard[:1]), found).height > 320
    assert show.detections(base, {r.id: nothing for r in base.records}, pictures=1).width >= 640


def test_sheets_and_figures():
    results = [(torch.tensor([[5.0, 5, 50, 50]]), torch.tensor([0.9]), ["a"])] * 2
    assert len(show.found([GREY] * 2, results, ["a"]).axes) == 2
    assert (
        show.guesses([GREY], [{"a": 0.7, "b": 0.3}]).axes
        and show.captioned([GREY], ["a 70 %"]).width > 128
    )


def places(picture: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Where a picture has exactly this colour, (n, 2) rows and columns."""
    return np.argwhere((np.asarray(picture) == color).all(-1))


def test_shots_stand_by_class_in_their_surroundings():
    black = torch.zeros(3, 60, 90, dtype=torch.uint8)
    black[:, 20:40, 60:90] = torch.tensor([10, 200, 30], dtype=torch.uint8)[
        :, None, None
    ]  # the object, at the edge
    objects = [((60.0, 20, 90, 40), 1, False)] * 2
    records = [make_record("p", "", 90, 60, [*objects, ((0.0, 0, 9, 9), 0, False)])]

    class Drawn(DetectionSet):
        def image(self, index: int) -> torch.Tensor:
            return black

    dataset = Drawn("x", "train", ["cat", "emu", "gnu"], ["emu"], records, "coco")
    picture = show.shots(dataset, side=90)
    block = 22 + 98  # of a class: its name and a row of two
    assert picture.size == (3 * (192 + 4) + 4, block + 8)
    orange, blue = places(picture, (255, 165, 0)), places(picture, (65, 105, 225))
    assert orange[:, 1].min() > 196 and orange[:, 1].max() < 2 * 196, "emu's alone"
    assert ((blue[:, 1] < 196) | (blue[:, 1] > 2 * 196)).all() and (blue[:, 1] > 2 * 196).any(), (
        "gnu has its name too"
    )
    # the window is 45 pixels wide, shown twice as large, and reaches 7 pixels beyond the picture,
    # which is grey
    green = places(picture, (10, 200, 30))
    assert 2 * 20 * 2 * 30 * 2 * 0.7 < len(green) < 2 * 20 * 2 * 30 * 2, (
        "two objects, without their boxes' lines"
    )
    assert len(places(picture, (225, 225, 225))) > 2 * 14 * 90
    assert show.shots(dataset, most=1, side=90).width == 3 * 94 + 4


def test_confusion_can_be_read():
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(80)]
    for n in (1, 5, 25, 26, 80):
        matrix = rng.poisson(0.2, (n + 1, n + 1))
        matrix[0, 0], matrix[0, 1:] = 30, 0
        picture = show.confusion(matrix, names[:n], names[n - 1 : n])
        assert picture.width < 2000 and 0.8 < picture.width / picture.height < 1.3
        # the novel class's name is twice on orange, and the others on blue: at the left and at the
        # bottom
        orange, blue = places(picture, (255, 165, 0)), places(picture, (65, 105, 225))
        assert len(orange) > 100 and len(blue) >= 100 * (n - 1) and (n > 1 or not len(blue))
        assert np.ptp(orange[:, 1]) > 0.2 * picture.width / n
        # all of the first class is found, so its cell is black but for a number that only few
        # classes leave room for
        left = places(picture, (0, 0, 0))
        assert len(left) > (100 if n > 25 else 400)
    assert show.confusion(np.zeros((4, 4), int), names[:3], []).width > 300


def test_curves(tmp_path):
    log = tmp_path / "log.jsonl"
    show.curves(log, tmp_path / "none.png")
    log.write_text(
        "".join(
            json.dumps({"step": i, "loss": 1 / i, "lr": 0.1, "seconds": i}) + "\n"
            for i in range(1, 9)
        )
    )
    show.curves(log, tmp_path / "curves.png")
    assert not (tmp_path / "none.png").exists() and Image.open(tmp_path / "curves.png").width > 300
