"""What a model's file says of itself, checked before anything is built or taken from it.

A file may come from anybody. Fields that this project writes are of their kind and within bounds,
sizes are those of the file's own tensors, and what a trunk, a detector or its pictures are made of
has no other fields: none may name a path or something to download. Of fields that recipes of one's
own add only that they are json is known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fewshot import InputError

Check = Callable[[Any], bool]
Shapes = Mapping[str, Sequence[int]]  # of a file's tensors, by name
ADVICE = "it is damaged, or not of this project: save it anew"


class Said(dict):
    """A json object of a model's file: to ask for a field that it lacks is an `InputError` that
    names the file.

    Attributes:
        source: the file. shapes: of its tensors; only the outermost object has them.
    """

    source: str
    shapes: Shapes

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.source}: a model's file that does not say its {key!r}; {ADVICE}")


def whole(least: int, most: int) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float) -> Check:
    return lambda value: type(value) in (int, float) and least <= value <= most  # NaN is not


def text(value: Any) -> bool:
    return isinstance(value, str)


def truth(value: Any) -> bool:
    return isinstance(value, bool)


def either(*values: Any) -> Check:
    return lambda value: any(value is v or (isinstance(v, str) and value == v) for v in values)


def optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def several(check: Check, many: int | None = None) -> Check:
    return lambda value: (
        isinstance(value, list) and many in (None, len(value)) and all(map(check, value))
    )


def names(value: Any) -> bool:
    return several(text)(value) and len(set(value)) == len(value)


def results(value: Any) -> bool:
    """Whether a card can be made of it: accuracies by shots, or average precisions by group."""
    if not isinstance(value, dict) or not isinstance(shots := value.get("shots", {}), dict):
        return False
    lines = [result for name, result in value.items() if name.startswith(("AP", "mAP"))]
    lines += [
        isinstance(result, dict) and {key: result.get(key) for key in ("accuracy", "ci95")}
        for result in shots.values()
    ]
    numbers = all(
        isinstance(line, dict) and all(type(x) in (int, float) for x in line.values())
        for line in lines
    )
    return numbers and (not shots or {"ways", "tasks"} <= value.keys())


def vectors(value: Any) -> bool:
    """Whether it names vectors, all of one length."""
    finite = several(number(-1e30, 1e30))
    return (
        isinstance(value, dict)
        and all(map(finite, value.values()))
        and len({len(v) for v in value.values()}) < 2
    )


SIDE, CHANNELS, PROPOSALS = whole(1, 4096), whole(1, 65536), several(whole(1, 1_000_000), 2)
COLOUR = several(number(-1e6, 1e6), 3)
NESTED: dict[str, dict[str, Check]] = {
    "normalisation": {
        "mean": COLOUR,
        "std": several(number(1e-6, 1e6), 3),
        "bgr": truth,
    },
    "architecture": {
        "name": text,
        "style": optional(text),
        "norm": text,
        "meta": truth,
        "pretrained": truth,
        "channels": CHANNELS,
    },
    "sizes": {
        "rois": whole(1, 100_000),
        "width": CHANNELS,
        "threshold": number(0, 1),
        "rpn_channels": CHANNELS,
        "relation_channels": CHANNELS,
        "train_proposals": PROPOSALS,
        "test_proposals": PROPOSALS,
        "shared_proposals": whole(1, 1_000_000),
        "proposal_score": number(0, 1),
        "roi_size": whole(1, 64),
        "clusters": whole(0, 65536),
        "temperature": number(1e-9, 1e9),
        "objectness": number(0, 1),
        "nms": number(0, 1),
        "decay": number(0, 1e9),
        "aligned": truth,
        "convention": either("mmdet", "torchvision", "detectron2"),
    },
    "pictures": {
        "short": optional(SIDE),
        "long": optional(whole(1, 16384)),
        "flip": truth,
        "multiple": whole(1, 1024),
        "enlarge": truth,
    },
    "calibration": {"backbone": text, "fingerprint": text, "prototypes": vectors},
}
FIELDS: dict[str, Check] = {
    "method": text,
    "classes": names,
    "base": names,
    "novel": names,
    "stage": text,
    "dataset": text,
    "backbone": text,
    "size": SIDE,
    "stored": SIDE,
    "augment": truth,
    "temperature": number(1e-9, 1e9),
    "ways": whole(1, 100_000),
    "inner_lr": number(0, 1e6),
    "cosine": truth,
    "dimensions": whole(0, 65536),
    "support_size": SIDE,
    "context": whole(0, 4096),
    "results": results,
    **{key: lambda value: isinstance(value, dict) for key in (*NESTED, "args")},
}
# Flags that models of this project's methods are built from.
FLAGS: dict[str, Check] = {
    "backbone": optional(text),
    "distance": either("scaled", "squared", "euclidean"),
    "ways": whole(1, 100_000),
    "test_steps": whole(0, 100_000),
    "inner_lr": optional(number(0, 1e6)),
    "temperature": optional(number(1e-9, 1e9)),
    "test_temperature": optional(number(1e-9, 1e9)),
    "loss_weights": several(number(-1e9, 1e9), 3),
    "steps": optional(whole(0, 1_000_000)),
}
# Which tensor's first side a size is: a field of `sizes` unless said otherwise, one of these
# tensors.
SIDES = {
    ("sizes", "rpn_channels"): ("rpn.conv.weight",),
    ("sizes", "width"): ("fc2.weight", "cls_fc2.weight"),
    ("sizes", "relation_channels"): ("relation.patch.0.weight",),
    ("architecture", "channels"): ("trunk.lateral.0.weight", "base.trunk.lateral.0.weight"),
    ("", "dimensions"): ("contrast.2.weight",),
}


def checked(about: Said) -> Said:
    """The same, in which every field that is known is of its kind, and sizes are those of the
    tensors.

    Raises:
        InputError: naming the file and the field.
    """
    _check(about, about, FIELDS)
    for part, checks in NESTED.items():
        _check(about, about.get(part, {}), checks, part)
    for (part, key), tensors in SIDES.items():
        size = (about.get(part, {}) if part else about).get(key)
        found = [about.shapes[tensor] for tensor in tensors if tensor in about.shapes]
        if size and not any(shape and shape[0] == size for shape in found):
            raise InputError(
                f"{about.source}: {key!r} is {size}, which its {' or '.join(tensors)} is not; {ADVICE}"
            )
    return about


def check_flags(about: Mapping[str, Any]) -> None:
    """Raises InputError unless the flags are what this project's methods can be built from."""
    if isinstance(about, Said):
        _check(about, about.get("args", {}), FLAGS, "args")


def check_known(about: Mapping[str, Any], part: str, known: Collection[str]) -> None:
    """Raises InputError if a nested object has another field than these, which might be a path or a
    download.
    """
    if isinstance(about, Said) and (unknown := about.get(part, {}).keys() - known):
        raise InputError(
            f"{about.source}: its {part} have an unknown {min(unknown)!r:.60}; {ADVICE}"
        )


def _check(
    about: Said, fields: Mapping[str, Any], checks: Mapping[str, Check], part: str = ""
) -> None:
    for key in fields.keys() & checks.keys():
        if not checks[key](fields[key]):
            where = f"{part} {key!r}" if part else repr(key)
            raise InputError(f"{about.source}: its {where} is {fields[key]!r:.60}; {ADVICE}")
