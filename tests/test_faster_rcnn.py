"""The shared two-stage pieces against closed forms, the reference's numbers and plain loops."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import ops

from fewshot.detectors import faster_rcnn
from fewshot.detectors.faster_rcnn import NEGATIVE, RPN, UNUSED, RoIs

GOLDENS = Path(__file__).parent / "goldens"


def random_boxes(n: int, size: float = 100, seed: int = 0) -> torch.Tensor:
    r = torch.Generator().manual_seed(seed)
    corner, extent = (
        torch.rand(n, 2, generator=r) * size * 0.6,
        5 + torch.rand(n, 2, generator=r) * size * 0.4,
    )
    return torch.cat([corner, corner + extent], 1)


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_anchors_equal_the_reference(kind):
    golden = json.loads((GOLDENS / "det_anchors.json").read_text())[kind]
    config = golden["config"]
    for stride, base in zip(config["strides"], golden["base_anchors"], strict=True):
        anchors = faster_rcnn.anchor_grid(
            (2, 3), stride, tuple(config["scales"]), tuple(config["ratios"])
        )
        a = len(base)
        assert torch.allclose(anchors[:a], torch.tensor(base), atol=1e-4)
        shift = torch.tensor([2.0 * stride, stride, 2.0 * stride, stride])
        assert torch.allclose(
            anchors[5 * a :], torch.tensor(base) + shift, atol=1e-4
        )  # row 1, column 2


def test_anchors_are_made_once():
    rpn, maps = RPN(4, 8), [(torch.zeros(1, 15, 3, 2), torch.zeros(1, 60, 3, 2))]
    assert rpn.outputs(maps)[2][0] is rpn.outputs(maps)[2][0]


def test_decode_equals_the_reference():
    roi = torch.tensor([[10.0, 20, 60, 100]])
    boxes = faster_rcnn.decode(
        torch.tensor([[1.0, -1, 0.5, -6]]), roi, faster_rcnn.ROI_STD, (1000, 1000)
    )
    assert torch.allclose(boxes, torch.tensor([[12.3707, 39.9522, 67.6293, 64.0478]]), atol=1e-4)
    clamped = faster_rcnn.decode(
        torch.tensor([[1.0, -1, 0.5, -30]]), roi, faster_rcnn.ROI_STD, (1000, 1000)
    )
    assert torch.allclose(clamped[0, [1, 3]], torch.tensor([51.36, 52.64]), atol=1e-4)


def test_decode_undoes_encode_and_clips():
    anchors, boxes = random_boxes(50, seed=1), random_boxes(50, seed=2)
    deltas = faster_rcnn.encode(boxes, anchors, faster_rcnn.ROI_STD)
    assert torch.allclose(
        faster_rcnn.decode(deltas, anchors, faster_rcnn.ROI_STD, (200, 200)), boxes, atol=1e-3
    )
    per_class = deltas[:, None].expand(-1, 3, -1)
    clipped = faster_rcnn.decode(per_class, anchors, faster_rcnn.ROI_STD, (40, 30))
    assert clipped.shape == (50, 3, 4)
    assert torch.allclose(clipped[:, 1], ops.clip_boxes_to_image(boxes, (40, 30)), atol=1e-3)


def plain_assign(candidates, truth, positive, negative, low_quality):
    """The rule as one reads it, a candidate and a box at a time."""
    overlap = ops.box_iou(truth, candidates)
    result = []
    for c in range(len(candidates)):
        best = max(range(len(truth)), key=lambda t: (overlap[t, c].item(), -t))
        value = overlap[best, c].item()
        result.append(best if value >= positive else NEGATIVE if value < negative else UNUSED)
    if low_quality is not None:
        for t in range(len(truth)):
            top = overlap[t].max().item()
            if top >= low_quality:
                for c in range(len(candidates)):
                    if overlap[t, c].item() == top:
                        result[c] = t
    return torch.tensor(result)


@pytest.mark.parametrize("low_quality", [None, 0.3])
def test_assign_equals_a_plain_loop(low_quality):
    for seed in range(20):
        candidates, truth = random_boxes(60, seed=seed), random_boxes(4, seed=100 + seed)
        candidates[:8] = candidates[8:16]  # ties
        mine, _ = faster_rcnn.assign(candidates, truth, 0.5, 0.3, low_quality)
        assert torch.equal(mine, plain_assign(candidates, truth, 0.5, 0.3, low_quality))


def test_assign_without_truth_is_all_negative():
    assignment, _ = faster_rcnn.assign(random_boxes(5), torch.zeros(0, 4), 0.5, 0.5)
    assert assignment.tolist() == [NEGATIVE] * 5


def test_sample_fills_up_with_negatives_in_ascending_order():
    assignment = torch.tensor(
        [0, NEGATIVE, 1, UNUSED, NEGATIVE, NEGATIVE, 2, NEGATIVE, NEGATIVE, 3]
    )
    positive, negative = faster_rcnn.sample(assignment, 6, 0.5)
    assert (
        len(positive) == 3
        and set(positive.tolist()) < {0, 2, 6, 9}
        and positive.tolist() == sorted(positive.tolist())
    )
    assert len(negative) == 3 and (assignment[negative] == NEGATIVE).all()
    positive, negative = faster_rcnn.sample(assignment, 100, 0.5)
    assert positive.tolist() == [0, 2, 6, 9] and negative.tolist() == [1, 4, 5, 7, 8]


def test_sample_draws_from_the_global_stream_only_when_it_must():
    assignment = torch.tensor([0, NEGATIVE, NEGATIVE])
    before = torch.get_rng_state()
    faster_rcnn.sample(assignment, 10, 0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_rois_begin_with_the_truth_and_know_their_targets():
    truth, labels = random_boxes(2, seed=3), torch.tensor([4, 1])
    proposals = torch.cat([truth + 1, random_boxes(30, seed=4)])
    (rois,) = faster_rcnn.sample_rois(
        [proposals], [truth], [labels], classes=7, number=100, fraction=0.5
    )
    positives = len(rois.deltas)
    assert torch.equal(rois.boxes[:2], truth) and rois.labels[:2].tolist() == [4, 1]
    assert (
        positives >= 4
        and (rois.labels[:positives] < 7).all()
        and (rois.labels[positives:] == 7).all()
    )
    decoded = faster_rcnn.decode(
        rois.deltas, rois.boxes[:positives], faster_rcnn.ROI_STD, (1000, 1000)
    )
    assert torch.allclose(decoded, truth[rois.matched], atol=1e-3)
    assert (ops.box_iou(rois.boxes[positives:], truth) < 0.5).all()


def test_an_image_without_objects_gives_background_only():
    (rois,) = faster_rcnn.sample_rois(
        [random_boxes(30)],
        [torch.zeros(0, 4)],
        [torch.zeros(0, dtype=torch.int64)],
        classes=3,
        number=16,
    )
    assert rois.labels.tolist() == [3] * 16 and rois.deltas.shape == (0, 4)
    losses = faster_rcnn.roi_losses(
        torch.randn(16, 4, requires_grad=True), torch.randn(16, 3, 4), [rois]
    )
    assert losses["box"] == 0 and losses["cls"] > 0


def test_roi_losses_by_hand():
    rois = RoIs(
        torch.zeros(3, 4),
        torch.tensor([1, 0, 2]),
        torch.tensor([[0.5, 0, 0, 0], [0, 0, 3.0, 0]]),
        None,
        None,
    )
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    losses = faster_rcnn.roi_losses(logits, torch.zeros(3, 2, 4), [rois])
    assert losses["cls"].item() == pytest.approx(F.cross_entropy(logits, rois.labels).item())
    assert losses["box"].item() == pytest.approx((0.5 * 0.25 + 2.5) / 3)


def test_softmax_rpn_loss_is_the_two_way_cross_entropy():
    torch.manual_seed(0)
    rpn = RPN(4, 8, softmax=True, border=True)
    rpn.number = 10**7
    features, truth = torch.randn(1, 4, 6, 7), torch.tensor([[10.0, 12, 50, 60]])
    ((cls, reg),) = rpn.maps([features])
    outputs = rpn.outputs([(cls, reg)])
    losses = rpn.losses(*outputs, [(96, 112)], [truth])
    anchors = outputs[2][0]
    inside = (
        (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < 112) & (anchors[:, 3] < 96)
    ).nonzero()[:, 0]
    wanted = plain_assign(anchors[inside], truth, 0.7, 0.3, 0.3)
    pairs = cls.permute(0, 2, 3, 1).reshape(-1, 2)[inside[wanted != UNUSED]]
    target = (wanted[wanted != UNUSED] < 0).long()  # index 0 is the object
    assert losses["rpn_cls"].item() == pytest.approx(
        F.cross_entropy(pairs, target).item(), rel=1e-5
    )
    assert losses["rpn_box"] > 0


def test_proposals_are_clipped_sorted_and_apart():
    torch.manual_seed(0)
    rpn = RPN(4, 8, test_proposals=(200, 20)).eval()
    nn_input = [torch.randn(2, 4, 6, 7)]
    proposals = rpn.proposals(*rpn.outputs(rpn.maps(nn_input)), [(96, 112), (40, 50)])
    for found, (height, width) in zip(proposals, [(96, 112), (40, 50)], strict=True):
        assert 0 < len(found) <= 20 and (found[:, :2] >= 0).all()
        assert (found[:, 2] <= width).all() and (found[:, 3] <= height).all()
        assert (found[:, 4].diff() <= 0).all()
        overlap = ops.box_iou(found[:, :4], found[:, :4]).fill_diagonal_(0)
        assert overlap.max() <= 0.7


def test_detections_by_hand(monkeypatch):
    proposals = torch.tensor([[10.0, 10, 30, 30], [11, 10, 31, 30], [50, 50, 90, 90]])
    logits = torch.log(torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.2, 0.3], [0.01, 0.69, 0.3]]))
    found = faster_rcnn.detections(logits, torch.zeros(3, 2, 4), proposals, (80, 100))
    assert found.labels.tolist() == [
        1,
        0,
        1,
    ]  # the second box loses to the first in class 0, its .2 to none in class 1
    assert torch.allclose(found.scores, torch.tensor([0.69, 0.6, 0.2]))
    assert found.boxes[0].tolist() == [50, 50, 90, 80]
    monkeypatch.setattr(faster_rcnn, "MOST", 1)
    best = faster_rcnn.detections(logits, torch.zeros(3, 2, 4), proposals, (80, 100))
    assert torch.equal(best.boxes, found.boxes[:1])


def test_sizes_are_clamped_on_both_sides():
    roi = torch.tensor([[0.0, 0, 100, 100]])
    small, large = (
        faster_rcnn.decode(torch.tensor([[0.0, 0, d, d]]), roi, faster_rcnn.RPN_STD, (10**5, 10**5))
        for d in (-9, 9)
    )
    assert (small[0, 2] - small[0, 0]).item() == pytest.approx(100 * 16 / 1000, rel=1e-4)
    assert large[0, 2].item() == pytest.approx(
        50 + 50 * math.exp(faster_rcnn.MAX_LOG_SIZE), rel=1e-4
    )


def test_pyramid_cuts_each_roi_from_its_level():
    torch.manual_seed(0)
    strides = (4, 8, 16)
    features = [torch.randn(2, 3, 128 // s, 128 // s) for s in strides]
    # sides 20 and 55 belong to the finest level (below 2 * 56), 112 to the next, 120 x 500 (245) to
    # the coarsest
    boxes = [
        torch.tensor([[3.0, 4, 23, 24], [10, 10, 122, 122.0]]),
        torch.tensor([[5.0, 5, 60, 60], [0, 0, 120, 500]]),
    ]
    cut = faster_rcnn.pyramid_align(features, boxes, 7, strides)
    for row, (image, i, level) in enumerate([(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 2)]):
        alone = faster_rcnn.roi_align(
            features[level][image : image + 1], [boxes[image][i : i + 1]], 7, strides[level]
        )
        assert torch.equal(cut[row], alone[0])


def test_negative_pairs_turn_positives_into_background():
    torch.manual_seed(0)
    rpn = RPN(4, 8, strides=(8,), scales=(4,))
    outputs = rpn.outputs(rpn.maps([torch.randn(2, 4, 8, 8)]))
    sizes, truth = [(64, 64)] * 2, [torch.tensor([[8.0, 8, 40, 40]])] * 2
    torch.manual_seed(1)
    both = rpn.losses(*outputs, sizes, truth)
    torch.manual_seed(1)
    one = rpn.losses(*outputs, sizes, truth, negative_pairs=[False, True])
    logits, _, anchors = outputs
    assignment, _ = faster_rcnn.assign(anchors[0], truth[0], 0.7, 0.3, 0.3)
    positive = logits[0][
        1, assignment >= 0
    ]  # turning round costs softplus(x) - softplus(-x) = x of each
    sampled = 2 * ((assignment >= 0).sum() + (assignment == faster_rcnn.NEGATIVE).sum())
    assert len(positive) > 0 and sampled <= 2 * 256
    assert (one["rpn_cls"] - both["rpn_cls"]).item() == pytest.approx(
        (positive.sum() / sampled).item(), abs=1e-6
    )
    assert 0 < one["rpn_box"] < both["rpn_box"]


def test_nms_with_offset_counts_a_pixel_more():
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4.1]]), torch.tensor([0.9, 0.8])
    labels = torch.zeros(2, dtype=torch.int64)
    assert len(faster_rcnn.nms_by_class(boxes, scores, labels, 0.5)) == 2  # IoU 36.9 / 81
    assert len(faster_rcnn.nms_by_class(boxes, scores, labels, 0.5, offset=1)) == 1  # IoU 51 / 100
