"""Torchvision's detectors trained on COCO, or fine-tuned elsewhere, as base models of TFA, FSCE and
MPSR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.models import detection

from fewshot import InputError, weights
from fewshot.backbones.trunks import FrozenBatchNorm2d
from fewshot.data.transforms import IMAGENET
from fewshot.detectors.build import rebuilt
from fewshot.detectors.tfa import TFA

Backbone = Literal["resnet50", "mobilenet_v3_large"]
WEIGHTS = {
    "resnet50": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "mobilenet_v3_large": detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
}
BACKGROUND = "__background__"
# what torchvision calls the rows of its head that stand for no class
NO_OBJECT = (BACKGROUND, "N/A")
SIZES = {
    "rois": 512,
    "width": 1024,
    "threshold": 0.5,
    "rpn_channels": 256,
    "convention": "torchvision",
}
SETTINGS = {
    "resnet50": {
        "pictures": {"short": 800, "long": 1333, "multiple": 32},
        "sizes": SIZES | {"train_proposals": (2000, 2000), "test_proposals": (1000, 1000)},
    },
    "mobilenet_v3_large": {
        "pictures": {"short": 320, "long": 640, "multiple": 32},
        "sizes": SIZES
        | {"train_proposals": (2000, 2000), "test_proposals": (150, 150), "proposal_score": 0.05},
    },
}
# rewriting rules of names; some of the files are of a time when layers stood alone that are now in
# a Sequential
TRUNKS = {
    "resnet50": (
        (r"^backbone\.body\.(conv1|bn1)\.", r"trunk.\1."),
        (r"^backbone\.body\.layer(\d)\.", lambda match: f"trunk.stages.{int(match[1]) - 1}."),
    ),
    "mobilenet_v3_large": (
        (r"^backbone\.body\.0\.0\.", "trunk.conv1."),
        (r"^backbone\.body\.0\.1\.", "trunk.bn1."),
        (r"^backbone\.body\.(14|15|16)\.", r"trunk.stages.1.\1."),
        (r"^backbone\.body\.", "trunk.stages.0."),
    ),
}
OTHERS = (
    (r"^backbone\.fpn\.inner_blocks\.(\d)(\.0)?\.(?=weight|bias)", r"trunk.lateral.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)(\.0)?\.(?=weight|bias)", r"trunk.output.\1."),
    (r"^rpn\.head\.conv(\.0\.0)?\.(?=weight|bias)", "rpn.conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn.cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn.reg."),
    (r"^roi_heads\.box_head\.fc6\.", "fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "fc2."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "reg."),
)


def coco(backbone: Backbone = "resnet50") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`converted` of torchvision's detector trained on COCO, which torchvision downloads once.

    "resnet50": `fasterrcnn_resnet50_fpn`; "mobilenet_v3_large":
    `fasterrcnn_mobilenet_v3_large_320_fpn`.

    Raises:
        InputError: it cannot be downloaded.
    """
    published = WEIGHTS[backbone]
    try:
        state = published.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"torchvision's detector cannot be downloaded ({error}): fetch {published.url} elsewhere, "
            "make a base model of it with scripts/convert_torchvision.py, and give that file"
        ) from error
    return converted(state, published.meta["categories"], str(published))


def categories(backbone: Backbone = "resnet50") -> list[str]:
    """Torchvision's names of the 91 rows of its detectors trained on COCO."""
    return list(WEIGHTS[backbone].meta["categories"])


