"""DeFRCN against the reference's outputs, losses and gradients, weights given by the naming rule."""

import json
import re
import sys
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest
import torch
import torch.nn.functional as F
from detector_goldens import SIZE, check_detections, check_gradients, normalised, training_batch
from naming_rule import close, golden, image, weight
from runs import FROZEN, QUICK, load, run_here
from safetensors.torch import load_file
from torch import Tensor

import fewshot
from fewshot import InputError
from fewshot.backbones import trunks
from fewshot.convert import detectron2
from fewshot.convert.detectron2 import ANCHORS, tensor_name
from fewshot.data.transforms import CAFFE
from fewshot.detectors import faster_rcnn
from fewshot.detectors.build import rebuilt
from fewshot.detectors.defrcn import DecoupledAffine, DeFRCN, grow
from fewshot.detectors.faster_rcnn import NEGATIVE
from fewshot.training.schedule import choose

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import convert_defrcn

BOX = "roi_heads.box_predictor"


def reference_state(expected: dict) -> dict[str, Tensor]:
    """All tensors of the reference's model under its names; affine maps are drawn like norms and
    then shaped.
    """
    drawn = {}
    for key, shape in expected["state"].items():
        flat = shape[1:2] if key.startswith("affine_") else shape
        drawn[key] = torch.from_numpy(weight(key, flat, expected["gains"])).view(*shape)
    return drawn


@pytest.fixture(scope="module")
def case() -> tuple[DeFRCN, dict]:
    expected = golden("defrcn")
    model = DeFRCN(trunks.c4("resnet50", style="caffe"), expected["num_classes"])
    model.load_state_dict(
        {tensor_name(key): tensor for key, tensor in reference_state(expected).items()}
    )
    return model.eval(), expected


@pytest.fixture
def take_all(monkeypatch):
    """Samples are all positives and all negatives, as in the reference's run; divisors stay what
    they are.
    """
    whole = faster_rcnn.sample
    monkeypatch.setattr(
        faster_rcnn,
        "sample",
        lambda assignment, number, fraction: whole(assignment, 10**7, fraction),
    )


@torch.no_grad()
def test_outputs(case):
    model, expected = case[0].eval(), case[1]["test"]
    query = normalised("query0")[None]
    close(query, expected["input"])
    features = model.trunk(query)
    close(features, expected["res4"])
    close(model.affine_rpn(features), expected["affine_rpn"])
    close(model.affine_rcnn(features), expected["affine_rcnn"])
    maps = model.rpn.maps([model.affine_rpn(features)])
    close(maps[0][0], expected["rpn_cls"])
    close(maps[0][1], expected["rpn_reg"])
    outputs = model.rpn.outputs(maps)
    assert torch.allclose(outputs[2][0][:30], torch.tensor(expected["first_anchors"]), atol=1e-4)
    (proposals,) = model.rpn.proposals(*outputs, [SIZE])
    wanted = torch.tensor(expected["rpn_proposals"]["top"])
    assert len(proposals) == expected["rpn_proposals"]["count"]
    assert torch.allclose(proposals[:30, :4], wanted[:, :4], atol=0.05)
    assert torch.allclose(proposals[:30, 4].logit(), wanted[:, 4], atol=1e-4)

    fixed = torch.tensor(expected["fixed_proposals"])
    aligned = faster_rcnn.roi_align(model.affine_rcnn(features), [fixed], 7, 16)
    close(aligned, expected["roi_align"])
    close(aligned.mean((1, 2, 3)), expected["roi_align_per_box_mean"])
    close(model.trunk.stage4(aligned), expected["res5"])
    vectors = model.roi_vectors(features, [fixed])
    close(vectors, expected["roi_vectors"])
    logits, deltas = model.head(vectors)
    close(logits, expected["cls_score"])
    close(deltas.flatten(1), expected["bbox_pred"])
    found = faster_rcnn.detections(logits, deltas, fixed, SIZE, convention="detectron2")
    check_detections(found, expected["det_fixed"])
    (found,) = model.detect(query, [SIZE])
    check_detections(found, expected["det_e2e"])
    assert torch.allclose(found.boxes, torch.tensor(case[1]["pcb"]["det_boxes"]), atol=0.05)
    close(found.scores, case[1]["pcb"]["calibrated"][0]["scores_before"])
    assert found.labels.tolist() == case[1]["pcb"]["calibrated"][0]["classes"]


