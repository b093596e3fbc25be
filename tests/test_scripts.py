"""scripts/proposal_recall.py: what a detector's first stage proposes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import tyro

import fewshot
from fewshot import InputError, weights
from fewshot.data import detection
from fewshot.evaluation import average_precision


def load(name: str, folder: str = "scripts") -> ModuleType:
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


proposal_recall = load("proposal_recall")


def call(module: ModuleType, flags: str) -> None:
    module.main(tyro.cli(module.Args, args=flags.split()))


@pytest.mark.parametrize("recipe", ["tfa", pytest.param("attention_rpn", marks=pytest.mark.slow)])
def test_proposal_recall_of_a_run(recipe, tmp_path, capsys):
    quick = "--iters 2 --batch-size 2 --test-images 4 --workers 0 --stage base"
    call(load(recipe, "recipes"), f"{quick} --out {tmp_path}")
    capsys.readouterr()
    call(proposal_recall, f"{tmp_path / 'base'} --test-images 3 --workers 0")
    lines = capsys.readouterr().out.splitlines()
    assert "3 pictures" in lines[0] and lines[1].split() == ["base", "novel", "all"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(rows) == ["R100", "R300", "R1000"] and all(row[1] == "-" for row in rows.values())
    values = [float(row[0]) for row in rows.values()]
    assert (
        values == sorted(values) and values[-1] > 50
    )  # a thousand boxes of any kind cover most of a small picture

    model = fewshot.load(tmp_path / "base")
    model.network.rpn.test_proposals = 1000, 1000
    dataset = detection.open_detection("glyphs", "", part="test").restrict(model.classes)
    boxes = {}
    for i, record in enumerate(dataset.records[:3]):
        x = model.normalisation(dataset.image(i)[None])
        boxes[record.id] = model.network.propose(x, [x.shape[2:]])[0].numpy()
    wanted = average_precision.proposal_recall(
        boxes, dataset.with_records(dataset.records[:3]), inclusive_pixels=False
    )
    assert values == pytest.approx([round(wanted[key]["base"], 1) for key in rows], abs=0.06)


def test_proposal_recall_says_what_is_wrong(tmp_path):
    weights.save(tmp_path / "model.safetensors", torch.nn.Linear(2, 2), {"method": "none"})
    with pytest.raises(InputError, match="model of 'none'"):
        call(proposal_recall, f"{tmp_path}")
