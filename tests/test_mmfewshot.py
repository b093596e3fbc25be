"""Checkpoints of mmfewshot, built by the naming rule under its names: converted, loaded, and equal
to its results.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_goldens import SIZE, check_detections
from naming_rule import GAINS, boxes, close, golden, image, rgb_input, weight
from safetensors.torch import load_file
from test_heads import EPISODES, WAYS, episode

import fewshot
from fewshot import InputError, weights
from fewshot.convert import mmfewshot
from fewshot.data.annotations import COCO_NOVEL, VOC_CLASSES, VOC_NOVEL
from fewshot.data.detection import Detections
from fewshot.inference import Found

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_mmfewshot.py"
NOVEL = VOC_NOVEL[1].split()
VOC = tuple(name for name in VOC_CLASSES if name not in NOVEL) + tuple(NOVEL)


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("convert_mmfewshot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "convert_mmfewshot", module)
    spec.loader.exec_module(module)
    return module


def detector_checkpoint(case: str, path: Path) -> dict:
    """A detector's checkpoint as the reference would save it, with its second names of tensors; the
    golden file.
    """
    stored = golden(case)
    gains = stored.get("gains", GAINS)
    state = {
        key: torch.from_numpy(weight(key, shape, gains)) for key, shape in stored["state"].items()
    }
    supports = ("attention_rpn", "meta_rcnn", "meta_rcnn_r101_15", "fsdetview", "vfa")
    for key in list(state):
        if key.startswith("backbone.") and case in supports:
            state[f"support_{key}"] = state[key]
    names = VOC[: stored["num_classes"]]
    meta = {
        "CLASSES": names,
        "iter": 100,
        "model_init_ann_cfg": [{"boxes": np.zeros((2, 4), np.float32)}],
    }
    torch.save({"meta": meta, "state_dict": state}, path)
    return stored


def as_reference(found: Found, classes: list[str]) -> Detections:
    return Detections(
        found.boxes, found.scores, torch.tensor([classes.index(name) for name in found.names])
    )


# of Meta R-CNN's kind one is converted by default
KIN = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("meta_rcnn_r101_15", "fsdetview", "vfa")
]


@pytest.mark.parametrize("case", ["tfa", "fsce", "mpsr", "attention_rpn", "meta_rcnn", *KIN])
def test_detectors(case, tmp_path, script, capsys):
    stored = detector_checkpoint(case, tmp_path / "model.pth")
    script.main(script.Args(tmp_path / "model.pth"))
    said = capsys.readouterr().out
    model = fewshot.load(tmp_path / "model.safetensors")
    assert model.method == case.removesuffix("_r101_15") and f"resnet{stored['depth']}" in said
    assert model.classes == list(VOC[: stored["num_classes"]])
    assert model.about["novel"] == (NOVEL if stored["num_classes"] == 20 else [])
    expected, query = stored["test"], image("query0", *SIZE)
    if "support_order" in expected:
        with pytest.raises(InputError, match="no supports yet"):
            model.predict(query, size="keep")
        side, low = (320, 96) if case == "attention_rpn" else (224, 60)
        pictures, places, labels = [], [], []
        for c, s in expected["support_order"]:
            pictures.append(image(f"support_c{c}_s{s}", side, side))
            places.append(boxes(f"supbox_c{c}_s{s}", 1, side, side, lo=low, hi=0.9)[0])
            labels.append(VOC[c])
        model.support(pictures, places, labels, size="keep")
    found = as_reference(model.predict(query, size="keep"), list(VOC))
    wanted = expected["det_e2e"]
    if case == "attention_rpn":  # up to a hundred boxes of every class
        counts = torch.bincount(found.labels, minlength=5).tolist()
        assert counts == wanted["per_class"][:5]
        top = torch.tensor(wanted["top"])
        assert torch.allclose(found.scores[: len(top)], top[:, 1], atol=1e-4)
        assert torch.allclose(found.boxes[: len(top)], top[:, 2:], atol=0.05)
    else:
        check_detections(found, wanted)


BACKBONES = {
    "conv4": "conv4",
    "conv4_nopool": "conv4",
    "resnet12": "resnet12",
    "resnet12_map": "resnet12",
}
BACKBONES |= {"wrn28x10": "wrn28_10"}


def classifier_checkpoint(path: Path, backbone: str, head: dict[str, list[int]], **meta) -> dict:
    """A classifier's checkpoint; the golden case of its backbone."""
    stored = golden("cls_backbones")[backbone]
    shapes = {f"backbone.{key}": shape for key, shape in stored["state"].items()}
    shapes |= {f"head.{key}": shape for key, shape in head.items()}
    state = {f"module.{key}": torch.from_numpy(weight(key, shape)) for key, shape in shapes.items()}
    state["module.device_indicator"] = torch.empty(0)
    torch.save({"meta": meta, "state_dict": state}, path)
    return stored


