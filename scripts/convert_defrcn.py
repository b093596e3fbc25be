"""A checkpoint of DeFRCN, made with detectron2, as one of this project's self-describing files.

    python scripts/convert_defrcn.py model_final.pth --of voc1 --out defrcn.safetensors
    python scripts/convert_defrcn.py model_final.pth --classes kettle teapot cup --novel cup

The result is used with `fewshot.load`, `scripts/predict.py`, or as `--base` of recipes/defrcn.py. A
checkpoint does not name its classes: `--of` says whose they are, and their number whether they are
the base, the novel or all of them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fewshot import InputError, convert, weights
from fewshot.convert import detectron2


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]  # the .pth file
    out: Path | None = None  # file to write; by default the checkpoint's name with .safetensors
    of: detectron2.ClassesOf | None = None  # its classes: of VOC's split 1, 2 or 3, or COCO's
    classes: tuple[str, ...] = ()  # their names in label order, if they are neither
    novel: tuple[str, ...] = ()  # which of --classes are novel


def main(args: Args) -> None:
    state, about = detectron2.convert(
        weights.read_state(args.checkpoint),
        args.checkpoint,
        of=args.of,
        classes=args.classes,
        novel=args.novel,
    )
    convert.write(state, about, args.checkpoint, args.out)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
