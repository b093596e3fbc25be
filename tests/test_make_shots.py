"""scripts/make_shots.py: shots of several numbers and seeds as files that recipes read, and as
pictures.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from fewshot import InputError
from fewshot.data import detection, k_shot
from fewshot.data.detection import DetectionSet

spec = importlib.util.spec_from_file_location(
    "make_shots", Path(__file__).parents[1] / "scripts" / "make_shots.py"
)
make_shots = importlib.util.module_from_spec(spec)
sys.modules["make_shots"] = make_shots  # dataclasses look the module up
spec.loader.exec_module(make_shots)


def call(flags: str) -> None:
    make_shots.main(tyro.cli(make_shots.Args, args=flags.split()))


def objects(dataset: DetectionSet) -> set[tuple]:
    names = dataset.classes
    return {
        (names[i], r.id, *box)
        for r in dataset.records
        for i, box in zip(r.labels, r.boxes.tolist())
    }


@pytest.fixture(scope="module")
def glyphs() -> DetectionSet:
    return detection.open_detection("glyphs", "", part="train", split=2)


@pytest.fixture
def few(glyphs, monkeypatch) -> DetectionSet:
    """The first forty scenes and four classes, so that `all` is little and quickly shown."""
    few = glyphs.with_records(glyphs.records[:40]).restrict(
        ["glyph-03", "glyph-04", "glyph-10", "glyph-11"]
    )
    monkeypatch.setattr(make_shots.detection, "open_detection", lambda *args, **kwargs: few)
    return few


def test_shots_are_drawn_as_by_a_recipe_and_shown(glyphs, tmp_path, capsys):
    call(f"glyphs --split 2 --shots 1 2 --seeds 3 --out {tmp_path}")
    said = capsys.readouterr()
    assert (
        "20 objects, 1 of each class" in said.out + said.err
        and "40 objects, 2 of each" in said.out + said.err
    )
    path = tmp_path / "seed3" / "2shot.json"
    given, drawn = k_shot.choose_shots(glyphs, 2, 0, path), k_shot.select_shots(glyphs, 2, 3)
    assert [r.id for r in given.records] == [r.id for r in drawn.records] and objects(
        given
    ) == objects(drawn)
    with Image.open(path.with_suffix(".png")) as picture:
        assert np.array_equal(picture, make_shots.show.shots(drawn))
    path.with_suffix(".png").unlink()
    call(f"glyphs --split 2 --show {path}")
    assert path.with_suffix(".png").exists()


@pytest.mark.parametrize("layout", ["json", "txt", "coco"])
def test_each_layout_is_read_back_and_nested(few, tmp_path, capsys, layout):
    call(f"glyphs --split 2 --shots 1 3 all --seeds 0 7 --format {layout} --out {tmp_path}")
    said = capsys.readouterr()
    drawn = {}
    for seed in (0, 7):
        folder = tmp_path / f"seed{seed}"
        for k in (1, 3, "all"):
            place = folder / f"{k}shot.json" if layout == "json" else folder
            drawn[seed, k] = objects(k_shot.choose_shots(few, k, seed))
            read = objects(k_shot.choose_shots(few, k, seed, place))
            if layout != "txt" or k == "all":
                assert read == drawn[seed, k]
            else:  # which cannot say which of two objects on a picture is meant
                assert {row[:2] for row in read} <= {row[:2] for row in drawn[seed, k]} and len(
                    read
                ) == 4 * k
            assert (folder / f"{k}shot.png").exists()
        assert drawn[seed, 1] < drawn[seed, 3] < drawn[seed, "all"]
    assert drawn[0, 3] != drawn[7, 3] and drawn[0, "all"] == drawn[7, "all"]
    assert len(list(tmp_path.glob("seed7/*"))) == 3 + {"json": 3, "txt": 12, "coco": 12}[layout]
    assert ("hold more objects" in said.out + said.err) == (layout == "txt")


def test_one_layout_becomes_another(few, tmp_path):
    call(f"glyphs --split 2 --shots 3 --seeds 5 --out {tmp_path / 'a'}")
    given = tmp_path / "a" / "seed5" / "3shot.json"
    call(f"glyphs --split 2 --shots 3 --shot-lists {given} --format coco --out {tmp_path / 'b'}")
    call(
        f"glyphs --split 2 --shots 3 --shot-lists {tmp_path / 'b' / 'seed0'} --out {tmp_path / 'c'}"
    )
    first, last = (
        k_shot.load_shots(path, few) for path in (given, tmp_path / "c" / "seed0" / "3shot.json")
    )
    assert objects(first) == objects(last) == objects(k_shot.select_shots(few, 3, 5))


def test_classes_that_have_fewer_are_said(few, tmp_path, capsys):
    most = max(k_shot.counts(few))
    call(f"glyphs --split 2 --shots {most} --out {tmp_path}")
    said = "".join(capsys.readouterr())
    assert said.count("has only") == sum(n < most for n in k_shot.counts(few)) > 0
    assert f"{min(k_shot.counts(few))} to {most} of each class" in said


def test_what_cannot_be_drawn_is_named(few, tmp_path):
    for flags, words in [
        ("--shots 0", "--shots 0"),
        ("--seeds -1", "--seeds"),
        ("--shots", "--shots and --seeds"),
    ]:
        with pytest.raises(InputError, match=words):
            call(f"glyphs {flags} --out {tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
