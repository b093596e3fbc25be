"""Files from strangers: each reader gives its result or one line that names the file, whatever is
in it.

Every reader has a small sound sample, of which many mutated ones are made: bytes are flipped, cut,
put in and moved, or values of the parsed file are taken out, doubled, nested and exchanged for odd
ones. A failure is told by its number, which makes it again.
"""

import importlib
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torchvision
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import fewshot
from fewshot import InputError, methods, weights
from fewshot.backbones import pretrained
from fewshot.backbones.fpn import fpn
from fewshot.backbones.trunks import c4
from fewshot.convert import mmfewshot
from fewshot.data import annotations, classification, detection, k_shot, layouts, pictures
from fewshot.data.classification import open_dataset
from fewshot.data.transforms import IMAGENET
from fewshot.detectors import calibrate
from fewshot.detectors.defrcn import DeFRCN
from fewshot.detectors.prototype import PrototypeDetector
from fewshot.detectors.tfa import TFA
from fewshot.evaluation import frozen

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
convert_defrcn, convert_torchvision, predict, results = map(
    importlib.import_module, ("convert_defrcn", "convert_torchvision", "predict", "results")
)
LIBRARY = Path(fewshot.__file__).parent
DEEP = "@deep@"  # stands for what is nested too deeply to be written by a library
ODD = [
    None,
    True,
    False,
    -1,
    0,
    1,
    1.5,
    10**6,
    10**30,
    -(10**30),
    float("inf"),
    float("-inf"),
    float("nan"),
    1e300,
    "",
    "0",
]
ODD += [
    "\0",
    "a\nb",
    " ",
    "../../etc/passwd",
    "/etc/passwd",
    "x" * 5000,
    "x/" * 3000,
    "\ud800",
    "é☃",
    "nan",
    "inf",
    "-1",
]
ODD += [[], {}, [[]], [None], {"a": 1}, [1e300] * 4, [float("nan")] * 4, DEEP]
TEXTS = [str(value) for value in ODD if not isinstance(value, (list, dict))] + [
    "1_0",
    "٣",
    "1e5",
    "0x10",
    "#",
    ",",
    '"',
]
Mutate = Callable[[bytes, random.Random], bytes]


# how a file is mutated


def bytewise(data: bytes, rng: random.Random) -> bytes:
    """Up to eight places of a file flipped, cut out, filled in, overwritten or moved, or its end
    cut off.
    """
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 16, 200))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = rng.randbytes(length)
            case 3:
                data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * length
            case 4:
                there = rng.randrange(len(data) + 1)
                data[there:there] = data[at : at + length]
            case _ if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


