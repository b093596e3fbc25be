"""scripts/: shots as files and pictures, finished runs as a table, what a detector's first stage proposes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import fewshot
from fewshot import InputError, evaluate, weights
from fewshot.data import detection, k_shot


def load(name: str, folder: str = "scripts") -> ModuleType:
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


make_shots, results, proposal_recall = load("make_shots"), load("results"), load("proposal_recall")


def call(module: ModuleType, flags: str) -> None:
    module.main(tyro.cli(module.Args, args=flags.split()))


def test_shots_are_drawn_as_by_a_recipe_and_shown(tmp_path, capsys):
    call(make_shots, f"glyphs --split 2 --shots 1 2 --seeds 3 --out {tmp_path}")
    said = capsys.readouterr()
    assert "20 objects, 1 of each class" in said.out + said.err and "40 objects, 2 of each" in said.out + said.err
    dataset = detection.open_detection("glyphs", "", part="train", split=2)
    path = tmp_path / "glyphs-split2" / "2shot-seed3.json"
    given, drawn = k_shot.choose_shots(dataset, 2, 0, path), k_shot.select_shots(dataset, 2, 3)
    assert [r.id for r in given.records] == [r.id for r in drawn.records]
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.size == (4 + 2 * 132, 4 + 20 * 132)  # two objects wide, twenty classes high
        pixels = np.asarray(picture.convert("RGB"))
    orange = (pixels == (255, 165, 0)).all(-1).any(1)
    assert orange[4 + 15 * 132 :].any() and not orange[: 4 + 15 * 132].any()  # novel classes come last
    path.with_suffix(".png").unlink()
    call(make_shots, f"glyphs --split 2 --show {path}")
    assert path.with_suffix(".png").exists()


def write(
    path: Path, method: str, seed: int, trained: dict, tested: dict, metrics: dict, id: str | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "method": method,
        "seed": seed,
        "trained": trained,
        "tested": tested,
        "id": id or str(path).replace("-", ""),
    }
    path.write_text(json.dumps({**metrics, "settings": settings}))


@pytest.fixture
def runs(tmp_path) -> Path:
    """A detector's base model and three seeds at 5 shots, one with another rate; a classifier twice; and a copy."""
    trained = {"dataset": "glyphs", "shots": 5, "lr": None}
    for name, seed, novel, lr in [("a", 0, 40.0, None), ("b", 1, 44.0, None), ("c", 2, 48.0, None), ("d", 0, 9.0, 0.5)]:
        protocol = {"dataset": "glyphs", "split": 1, "stage": "finetune", "trained_on": "base and novel classes"}
        result = {"AP50": {"base": 80.0, "novel": novel, "all": 70.0}, "protocol": protocol}
        path = tmp_path / "tfa" / name / "metrics.json"
        write(path, "tfa", seed, trained | {"lr": lr}, {"shots": 5}, result)
        (tmp_path / "copies" / name).mkdir(parents=True)
        (tmp_path / "copies" / name / "metrics.json").write_text(path.read_text())
    protocol = {"dataset": "glyphs", "split": 1, "stage": "base", "trained_on": "base classes"}
    result = {"AP50": {"base": 90.0, "all": 90.0}, "protocol": protocol}
    write(tmp_path / "tfa" / "base" / "metrics.json", "tfa", 0, trained, {"shots": 5}, result)
    for seed, accuracy in [(0, 60.0), (1, 62.0)]:
        shots = {"1": {"accuracy": accuracy, "ci95": 0.3}, "5": {"accuracy": 80.0, "ci95": 0.2}}
        result, tested = {"ways": 5, "tasks": 2000, "shots": shots}, {"ways": 5, "shots": [1, 5], "tasks": 2000}
        write(
            tmp_path / "proto" / f"seed{seed}" / "metrics.json", "proto_net", seed, {"dataset": "cub"}, tested, result
        )
    # the same run tested again in 20 ways
    result, tested = {**result, "ways": 20}, {**tested, "ways": 20}
    write(tmp_path / "twenty" / "test-0123abcd.json", "proto_net", 1, {"dataset": "cub"}, tested, result)
    return tmp_path


def test_seeds_are_averaged_and_settings_kept_apart(runs, capsys):
    call(results, f"{runs} --json {runs / 'rows.json'} --plot {runs / 'plot.png'}")  # copies count once
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    head = ["method", "data", "what", "seeds", "base", "novel", "all", "1-shot", "5-shot", "differing in"]
    assert cells[0] == head
    # t(1) = 12.71: two seeds say little. 62 - 61 = 1 = stdev / sqrt(2)
    assert cells[1][:4] == ["proto_net", "cub", "20-way tasks", "1"]
    assert cells[2] == ["proto_net", "cub", "5-way tasks", "2", "-", "-", "-", "61.0 ± 12.7", "80.0 ± 0.0"]
    assert cells[3] == ["tfa", "glyphs, split 1", "base training", "1", "90.0", "-", "90.0", "-", "-"]
    tuned = [line for line in cells if line[2] == "5 shots"]
    assert [line[3:7] for line in tuned] == [
        ["1", "80.0", "9.0", "70.0"],
        ["3", "80.0 ± 0.0", "44.0 ± 9.9", "70.0 ± 0.0"],  # 4.30 * 4 / sqrt(3)
    ]
    assert tuned[0][-1] == "lr 0.5"
    rows = json.loads((runs / "rows.json").read_text())
    assert len(rows) == 5 and rows[-1]["values"]["novel"] == pytest.approx([44, 4.30 * 4 / 3**0.5])
    assert (runs / "plot.png").stat().st_size > 5000
    call(results, f"{runs / 'proto' / 'seed0'} --markdown")
    assert "| proto_net | cub | 5-way tasks | 1 | 60.0 ± 0.3 | 80.0 ± 0.2 |  |" in capsys.readouterr().out


def test_results_says_what_is_wrong(runs, tmp_path):
    for flags, words in [(f"{runs / 'nothing'}", "no finished run"), (f"{runs / 'tfa'} --metric AP99", "AP99")]:
        with pytest.raises(InputError, match=words):
            call(results, flags)
    (runs / "tfa" / "a" / "metrics.json").write_text('{"AP50": {}}')
    with pytest.raises(InputError, match="not a result with its settings"):
        call(results, f"{runs}")


@pytest.mark.parametrize("recipe", ["tfa", "attention_rpn"])
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
    assert values == sorted(values) and values[-1] > 50  # a thousand boxes of any kind cover most of a small picture

    model = fewshot.load(tmp_path / "base")
    model.network.rpn.test_proposals = 1000, 1000
    dataset = detection.open_detection("glyphs", "", part="test").restrict(model.classes)
    boxes = {}
    for i, record in enumerate(dataset.records[:3]):
        x = model.normalisation(dataset.image(i)[None])
        boxes[record.id] = model.network.propose(x, [x.shape[2:]])[0].numpy()
    wanted = evaluate.proposal_recall(boxes, dataset.with_records(dataset.records[:3]), inclusive_pixels=False)
    assert values == pytest.approx([round(wanted[key]["base"], 1) for key in rows], abs=0.06)


def test_proposal_recall_says_what_is_wrong(tmp_path):
    weights.save(tmp_path / "model.safetensors", torch.nn.Linear(2, 2), {"method": "none"})
    with pytest.raises(InputError, match="model of 'none'"):
        call(proposal_recall, f"{tmp_path}")
