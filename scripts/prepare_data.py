"""Get a data set, put it where recipes look for it, and count what is there.

    python scripts/prepare_data.py cub
    python scripts/prepare_data.py voc --root /disk/data
    python scripts/prepare_data.py coco --year 2014 --yes

What may be downloaded is, with its checksum; of the rest this says where it is and where to put it.
A data set that is there and complete is only counted. The embedded glyphs need nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro
from torchvision.datasets import CIFAR100, Omniglot, VOCDetection, utils

from fewshot import InputError
from fewshot.data import annotations
from fewshot.data.classification import open_dataset
from fewshot.data.image_set import Split

Name = Literal[
    "omniglot", "cifar_fs", "fc100", "cub", "mini_imagenet", "tiered_imagenet", "voc", "coco"
]

# (classes, pictures) of every part as published. COCO's archives have checksums, and its lists say
# which pictures belong to them, so that nothing remains to be counted.
PUBLISHED = {
    "omniglot": {"train": (4112, 82_240), "val": (688, 13_760), "test": (1692, 33_840)},
    "cifar_fs": {"train": (64, 38_400), "val": (16, 9_600), "test": (20, 12_000)},
    "fc100": {"train": (60, 36_000), "val": (20, 12_000), "test": (20, 12_000)},
    "cub": {"train": (100, 5_885), "val": (50, 2_950), "test": (50, 2_953)},
    "mini_imagenet": {"train": (64, 38_400), "val": (16, 9_600), "test": (20, 12_000)},
    "tiered_imagenet": {"train": (351, 448_695), "val": (97, 124_261), "test": (160, 206_209)},
    "voc": {"train": (20, 16_551), "test": (20, 4_952)},
}

# to download
SIZES = {
    "omniglot": "15 MB",
    "cifar_fs": "170 MB",
    "fc100": "170 MB",
    "cub": "1.1 GB",
    "voc": "2.8 GB",
}
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
VOC_PARTS = ("2007", "trainval"), ("2007", "test"), ("2012", "trainval")
COCO_URL = "http://images.cocodataset.org"
# archive -> md5, gigabytes, and what is there once it was unpacked
COCO = {
    "2014": {
        "zips/train2014.zip": ("0da8c0bd3d6becc4dcb32757491aca88", 13.5, "train2014"),
        "zips/val2014.zip": ("a3d79f5ed8d289b7a7554ce06a5782b3", 6.6, "val2014"),
        "annotations/annotations_trainval2014.zip": (
            "0a379cfc70b0e71301e0f377548639bd",
            0.3,
            "annotations/instances_train2014.json",
        ),
    },
    "2017": {
        "zips/train2017.zip": ("cced6f7f71b7629ddf16f17bbcfab6b2", 19.3, "train2017"),
        "zips/val2017.zip": ("442b8da7639aecaf257c1dceb8ba8c80", 0.8, "val2017"),
        "annotations/annotations_trainval2017.zip": (
            "f4bbac642086de4f52a3fdda2de5fa2c",
            0.3,
            "annotations/instances_train2017.json",
        ),
    },
}

BY_HAND = {
    "mini_imagenet": (
        "ImageNet's pictures may not be passed on: unpack the folders of the 100 classes of ILSVRC2012_img_train.tar, "
        "from https://image-net.org after registration, to {root}/mini_imagenet/images, and put train.csv, val.csv and "
        "test.csv of https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet into "
        "{root}/mini_imagenet"
    ),
    "tiered_imagenet": (
        "ImageNet's pictures may not be passed on: unpack tiered-imagenet.tar (13 GB), to which "
        "https://github.com/renmengye/few-shot-ssl-public#tieredimagenet links, so that train_images_png.pkl, "
        "train_labels.pkl and those of val and test are in {root}/tiered_imagenet"
    ),
}
# TFA's (Wang et al. 2020), as mmfewshot packs them
SHOT_LISTS = {
    "voc": (
        "published few-shot lists, for --shot-lists {root}/few_shot_ann/voc: unpack "
        "https://download.openmmlab.com/mmfewshot/few_shot_ann/voc.tar.gz in {root}/few_shot_ann "
        "(first published at http://dl.yf.io/fs-det/datasets/vocsplit/)"
    ),
    "coco": (
        "published few-shot lists and the split that goes with them, of the pictures of 2014, for --shot-lists "
        "{root}/few_shot_ann/coco: unpack https://download.openmmlab.com/mmfewshot/few_shot_ann/coco.tar.gz in "
        "{root}/few_shot_ann (first published at http://dl.yf.io/fs-det/datasets/cocosplit/)"
    ),
}


@dataclass
class Args:
    name: tyro.conf.Positional[Name]  # data set
    root: str = "data"  # folder that holds data sets: a recipe's --data-root
    year: Literal["2014", "2017"] = "2017"  # of COCO; published lists name pictures of 2014
    yes: bool = False  # download COCO, large as it is


def main(args: Args) -> None:
    """Raises InputError when the data set is not there, whole, in the end."""
    try:
        verify(args)
    except InputError as lack:
        if args.name in BY_HAND:
            raise InputError(f"{lack}. {BY_HAND[args.name].format(root=args.root)}") from lack
        print(lack)
        download(args)
        verify(args)
    if args.name in SHOT_LISTS:
        print(SHOT_LISTS[args.name].format(root=args.root))


def verify(args: Args) -> None:
    """Print the classes and pictures of every part. Raises InputError for what is missing or not as
    published.
    """
    found = count(args)
    published = PUBLISHED.get(args.name, found)
    print(f"{f'{args.name} in {args.root}':40}{'classes':>10}{'pictures':>12}{'published':>12}")
    for part, (classes, pictures) in found.items():
        print(f"{part:40}{classes:10,}{pictures:12,}{published[part][1]:12,}")
    for part, numbers in found.items():
        if numbers != published[part]:
            (classes, pictures), (all_classes, all_pictures) = numbers, published[part]
            raise InputError(
                f"{args.name} in {args.root}: {part} has {pictures:,} pictures of {classes} classes, published are "
                f"{all_pictures:,} of {all_classes}; complete it"
            )


def count(args: Args) -> dict[str, tuple[int, int]]:
    """(classes, pictures) of every part. Raises InputError for whatever a recipe would complain of."""
    root, parts = Path(args.root), get_args(annotations.Part)
    if args.name == "voc":
        # read by itself: as a set to learn on it lacks pictures whose objects are all difficult
        records = {part: annotations.read_voc(root, part, (0, 0, 0, 0))[0] for part in parts}
        return {part: (len(annotations.VOC_CLASSES), len(records[part])) for part in parts}
    if args.name == "coco":
        home = root / "coco" if (root / "coco").is_dir() else root
        for _, _, unpacked in COCO[args.year].values():
            if not (home / unpacked).exists():
                raise InputError(f"{home / unpacked}: missing")
        return {part: tuple(map(len, annotations.read_coco(root, part)[:2])) for part in parts}
    opened = ((split, open_dataset(args.name, root, split)) for split in get_args(Split))
    return {split: (len(dataset.classes), len(dataset)) for split, dataset in opened}


def download(args: Args) -> None:
    """Download and unpack a data set. Raises InputError when that fails, and for COCO without
    `args.yes`.
    """
    root = Path(args.root)
    if args.name == "coco" and not args.yes:
        size = sum(gigabytes for _, gigabytes, _ in COCO[args.year].values())
        raise InputError(
            f"coco {args.year}: {size:.0f} GB to download from {COCO_URL}, and twice as much room to unpack it; "
            f"add --yes to do so, or put its pictures and annotations into {root / 'coco'} yourself"
        )
    if args.name in SIZES:
        print(f"downloading {SIZES[args.name]} to {root}; archives may be deleted afterwards")
    try:
        root.mkdir(parents=True, exist_ok=True)
        match args.name:
            case "omniglot":
                for background in (True, False):
                    Omniglot(root, background=background, download=True)
            case "cifar_fs" | "fc100":
                CIFAR100(root, download=True)
            case "cub":
                utils.download_and_extract_archive(CUB_URL, root, md5=CUB_MD5)
            case "voc":
                for year, part in VOC_PARTS:
                    VOCDetection(root, year, part, download=True)
            case "coco":
                download_coco(root / "coco", args.year)
    except (OSError, RuntimeError) as error:  # RuntimeError: torchvision's for a wrong checksum
        raise InputError(
            f"{args.name}: download to {root} failed ({error}); run this again"
        ) from error


def download_coco(home: Path, year: str) -> None:
    """Archives are removed once they are unpacked, and not got again: they are as large as what
    they hold.
    """
    for path, (md5, _, unpacked) in COCO[year].items():
        if (home / unpacked).exists() and not (home / Path(path).name).exists():
            continue
        utils.download_and_extract_archive(
            f"{COCO_URL}/{path}", home, md5=md5, remove_finished=True
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except InputError as error:
        sys.exit(f"error: {error}")