def test_losses_and_gradients_of_given_proposals(case, take_all):
    model, train = case[0].train(), case[1]["train"]
    fixed = train["fixed"]
    images, truth, labels = training_batch(train)
    close(images, train["input"])
    begin(model)
    proposals = [torch.tensor(p) for p in train["fixed_proposals"]]
    rois = faster_rcnn.sample_rois(
        proposals, truth, labels, classes=20, number=512, convention="detectron2"
    )
    assert mean_counts(rois) == list(fixed["counts_per_image_mean"].values())
    losses = model.head_losses(
        model.roi_vectors(model.trunk(images), [r.boxes for r in rois]), rois
    )
    check_losses(losses, fixed["losses"])
    sum(losses.values()).backward()
    check_gradients(model, fixed["grad_norms"], tensor_name)


# of one gradient that reaches the trunk in part, and of none with stage 4 frozen
@pytest.mark.parametrize(
    "setting", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2)), 3]
)
def test_whole_training_step(setting, case, take_all):
    model, train = case[0].train(), case[1]["train"]
    expected = train["settings"][setting]
    images, truth, labels = training_batch(train)
    begin(model, expected["rpn_scale"], expected["rcnn_scale"])
    if expected["res5_frozen"]:
        model.trunk.stage4.requires_grad_(False)
    frozen = {tensor_name(f"{part}.x").removesuffix("x") for part in expected["frozen"]} - {
        "trunk."
    }
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in still if not name.startswith("trunk.conv1")} == {
        name for name, _ in model.named_parameters() if name.startswith(tuple(frozen))
    }
    model.rpn.train_proposals = (12000, train["proposals_after_nms"])
    losses = model(images, [SIZE, SIZE], truth, labels)
    check_losses(losses, expected["e2e_losses"])
    rpn, roi = (
        sum(losses[name] for name in names) for names in (("rpn_cls", "rpn_box"), ("cls", "box"))
    )
    for loss, kind in ((rpn, "rpn_losses"), (roi, "roi_losses"), (rpn + roi, "all")):
        model.zero_grad()
        loss.backward(retain_graph=True)
        check_gradients(model, expected[f"grad_norms_{kind}"], tensor_name)
        for name, norm in expected[f"grad_norms_{kind}"].items():
            if norm == 0:  # reached, and scaled to nothing
                assert model.get_parameter(tensor_name(name)).grad.count_nonzero() == 0


def test_rpn_targets(case):
    counts = case[1]["train"]["settings"][0]["counts_per_image_mean"]
    _, truth, _ = training_batch(case[1]["train"])
    anchors = faster_rcnn.anchor_grid((16, 20), 16, case[0].trunk.anchor_scales, (0.5, 1.0, 2.0))
    assigned = [
        faster_rcnn.assign(anchors, boxes, 0.7, 0.3, 0.0, reassign=False)[0] for boxes in truth
    ]
    assert sum((a >= 0).sum().item() for a in assigned) / 2 == counts["rpn/num_pos_anchors"]
    assert sum((a == NEGATIVE).sum().item() for a in assigned) / 2 == counts["rpn/num_neg_anchors"]


def begin(model: DeFRCN, rpn_scale: float = 0.0, roi_scale: float = 0.75) -> None:
    model.zero_grad()
    model.trunk.requires_grad_(True)
    model.trunk.freeze(2)
    model.affine_rpn.scale, model.affine_rcnn.scale = rpn_scale, roi_scale


def mean_counts(rois: list[faster_rcnn.RoIs]) -> list[float]:
    positives = [len(r.deltas) for r in rois]
    return [sum(positives) / 2, sum(len(r.boxes) for r in rois) / 2 - sum(positives) / 2]


def check_losses(losses: dict[str, Tensor], expected: dict[str, float]) -> None:
    names = {
        "loss_cls": "cls",
        "loss_box_reg": "box",
        "loss_rpn_cls": "rpn_cls",
        "loss_rpn_loc": "rpn_box",
    }
    assert {names[theirs] for theirs in expected} == set(losses)
    for theirs, value in expected.items():
        assert losses[names[theirs]].item() == pytest.approx(value, rel=1e-4), theirs


# --------------------------------------------------------------------------------------- rules that
# no golden covers
def test_scale_changes_gradients_alone():
    x, results = torch.randn(2, 3, 4, 5, requires_grad=True), []
    for scale in (0.0, 0.001, 0.75, 1.0):
        layer = DecoupledAffine(3, scale)
        torch.nn.init.normal_(layer.weight)
        layer.bias.data.fill_(0.5)
        y = layer(x)
        assert torch.equal(y, x * layer.weight + 0.5)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        results.append(torch.equal(gradient, (layer.weight * scale).expand_as(x)))
    assert all(results)


