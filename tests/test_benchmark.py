"""scripts/benchmark.py: what it compares computes the same, so that the ratios are of speed alone."""

import json
import re
from pathlib import Path

import pytest
import torch
import tyro
from test_scripts import load

from fewshot import heads
from fewshot.backbones import trunks
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.heads import transductive

load("plain_transductive")  # which the next imports
benchmark = load("benchmark")
METHODS = "simple_shot bd_cspn laplacian_shot tim_gd tim_adm alpha_tim pt_map logistic".split()


def test_prototypes():
    torch.manual_seed(0)
    support, query = torch.randn(3, 5 * 2, 8), torch.randn(3, 7, 8)
    plain = [benchmark.plain_prototype(s, q, 2) for s, q in zip(support, query, strict=True)]
    assert torch.allclose(heads.prototype(support, query, 5), torch.stack(plain), atol=1e-4)


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("name", METHODS)
def test_transductive_methods_beside_their_loop(name, shots):
    features = benchmark.features_of_classes(64).double()
    prepare, method, plain = benchmark.transductive_methods(features.mean((0, 1)))[name]
    tasks = features.flatten(0, 1), *benchmark.drawn_tasks(features, shots, 2)
    ours = benchmark.in_chunks(prepare, method, *tasks, chunk=2)
    assert ours.shape == (2, 75, 5) and ours.dtype == torch.float64
    tolerance = 5e-5 if name == "logistic" else 1e-10  # LBFGS stops early
    assert torch.allclose(
        ours, benchmark.one_by_one(prepare, plain, *tasks), rtol=0, atol=tolerance
    )
    start = benchmark.in_chunks(
        prepare, transductive.simple_shot, *tasks, chunk=2
    )  # where methods begin, not end
    assert (ours.argmax(2) != start.argmax(2)).any() == (name != "simple_shot")


def test_features_of_transductive_rows_are_realistic():
    features = benchmark.features_of_classes(640)
    assert (features >= 0).all() and torch.allclose(features.norm(dim=2), torch.tensor(1.0))
    prepare, method, _ = benchmark.transductive_methods(features.mean((0, 1)))["simple_shot"]
    labels = torch.arange(5).repeat_interleave(15)
    for shots, low, high in ((1, 0.4, 0.6), (5, 0.7, 0.9)):
        support, query = benchmark.drawn_tasks(features, shots, 50)
        assert all(
            len(set(s.tolist() + q.tolist())) == 5 * (shots + 15) for s, q in zip(support, query)
        )
        scores = benchmark.in_chunks(prepare, method, features.flatten(0, 1), support, query, 40)
        assert low < (scores.argmax(2) == labels).float().mean() < high


def test_chunks_are_those_of_the_recipes():
    recipes = [
        Path(load(name, "recipes").__file__) for name in ("logistic", "tim", "alpha_tim", "pt_map")
    ]
    of_recipes = {
        path.stem: int(re.search(r"tasks_at_once=(\d+)", path.read_text())[1]) for path in recipes
    }
    of_tim = of_recipes.pop("tim")
    assert of_recipes | {"tim_gd": of_tim, "tim_adm": of_tim} == benchmark.AT_ONCE
    for recipe in ("simple_shot", "bd_cspn", "laplacian_shot"):
        assert "tasks_at_once" not in Path(load(recipe, "recipes").__file__).read_text()
    assert [benchmark.tasks_at_once(640, shots) for shots in (1, 5)] == [40, 32]


@pytest.mark.parametrize("method", [MetaRCNN, FSDetView])
@torch.no_grad()
def test_heads_of_detectors_beside_their_loop(method):
    torch.manual_seed(0)
    model = benchmark.with_prototypes(method(trunks.c4("small", meta=True), 6))
    queries = torch.rand(40, 256)
    for ours, plain in zip(
        model.classify(queries), benchmark.plain_meta_rcnn(model, queries), strict=True
    ):
        assert plain.std() > 0 and torch.allclose(ours, plain, atol=1e-4)


def test_attention_rpn_beside_its_loop():
    torch.manual_seed(0)
    sizes = {"rpn_channels": 16, "relation_channels": 16, "test_proposals": (200, 20)}
    model = benchmark.with_prototypes(AttentionRPN(trunks.c4("small"), 3, **sizes))
    images = torch.randn(1, 3, 96, 128)
    (ours,) = model.detect(images, [(96, 128)])
    plain = benchmark.plain_attention_rpn(model, images, (96, 128))
    assert min(len(p.scores) for p in plain) > 0
    for k, wanted in enumerate(plain):
        mine = ours.labels == k
        assert torch.allclose(ours.scores[mine], wanted.scores, atol=1e-4)
        assert torch.allclose(ours.boxes[mine], wanted.boxes, atol=1e-2)


def test_rows_are_printed_and_kept(tmp_path, capsys):
    flags = f"detect --methods TFA --short 64 --long 64 --json {tmp_path / 'rows.json'}"
    benchmark.main(tyro.cli(benchmark.Args, args=flags.split()))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"].split(" / ")[0] for row in rows] == [
        "TFA: training, pictures of 64 x 64",
        *(f"TFA: testing {n} classes" for n in (1, 20, 80)),
    ]
    assert all(row["ours"] > 0 for row in rows)
    assert rows[2]["ratio"] == pytest.approx(rows[2]["ours"] / rows[2]["plain"])
    assert "testing 80 classes / one class" in capsys.readouterr().out


def test_rows_of_transductive_methods(tmp_path):
    path = tmp_path / "rows.json"
    benchmark.main(
        tyro.cli(
            benchmark.Args, args=f"transductive --methods bd_cspn --tasks 50 --json {path}".split()
        )
    )
    rows = json.loads(path.read_text())
    assert [row["name"] for row in rows] == [
        f"bd_cspn, {shots}-shot, 50 tasks / loop" for shots in (1, 5)
    ]
    assert all(row["ours"] > 0 and row["plain"] > 0 for row in rows)


@pytest.mark.parametrize("what", ["transductive", "detect"])
def test_an_unknown_method(what):
    with pytest.raises(SystemExit, match="no method 'nearest': choose from "):
        benchmark.main(tyro.cli(benchmark.Args, args=f"{what} --methods nearest".split()))
