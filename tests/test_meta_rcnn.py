"""Meta R-CNN against the reference's outputs, losses and gradients, weights given by the naming rule."""

import json
from pathlib import Path

import pytest
import torch
from naming_rule import GAINS, boxes, close, image, weight
from torch import Tensor

from fewshot import backbones
from fewshot.data import transforms
from fewshot.detectors import faster_rcnn
from fewshot.detectors.meta_rcnn import MetaRCNN

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "meta_rcnn.json").read_text())
TEST, TRAIN = GOLDEN["test"], GOLDEN["train"]
SIZE = (256, 320)
HEAD = {"fc_cls": "cls", "fc_reg": "reg", "fc_meta": "meta", "rpn_conv": "conv", "rpn_cls": "cls", "rpn_reg": "reg"}


def our_key(key: str) -> str:
    """The reference's name of a tensor -> ours."""
    if key.startswith("backbone."):
        return key.replace("backbone.", "trunk.", 1)
    if key.startswith("roi_head.shared_head.layer4."):
        return key.replace("roi_head.shared_head.layer4.", "trunk.stage4.", 1)
    *prefix, layer, kind = key.split(".")
    return ("rpn." if prefix == ["rpn_head"] else "") + f"{HEAD[layer]}.{kind}"


def normalised(name: str, height: int, width: int) -> Tensor:
    return transforms.CAFFE(torch.from_numpy(image(name, height, width)).permute(2, 0, 1))


