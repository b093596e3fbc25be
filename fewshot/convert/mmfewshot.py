"""What checkpoints of mmfewshot 0.1.0, and of VFA, are called here: names of tensors, methods,
variants, classes.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewshot import InputError, methods, weights
from fewshot.data.annotations import COCO_NOVEL, VOC_CLASSES, VOC_NOVEL, is_text
from fewshot.data.transforms import CAFFE, CAFFE_MPSR, IMAGENET
from fewshot.methods import DETECTORS

COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted "
    "plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,"
    "book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
# the reference's name of a method in its configs and files -> ours
CLASSIFIER_NAMES = {
    "Baseline": "baseline",
    "BaselinePlus": "baseline_plus",
    "NegMargin": "neg_margin",
    "ProtoNet": "proto_net",
    "MatchingNet": "matching_net",
    "RelationNet": "relation_net",
    "MetaBaseline": "meta_baseline",
    "MAML": "maml",
}
# rewriting rules of names: backbones of classifiers, then heads
BACKBONES = {
    "conv4": ((r"layers\.(\d)\.layers", r"blocks.\1"),),
    "resnet12": (
        (r"layer(\d)\.0", lambda m: f"stages.{int(m[1]) - 1}"),
        ("downsample", "shortcut"),
    ),
    "wrn28_10": (
        (r"layer(\d)", lambda m: f"stages.{int(m[1]) - 1}"),
        (r"shortcut\.0", "shortcut"),
        ("^conv1", "stem"),
        ("^norm1", "norm"),
    ),
}
HEADS = (
    (r"^fc\.(weight|bias|weight_g|weight_v)$", r"\1"),
    (r"^fc\.parametrizations\.weight\.original0$", "weight_g"),
    (r"^fc\.parametrizations\.weight\.original1$", "weight_v"),
    (r"^layer(\d)\.0\.", r"conv\1."),
    (r"^layer(\d)\.1\.", r"norm\1."),
)
LAST = {"fc_cls": "cls", "fc_reg": "reg", "fc_meta": "meta"}
DETECTOR_HEADS = LAST | {
    "shared_fcs.0": "fc1",
    "shared_fcs.1": "fc2",
    "contrastive_head.0": "contrast.0",
    "contrastive_head.2": "contrast.2",
    "cls_fcs.0": "cls_fc1",
    "cls_fcs.1": "cls_fc2",
    "reg_fcs.0": "reg_fc1",
    "reg_fcs.1": "reg_fc2",
    "patch_relation_branch.0": "relation.patch.0",
    "patch_relation_branch.3": "relation.patch.1",
    "patch_relation_branch.5": "relation.patch.2",
    "local_correlation_branch.0": "relation.local",
    "global_relation_branch.0": "relation.whole.0",
    "global_relation_branch.2": "relation.whole.1",
    "patch_relation_fc_cls": "relation.patch_cls",
    "patch_relation_fc_reg": "relation.reg",
    "local_correlation_fc_cls": "relation.local_cls",
    "global_relation_fc_cls": "relation.whole_cls",
}
BOX_HEAD = "roi_head.bbox_head."
AGGREGATOR = "roi_head.aggregation_layer.aggregator_list."
VAE = "roi_head.vae."
VAE_LAYERS = {
    "encoder.0": "encoder.0",
    "encoder.1": "encoder.1",
    "fc_mu": "mean",
    "fc_var": "log_variance",
    "decoder_input": "decoder.0",
    "decoder.0": "decoder.1",
    "decoder.1": "decoder.2",
}
PYRAMIDS = ("tfa", "fsce", "mpsr")  # methods with a feature pyramid
PROTOTYPES = ("prototypes", "kernels", "maps", "known")  # buffers that checkpoints do not have


@dataclass
class Converted:
    """A model in this project's terms: what `weights.save_state` takes, and what became of the
    other tensors.
    """

    state: dict[str, Tensor]
    about: dict[str, Any]
    dropped: Counter = field(default_factory=Counter)  # reason -> number of tensors


def backbone_name(key: str, backbone: str) -> str:
    """The reference's name of a classifier's backbone tensor, without `backbone.`, -> ours, without
    `features.`.
    """
    return _rewritten(key, BACKBONES[backbone])


def head_name(key: str) -> str:
    """The reference's name of a classifier's head tensor, without `head.`, -> ours, likewise."""
    return _rewritten(key, HEADS)


def classifier_name(key: str, backbone: str) -> str | None:
    """The reference's name of a classifier's tensor -> ours; None where it is no part of one."""
    part, _, rest = key.partition(".")
    if part == "backbone":
        return f"features.{backbone_name(rest, backbone)}"
    return f"head.{head_name(rest)}" if part == "head" else None


def detector_name(key: str, method: str) -> str | None:
    """The reference's name of a detector's tensor -> ours; None where it is no part of such a
    detector.
    """
    if method in PYRAMIDS and (match := re.match(r"backbone\.layer(\d)\.(.+)", key)):
        return f"trunk.stages.{int(match[1]) - 1}.{match[2]}"
    if key.startswith("backbone."):
        return key.replace("backbone.", "trunk.", 1)
    if match := re.match(r"neck\.(lateral|fpn)_convs\.(\d)\.conv\.(weight|bias)$", key):
        return f"trunk.{'lateral' if match[1] == 'lateral' else 'output'}.{match[2]}.{match[3]}"
    if key.startswith("rpn_head.rpn_"):
        return "rpn." + key.removeprefix("rpn_head.rpn_")
    if key.startswith("roi_head.shared_head.layer4."):
        return key.replace("roi_head.shared_head.layer4.", "trunk.stage4.", 1)
    if match := re.match(rf"{re.escape(AGGREGATOR)}([01])\.(.+)", key):
        return f"{('product', 'difference')[int(match[1])]}.{match[2]}"
    if key.startswith(VAE):
        layer, _, kind = key.removeprefix(VAE).rpartition(".")
        return f"vae.{VAE_LAYERS[layer]}.{kind}" if layer in VAE_LAYERS else None
    layer, _, kind = key.removeprefix(BOX_HEAD).rpartition(".")
    return f"{DETECTOR_HEADS[layer]}.{kind}" if layer in DETECTOR_HEADS else None


def _rewritten(key: str, rules: Sequence[tuple]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, meta) of a checkpoint. Nothing in it is executed: tensors, numbers, text and
    arrays are read.

    Raises:
        InputError: it cannot be read, or holds other objects.
    """
    arrays = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "fdlihbBq?"}]
    try:
        arrays += [np._core.multiarray._reconstruct, np._core.multiarray.scalar]
    except AttributeError:  # numpy 1
        arrays += [np.core.multiarray._reconstruct, np.core.multiarray.scalar]
    # files written with numpy 1 name its modules so
    named = [(f, f"numpy.core.multiarray.{f.__name__}") for f in arrays[-2:]]
    try:
        with torch.serialization.safe_globals([*arrays, *named]):
            content = weights.unpickled(Path(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; correct the path") from None
    except pickle.UnpicklingError as error:
        culprit = re.search(r"(?:GLOBAL|class|function) (\S+)", str(error))
        what = culprit[1] if culprit else "an object"
        raise InputError(
            f"{path} holds {what}, which is not read since that would run its code: where it was made, save "
            "{'state_dict': checkpoint['state_dict'], 'meta': {'CLASSES': checkpoint['meta']['CLASSES']}} anew"
        ) from None
    except Exception as error:  # torch stumbles over many things in a file that is damaged
        raise InputError(
            f"{path} cannot be read as a checkpoint: {str(error).partition(chr(10))[0]:.300}"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path} is no checkpoint: it holds a {type(content).__name__}, not a dict of tensors"
        )
    state, meta = content.get("state_dict", content), content.get("meta")
    if flaw := weights.state_flaw(state):
        raise InputError(f"{path} is no checkpoint: {flaw}")
    return dict(state), meta if isinstance(meta, dict) else {}


def convert(
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    name: str = "checkpoint",
    *,
    method: str | None = None,
    classes: Sequence[str] | None = None,
    split: Literal[1, 2, 3] | None = None,
    aligned: bool | None = None,
) -> Converted:
    """A checkpoint's model in this project's terms.

    Method, depth, number of classes and variants are read from names and shapes, from the file's
    `meta` and its name.

    Args:
        state, meta: of the checkpoint.
        name: of its file; published ones tell the method.
        method: where none of these tell: proto_net and matching_net have the same tensors, as do
            tfa and fsce.
        classes: names in label order, where `meta` has none.
        split: VOC's split, where neither does.
        aligned: of MPSR, whether its RoIs are cut half a pixel off; by default as published: not in
            models fine-tuned on VOC, nor in those converted from the authors'.

    Raises:
        InputError: naming the tensor that is missing, left over or does not fit, or what has to be
            said by an argument.
    """
    try:
        return _converted(state, meta, name, method, classes, split, aligned)
    except InputError as error:
        raise error if name in str(error) else InputError(f"{name}: {error}") from None


def _converted(
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    name: str,
    method: str | None,
    classes: Sequence[str] | None,
    split: int | None,
    aligned: bool | None,
) -> Converted:
    tensors, dropped = _needed(state)
    detects = any(key.startswith(("rpn_head.", "roi_head.")) for key in tensors)
    possible = DETECTORS if detects else CLASSIFIER_NAMES.values()
    if method is not None and method not in possible:
        kind = "detector" if detects else "classifier"
        raise InputError(f"{name} is a {kind}, and {method!r} is none of {', '.join(possible)}")

    text = f"{name} {meta.get('config', '')}"
    if detects:
        method = method or _detector_method(tensors, text)
        names = _classes(tensors, meta, classes, split)
        about = _detector_about(tensors, method, names, aligned, text)
        rename = partial(detector_name, method=method)
    else:
        method = method or _classifier_method(tensors, text)
        about = _classifier_about(tensors, method, meta, classes)
        rename = partial(classifier_name, backbone=about["args"]["backbone"])

    ours = {}
    for key, value in tensors.items():
        renamed = rename(key)
        counts = key.endswith("num_batches_tracked") and not key.startswith((AGGREGATOR, VAE))
        if detects and counts:
            dropped["num_batches_tracked: of norms that are constants"] += 1
        elif renamed is None:
            raise InputError(
                f"{key} in {name} is no part of {method}: is it of another method? (--method)"
            )
        else:
            ours[renamed] = value

    with torch.device("meta"):  # it need not be there to be compared with
        model = methods.built(about)
    # no class is known yet
    ours |= {
        n: torch.zeros_like(t, device="cpu") for n, t in model.named_buffers() if n in PROTOTYPES
    }
    weights.check_fit(model, {n: t.shape for n, t in ours.items()}, name, methods.unused(model))
    return Converted(ours, about, dropped)


def _needed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Counter]:
    """The tensors without what wraps a model in training or is there twice, and what was dropped."""
    tensors, dropped = {}, Counter()
    for key, value in state.items():
        key = key.removeprefix("module.")
        if key.endswith("device_indicator"):
            dropped["device_indicator: empty"] += 1
        elif key.startswith("support_backbone."):
            twin = state.get(key.removeprefix("support_"))
            if twin is None or not torch.equal(twin, value):
                raise InputError(
                    f"{key} differs from backbone's: a support network of its own is not known here"
                )
            dropped["support_backbone.*: the same tensors as backbone.*"] += 1
        else:
            tensors[key] = value
    return tensors, dropped