def exchanged(tree: Any, rng: random.Random, odd: list = ODD) -> Any:
    """A copy of nested dicts and lists where one value is odd, missing, double, nested or another
    one of them.
    """
    places = []  # (container, key)

    def copied(node: Any) -> Any:
        if isinstance(node, dict):
            new = {}
            new.update(
                (key, (copied(value), places.append((new, key)))[0]) for key, value in node.items()
            )
            return new
        if isinstance(node, (list, tuple)):
            new = [copied(value) for value in node]
            places.extend((new, i) for i in range(len(new)))
            return new
        return node

    whole = [copied(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        container, key = rng.choice([*places, (whole, 0)])
        if key not in (container if isinstance(container, dict) else range(len(container))):
            continue
        match rng.randrange(8):
            case 0 if container is not whole:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, container[key])
            case 1:
                container[f"{key} "] = container.pop(key)
            case 2:
                container[key] = [container[key]]
            case 3 if container is not whole:
                other, place = rng.choice(places)
                if place in (other if isinstance(other, dict) else range(len(other))):
                    container[key] = (
                        json.loads(json.dumps(other[place]))
                        if is_json(other[place])
                        else other[place]
                    )
            case 4 if isinstance(container[key], str):
                container[key] += rng.choice(TEXTS)
            case 5 if isinstance(container[key], (int, float)):
                container[key] = rng.choice(
                    (-container[key], str(container[key]), float(container[key]))
                )
            case _:
                container[key] = rng.choice(odd)
    return whole[0]


def is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def encoded(text: str, rng: random.Random) -> bytes:
    """Text in UTF-8, and now and then in another encoding, or behind a byte order mark."""
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    encoding = rng.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-32", "latin-1", "cp500"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def as_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return bytewise(data, rng)
    tree = exchanged(json.loads(data), rng)
    return encoded(json.dumps(tree, ensure_ascii=rng.random() < 0.7), rng)


def as_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return bytewise(data, rng)
    if rng.random() < 0.5:
        lines = data.decode().splitlines()
        lines[rng.randrange(len(lines))] = rng.choice(YAML)
        return encoded("\n".join(lines), rng)
    return encoded(yaml.safe_dump(exchanged(yaml.safe_load(data), rng), sort_keys=False), rng)


YAML = [
    "names: !!int foo",
    "names: &a [*a]",
    "nc: 2001-99-99",
    "- : :",
    "? [a]",
    "nc: !!bool x",
    "nc: !!timestamp x",
    "!!x",
]
YAML += [
    "names: !!python/object/apply:os.system [exit]",
    "nc: .",
    "nc: 0x",
    "nc: !!float _",
    "? {a: b}\n: c",
    "names: {yes: a}",
]
YAML += [
    "names: " + "[" * 3000,
    "names: {0: a, 0.5: b}",
    "nc: 1:99:99",
    "path: [a]",
    "train: {a: b}",
    "\t: a",
    "--- a",
    "%TAG",
]
YAML += [
    "names: {99999999999999999999: a}",
    "nc: !!binary x",
    "nc: !!null x",
    "names: !!set {a, b}",
    "names: !!omap [a: b]",
]
YAML += [
    f"a: &{n} [{', '.join([f'*{m}'] * 9)}]" if m else f"a: &{n} [x]"
    for m, n in zip(" abcdefgh".strip(), "bcdefghi")
]
YAML += ["train: &a [x,x,x,x,x,x,x,x,x]\nval: &b [" + "*a," * 9 + "]\ntest: [" + "*b," * 9 + "]"]


def as_xml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return bytewise(data, rng)
    tree = ElementTree.fromstring(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        parent = rng.choice([node for node in tree.iter() if len(node)])
        child = parent[rng.randrange(len(parent))]
        match rng.randrange(6):
            case 0 if len(tree) > 1:
                parent.remove(child)
            case 1:
                parent.append(child)
            case 2:
                child.tag = rng.choice(["xmin", "object", "size", "name", "_"])
            case 3:
                child.append(ElementTree.fromstring("<name>inside</name>"))
            case _:
                child.text = rng.choice(TEXTS)
        if not any(len(node) for node in tree.iter()):
            break
    text = ElementTree.tostring(tree, "unicode").replace(DEEP, "<a>" * 50_000 + "</a>" * 50_000)
    declared = rng.choice(
        [""] * 6
        + [
            f'<?xml version="1.0" encoding="{e}"?>'
            for e in ("utf-16", "latin-1", "cp037", "?", "euc-jp")
        ]
    )
    return encoded(declared + text, rng)


def as_words(data: bytes, rng: random.Random) -> bytes:
    """Of a text of lines and words; commas part them too."""
    if rng.random() < 0.4:
        return bytewise(data, rng)
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        number = rng.randrange(len(lines))
        words = lines[number].replace(",", " , ").split(" ")
        place = rng.randrange(len(words))
        match rng.randrange(4):
            case 0:
                lines.insert(number, lines[rng.randrange(len(lines))])
            case 1:
                del words[place]
            case _:
                words[place] = rng.choice(TEXTS)
        lines[number] = " ".join(words).replace(" , ", ",")
    return encoded("\n".join(lines), rng)


def as_pickle(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return bytewise(data, rng)
    arrays = [
        np.zeros((2, 0)),
        np.array(["a", None]),
        np.float32([np.nan]),
        np.int64(7),
        b"x",
        {1},
        np.zeros(9, "M8[s]"),
    ]
    return pickle.dumps(exchanged(pickle.loads(data), rng, [*ODD, *arrays]), rng.randrange(6))


def as_zip(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        return bytewise(data, rng)
    made = io.BytesIO()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(made, "w", rng.choice(kinds)) as new,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of double names
        for name in old.namelist():
            content = old.read(name)
            chance = rng.random()
            if chance > 0.1:
                name = (
                    rng.choice(
                        [f"../../{name}", "/abs.png", ".png", "a" * 5000 + ".png", name + "/"]
                    )
                    if chance < 0.15
                    else name
                )
                new.writestr(name, bytewise(content, rng) if 0.15 < chance < 0.2 else content)
    return made.getvalue()


def as_npy(data: bytes, rng: random.Random) -> bytes:
    start = data.index(b"\n") + 1
    if rng.random() < 0.3:
        return bytewise(data, rng)
    if rng.random() < 0.6:
        header = bytewise(data[10 : start - 1], rng).replace(b"\n", b"")
    else:
        header = repr(
            exchanged(
                {"descr": [("pixels", "u1", (3, 8, 8))], "fortran_order": False, "shape": (3,)}, rng
            )
        ).encode("utf-8", "replace")
    return data[:8] + struct.pack("<H", len(header) + 1) + header + b"\n" + data[start:]


def as_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mostly of what the file says of itself, which is json in json; also of the tensors' types,
    shapes and places.
    """
    if rng.random() < 0.1:
        return bytewise(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    said = {
        key: json.loads(value)
        for key, value in header.get("__metadata__", {}).items()
        if key != "format"
    }
    if said and rng.random() < 0.8:
        about = exchanged(said, rng)
        if not isinstance(about, dict):
            about = {"method": about}
        header["__metadata__"] = {
            key: json.dumps(value).replace(f'"{DEEP}"', "[" * 100_000)
            for key, value in about.items()
        }
    else:
        header = exchanged(
            header, rng, [*ODD, "F64", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "U64"]
        )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def as_pth(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        start, end = (
            data[:40_000],
            data[40_000:],
        )  # what says what the bytes of tensors are is at the start
        return bytewise(start, rng) + end if rng.random() < 0.8 else start + bytewise(end, rng)
    tree = torch.load(io.BytesIO(data), weights_only=True)
    huge = [
        torch.zeros(1).expand(10**9, 10**3),
        torch.zeros(1),
        torch.tensor(1.0),
        torch.zeros(0),
        torch.zeros(2, 3, dtype=torch.bool),
    ]
    huge += [torch.zeros(3, 3).to_sparse(), torch.zeros(2, 2, device="meta"), torch.zeros(10**9, 0)]
    huge += [
        torch.zeros(10**9, 0, 3, 3),
        torch.zeros(1, dtype=torch.complex64),
        torch.full((4,), float("nan")),
    ]
    made = io.BytesIO()
    torch.save(exchanged(tree, rng, [*ODD, *huge]), made)
    return made.getvalue()


# the readers


class Reader(NamedTuple):
    make: Callable[
        [Path], Path
    ]  # writes a sound sample into a folder; the file of it that is to be mutated
    read: Callable[[Path], Any]  # reads all of the sample, given the folder
    mutate: Mutate


def picture(path: Path, side: int = 40, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)).save(
        path, **options
    )


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def xml(name: str) -> str:
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>30</xmax><ymax>35</ymax></bndbox>"
    objects = "".join(
        f"<object><name>{n}</name><difficult>0</difficult>{box}</object>" for n in (name, "cat")
    )
    return f"<annotation><size><width>40</width><height>40</height></size>{objects}</annotation>"


def voc(folder: Path) -> Path:
    for n in range(3):
        picture(folder / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"00000{n}.jpg")
        written(folder / "VOCdevkit" / "VOC2007" / "Annotations" / f"00000{n}.xml", xml("dog"))
    for name in ("trainval", "test"):
        listed = written(
            folder / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{name}.txt",
            "000000\n000001\n000002\n",
        )
    return listed.with_name("trainval.txt")


def voc_xml(folder: Path) -> Path:
    voc(folder)
    return folder / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"


def read_published_voc(folder: Path) -> Any:
    dataset = detection.open_detection("voc", folder, part="train").restrict(["dog"])
    for i in range(len(dataset)):
        dataset.image(i)


def own(layout: str, folder: Path) -> None:
    """All that is done with own data before training, also where faults are collected."""
    place = next(folder.iterdir()) if layout == "voc" else folder
    place = place / "VOC2007" if layout == "voc" else place
    faults: list[str] = []
    try:
        layouts.read_all(place, layout=layout, fault=faults.append)
    except InputError as error:
        faults.append(str(error))
    split = detection.open_split(str(place), "", novel=["dog"], layout=layout)
    assert not faults
    k_shot.select_shots(split.train, 1, 0)
    for dataset in (split.train, split.test):
        for i in range(len(dataset)):
            dataset.image(i)


def coco(file: str, folder: Path) -> Path:
    for n in range(5):
        picture(folder / "images" / f"{n}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 40} for n in range(5)]
    box = {"bbox": [2, 3, 20, 30], "area": 600, "iscrowd": 0}
    objects = [
        {"id": i, "image_id": n, "category_id": c, **box}
        for i, (n, c) in enumerate((n, c) for n in range(5) for c in (1, 2))
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    return written(
        folder / file,
        json.dumps({"images": images, "annotations": objects, "categories": categories}),
    )


def read_published_coco(folder: Path) -> None:
    names, records, _ = annotations.read_coco(folder, "train")
    dataset = detection.DetectionSet("coco", "train", list(names), [], records, "coco").restrict(
        list(names)
    )
    k_shot.select_shots(dataset, 1, 0)
    annotations.read_coco_json(folder / "annotations" / "instances_train2017.json", "take")


def published_coco(folder: Path) -> Path:
    path = coco("annotations/instances_train2017.json", folder)
    (folder / "images").rename(folder / "train2017")
    return path


def yolo(mutated: str, folder: Path) -> Path:
    for n in range(5):
        picture(folder / "images" / f"{n}.png")
        written(folder / "labels" / f"{n}.txt", "0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.5 0.1 0.5 0.5\n")
    written(folder / "train.txt", "".join(f"./images/{n}.png\n" for n in range(3)))
    content = {"path": ".", "train": "train.txt", "val": "images", "nc": 2, "names": ["dog", "cat"]}
    written(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False))
    return folder / mutated


def shots(kind: str, folder: Path) -> Path:
    path = coco("train.json", folder)
    data = detection.open_split(str(folder), "", novel=["dog"]).train
    if kind == "shots.json":
        return written(folder / kind, json.dumps(k_shot.shots_of(k_shot.select_shots(data, 1, 0))))
    os.makedirs(folder / "lists")
    for name, text in k_shot.lists_of(k_shot.select_shots(data, 1, 0), 1, kind).items():
        path = written(folder / "lists" / name, text)
    return path


def read_shots(given: str, folder: Path) -> None:
    train = detection.open_split(str(folder), "", novel=["dog"]).train
    chosen = k_shot.choose_shots(train, 1, 0, folder / given)
    json.dumps(k_shot.files(chosen))
    for record in chosen.records:
        assert (
            np.isfinite(record.boxes).all()
            and (record.boxes[:, :2] < (record.width, record.height)).all()
        )


def mini_imagenet(folder: Path) -> Path:
    rows = ["filename,label"]
    for n in range(16):
        picture(folder / "mini_imagenet" / "images" / f"n{n:02d}" / f"n{n:02d}00000001.jpg", 12)
        rows.append(f"n{n:02d}00000001.jpg,n{n:02d}")
    return written(folder / "mini_imagenet" / "val.csv", "\n".join(rows))


def looked_at(dataset: classification.ImageSet) -> None:
    for i in range(0, len(dataset), max(1, len(dataset) // 4)):
        dataset.pixels(i)


def novel_classes(file: str, folder: Path) -> Path:
    for n in range(12):
        picture(folder / "data" / f"c{n}" / "0.png", 8)
    division = {"train": ["c0", "c1"], "val": ["c2"], "test": ["c3"]}
    return written(folder / file, json.dumps(division) if file.endswith("json") else "c3\nc4\nc5\n")


def encoded_picture(side: int = 8, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 90)).save(file, **options)
    return file.getvalue()


def tiered(mutated: str, folder: Path) -> Path:
    names = [f"class {n:03d}" for n in range(97)]
    content = {"label_specific": np.arange(97), "label_specific_str": names}
    (folder / "val_labels.pkl").write_bytes(pickle.dumps(content, 2))
    buffers = [np.frombuffer(encoded_picture(format="PNG"), np.uint8)] * 97
    (folder / "val_images_png.pkl").write_bytes(pickle.dumps(buffers, 2))
    return folder / mutated


def cifar(mutated: str, folder: Path) -> Path:
    home = folder / "cifar-100-python"
    home.mkdir()
    listed = {name for part in classification.CIFAR_FS.values() for name in part.split()}
    names = sorted(listed | {f"other{n:02d}" for n in range(100 - len(listed))})
    content = {
        "data": np.zeros((100, 3072), np.uint8),
        "fine_labels": list(range(100)),
        "coarse_labels": [n // 5 for n in range(100)],
    }
    for part in ("train", "test"):
        (home / part).write_bytes(pickle.dumps(content, 2))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))
    return home / mutated


def read_cifar(folder: Path) -> None:
    looked_at(open_dataset("cifar_fs", folder, "val"))
    looked_at(open_dataset("fc100", folder, "test"))


def omniglot(folder: Path) -> Path:
    for part in classification.OMNIGLOT_PARTS:
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for n in range(3):
                for drawing in range(2):
                    content = encoded_picture(105, format="PNG")
                    archive.writestr(
                        f"{part}/Script_{part}/character{n:02d}/{drawing}.png", content
                    )
    return folder / "images_background.zip"


def picture_file(suffix: str, folder: Path, **options) -> Path:
    picture(folder / f"a{suffix}", 20, **options)
    return folder / f"a{suffix}"


def read_picture(folder: Path) -> None:
    (path,) = folder.iterdir()
    layouts._size(path, annotations.refuse)
    pictures.tensor(path)


def squares(folder: Path) -> Path:
    for n in range(3):
        picture(folder / "train" / f"c{n}" / "0.png", 8)
    open_dataset("folder", folder, "train", cache=True)
    return next((folder / classification.CACHE_FOLDER).iterdir())


def classifier(method: str, folder: Path) -> Path:
    args = {
        "backbone": "conv4",
        "distance": "squared",
        "ways": 5,
        "test_steps": 5,
        "inner_lr": 0.1,
        "temperature": 64.0,
    }
    about = {
        "method": method,
        "args": args,
        "classes": ["a", "b"],
        "size": 32,
        "stored": 32,
        "normalisation": IMAGENET.to_dict(),
    }
    about |= {"dataset": "folder", "augment": True, "temperature": 64.0, "commit": "0", "step": 10}
    about |= {"results": {"ways": 5, "tasks": 10, "shots": {"5": {"accuracy": 71.25, "ci95": 1.5}}}}
    weights.save(folder / "model.safetensors", methods.built(about), about)
    return folder / "model.safetensors"


def detector(folder: Path) -> Path:
    model = TFA(fpn("small", channels=16), 2, width=32, rpn_channels=16)
    about = {
        "method": "tfa",
        "args": {"backbone": "small"},
        "stage": "base",
        "classes": ["a", "b"],
        "base": ["a", "b"],
        "novel": [],
    }
    about |= {
        "pictures": {"short": 64, "long": 96, "multiple": 32, "enlarge": True},
        **model.describe(),
    }
    weights.save(
        folder / "model.safetensors",
        model,
        about | {"results": {"AP50": {"base": 12.5, "all": 12.5}}},
    )
    return folder / "model.safetensors"


def read_model(folder: Path) -> None:
    model = fewshot.load(folder / "model.safetensors")
    json.dumps(model.about)
    model.generate_model_card()
    if hasattr(model, "pipeline"):
        model.pipeline.resized(100, 50)


def mm_classifier(folder: Path) -> Path:
    state = {}
    for n in range(4):
        state[f"backbone.layers.{n}.layers.0.weight"] = torch.zeros(64, 64 if n else 3, 3, 3)
        for key in (
            "layers.0.bias",
            "layers.1.weight",
            "layers.1.bias",
            "layers.1.running_mean",
            "layers.1.running_var",
        ):
            state[f"backbone.layers.{n}.{key}"] = torch.zeros(64)
        state[f"backbone.layers.{n}.layers.1.num_batches_tracked"] = torch.tensor(0)
    state |= {"head.fc.weight": torch.zeros(5, 1600), "head.fc.bias": torch.zeros(5)}
    torch.save(
        {"meta": {"CLASSES": ["a", "b"], "config": "type='MAML'"}, "state_dict": state},
        folder / "maml_conv4.pth",
    )
    return folder / "maml_conv4.pth"


def read_checkpoint(folder: Path) -> None:
    (path,) = folder.iterdir()
    state, meta = mmfewshot.read(path)
    mmfewshot.convert(state, meta, path.stem)


def cd_fsod(file: str, folder: Path) -> Path:
    """A target in the published layout, of pictures with an object of either class."""
    for part in ("train", "test"):
        for n in range(3):
            picture(folder / "ArTaxOr" / part / f"{n}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 40} for n in range(3)]
    box = {"bbox": [2, 3, 20, 30], "area": 600, "iscrowd": 0}
    objects = [
        {"id": 2 * n + c, "image_id": n, "category_id": c, **box} for n in range(3) for c in (1, 2)
    ]
    content = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    for name in ("train", "test", "1_shot"):
        shot = {"images": images[:1], "annotations": objects[:2]} if name == "1_shot" else {}
        written(folder / "ArTaxOr" / "annotations" / f"{name}.json", json.dumps(content | shot))
    return folder / "ArTaxOr" / "annotations" / file


def read_cd_fsod(folder: Path) -> None:
    split = detection.open_split("artaxor", folder)
    for dataset in (k_shot.choose_shots(split.train, 1, 0), split.train, split.test):
        for i in range(len(dataset)):
            dataset.image(i)


def slim(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names and shapes in a small file: all are views of one store of bytes."""
    store = torch.zeros(max(tensor.numel() for tensor in state.values()), dtype=torch.uint8)
    return {name: store[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}


def checkpoint(state: dict[str, torch.Tensor], path: Path, **more: Any) -> Path:
    torch.save({"model": state, **more} if more else state, path)
    return path


def defrcn(folder: Path) -> Path:
    """As detectron2 saves DeFRCN's model."""
    ours = {
        "trunk.layer": "backbone.res",
        "trunk.stage4.": "roi_heads.res5.",
        "trunk.": "backbone.stem.",
    }
    ours |= {"rpn.cls.": "proposal_generator.rpn_head.objectness_logits."}
    ours |= {
        "rpn.reg.": "proposal_generator.rpn_head.anchor_deltas.",
        "rpn.": "proposal_generator.rpn_head.",
    }
    ours |= {
        "cls.": "roi_heads.box_predictor.cls_score.",
        "reg.": "roi_heads.box_predictor.bbox_pred.",
    }
    with torch.device("meta"):
        model = DeFRCN(c4("resnet50", style="caffe", norm="frozen"), 5, rpn_channels=8)
    state = {}
    for name, tensor in model.state_dict().items():
        start = next((start for start in ours if name.startswith(start)), "")
        name = ours.get(start, "") + name[len(start) :]
        if start == "trunk.layer":
            name = f"backbone.res{int(name[12]) + 1}{name[13:]}"
        for old, new in ((".downsample.0.", ".shortcut."), (".downsample.1.", ".shortcut.norm.")):
            name = name.replace(old, new)
        for number in "123":
            name = name.replace(f".bn{number}.", f".conv{number}.norm.")
        state[name] = tensor
    return checkpoint(
        slim(state), folder / "defrcn.pth", iteration=9, scheduler={"milestones": [10, 20]}
    )


def read_defrcn(folder: Path) -> None:
    args = convert_defrcn.Args(folder / "defrcn.pth", folder / "out" / "a.safetensors", of="voc1")
    with redirect_stdout(None):
        convert_defrcn.main(args)
    json.dumps(weights.describe_file(args.out))


@lru_cache
def torchvisions() -> dict[str, torch.Tensor]:
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )
    return slim(model.state_dict())


def torchvisions_detector(folder: Path) -> Path:
    written(folder / "names.txt", "kettle\ntea pot\n")
    return checkpoint(torchvisions(), folder / "mine.pth")


def read_torchvisions(folder: Path) -> None:
    args = convert_torchvision.Args(
        folder / "mine.pth", folder / "out" / "a.safetensors", classes=folder / "names.txt"
    )
    with redirect_stdout(None):
        convert_torchvision.main(args)
    json.dumps(weights.describe_file(args.out))


def read_names(folder: Path) -> None:
    """As scripts/convert_torchvision.py before it converts, which takes longer."""
    args = convert_torchvision.Args(folder / "mine.pth", classes=folder / "names.txt")
    assert len(convert_torchvision._categories(args, torchvisions())) == 3


def supports(file: str, folder: Path) -> Path:
    """Class folders of scripts/predict.py's --support: of two classes, with annotated pictures and
    without.
    """
    for n in range(2):
        picture(folder / "cat" / f"{n}.png")
        picture(folder / "dog" / f"d{n}.png")
    written(folder / "cat" / "0.xml", xml("cat"))
    picture(folder / "cow" / "only.png", 20)
    images = [{"id": 1, "file_name": "d0.png", "width": 40, "height": 40}]
    objects = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [2, 3, 20, 30],
            "area": 600,
            "iscrowd": 0,
        }
    ]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "dog"}]}
    written(folder / "objects.json", json.dumps(content))
    return folder / file