HEADS = {  # method -> (backbone, head, meta)
    "baseline": (
        "resnet12",
        {"fc.weight": [64, 640], "fc.bias": [64]},
        {"config": "model = dict(type='Baseline')"},
    ),
    "baseline_plus": ("conv4", {"fc.weight_g": [100, 1], "fc.weight_v": [100, 1600]}, {}),
    "neg_margin": ("wrn28x10", {"weight": [100, 640]}, {}),
    "proto_net": ("conv4", {}, {"config": "model = dict(type='ProtoNet')"}),
    "matching_net": ("resnet12", {}, {"config": "model = dict(type='MatchingNet')"}),
    "relation_net": ("conv4_nopool", None, {}),
    "meta_baseline": ("resnet12", {"temperature": []}, {}),
    "maml": (
        "conv4",
        {"fc.weight": [5, 1600], "fc.bias": [5]},
        {"config": "model = dict(type='MAML')"},
    ),
}


@pytest.mark.parametrize("method", HEADS)
@torch.no_grad()
def test_classifiers(method, tmp_path, script):
    backbone, head, meta = HEADS[method]
    cases = golden("cls_metric_heads")
    if head is None:
        head = cases["relation_net_5way_1shot"]["state"]
    stored = classifier_checkpoint(
        tmp_path / "model.pth", backbone, head, CLASSES=("a", "b"), **meta
    )
    script.main(script.Args(tmp_path / "model.pth"))
    model = fewshot.load(tmp_path / "model.safetensors")
    assert model.method == method and model.about["args"]["backbone"] == BACKBONES[backbone]
    pictures = [image(f"cls{i}", 84, 84) for i in range(stored["eval"]["shape"][0])]
    x = model.transformed([torch.from_numpy(p).permute(2, 0, 1) for p in pictures], "keep")
    assert torch.allclose(x, rgb_input(*pictures), atol=1e-5)
    if method != "maml":  # whose norms never use the statistics that a checkpoint has
        close(model.network.features(x), stored["eval"], 1e-5)
    state = load_file(tmp_path / "model.safetensors")
    assert len([key for key in state if key.startswith("head.")]) == len(head)

    for name, case in cases.items():  # the metric heads' probabilities on given features
        shape = EPISODES[case["episode"].split("_")[1]]
        fits = shape[1:] == (19, 19) if method == "relation_net" else True
        if name.rsplit("_", 2)[0] == method and fits:
            support, query, _ = episode(case)
            shots = support.shape[1] // WAYS
            model.adapt(support[0], [range(w * shots, (w + 1) * shots) for w in range(WAYS)])
            logits = model.classify(query[0])
            probabilities = (
                logits.exp() if method == "matching_net" else logits
            )  # the reference's second softmax
            close(probabilities.softmax(1), case["query_prob_eval"], 1e-5)


def test_maml_adapts(tmp_path):
    stored = golden("cls_maml")["84_second_order"]
    state = {key: torch.from_numpy(weight(key, shape)) for key, shape in stored["state"].items()}
    torch.save(
        {"state_dict": state, "meta": {"config": "model = dict(type='MAML', backbone=...)"}},
        tmp_path / "m.pth",
    )
    converted = mmfewshot.convert(*mmfewshot.read(tmp_path / "m.pth"))
    weights.save_state(tmp_path / "m.safetensors", converted.state, converted.about)
    model = fewshot.load(tmp_path / "m.safetensors")
    model.support([image(f"maml_s{k}", 84, 84) for k in range(5)], list("abcde"), size="keep")
    expected = stored["meta_test_query_prob_5_steps"]
    guesses = model.predict(
        [image(f"maml_q{k}", 84, 84) for k in range(len(expected))], size="keep"
    )
    close([list(guess.probabilities.values()) for guess in guesses], expected, 1e-4)