def _detector_method(state: Mapping[str, Tensor], text: str) -> str:
    marks = {
        "rpn_head.rpn_cls_conv.": "mpsr",
        f"{BOX_HEAD}patch_relation_branch.": "attention_rpn",
        AGGREGATOR: "fsdetview",
        VAE: "vfa",
        f"{BOX_HEAD}fc_meta.": "meta_rcnn",
        f"{BOX_HEAD}contrastive_head.": "fsce",
    }
    for mark, method in marks.items():
        if any(key.startswith(mark) for key in state):
            return method
    return "fsce" if "fsce" in text.lower() else "tfa"  # the same network


def _classifier_method(state: Mapping[str, Tensor], text: str) -> str:
    head = {key.removeprefix("head.") for key in state if key.startswith("head.")}
    if "temperature" in head:
        return "meta_baseline"
    if "weight" in head:
        return "neg_margin"
    if any(key.startswith("layer1.") for key in head):
        return "relation_net"
    if any("weight_g" in key or "original0" in key for key in head):
        return "baseline_plus"

    names = ("baseline", "maml") if head else ("proto_net", "matching_net")
    possible = {theirs: ours for theirs, ours in CLASSIFIER_NAMES.items() if ours in names}
    for theirs, ours in possible.items():
        if re.search(rf"\b{theirs}\b", text):
            return ours
    for ours in possible.values():
        if re.search(rf"(^|[/\s]){ours.replace('_', '[-_]')}[-_]", text):
            return ours

    if head:  # MAML never updates the running statistics of its norms
        means = [value for key, value in state.items() if key.endswith("running_mean")]
        return "baseline" if any(mean.any() for mean in means) else "maml"
    raise InputError(
        "a classifier without a head may be proto_net or matching_net: say which (--method)"
    )