@lru_cache
def prototypes() -> fewshot.inference.Detector:
    """A detector that learns from supports alone."""
    base = TFA(fpn("small", channels=16), 2, width=32, rpn_channels=16)
    said = {
        "method": "tfa",
        "classes": ["a", "b"],
        "pictures": {"short": 64, "long": 96},
        **base.describe(),
    }
    model = PrototypeDetector(base, said, 3, clusters=2)
    about = {
        "method": "prototype_detector",
        "stage": "supports",
        "args": {},
        "classes": ["a", "b", "c"],
    }
    about |= {
        "base": [],
        "novel": ["a", "b", "c"],
        "pictures": said["pictures"],
        **model.describe(),
    }
    return fewshot.inference.Detector(model, model.state_dict(), about, "cpu")


def read_supports(folder: Path) -> None:
    """As scripts/predict.py."""
    with redirect_stderr(None):  # warnings of pictures that are left out
        paths, images, labels = predict.read_supports(folder)
    boxes = predict.read_boxes(folder, paths, images, labels)
    each = [i for i, some in enumerate(boxes) for _ in some]
    prototypes().support([images[i] for i in each], torch.cat(boxes), [labels[i] for i in each])


class Features(torch.nn.Module):
    """Of a picture, the mean of its colours."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


class Keeping(NamedTuple):
    features: str
    workers: int = 0


def kept_features(what: str, folder: Path) -> Path:
    squares(folder)
    keep(folder)
    return next((folder / "kept").glob(f"*-{what}.safetensors"))


def keep(folder: Path) -> None:
    """As the recipes that train nothing."""
    dataset = open_dataset("folder", folder, "train", size=8)
    accelerator, model, args = Accelerator(), Features(), Keeping(str(folder / "kept"))
    found = frozen.features(accelerator, model, dataset, args)
    mean = frozen.base_mean(accelerator, model, dataset, args)
    assert (
        found.shape == (3, 3) and mean.shape == (3,) and found.dtype == mean.dtype == torch.float32
    )
    assert found.isfinite().all() and mean.isfinite().all()


@lru_cache
def network(name: str) -> dict[str, torch.Tensor]:
    return slim(torchvision.models.get_model(name).state_dict())


def backbone_weights(folder: Path) -> Path:
    return checkpoint(network("shufflenet_v2_x0_5"), folder / "weights.pth")


def backbone_safetensors(folder: Path) -> Path:
    state = torchvision.models.get_model("shufflenet_v2_x0_5").state_dict()
    save_file(dict(state), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def read_backbone(folder: Path) -> None:
    (path,) = folder.iterdir()
    pretrained.network("torchvision/shufflenet_v2_x0_5", 32, source=str(path))


def timm_weights(folder: Path) -> Path:
    timm = pytest.importorskip("timm")
    return checkpoint(slim(timm.create_model("test_resnet").state_dict()), folder / "weights.pth")


def read_timm(folder: Path) -> None:
    pretrained.network("timm/test_resnet", 64, source=str(folder / "weights.pth"))


def calibrating_weights(folder: Path) -> Path:
    return checkpoint(network("squeezenet1_1"), folder / "weights.pth")


def calibrated(folder: Path) -> Path:
    """A detector's file with prototypes of its classes."""
    state, about = weights.load(detector(folder))
    made = calibrate.Calibration(regions(), {"a": torch.ones(3), "b": torch.arange(3.0)}).describe(
        "resnet18"
    )
    weights.save_state(folder / "model.safetensors", state, {**about, "calibration": made})
    return folder / "model.safetensors"


