"""What DeFRCN's checkpoints, made with detectron2, are called here: names of tensors, variants,
classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewshot import InputError, methods, weights
from fewshot.convert.mmfewshot import COCO_CLASSES
from fewshot.data.annotations import COCO_NOVEL, VOC_CLASSES, VOC_NOVEL
from fewshot.data.transforms import CAFFE
from fewshot.detectors.faster_rcnn import anchor_grid

# whose classes: of one of VOC's splits, or COCO's
ClassesOf = Literal["voc1", "voc2", "voc3", "coco"]
ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
# rewriting rules of names, in this order
RULES = (
    (r"^backbone\.stem\.", "trunk."),
    (r"^backbone\.res(\d)\.", lambda m: f"trunk.layer{int(m[1]) - 1}."),
    (r"^roi_heads\.res5\.", "trunk.stage4."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "reg."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.cls."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.reg."),
    (r"^proposal_generator\.rpn_head\.", "rpn."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
)


def tensor_name(key: str) -> str:
    """DeFRCN's name of a tensor -> ours; a name that it does not have stays as it is."""
    for pattern, replacement in RULES:
        key = re.sub(pattern, replacement, key)
    return key


def convert(
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    of: ClassesOf | None = None,
    classes: Sequence[str] = (),
    novel: Sequence[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, metadata) of a DeFRCN checkpoint's model in this project's terms.

    Args:
        state: its tensors, under their own names.
        source: what messages call it.
        of: whose classes it detects: base, novel or all of them, as their number tells.
        classes: their names in label order instead, and which of them are `novel`.

    Raises:
        InputError: naming the tensor that is missing, left over or does not fit, or what has to be
            said of the classes.
    """
    tensors = dict(state)
    anchors = tensors.pop(ANCHORS, None)
    for name in (
        "roi_heads.box_predictor.cls_score.weight",
        "proposal_generator.rpn_head.conv.weight",
    ):
        if name not in tensors or not tensors[name].ndim:
            raise InputError(
                f"{name} is missing from {source}: is it DeFRCN's, and not one whose head was taken off?"
            )
    depth = {6: 50, 23: 101}.get(
        len({key.split(".")[2] for key in tensors if key.startswith("backbone.res4.")})
    )
    if depth is None:
        raise InputError(
            f"{source} is neither of ResNet-50 nor of ResNet-101: its backbone.res4 has another length"
        )

    number = len(tensors["roi_heads.box_predictor.cls_score.weight"]) - 1
    names = _classes(number, source, of, classes, novel)
    about = {
        "method": "defrcn",
        "args": {"backbone": f"resnet{depth}"},
        "stage": "finetune" if names["novel"] else "base",
        "pictures": {"short": 800, "long": 1333, "multiple": 1},
        "sizes": {
            "rois": 512,
            "roi_size": 7,
            "rpn_channels": len(tensors["proposal_generator.rpn_head.conv.weight"]),
            "train_proposals": (12000, 2000),
            "test_proposals": (6000, 1000),
        },
        **names,
        "architecture": {
            "name": f"resnet{depth}",
            "style": "caffe",
            "norm": "frozen",
            "pretrained": True,
        },
        "normalisation": CAFFE.to_dict(),
    }

    with torch.device("meta"):  # without memory, however large the file says that it is
        model = methods.built(about)
    ours = {tensor_name(key): tensor for key, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    # stops at what is missing, left over or of another shape
    weights.check_fit(model, shapes, source)

    grid = anchor_grid((1, 1), model.trunk.stride, model.rpn.scales[0], model.rpn.ratios)
    if anchors is not None and not (
        anchors.shape == grid.shape and torch.allclose(anchors.float(), grid, atol=1e-3)
    ):
        raise InputError(
            f"{ANCHORS} in {source} are not the anchors that DeFRCN was published with"
        )
    return ours, about


def _classes(
    number: int,
    source: str | Path,
    of: ClassesOf | None,
    given: Sequence[str],
    novel: Sequence[str],
) -> dict[str, list[str]]:
    """What `DetectionSet.describe` says of a set's classes, of the model's, in label order."""
    if bool(of) == bool(given):
        raise InputError(
            f"{source} does not name its {number} classes: say whose they are with --of, or give --classes"
        )

    if of == "coco":
        few = [name for name in COCO_CLASSES if name in COCO_NOVEL]
        every = COCO_CLASSES
    elif of:
        few = VOC_NOVEL[int(of[-1])].split()
        every = [name for name in VOC_CLASSES if name not in few] + few
    else:
        few = list(novel)
        every = list(given)
    if foreign := set(few) - set(every):
        raise InputError(f"--novel {min(foreign)} is none of --classes: correct one of them")
    base = [name for name in every if name not in few]

    # a published model detects its base classes, its novel ones, or all
    names = {len(few): few, len(base): base, len(every): every}.get(number) if of else every
    if names is None or len(names) != number:
        raise InputError(
            f"{source} has {number} classes, which {of or '--classes'} has not: correct --of or --classes"
        )
    return {
        "classes": names,
        "base": [name for name in base if name in names],
        "novel": [name for name in few if name in names],
    }
