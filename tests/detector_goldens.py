"""What the detectors' tests share: the reference's pictures, its names of tensors, and how its
results are compared.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from naming_rule import GAINS, boxes, close, image, weight
from torch import Tensor, nn

from fewshot.data.detection import Detections
from fewshot.data.transforms import CAFFE, Normalisation
from fewshot.detectors import faster_rcnn
from fewshot.detectors.faster_rcnn import RPN
from fewshot.detectors.meta_rcnn import MetaDetector

SIZE = (256, 320)  # height and width of the reference's pictures
EVERY = 10**7  # number of samples that takes all
# our names of losses and the reference's
LOSSES = {
    "rpn_cls": "loss_rpn_cls",
    "rpn_box": "loss_rpn_bbox",
    "rpn_crops": "loss_rpn_cls_auxiliary",
    "cls": "loss_cls",
    "box": "loss_bbox",
    "meta": "loss_meta_cls",
    "vae": "loss_vae",
    "contrast": "loss_contrast",
    "crops": "loss_cls_auxiliary",
}


def normalised(
    name: str, height: int = SIZE[0], width: int = SIZE[1], by: Normalisation = CAFFE
) -> Tensor:
    """The reference's picture `name` (3, height, width) as the network sees it."""
    return by(torch.from_numpy(image(name, height, width)).permute(2, 0, 1))


def fill(
    module: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    our_key: Callable[[str], str],
    own: Sequence[str] = (),
    gains: Sequence[tuple[str, float]] = GAINS,
):
    """Give a detector the reference's weights; `own` are the only tensors that the reference lacks."""
    state = {
        our_key(key): torch.from_numpy(weight(key, shape, gains))
        for key, shape in shapes.items()
        if not key.endswith("num_batches_tracked") and not key.startswith("support_backbone.")
    }
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    assert sorted(missing) == sorted(own) and not unexpected, (
        f"missing {missing}, left over {unexpected}"
    )


def check_rpn(rpn: RPN, features: Sequence[Tensor], expected: Mapping[str, Any]) -> None:
    """Raw maps of every level and the proposals of one picture."""
    maps = rpn.maps(features)
    check_levels([cls for cls, _ in maps], expected["rpn_cls"])
    check_levels([reg for _, reg in maps], expected["rpn_reg"])
    (proposals,) = rpn.proposals(*rpn.outputs(maps), [SIZE])
    check_proposals(proposals, expected["rpn_proposals"])


def check_levels(maps: Sequence[Tensor], expected: Sequence[Any]) -> None:
    """Level by level."""
    for ours, theirs in zip(maps, expected, strict=True):
        close(ours, theirs)


def check_proposals(proposals: Tensor, expected: Mapping[str, Any]) -> None:
    """The same number, and the best ones equal; the reference's may lack their scores."""
    assert len(proposals) == expected["count"]
    wanted = torch.tensor(expected["top"])
    assert torch.allclose(proposals[: len(wanted), :4], wanted[:, :4], atol=0.05)
    if wanted.shape[1] == 5:
        assert torch.allclose(proposals[: len(wanted), 4], wanted[:, 4], atol=1e-4)


def check_detections(found: Detections, expected: Mapping[str, Any]) -> None:
    """The same classes, scores to 1e-4 and boxes to 0.05 pixels."""
    assert len(found.scores) == expected["count"]
    counts = torch.bincount(found.labels, minlength=len(expected["per_class"])).tolist()
    assert counts == list(expected["per_class"])
    wanted = torch.tensor(expected["top"]).view(-1, 6)
    n = len(wanted)
    assert found.labels[:n].tolist() == wanted[:, 0].tolist()
    assert torch.allclose(found.scores[:n], wanted[:, 1], atol=1e-4)
    assert torch.allclose(found.boxes[:n], wanted[:, 2:], atol=0.05)


def check_gradients(
    model: nn.Module, norms: Mapping[str, float | None], our_key: Callable[[str], str]
) -> None:
    """The norm of each parameter's gradient; those that are rounding errors of 0 are left out."""
    for key, norm in norms.items():
        gradient = model.get_parameter(our_key(key)).grad
        if norm is None:
            assert gradient is None, key
        elif norm > 1e-5:
            assert gradient is not None and gradient.norm().item() == pytest.approx(
                norm, rel=2e-3
            ), key