def regions(choice: str = "resnet18") -> calibrate.Regions:
    """The mean colours of boxes, in place of a network's."""
    return calibrate.Regions(torch.nn.Identity(), IMAGENET, stride=1)


def as_calibrated(data: bytes, rng: random.Random) -> bytes:
    """Of what the file says of its calibration alone."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    kept = exchanged(json.loads(header["__metadata__"]["calibration"]), rng)
    header["__metadata__"]["calibration"] = json.dumps(kept).replace(f'"{DEEP}"', "[" * 100_000)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def read_calibrated(folder: Path) -> None:
    about = weights.describe_file(folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "backbone", regions)
        made = calibrate.restored(about, folder / "model.safetensors")
    image, box = torch.zeros(3, 40, 40, dtype=torch.uint8), torch.tensor([[2.0, 3, 30, 30]])
    for name in ("a", "b"):
        scores = made(image, box, torch.tensor([0.5]), [name])
        assert scores.shape == (1,) and scores.isfinite().all()


def detectors_result(folder: Path) -> Path:
    """metrics.json of two runs, of which the second is to be mutated."""
    for seed in (0, 1):
        protocol = {
            "dataset": "glyphs",
            "split": 1,
            "stage": "finetune",
            "shots": "5",
            "test_pictures": 50,
        }
        trained, run = (
            {"dataset": "glyphs", "lr": None},
            {"seconds": 3.5, "base": "01234567", "precision": "no"},
        )
        settings = {
            "method": "tfa",
            "seed": seed,
            "trained": trained,
            "tested": {"shots": 5},
            "id": f"a{seed}",
        }
        content = {"AP50": {"base": 80.0, "novel": 30.5, "all": 70.0}, "protocol": protocol}
        content["settings"] = settings | {
            "run": run | {"command": "recipes/tfa.py", "commit": "0123"}
        }
        path = written(folder / f"seed{seed}" / "metrics.json", json.dumps(content))
    return path


def classifiers_result(file: str, folder: Path) -> Path:
    for seed in (0, 1):
        tested = {"ways": 5, "shots": [1, 5], "queries": 15, "tasks": None}
        settings = {
            "method": "tim",
            "seed": seed,
            "trained": {"dataset": "cub"},
            "tested": tested,
            "id": f"a{seed}",
        }
        shots = {"1": {"accuracy": 50.25, "ci95": 0.5}, "5": {"accuracy": 70.0, "ci95": 0.25}}
        content = {"ways": 5, "tasks": 3, "shots": shots, "settings": settings}
        written(folder / f"seed{seed}" / "metrics.json", json.dumps(content))
        written(
            folder / f"seed{seed}" / "tasks.json",
            json.dumps({"1": [50.0, 50.5, 50.25], "5": [70.0, 75.0, 65.0]}),
        )
    return folder / "seed1" / file


def read_results(folder: Path) -> None:
    """Tables, a picture and a paired difference of them."""
    second = folder / "seed1" / "metrics.json"
    with redirect_stdout(None):
        results.main(results.Args((folder,), json=folder / "rows.js"))
        results.draw(results.rows(results.collect([folder], "AP50")), "AP50")
        if results.read(second, "AP50"):
            results.main(results.Args((second, second), compare=True))


READERS: dict[str, Reader] = {
    "VOC xml": Reader(voc_xml, read_published_voc, as_xml),
    "VOC list": Reader(voc, read_published_voc, as_words),
    "own VOC xml": Reader(voc_xml, partial(own, "voc"), as_xml),
    "own VOC list": Reader(voc, partial(own, "voc"), as_words),
    "COCO json": Reader(published_coco, read_published_coco, as_json),
    "own COCO json": Reader(partial(coco, "train.json"), partial(own, "coco"), as_json),
    "YOLO txt": Reader(partial(yolo, "labels/1.txt"), partial(own, "yolo"), as_words),
    "YOLO list": Reader(partial(yolo, "train.txt"), partial(own, "yolo"), as_words),
    "YOLO data.yaml": Reader(partial(yolo, "data.yaml"), partial(own, "yolo"), as_yaml),
    "shots.json": Reader(partial(shots, "shots.json"), partial(read_shots, "shots.json"), as_json),
    "shot lists, txt": Reader(partial(shots, "txt"), partial(read_shots, "lists"), as_words),
    "shot lists, json": Reader(partial(shots, "coco"), partial(read_shots, "lists"), as_json),
    "novel classes, json": Reader(
        partial(novel_classes, "novel.json"),
        lambda folder: looked_at(
            open_dataset("folder", folder / "data", "val", novel=folder / "novel.json")
        ),
        as_json,
    ),
    "novel classes, txt": Reader(
        partial(novel_classes, "novel.txt"),
        lambda folder: looked_at(
            open_dataset("folder", folder / "data", "val", novel=folder / "novel.txt")
        ),
        as_words,
    ),
    "mini-ImageNet csv": Reader(
        mini_imagenet,
        lambda folder: looked_at(open_dataset("mini_imagenet", folder, "val")),
        as_words,
    ),
    "tiered-ImageNet labels": Reader(
        partial(tiered, "val_labels.pkl"),
        lambda f: looked_at(open_dataset("tiered_imagenet", f, "val")),
        as_pickle,
    ),
    "tiered-ImageNet pictures": Reader(
        partial(tiered, "val_images_png.pkl"),
        lambda f: looked_at(open_dataset("tiered_imagenet", f, "val")),
        as_pickle,
    ),
    "CIFAR pickle": Reader(partial(cifar, "train"), read_cifar, as_pickle),
    "CIFAR names": Reader(partial(cifar, "meta"), read_cifar, as_pickle),
    "Omniglot zip": Reader(
        omniglot, lambda folder: looked_at(open_dataset("omniglot", folder, "train")), as_zip
    ),
    **{
        f"picture {suffix[1:]}": Reader(partial(picture_file, suffix), read_picture, bytewise)
        for suffix in (".png", ".jpg", ".bmp", ".gif", ".tif", ".webp", ".ppm")
    },
    "cache npy": Reader(
        squares,
        lambda folder: looked_at(open_dataset("folder", folder, "train", cache=True)),
        as_npy,
    ),
    "classifier": Reader(partial(classifier, "proto_net"), read_model, as_safetensors),
    "MAML": Reader(partial(classifier, "maml"), read_model, as_safetensors),
    "detector": Reader(detector, read_model, as_safetensors),
    "mmfewshot classifier": Reader(mm_classifier, read_checkpoint, as_pth),
    "DeFRCN checkpoint": Reader(defrcn, read_defrcn, as_pth),
    "torchvision detector": Reader(torchvisions_detector, read_torchvisions, as_pth),
    "torchvision detector's names": Reader(
        lambda folder: torchvisions_detector(folder).with_name("names.txt"), read_names, as_words
    ),
    "backbone weights pth": Reader(backbone_weights, read_backbone, as_pth),
    "backbone weights safetensors": Reader(backbone_safetensors, read_backbone, as_safetensors),
    "timm weights": Reader(timm_weights, read_timm, as_pth),
    "calibration weights": Reader(
        calibrating_weights,
        lambda f: calibrate.backbone(f"squeezenet1_1={f / 'weights.pth'}"),
        as_pth,
    ),
    "calibration of a model": Reader(calibrated, read_calibrated, as_calibrated),
    "CD-FSOD train json": Reader(partial(cd_fsod, "train.json"), read_cd_fsod, as_json),
    "CD-FSOD test json": Reader(partial(cd_fsod, "test.json"), read_cd_fsod, as_json),
    "CD-FSOD shots json": Reader(partial(cd_fsod, "1_shot.json"), read_cd_fsod, as_json),
    "support xml": Reader(partial(supports, "cat/0.xml"), read_supports, as_xml),
    "support json": Reader(partial(supports, "objects.json"), read_supports, as_json),
    "support picture": Reader(partial(supports, "cow/only.png"), read_supports, bytewise),
    "kept features": Reader(partial(kept_features, "features"), keep, as_safetensors),
    "kept mean": Reader(partial(kept_features, "mean"), keep, as_safetensors),
    "detector's result": Reader(detectors_result, read_results, as_json),
    "classifier's result": Reader(
        partial(classifiers_result, "metrics.json"), read_results, as_json
    ),
    "classifier's tasks": Reader(partial(classifiers_result, "tasks.json"), read_results, as_json),
}


@pytest.fixture(autouse=True)
def few_characters(monkeypatch):
    """Omniglot of six characters of two drawings."""
    monkeypatch.setattr(classification, "OMNIGLOT_CHARACTERS", 6)
    monkeypatch.setattr(classification, "OMNIGLOT_DRAWINGS", 2)
    splits = {"train": slice(0, 3), "val": slice(3, 4), "test": slice(4, 6)}
    monkeypatch.setattr(classification, "OMNIGLOT_SPLITS", splits)


WHOLE = (
    " has no object of a class ",
    " test pictures has a novel object",
    " part, only ",
    "none of these runs has ",
)  # of what a set lacks as a whole, its folder is named


def outcome(read: Callable[[], Any], name: str) -> str:
    """ "result", "refused", or what else came of it."""
    try:
        read()
        return "result"
    except InputError as error:
        text = str(error)
        if name not in text and not any(words in text for words in WHOLE):
            return f"does not name the file: {text!r:.200}"
        if (
            len(text.splitlines()) != 1
            or "\0" in text
            or text.encode(errors="replace") != text.encode("utf-8", "ignore")
        ):
            return f"more than a line, or no text: {text!r:.200}"
        return "refused" if len(text) < 20_000 else f"{len(text)} characters long: {text!r:.200}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if Path(f.filename).is_relative_to(LIBRARY)] or frames
        return f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].lineno}: {error!r:.120}"


def tried(name: str, count: int, folder: Path, first: int = 0) -> Counter[str]:
    """Outcomes of so many mutated files, each told from the number that makes it again."""
    reader = READERS[name]
    path = reader.make(folder)
    sound, called = path.read_bytes(), path.name.removesuffix(".pth")
    assert outcome(lambda: reader.read(folder), called) == "result"
    found: Counter[str] = Counter()
    examples: dict[str, int] = {}
    for number in range(first, first + count):
        path.write_bytes(reader.mutate(sound, random.Random(f"{name} {number}")))
        result = outcome(lambda: reader.read(folder), called)
        found[result] += 1
        examples.setdefault(result, number)
    print(f"{name}: {count} tried, {found['result']} read, {found['refused']} refused")
    wrong = {result: examples[result] for result in found if result not in ("result", "refused")}
    assert not wrong, "\n".join(f"{found[w]} x {w} (first: number {n})" for w, n in wrong.items())
    return found


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files(name, tmp_path):
    assert tried(name, 60, tmp_path)["refused"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files(name, tmp_path):
    tried(name, 2000, tmp_path, first=60)


# files made to harm


class Runs:
    """Has a command run when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