def _blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.split(".")[2] for key in state if key.startswith(prefix)})


def _classes(
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    given: Sequence[str] | None,
    split: int | None,
) -> list[str]:
    """Class names in label order."""
    last = f"{BOX_HEAD}fc_cls.weight"
    number = _rows(state, last) - 1 if last in state else None
    names = _named(meta, given)

    if not names and split and number in (15, 20):
        novel = VOC_NOVEL[split].split()
        base = [name for name in VOC_CLASSES if name not in novel]
        names = base + novel if number == 20 else base
    elif not names and number in (60, 80):
        names = [name for name in COCO_CLASSES if number == 80 or name not in COCO_NOVEL]

    if not names and number:
        raise InputError(
            f"the names of its {number} classes are not in the file: give --split, or --classes"
        )
    if number is not None and len(names) != number:
        raise InputError(
            f"{len(names)} class names for a model of {number} classes: give --classes"
        )
    return names


def _named(meta: Mapping[str, Any], given: Sequence[str] | None) -> list[str]:
    names = given or meta.get("CLASSES")
    if names is not None and not (isinstance(names, (list, tuple)) and all(map(is_text, names))):
        raise InputError(
            f"CLASSES in its meta is {names!r:.60}, and no list of names: give --classes"
        )
    return list(names or ())


