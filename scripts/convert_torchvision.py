"""A state dict of torchvision's Faster R-CNN as a base model, for `--base` of TFA, FSCE, MPSR, and
for `fewshot.load`.

    python scripts/convert_torchvision.py fasterrcnn_resnet50_fpn_coco-258fb6c6.pth --out coco.safetensors
    python scripts/convert_torchvision.py mine.pth --out mine.safetensors --names kettle teapot

It is of `fasterrcnn_resnet50_fpn` or `fasterrcnn_mobilenet_v3_large_320_fpn`, with any number of
classes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fewshot import InputError, convert, weights
from fewshot.convert import torchvision as torchvision_base
from fewshot.data import annotations


@dataclass
class Args:
    state: tyro.conf.Positional[Path]  # file of the model's state_dict(), .pth or .safetensors
    out: Path | None = None  # file to write; by default the other's name with .safetensors
    names: tuple[str, ...] = ()  # of the classes, from label 1 on; default: COCO's, where they fit
    classes: Path | None = None  # file with these names, one per line
    eps: float | None = None  # of its batch norms; by default 1e-5, of a ResNet's frozen ones 0


def main(args: Args) -> None:
    state = weights.read_state(args.state)
    eps = torchvision_base.default_eps(state) if args.eps is None else args.eps
    state, about = torchvision_base.converted(
        state, _categories(args, state), args.state.name, eps=eps
    )
    convert.write(state, about, args.state, args.out)
    print(f"batch norms with eps {eps:g} (--eps says another)")


def _categories(args: Args, state: dict) -> list[str]:
    """A name for each row of the head."""
    if args.names and args.classes:
        raise InputError("the classes' names are given twice: leave out --names or --classes")
    names = list(args.names)
    if args.classes:
        if not args.classes.is_file():
            raise InputError(f"{args.classes}: no such file of class names")
        lines = annotations.read_text(args.classes).splitlines()
        names = [line.strip() for line in lines if line.strip()]
        for name in names:
            if names.count(name) > 1 or not annotations.is_text(name):
                raise InputError(
                    f"{args.classes}: class {name!r:.200} is there twice, or no text; correct it"
                )
    coco = torchvision_base.categories()
    head = state.get("roi_heads.box_predictor.cls_score.bias")
    rows = len(head) if head is not None and head.ndim else 0
    if args.classes and rows not in (0, len(names) + 1):
        raise InputError(
            f"{args.classes} has {len(names)} names, for {rows - 1} classes of {args.state}; correct it"
        )
    if not names and rows not in (0, len(coco)):
        raise InputError(
            f"{args.state} does not name its {rows - 1} classes: give --names or --classes"
        )
    return [torchvision_base.BACKGROUND, *names] if names else coco


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