def test_detectron2_keeps_an_anchors_own_best_box():
    """A box's best anchor overlaps another box more: with mmdet's rule it changes sides, with
    detectron2's it stays.
    """
    anchors = torch.tensor([[0.0, 0, 100, 100], [400, 400, 500, 500]])
    truth = torch.tensor(
        [[0.0, 0, 100, 90], [80, 80, 130, 130]]
    )  # the second overlaps no anchor more than the first
    assign = partial(faster_rcnn.assign, anchors, truth, 0.95, 0.3)
    assert assign(0.0)[0].tolist() == [1, NEGATIVE]
    assert assign(0.0, reassign=False)[0].tolist() == [0, NEGATIVE]
    assert assign(0.3)[0].tolist() == [
        0,
        NEGATIVE,
    ]  # 0.03 of overlap do not make a match with mmdet


def test_rpn_losses_are_divided_by_what_could_be_sampled():
    torch.manual_seed(0)
    few = [torch.tensor([[2.0, 2, 30, 30]])]  # all anchors of a small map are fewer than 256
    divisors = {}
    for convention in ("mmdet", "detectron2"):
        rpn = faster_rcnn.RPN(8, 8, scales=(4,), convention=convention)
        outputs = rpn.outputs(rpn.maps([torch.randn(1, 8, 2, 2)]))
        divisors[convention] = rpn.loss_sums(*outputs, [(32, 32)], few)[2]
    assert divisors["detectron2"] == 256 and 2 <= divisors["mmdet"] <= 16


def test_rois_end_with_the_truth():
    truth, labels = torch.tensor([[10.0, 10, 50, 60]]), torch.tensor([3])
    proposals = torch.tensor([[12.0, 10, 50, 60], [100, 100, 140, 150]])
    (rois,) = faster_rcnn.sample_rois(
        [proposals], [truth], [labels], classes=5, number=64, fraction=0.5, convention="detectron2"
    )
    assert torch.equal(rois.boxes, torch.stack([proposals[0], truth[0], proposals[1]]))
    assert rois.labels.tolist() == [3, 3, 5] and rois.matched.tolist() == [0, 0]


def test_the_classifier_alone_is_dropped_out():
    torch.manual_seed(0)
    model = DeFRCN(trunks.c4("small"), 3, roi_size=6, dropout=0.8).train()
    torch.nn.init.normal_(model.cls.weight)
    torch.nn.init.normal_(model.reg.weight)
    vectors = torch.rand(4, 256)
    logits, deltas = model.head(vectors)
    again = model.head(vectors)
    assert torch.equal(deltas, again[1]) and not torch.allclose(logits, again[0])
    torch.manual_seed(1)
    seen = model.head(vectors)[0]
    torch.manual_seed(1)
    assert torch.equal(seen, F.linear(F.dropout(vectors, 0.8), model.cls.weight, model.cls.bias))
    assert torch.equal(model.eval().head(vectors)[0], model.cls(vectors))


def test_it_can_be_made_anew_from_what_it_says():
    sizes = {
        "rois": 7,
        "roi_size": 5,
        "rpn_channels": 16,
        "train_proposals": (50, 20),
        "test_proposals": (40, 10),
    }
    model = DeFRCN(trunks.begin("resnet18", "none"), 3, **sizes)
    described = json.loads(json.dumps(model.describe()))
    again = rebuilt(DeFRCN, {**described, "classes": ["a", "b", "c"]}, roi_scale=0.01, dropout=0.8)
    assert json.loads(json.dumps(again.describe())) == described
    assert (again.affine_rpn.scale, again.affine_rcnn.scale, again.dropout) == (0.0, 0.01, 0.8)
    again.load_state_dict(model.state_dict())