def converted(
    state: Mapping[str, Tensor],
    categories: Sequence[str],
    source: str = "the state dict",
    *,
    eps: float | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a base model, as TFA has them, and what describes it, for `rebuilt` and
    `weights.save_state`.

    It detects what torchvision's model does, but for rows of its head that stand for no class,
    which are left out.

    Args:
        state: of `fasterrcnn_resnet50_fpn` or `fasterrcnn_mobilenet_v3_large_320_fpn`.
        categories: the names of the head's rows, as torchvision has them: the background first.
        source: what errors and the description call it.
        eps: that batch norms add to the variance, which the state does not tell: by default as in
            `default_eps`.

    Raises:
        InputError: naming the tensor that is missing, left over or does not fit, or what is wrong
            with the names.
    """
    backbone: Backbone = (
        "resnet50" if "backbone.body.conv1.weight" in state else "mobilenet_v3_large"
    )
    ours = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in (*TRUNKS[backbone], *OTHERS):
            name = re.sub(pattern, replacement, name)
        if name == key:
            kinds = "fasterrcnn_resnet50_fpn or fasterrcnn_mobilenet_v3_large_320_fpn"
            raise InputError(
                f"{key} in {source} is no part of torchvision's {kinds}: give a state dict of these"
            )
        if not key.endswith("num_batches_tracked"):
            ours[name] = tensor
    classes = [name for name in categories if name not in NO_OBJECT]
    if repeated := [name for name in classes if classes.count(name) > 1]:
        raise InputError(
            f"two classes of {source} are called {repeated[0]}: give each a name of its own"
        )
    about = {
        "method": "tfa",
        "args": {"backbone": backbone},
        "stage": "base",
        "source": source,
        "classes": classes,
        "base": classes,
        "novel": [],
        "cosine": False,
        "architecture": {
            "name": backbone,
            "style": None,
            "norm": "frozen",
            "pretrained": True,
            "channels": 256,
        },
        "normalisation": IMAGENET.to_dict(),
        **SETTINGS[backbone],
    }
    _check_head(ours, categories, source)
    with torch.device("meta"):  # stops at what is missing, left over or does not fit
        shapes = {name: tensor.shape for name, tensor in ours.items()}
        weights.check_fit(rebuilt(TFA, about), shapes, source, ("cls.", "reg."))
    model = rebuilt(TFA, about)
    rows = [row for row, name in enumerate(categories) if name not in NO_OBJECT]
    for kind in ("weight", "bias"):
        ours[f"cls.{kind}"] = ours[f"cls.{kind}"][[*rows, 0]]
        ours[f"reg.{kind}"] = ours[f"reg.{kind}"].unflatten(0, (-1, 4))[rows].flatten(0, 1)
        # torchvision's anchors run ratio by ratio, ours by scale
        for name in (f"rpn.cls.{kind}", f"rpn.reg.{kind}"):
            by_anchor = ours[name].unflatten(
                0, (len(model.rpn.ratios), len(model.rpn.scales[0]), -1)
            )
            ours[name] = by_anchor.transpose(0, 1).flatten(0, 2)
    model.load_state_dict(ours)
    eps = default_eps(state) if eps is None else eps
    for norm in model.modules():
        if isinstance(norm, FrozenBatchNorm2d):  # the same norm in terms of ours
            norm.weight *= (norm.running_var + eps).rsqrt()
            norm.running_var.fill_(1 - norm.eps)
    return model.state_dict(), about | model.describe()


def default_eps(state: Mapping[str, Tensor]) -> float:
    """What the batch norms of a model add to the variance: nothing, in torchvision's ResNet trained
    on COCO.
    """
    # norms that were not frozen
    trained = any(key.endswith("num_batches_tracked") for key in state)
    return 0.0 if "backbone.body.conv1.weight" in state and not trained else 1e-5


def _check_head(ours: Mapping[str, Tensor], categories: Sequence[str], source: str) -> None:
    for name, per_class in (("cls.weight", 1), ("cls.bias", 1), ("reg.weight", 4), ("reg.bias", 4)):
        if name not in ours:
            raise InputError(
                f"{name} is missing from {source}: give the state dict of a whole detector"
            )
        shape, inner = tuple(ours[name].shape), (SIZES["width"],) if name.endswith("weight") else ()
        if shape[1:] != inner or not shape:
            rows = ", ".join(map(str, (per_class * len(categories), *inner)))
            raise InputError(
                f"{name} is {shape} in {source}, a detector of torchvision's has ({rows})"
            )
        if shape[0] != per_class * len(categories):
            number = shape[0] // per_class - 1
            raise InputError(
                f"{source} is a model of {number} classes, and {len(categories) - 1} names do not fit it"
            )