def check_losses(
    losses: Mapping[str, Tensor], expected: Mapping[str, Any], names: str, rel: float = 1e-4
) -> None:
    """Those of `names`, which the reference gives as numbers or level by level."""
    for name in names.split():
        wanted = np.sum(expected[LOSSES[name]])
        assert losses[name].item() == pytest.approx(wanted, rel=rel), name


def all_rois(
    train: Mapping[str, Any],
    truth: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    **more: Any,
) -> list[faster_rcnn.RoIs]:
    """All RoIs among the reference's proposals for its training pictures, as many as it has."""
    proposals = [torch.tensor(p) for p in train["fixed_proposals"]]
    proposals *= len(truth) // len(proposals)
    options = {"classes": classes, "number": EVERY, **more}
    rois = faster_rcnn.sample_rois(proposals, truth, labels, **options)
    counts = [[len(r.deltas), len(r.boxes) - len(r.deltas)] for r in rois]
    assert counts == train["fixed"]["samples_pos_neg"]
    return rois


def training_batch(
    train: Mapping[str, Any], by: Normalisation = CAFFE
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The reference's two training pictures, their boxes and labels."""
    images = torch.stack([normalised(f"train{i}", by=by) for i in range(2)])
    truth = [torch.tensor(b) for b in train["gt_boxes"]]
    return images, truth, [torch.tensor(c) for c in train["gt_labels"]]


def support_stack(order: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The reference's supports (n, 4, 224, 224) with their box as mask, and their labels; `order`:
    (class, shot).
    """
    stacks = []
    for c, s in order:
        x1, y1, x2, y2 = boxes(f"supbox_c{c}_s{s}", 1, 224, 224, lo=60, hi=0.9)[0].astype(int)
        mask = torch.zeros(1, 224, 224)
        mask[:, y1:y2, x1:x2] = 1
        stacks.append(torch.cat([normalised(f"support_c{c}_s{s}", 224, 224), mask]))
    return torch.stack(stacks), torch.tensor([c for c, _ in order])


def check_query_path(model: MetaDetector, expected: Mapping[str, Any]) -> None:
    """What Meta R-CNN and its kin make of a query picture before any support is seen."""
    query = normalised("query0")[None]
    close(query, expected["input"])
    features = model.trunk(query)
    close(features, expected["backbone"][0])
    check_rpn(model.rpn, [features], expected)
    fixed = torch.tensor(expected["fixed_proposals"])
    close(faster_rcnn.roi_align(features, [fixed], 14, 16), expected["roi_align"])
    close(model.roi_vectors(features, [fixed]), expected["roi_shared_head"])


def check_all_classes_at_once(
    model: MetaDetector,
    expected: Mapping[str, Any],
    queries: Tensor,
    vectors: Tensor,
    labels: Tensor,
) -> None:
    """Detections of a query picture by the prototypes of all supports, and by those of some."""
    query, fixed = normalised("query0")[None], torch.tensor(expected["fixed_proposals"])
    logits, deltas = model.classify(queries)  # all classes at once
    assert torch.allclose(logits, torch.tensor(expected["merged_cls_score"]), atol=1e-4)
    close(deltas.flatten(1), expected["merged_bbox_pred"])
    check_detections(
        faster_rcnn.detections(logits, deltas, fixed, SIZE, nms=0.3), expected["det_fixed"]
    )
    (found,) = model.detect(query, [SIZE])
    check_detections(found, expected["det_e2e"])

    some = torch.isin(labels, torch.tensor([1, 4, 7]))
    model.set_prototypes(vectors[some], labels[some])
    assert model.known.nonzero()[:, 0].tolist() == [1, 4, 7]
    logits, deltas = model.classify(queries)
    close(logits, expected["merged_cls_score_supports_only_1_4_7"])
    found = faster_rcnn.detections(logits, deltas, fixed, SIZE, nms=0.3)
    check_detections(found, expected["det_fixed_supports_only_1_4_7"])
