"""A checkpoint of mmfewshot 0.1.0, published or one's own, as one of this project's self-describing
files.

    python scripts/convert_mmfewshot.py tfa_r101_fpn_voc-split1_10shot-fine-tuning_20211101_023154-1f3d1ff1.pth
    python scripts/convert_mmfewshot.py work_dirs/my_run/latest.pth --method matching_net --out matching.safetensors

The result is used with `fewshot.load`, `scripts/predict.py`, or as `--base` of a detector's recipe.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fewshot import InputError, convert
from fewshot.convert import mmfewshot


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]  # the .pth file
    out: Path | None = None  # file to write; by default the checkpoint's name with .safetensors
    method: str | None = None  # where it cannot be read: proto_net or matching_net, tfa or fsce
    classes: tuple[str, ...] | None = None  # names in label order, where the file has none
    split: Literal[1, 2, 3] | None = None  # VOC's split, where the file has no names
    aligned: bool | None = None  # MPSR: RoIs half a pixel off; by default as published for its kind


def main(args: Args) -> None:
    model = mmfewshot.convert(
        *mmfewshot.read(args.checkpoint),
        args.checkpoint.stem,
        method=args.method,
        classes=args.classes,
        split=args.split,
        aligned=args.aligned,
    )
    convert.write(model.state, model.about, args.checkpoint, args.out)
    for reason, number in model.dropped.items():
        print(f"left out {number} tensors, {reason}")
    if "known" in model.state:
        print("prototypes are not in checkpoints: give the model supports before it predicts")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