@pytest.fixture(scope="module")
def model() -> MetaRCNN:
    model = MetaRCNN(backbones.c4("resnet50", meta=True, style="caffe"), 20)
    state = {
        our_key(key): torch.from_numpy(weight(key, shape, GAINS))
        for key, shape in GOLDEN["state"].items()
        if not key.endswith("num_batches_tracked")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["prototypes", "known"] and not unexpected
    return model.eval()


@pytest.fixture(scope="module")
def supports() -> tuple[Tensor, Tensor]:
    stacks = []
    for c, s in TEST["support_order"]:
        x1, y1, x2, y2 = boxes(f"supbox_c{c}_s{s}", 1, 224, 224, lo=60, hi=0.9)[0].astype(int)
        mask = torch.zeros(1, 224, 224)
        mask[:, y1:y2, x1:x2] = 1
        stacks.append(torch.cat([normalised(f"support_c{c}_s{s}", 224, 224), mask]))
    return torch.stack(stacks), torch.tensor([c for c, _ in TEST["support_order"]])


@torch.no_grad()
def test_query_path(model):
    query = normalised("query0", *SIZE)[None]
    close(query, TEST["input"])
    features = model.trunk(query)
    close(features, TEST["backbone"][0])
    ((cls, reg),) = model.rpn.maps([features])
    close(cls, TEST["rpn_cls"][0])
    close(reg, TEST["rpn_reg"][0])
    (proposals,) = model.rpn.proposals(*model.rpn.outputs([(cls, reg)]), [SIZE])
    assert len(proposals) == TEST["rpn_proposals"]["count"]
    wanted = torch.tensor(TEST["rpn_proposals"]["top"])
    assert torch.allclose(proposals[:30, :4], wanted[:, :4], atol=0.05)
    assert torch.allclose(proposals[:30, 4], wanted[:, 4], atol=1e-4)
    fixed = torch.tensor(TEST["fixed_proposals"])
    aligned = faster_rcnn.roi_align(features, [fixed], 14, 16)
    close(aligned, TEST["roi_align"])
    close(model.roi_vectors(features, [fixed]), TEST["roi_shared_head"])


def check_detections(found: faster_rcnn.Detections, golden: dict) -> None:
    assert len(found.scores) == golden["count"]
    assert torch.bincount(found.labels, minlength=20).tolist() == golden["per_class"]
    wanted = torch.tensor(golden["top"])
    n = len(wanted)
    assert found.labels[:n].tolist() == wanted[:, 0].tolist()
    assert torch.allclose(found.scores[:n], wanted[:, 1], atol=1e-4)
    assert torch.allclose(found.boxes[:n], wanted[:, 2:], atol=0.05)


@torch.no_grad()
def test_support_path_and_detections(model, supports):
    stack, labels = supports
    close(stack, TEST["support_input"])
    close(model.trunk(stack, support=True), TEST["support_backbone"][0])
    vectors = model.support_vectors(stack)
    close(vectors, TEST["support_roi_feat"])
    model.set_prototypes(vectors, labels)
    for c, golden in TEST["support_class_feat"].items():
        close(model.prototypes[int(c)][None], golden)

    query, fixed = normalised("query0", *SIZE)[None], torch.tensor(TEST["fixed_proposals"])
    queries = model.roi_vectors(model.trunk(query), [fixed])
    for c, golden in TEST["per_support_class"].items():  # the head as in training, a class at a time
        close(model.cls(queries * model.prototypes[int(c)]), golden["cls_score"])
        close(model.reg(queries * model.prototypes[int(c)]), golden["bbox_pred"])
    logits, deltas = model.classify(queries)  # all classes folded into one matmul
    assert torch.allclose(logits, torch.tensor(TEST["merged_cls_score"]), atol=1e-4)
    close(deltas.flatten(1), TEST["merged_bbox_pred"])
    check_detections(faster_rcnn.detections(logits, deltas, fixed, SIZE, nms=0.3), TEST["det_fixed"])
    (found,) = model.detect(query, [SIZE])
    check_detections(found, TEST["det_e2e"])

    some = torch.isin(labels, torch.tensor([1, 4, 7]))
    model.set_prototypes(vectors[some], labels[some])
    assert model.known.nonzero()[:, 0].tolist() == [1, 4, 7]
    logits, deltas = model.classify(queries)
    close(logits, TEST["merged_cls_score_supports_only_1_4_7"])
    found = faster_rcnn.detections(logits, deltas, fixed, SIZE, nms=0.3)
    check_detections(found, TEST["det_fixed_supports_only_1_4_7"])


def training_batch() -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    images = torch.stack([normalised(f"train{i}", *SIZE) for i in range(2)])
    truth = [torch.tensor(b) for b in TRAIN["gt_boxes"]]
    labels = [torch.tensor(c) for c in TRAIN["gt_labels"]]
    stacks = []
    for c in range(20):
        x1, y1, x2, y2 = boxes(f"supbox_c{c}_s0", 1, 224, 224, lo=60, hi=0.9)[0].astype(int)
        mask = torch.zeros(1, 224, 224)
        mask[:, y1:y2, x1:x2] = 1
        stacks.append(torch.cat([normalised(f"support_c{c}_s0", 224, 224), mask]))
    return images, truth, labels, torch.stack(stacks)


def reference_norms(model: MetaRCNN, norms: dict[str, float | None]) -> None:
    for key, norm in norms.items():
        gradient = model.get_parameter(our_key(key)).grad
        if norm is None:
            assert gradient is None, key
        elif norm > 1e-5:
            assert gradient.norm().item() == pytest.approx(norm, rel=2e-3), key


def test_training_losses_and_gradients(model):
    images, truth, labels, stack = training_batch()
    model.train()
    model.zero_grad()
    features = model.trunk(images)
    rois = faster_rcnn.sample_rois(
        [torch.tensor(p) for p in TRAIN["fixed_proposals"]], truth, labels, classes=20, number=10**7
    )
    counts = [[len(r.deltas), len(r.boxes) - len(r.deltas)] for r in rois]
    assert counts == TRAIN["fixed"]["samples_pos_neg"]
    queries = model.roi_vectors(features, [r.boxes for r in rois]).split([len(r.boxes) for r in rois])
    drawn = [label[0] for label in labels]
    losses = model.head_losses(queries, rois, drawn, model.support_vectors(stack), torch.arange(20))
    golden = TRAIN["fixed"]["losses"]
    assert losses["cls"].item() == pytest.approx(golden["loss_cls"], rel=1e-4)
    assert losses["box"].item() == pytest.approx(golden["loss_bbox"], rel=1e-4)
    assert losses["meta"].item() == pytest.approx(golden["loss_meta_cls"], rel=1e-4)
    sum(losses.values()).backward()
    reference_norms(model, TRAIN["fixed"]["grad_norms"])


def test_whole_training_step(model):
    images, truth, labels, stack = training_batch()
    model.train()
    model.zero_grad()
    model.rois = model.rpn.number = 10**7
    model.rpn.train_proposals = (12000, 50)
    losses = model(images, [SIZE, SIZE], truth, labels, stack, torch.arange(20))
    golden = TRAIN["e2e"]["losses"]
    assert losses["rpn_cls"].item() == pytest.approx(golden["loss_rpn_cls"][0], rel=1e-4)
    assert losses["rpn_box"].item() == pytest.approx(golden["loss_rpn_bbox"][0], rel=1e-4)
    assert losses["cls"].item() == pytest.approx(golden["loss_cls"], rel=1e-4)
    assert losses["box"].item() == pytest.approx(golden["loss_bbox"], rel=1e-4)
    assert losses["meta"].item() == pytest.approx(golden["loss_meta_cls"], rel=1e-4)
    (losses["rpn_cls"] + losses["rpn_box"]).backward()
    reference_norms(model, TRAIN["e2e"]["rpn_loss_grad_norms"])


@torch.no_grad()
def test_folded_classifier_equals_a_pass_per_class():
    torch.manual_seed(0)
    model = MetaRCNN(backbones.c4("small", meta=True), 80).eval()
    d = model.prototypes.shape[1]
    torch.nn.init.normal_(model.cls.weight)
    torch.nn.init.normal_(model.reg.weight)
    torch.nn.init.normal_(model.cls.bias)
    model.set_prototypes(torch.rand(160, d), torch.arange(160) % 80)
    queries = torch.randn(30, d)
    logits, deltas = model.classify(queries)
    passes = [model.cls(queries * p) for p in model.prototypes]
    for c in range(80):
        assert torch.allclose(logits[:, c], passes[c][:, c], atol=1e-4)
        wanted = model.reg(queries * model.prototypes[c]).view(30, 80, 4)[:, c]
        assert torch.allclose(deltas[:, c], wanted, atol=1e-4)
    assert torch.allclose(logits[:, 80], torch.stack(passes)[..., 80].mean(0), atol=1e-4)
