"""The same pictures from COCO's format as from their own: equal sets, and recipes that train on
them.
"""

import json
from pathlib import Path

import coco_format
import numpy as np
import pytest
from runs import run_here

from fewshot.data import detection
from fewshot.data.annotations import VOC_NOVEL

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Glyph scenes on disk."""
    folder = tmp_path_factory.mktemp("scenes")
    for part, number in (("train", 80), ("test", 6)):
        whole = detection.open_detection("glyphs", "", part=part)
        coco_format.write(whole.with_records(whole.records[:number]), folder)
    return folder


@pytest.mark.parametrize("recipe", ["meta_rcnn", "tfa"])
def test_recipes_train_on_ones_own_data(recipe, folder, tmp_path):
    novel = " ".join(f"glyph-{i}" for i in range(15, 20))
    flags = f"--dataset {folder} --novel-classes {novel} --backbone small --short 160 --long 160 --shots 1 --iters 2"
    run_here(recipe, f"{flags} --batch-size 2 --rois 8 --out {tmp_path}")
    metrics = json.loads((tmp_path / "1shot-seed0" / "metrics.json").read_text())
    assert set(metrics["AP"]) == {"base", "novel", "all"} and {"AP75", "APs", "AR100"} <= set(
        metrics
    )
    assert metrics["protocol"]["dataset"] == str(folder)


@pytest.mark.skipif(not (DATA / "VOCdevkit").is_dir(), reason="needs the VOC pictures")
def test_voc_in_cocos_format_is_the_same(tmp_path):
    voc = detection.open_detection("voc", DATA, part="test")
    voc = voc.with_records(voc.records[:40])
    coco_format.write(voc, tmp_path)
    own = detection.open_detection(str(tmp_path), "", part="test", novel=VOC_NOVEL[1].split())
    assert own.base == voc.base and sorted(own.novel) == sorted(voc.novel) and own.metric == "coco"
    names = [[s.classes[i] for i in r.labels] for s in (voc, own) for r in s.records]
    assert names[:40] == names[40:]
    for a, b in zip(voc.records, own.records):
        assert np.allclose(a.boxes, b.boxes, atol=1e-3) and (a.difficult == b.difficult).all()
    assert voc.image(0).equal(own.image(0))