def test_a_grown_head_keeps_its_base_classes():
    base = DeFRCN(trunks.c4("small"), 2, roi_size=6)
    for parameter in (*base.cls.parameters(), *base.reg.parameters()):
        torch.nn.init.normal_(parameter)
    grown = DeFRCN(
        trunks.c4("small"), 4, roi_size=6
    )  # novel classes between the base ones, as in COCO's order
    grown.load_state_dict(grow(base.state_dict(), ["a", "c"], ["a", "b", "c", "d"]))
    vectors = torch.randn(5, 256)
    (logits, deltas), (before, boxes) = grown.head(vectors), base.head(vectors)
    assert torch.allclose(logits[:, [0, 2, 4]], before, atol=1e-5)
    assert torch.allclose(deltas[:, [0, 2]], boxes, atol=1e-5)
    assert grown.cls.bias[[1, 3]].eq(0).all() and grown.reg.bias.view(4, 4)[[1, 3]].eq(0).all()
    assert grown.cls.weight[[1, 3]].std().item() == pytest.approx(0.01, rel=0.2)
    assert grown.reg.weight.view(4, 4, -1)[[1, 3]].std().item() == pytest.approx(0.01, rel=0.2)
    fresh = grow(base.state_dict(), [], ["x"])  # of a base model whose classes are not gone on with
    assert fresh["cls.bias"].tolist() == [0, base.cls.bias[-1].item()]


# ---------------------------------------------------------------------------------------------------- the converter
@pytest.fixture(scope="module")
def checkpoint(case, tmp_path_factory) -> Path:
    """The reference's model in a file as detectron2 writes it."""
    path = tmp_path_factory.mktemp("detectron2") / "model_final.pth"
    anchors = faster_rcnn.anchor_grid((1, 1), 16, (2, 4, 8, 16, 32), (0.5, 1.0, 2.0)).clone()
    content = {"model": reference_state(case[1]) | {ANCHORS: anchors}, "iteration": 14_999}
    torch.save(content | {"optimizer": {}, "scheduler": {"milestones": (10_000,)}}, path)
    return path


@torch.no_grad()
def test_converted_checkpoints_detect_the_same(case, checkpoint, tmp_path):
    out = tmp_path / "made" / "defrcn.safetensors"
    convert_defrcn.main(convert_defrcn.Args(checkpoint, out, of="voc2"))
    model = fewshot.load(out)
    novel = ["aeroplane", "bottle", "cow", "horse", "sofa"]
    assert model.classes[15:] == novel == model.about["novel"]
    assert model.classes[:2] == ["bicycle", "bird"] and model.about["base"] == model.classes[:15]
    assert (model.pipeline.short, model.pipeline.long) == (800, 1333)
    assert model.normalisation == CAFFE
    (found,) = model.network.detect(normalised("query0")[None], [SIZE])
    check_detections(found, case[1]["test"]["det_e2e"])
    picture = torch.from_numpy(image("query0", *SIZE)).permute(2, 0, 1)
    best = model.predict(picture, size="keep")
    assert torch.equal(best.boxes, found.boxes) and best.names[0] == model.classes[10]


@pytest.mark.parametrize(
    ("number", "options", "classes", "novel"),
    [
        (15, {"of": "voc1"}, "aeroplane bicycle boat bottle", 0),
        (5, {"of": "voc3"}, "boat cat motorbike sheep sofa", 5),
        (60, {"of": "coco"}, "truck traffic_light", 0),
        (20, {"of": "coco"}, "person bicycle car motorcycle airplane", 20),
        (80, {"of": "coco"}, "person bicycle car motorcycle airplane bus train truck", 20),
        (3, {"classes": ("a", "b", "c"), "novel": ("b",)}, "a b c", 1),
    ],
)
def test_their_number_tells_which_classes(number, options, classes, novel):
    state = trained_for(number)
    ours, about = detectron2.convert(state, "model.pth", **options)
    assert (
        len(ours) == len(state) and len(about["classes"]) == number and len(about["novel"]) == novel
    )
    names = [name.replace(" ", "_") for name in about["classes"]]
    assert names[: len(classes.split())] == classes.split()
    assert about["stage"] == ("finetune" if novel else "base")
    assert set(about["base"]) | set(about["novel"]) == set(about["classes"])