def test_what_a_checkpoint_may_say_and_lack(tmp_path, script):
    """Each line is an error with the way out of it, and leaves no file."""
    path = tmp_path / "unknown.pth"
    classifier_checkpoint(path, "conv4", {})
    with pytest.raises(InputError, match="proto_net or matching_net: say which"):
        script.main(script.Args(path))
    script.main(script.Args(path, method="proto_net", out=tmp_path / "proto.safetensors"))
    assert fewshot.load(tmp_path / "proto.safetensors").about["args"]["distance"] == "euclidean"
    classifier_checkpoint(tmp_path / "proto-net_conv4_1xb105_cub_5way-1shot_x.pth", "conv4", {})
    script.main(script.Args(tmp_path / "proto-net_conv4_1xb105_cub_5way-1shot_x.pth"))

    classifier_checkpoint(path, "conv4", {"temperature": [], "strange": [3]})
    with pytest.raises(InputError, match=r"head\.strange does not belong"):
        script.main(script.Args(path))
    classifier_checkpoint(path, "conv4", {"temperature": [2]})
    with pytest.raises(InputError, match=r"head\.temperature is \(2,\)"):
        script.main(script.Args(path))
    with pytest.raises(InputError, match="is a classifier, and 'tfa' is none of"):
        script.main(script.Args(path, method="tfa"))
    with pytest.raises(
        InputError, match="is a classifier, and 'feat' is none of"
    ):  # ours, but not mmfewshot's
        script.main(script.Args(path, method="feat"))
    assert not (tmp_path / "unknown.safetensors").exists()
    for content, message in (
        ([1, 2], "holds a list"),
        ({"state_dict": {}}, "no state dict"),
        (Path("x"), "would run"),
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=message):
            mmfewshot.read(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"unknown\.pth"):
        mmfewshot.read(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        mmfewshot.read(tmp_path / "none.pth")


def test_a_vfa_checkpoint_has_all_its_tensors_and_no_others(tmp_path):
    path = tmp_path / "vfa_r101_c4_8xb4_voc-split1_10shot-fine-tuning_iter_2000.pth"
    detector_checkpoint("vfa", path)
    state, meta = mmfewshot.read(path)
    converted = mmfewshot.convert(state, meta)
    assert converted.about["method"] == "vfa" and converted.about["novel"] == NOVEL
    assert converted.about["pictures"] == {"short": 800, "long": 1333, "multiple": 32}
    # five linear layers and two norms, whose statistics count
    assert len([key for key in converted.state if key.startswith("vae.")]) == 5 * 2 + 2 * 5
    with pytest.raises(
        InputError, match=r"roi_head\.vae\.prior\.weight in checkpoint is no part of vfa"
    ):
        mmfewshot.convert(state | {"roi_head.vae.prior.weight": torch.zeros(1)}, meta)
    del state["roi_head.vae.fc_var.bias"]
    with pytest.raises(InputError, match=r"vae\.log_variance\.bias"):
        mmfewshot.convert(state, meta)


def test_class_names_of_detectors(tmp_path):
    detector_checkpoint("tfa", tmp_path / "m.pth")
    state, _ = mmfewshot.read(tmp_path / "m.pth")
    with pytest.raises(
        InputError, match="names of its 20 classes are not in the file: give --split"
    ):
        mmfewshot.convert(state, {})
    about = mmfewshot.convert(state, {}, split=2).about
    assert (
        about["novel"] == about["classes"][15:] == VOC_NOVEL[2].split()
        and about["base"] == about["classes"][:15]
    )
    with pytest.raises(InputError, match="2 class names for a model of 20"):
        mmfewshot.convert(state, {}, classes=["a", "b"])
    assert mmfewshot.convert(state, {"CLASSES": VOC}, "fsce_r101_fpn_voc").about["method"] == "fsce"
    assert len(mmfewshot.COCO_CLASSES) == 80 and set(COCO_NOVEL) < set(mmfewshot.COCO_CLASSES)
    state["support_backbone.conv1.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"support_backbone\.conv1\.weight differs"):
        mmfewshot.convert(state, {"CLASSES": VOC})
