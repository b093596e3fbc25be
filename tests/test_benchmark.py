"""scripts/benchmark.py: what it compares computes the same, so that the ratios are of speed alone."""

import json

import pytest
import torch
import tyro
from test_scripts import load

from fewshot import heads, trunks
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaRCNN

benchmark = load("benchmark")


def test_prototypes():
    torch.manual_seed(0)
    support, query = torch.randn(3, 5 * 2, 8), torch.randn(3, 7, 8)
    plain = [benchmark.plain_prototype(s, q, 2) for s, q in zip(support, query, strict=True)]
    assert torch.allclose(heads.prototype(support, query, 5), torch.stack(plain), atol=1e-4)


@pytest.mark.parametrize("method", [MetaRCNN, FSDetView])
@torch.no_grad()
def test_heads_of_detectors_beside_their_loop(method):
    torch.manual_seed(0)
    model = benchmark.with_prototypes(method(trunks.c4("small", meta=True), 6))
    queries = torch.rand(40, 256)
    for ours, plain in zip(model.classify(queries), benchmark.plain_meta_rcnn(model, queries), strict=True):
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