XML = {
    "laughs": f'<!DOCTYPE a [<!ENTITY l0 "{"ha" * 50}">{LAUGHS}]><annotation><size>&l9;</size></annotation>',
    "foreign": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + xml("&x;"),
}


def refusal(read: Callable[[], Any], path: Path) -> str:
    """The message; reading took next to no time and no memory worth mentioning."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError) as caught:
        read()
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_code_in_files_is_not_run(tmp_path):
    done = tmp_path / "done"
    planted = Runs(f"touch {done}")
    torch.save({"state_dict": {"a": planted}}, tmp_path / "a.pth")
    for read in (mmfewshot.read, weights.read_state):
        refusal(lambda read=read: read(tmp_path / "a.pth"), tmp_path / "a.pth")
    cifar("meta", tmp_path)
    (tmp_path / "cifar-100-python" / "meta").write_bytes(
        pickle.dumps({"fine_label_names": planted})
    )
    assert "posix.system" in refusal(
        lambda: read_cifar(tmp_path), tmp_path / "cifar-100-python" / "meta"
    )
    (tmp_path / "cifar-100-python" / "meta").write_bytes(
        b"\x80\x02]r\xff\xff\xff\x7f."
    )  # object number 2^31 of its memo
    refusal(lambda: read_cifar(tmp_path), tmp_path / "cifar-100-python" / "meta")
    assert not done.exists()


def test_bombs_are_refused(tmp_path, monkeypatch):
    for name, content in XML.items():
        written(tmp_path / f"{name}.xml", content)
        refusal(
            lambda name=name: annotations.read_xml(tmp_path / f"{name}.xml"),
            tmp_path / f"{name}.xml",
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    refusal(lambda: pictures.tensor(tmp_path / "a.png"), tmp_path / "a.png")

    path = omniglot(tmp_path)
    monkeypatch.setattr(classification, "OMNIGLOT_BYTES", 10**6)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images_background/a/b/c.png", bytes(10**7))
    assert "once unpacked" in refusal(lambda: open_dataset("omniglot", tmp_path, "train"), path)

    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for read in (mmfewshot.read, weights.read_state):
        assert "unpack" in refusal(lambda read=read: read(tmp_path / "b.pth"), tmp_path / "b.pth")
    torch.save(
        {"rpn_head.rpn_conv.weight": torch.zeros(1).expand(10**9, 10**3)}, tmp_path / "c.pth"
    )
    for read in (mmfewshot.read, weights.read_state):
        assert "no plain tensor" in refusal(
            lambda read=read: read(tmp_path / "c.pth"), tmp_path / "c.pth"
        )


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sizes", {"rpn_channels": 10**6}, "'rpn_channels' is 1000000"),
        ("sizes", {"rpn_channels": 4096}, "'rpn_channels' is 4096"),
        ("sizes", {"width": 65536}, "'width' is 65536"),
        ("sizes", {"other": 1}, "unknown 'other'"),
        ("architecture", {"weights": "imagenet"}, "unknown 'weights'"),
        ("architecture", {"weights": "/etc/passwd"}, "unknown 'weights'"),
        ("architecture", {"channels": 60_000}, "'channels' is 60000"),
        ("architecture", {"name": "resnet101"}, "trunk."),
        ("classes", [f"c{n}" for n in range(50_000)], "cls.bias is (3,)"),
        ("pictures", {"other": 1}, "unknown 'other'"),
    ],
)
def test_a_detectors_file_does_not_steer_load(field, value, words, tmp_path):
    state, about = weights.load(detector(tmp_path))
    about = dict(about) | {field: about[field] | value if isinstance(value, dict) else value}
    weights.save_state(tmp_path / "model.safetensors", state, about)
    assert words in refusal(
        lambda: fewshot.load(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("args", {"backbone": "torchvision/vit_l_16"}, "features."),
        ("args", {"backbone": "torchvision/hf-hub:someone/model"}, "no network"),
        ("args", {"backbone": "../../model"}, "write torchvision/NAME"),
        ("args", {"ways": 90_000}, "head"),
        ("size", 10**9, "'size' is 1000000000"),
        ("size", 4096, "head"),
    ],
)
def test_a_classifiers_file_does_not_steer_load(field, value, words, tmp_path):
    state, about = weights.load(classifier("maml", tmp_path))
    about = dict(about) | {field: about[field] | value if isinstance(value, dict) else value}
    weights.save_state(tmp_path / "model.safetensors", state, about)
    assert words in refusal(
        lambda: fewshot.load(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    )


def test_lying_headers_of_model_files(tmp_path):
    path = classifier("proto_net", tmp_path)
    sound = path.read_bytes()
    (length,) = struct.unpack("<Q", sound[:8])
    tensor = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    for header in (json.dumps({"a": tensor}).encode(), b"{" * 10_000, b"[]"):
        path.write_bytes(struct.pack("<Q", len(header)) + header + sound[8 + length :])
        assert "not a model file" in refusal(lambda: fewshot.load(path), path)
    for size in (2**62, 2**26, 0):
        path.write_bytes(struct.pack("<Q", size) + sound[8:])
        refusal(lambda: fewshot.load(path), path)
