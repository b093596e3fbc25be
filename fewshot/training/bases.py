"""Models to begin with: one's own base model, one of other data, or torchvision's detector trained
on COCO.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fewshot import InputError, methods, weights
from fewshot.convert import torchvision as torchvision_base
from fewshot.data.detection import DetectionSplit
from fewshot.detectors import mpsr
from fewshot.detectors.mpsr import MPSR
from fewshot.detectors.tfa import TFA

# words for torchvision's detectors trained on COCO: a large one, and one for CPUs
COCO = {"coco": "resnet50", "coco_mobile": "mobilenet_v3_large"}


class Base(NamedTuple):
    """A model to fine-tune, and the data to do it with.

    state, about: what its file has. data: with the classes that the new detector is for. kept:
    those of them that the base model knows and the new detector goes on to know.
    """

    state: dict[str, Tensor]
    about: dict[str, Any]
    data: DetectionSplit
    kept: list[str]


def label(source: str) -> str:
    """How folders of runs name a base model: by its method and data if it lies in a run's folder,
    else by its name.
    """
    path = Path(source)
    folder = path.parent if path.suffix else path
    parts = (
        folder.parent.parts[-2:]
        if folder.name == "base" and len(folder.parts) > 2
        else (path.stem,)
    )
    return f"from-{'-'.join(parts)}"


def load(args: Any, data: DetectionSplit, method: str, detector: type[nn.Module] | None) -> Base:
    """The model that `--base` names: a run's folder, a file, an id on the hub, `coco` or
    `coco_mobile`.

    A model of just the data's base classes is gone on with, and knows these and the novel ones
    afterwards (generalised few-shot detection). Of any other model the layers of its classes are
    made anew, for the novel classes alone: these are all of the data's unless said otherwise.

    Args:
        args: a detection recipe's; `--keep-base` refuses a model of other classes than the data's
            base classes.
        data: both parts, with all classes.
        method, detector: the recipe's: it goes on with its own models, and with those of a method
            of `fewshot.methods` whose detector is this one or what this one extends; MPSR also with
            TFA's (`mpsr.from_tfa`). None: with any of these detectors, of which it wants the
            proposals alone.

    Raises:
        InputError: there is no such model, it is of another method or trunk, no class is novel, a
            novel one is among those that it was trained on, or the base's classes are to be kept
            and the data lack them.
    """
    source = args.base
    state, about = (
        torchvision_base.coco(COCO[source])
        if source in COCO
        else weights.load(weights.find(source))
    )
    kind = methods.DETECTORS.get(about["method"], type(None))
    if detector is None:
        if about["method"] == method or kind is type(None):
            raise InputError(
                f"--base {source} is a model of {about['method']}: give a detector that proposes regions"
            )
    else:
        if issubclass(detector, MPSR) and issubclass(kind, TFA):
            (state, about), kind = mpsr.from_tfa(state, about), MPSR
        if not (about["method"] == method or issubclass(detector, kind)):
            raise InputError(
                f"--base {source} is a model of {about['method']}, with which {method} cannot go on"
            )
        if args.backbone and args.backbone != (trunk := about["architecture"]["name"]):
            raise InputError(
                f"--base {source} has the trunk {trunk}, not {args.backbone}: leave --backbone out"
            )
    known, base = about["classes"], data.base
    if known == base and data.novel:
        return Base(state, about, data, base)
    if args.keep_base:
        name = next((name for name in known if name not in base), None)
        reason = (
            f"of which your data have no {name!r}"
            if name
            else "but your data have more base classes"
        )
        raise InputError(
            f"--keep-base keeps the classes of {source}, {reason}: leave --keep-base out"
        )
    if known == base:
        raise InputError(
            f"{source} knows all classes of the data: say which are novel with --novel-classes"
        )
    novel = data.novel or data.train.classes
    seen = [name for name in novel if name in known]
    if seen and about.get("args", {}).get("dataset") == args.dataset:
        raise InputError(
            f"--base {source} was trained on {seen[0]}, which is novel here: give one of the same split"
        )
    train, test = (part.with_novel(novel).restrict(novel) for part in (data.train, data.test))
    notes = [
        f"{source} knows its {len(known)} classes no more: the new detector is for the {len(novel)} novel ones"
    ]
    notes += [f"{source} was trained on classes of these names: {', '.join(seen)}"] if seen else []
    return Base(
        state,
        about,
        DetectionSplit(replace(train, notes=[*train.notes, *notes]), test, [], novel),
        [],
    )