def _rows(state: Mapping[str, Tensor], key: str) -> int:
    """How many rows, or filters, a weight has."""
    if key not in state or not state[key].dim():
        raise InputError(
            f"{key} is missing or a single number: is it a whole checkpoint of mmfewshot?"
        )
    return len(state[key])


def _detector_about(
    state: Mapping[str, Tensor], method: str, classes: list[str], aligned: bool | None, text: str
) -> dict[str, Any]:
    depth = {6: 50, 23: 101}.get(_blocks(state, "backbone.layer3."))
    if depth is None:
        raise InputError(
            "its backbone is neither a ResNet-50 nor a ResNet-101: backbone.layer3 has another length"
        )
    novel = _novel(classes)
    architecture: dict[str, Any] = {"name": f"resnet{depth}", "style": "caffe", "norm": "frozen"}
    sizes: dict[str, Any] = {"rpn_channels": _rows(state, "rpn_head.rpn_conv.weight")}
    about: dict[str, Any] = {
        "method": method,
        "args": {"backbone": architecture["name"]},
        "stage": "finetune" if novel else "base",
        "classes": classes,
        "novel": novel,
        "base": [name for name in classes if name not in novel],
        "pictures": {"short": 800, "long": 1333, "multiple": 32},
    }

    if method in PYRAMIDS:
        architecture["channels"] = _rows(state, "neck.lateral_convs.0.conv.weight")
        hidden = "cls_fcs" if method == "mpsr" else "shared_fcs"
        sizes["width"] = _rows(state, f"{BOX_HEAD}{hidden}.0.weight")
    elif method != "vfa":
        about["pictures"] = {"short": 600, "long": 1000, "multiple": 1}

    normalisation = CAFFE
    if method in ("tfa", "fsce"):
        about["cosine"] = f"{BOX_HEAD}fc_cls.bias" not in state
    if method == "fsce":
        contrast = f"{BOX_HEAD}contrastive_head.2.weight"
        about["dimensions"] = _rows(state, contrast) if contrast in state else 0
    elif method == "mpsr":
        about["pictures"]["multiple"], normalisation = 1, CAFFE_MPSR
        voc = len(classes) == 20 and set(classes) == set(VOC_CLASSES)
        sizes["aligned"] = not (voc or "convert_" in text) if aligned is None else aligned
    elif method == "attention_rpn":
        sizes["relation_channels"] = _rows(state, f"{BOX_HEAD}patch_relation_branch.0.weight")
        about |= {"support_size": 320, "context": 16}
    elif method not in PYRAMIDS:
        architecture["meta"] = True
        about["support_size"] = 224
    return about | {
        "architecture": architecture,
        "sizes": sizes,
        "normalisation": normalisation.to_dict(),
    }


def _novel(classes: Sequence[str]) -> list[str]:
    """Which of the classes are novel, by the published splits."""
    if set(classes) == set(VOC_CLASSES):
        for novel in VOC_NOVEL.values():
            if set(classes[15:]) == set(novel.split()):
                return list(classes[15:])
    if set(classes) in (set(COCO_CLASSES), set(COCO_NOVEL)):
        return [name for name in classes if name in COCO_NOVEL]
    return []


def _classifier_about(
    state: Mapping[str, Tensor], method: str, meta: Mapping[str, Any], classes: Sequence[str] | None
) -> dict[str, Any]:
    if "backbone.layers.0.layers.0.weight" in state:
        backbone = "conv4"
    else:
        backbone = "wrn28_10" if "backbone.layer1.0.shortcut.0.weight" in state else "resnet12"

    args: dict[str, Any] = {"backbone": backbone}
    if method == "proto_net":
        args["distance"] = "euclidean"  # with which it was trained
    if method == "matching_net":
        args["temperature"] = 100.0
    if method in ("baseline_plus", "neg_margin"):
        args["test_temperature"] = 2.0 if method == "baseline_plus" and backbone == "conv4" else 5.0
    if method == "maml":
        args |= {"ways": _rows(state, "head.fc.weight"), "test_steps": 5, "inner_lr": 0.01}
    return {
        "method": method,
        "args": args,
        "classes": _named(meta, classes),
        "size": 84,
        "stored": 256,
        "augment": True,
        "normalisation": IMAGENET.to_dict(),
    }