def trained_for(number: int) -> dict[str, Tensor]:
    state = {name: torch.zeros(shape) for name, shape in golden("defrcn")["state"].items()}
    for name, rows in (("cls_score", number + 1), ("bbox_pred", 4 * number)):
        state[f"{BOX}.{name}.weight"] = torch.zeros(rows, 2048)
        state[f"{BOX}.{name}.bias"] = torch.zeros(rows)
    return state


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"roi_heads.mask_head.weight": torch.zeros(1)}, "mask_head.weight does not belong"),
        ({"affine_rpn.bias": None}, "affine_rpn.bias is missing from model_final.pth"),
        (
            {"backbone.res3.0.shortcut.norm.bias": None},
            "layer2.0.downsample.1.bias is missing",
        ),
        ({f"{BOX}.cls_score.weight": None}, "DeFRCN's, and not one whose head was taken off"),
        ({"affine_rcnn.weight": torch.zeros(1, 512, 1, 1)}, "affine_rcnn.weight is (1, 512, 1, 1)"),
        ({ANCHORS: torch.zeros(15, 4)}, "are not the anchors that DeFRCN was published with"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(changed, words):
    state = trained_for(20) | changed
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(InputError, match=re.escape(words)) as error:
        detectron2.convert(state, "model_final.pth", of="voc1")
    assert "\n" not in str(error.value)


def test_classes_are_asked_for(checkpoint):
    for options, words in (
        ({}, "does not name its 20 classes: say whose they are"),
        ({"of": "voc1", "classes": ("a",)}, "does not name its 20 classes: say whose"),
        ({"classes": ("a", "b")}, "has 20 classes, which --classes has not"),
        ({"classes": ("a", "b"), "novel": ("c",)}, "--novel c is none of --classes"),
    ):
        with pytest.raises(InputError, match=words):
            detectron2.convert(trained_for(20), "model.pth", **options)
    with pytest.raises(InputError, match="has 7 classes, which coco has not"):
        detectron2.convert(trained_for(7), "model.pth", of="coco")
    with pytest.raises(InputError, match="would replace what it is made of"):
        convert_defrcn.main(convert_defrcn.Args(checkpoint, checkpoint, of="voc1"))


# ------------------------------------------------------------------------------------------------------- the recipe
@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model after a few steps."""
    folder = tmp_path_factory.mktemp("defrcn")
    run_here("defrcn", f"{QUICK['defrcn']} --stage base --out {folder}")
    return folder / "base"


def test_novel_classes_alone(base, tmp_path):
    copytree(base, tmp_path / "base")
    run_here("defrcn", f"{QUICK['defrcn']} --stage novel --out {tmp_path}")
    folder = tmp_path / "1shot-seed0-novel"
    result = json.loads((folder / "metrics.json").read_text())
    assert (
        set(result["AP50"]) == {"novel", "all"}
        and result["protocol"]["trained_on"] == "novel classes"
    )
    before, after = (load_file(place / "model.safetensors") for place in (base, folder))
    assert len(after["cls.weight"]) == 6
    moved = {
        name
        for name in before
        if before[name].shape == after[name].shape and not before[name].equal(after[name])
    }
    assert {name.split(".")[0] for name in moved} == {"trunk", "affine_rpn", "affine_rcnn", "rpn"}
    assert not any(name.startswith(FROZEN["defrcn"]) for name in moved)


def test_weights_and_biases_decay_as_published(base, monkeypatch, tmp_path):
    """A weight without gradient decays by rate * 5e-5 in a step, a bias by rate * 1e-4; the rate
    has fallen to 1000.
    """
    copytree(base, tmp_path / "base")
    before = load_file(base / "model.safetensors")
    monkeypatch.setattr(
        DeFRCN, "forward", lambda self, *_: {"none": sum(p.sum() * 0 for p in self.parameters())}
    )
    run_here("defrcn", f"{QUICK['defrcn']} --stage finetune --iters 1 --lr 10000 --out {tmp_path}")
    after = load_file(tmp_path / "1shot-seed0" / "model.safetensors")
    for name, decay in (
        ("rpn.conv.weight", 5e-5),
        ("affine_rcnn.weight", 5e-5),
        ("affine_rcnn.bias", 1e-4),
    ):
        assert torch.allclose(after[name], before[name] * (1 - 1000 * decay), atol=1e-6), name
    assert torch.equal(after["trunk.stage4.1.weight"], before["trunk.stage4.1.weight"])


def test_schedules_of_the_two_settings_differ():
    recipe = load("defrcn")
    args = recipe.Args(dataset="voc", shots=4)
    whole, alone = (
        choose(table["voc"], "finetune", args, pictures=9)
        for table in (recipe.SCHEDULE, recipe.NOVEL)
    )
    assert (whole.steps, whole.milestones) == (2250, (1800,)) and (
        alone.steps,
        alone.milestones,
    ) == (1800, (1440,))
    assert choose(recipe.NOVEL["own"], "novel", args, pictures=100, batch=4).steps == 750
