"""Files from strangers: each reader gives its result or one line that names the file, whatever is
in it.

Every reader has a small sound sample, of which many mutated ones are made: bytes are flipped, cut,
put in and moved, or values of the parsed file are taken out, doubled, nested and exchanged for odd
ones. A failure is told by its number, which makes it again.
"""

import copy
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
from collections.abc import Callable, Iterator
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
from fewshot.backbones import pretrained, trunks
from fewshot.backbones.fpn import fpn
from fewshot.backbones.trunks import c4
from fewshot.convert import mmfewshot
from fewshot.data import annotations, classification, detection, k_shot, layouts, pictures
from fewshot.data.classification import open_dataset
from fewshot.data.transforms import IMAGENET
from fewshot.detectors import calibrate
from fewshot.detectors.build import rebuilt
from fewshot.detectors.defrcn import DeFRCN
from fewshot.detectors.mpsr import MPSR, from_tfa
from fewshot.detectors.prototype import PrototypeDetector
from fewshot.detectors.tfa import TFA
from fewshot.evaluation import frozen

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
convert_defrcn, convert_torchvision, predict, results = map(
    importlib.import_module, ("convert_defrcn", "convert_torchvision", "predict", "results")
)
LIBRARY = Path(fewshot.__file__).parent
DEEP = "@deep@"  # stands for what is nested too deeply to be written by a library
ODD = [None, True, False, -1, 0, 1, 1.5, 10**6, 10**30, -(10**30), 1e300, "", "0", "nan", "inf"]
ODD += [float("inf"), float("-inf"), float("nan"), "\0", "a\nb", " ", "\ud800", "é☃", "-1"]
ODD += ["../../etc/passwd", "/etc/passwd", "x" * 5000, "x/" * 3000]
ODD += [[], {}, [[]], [None], {"a": 1}, [1e300] * 4, [float("nan")] * 4, DEEP]
TEXTS = [str(value) for value in ODD if not isinstance(value, (list, dict))]
TEXTS += ["1_0", "٣", "1e5", "0x10", "#", ",", '"']
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


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Where values are in nested dicts and lists: (container, key)."""
    if isinstance(node, (dict, list)):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places(node[key])


def exchanged(tree: Any, rng: random.Random, odd: list = ODD) -> Any:
    """A copy of nested dicts and lists where one value is odd, missing, double, nested or another
    one of them.
    """
    whole = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = list(places(whole))
        container, key = rng.choice(found)
        other, place = rng.choice(found)
        value = container[key]
        match rng.randrange(8):
            case 0 if container is not whole:
                del container[key]
            case 1 if isinstance(container, dict):
                container[f"{key} "] = container.pop(key)
            case 1:
                container.insert(key, value)
            case 2:
                container[key] = [value]
            case 3:
                container[key] = copy.deepcopy(other[place])
            case 4 if isinstance(value, str):
                container[key] += rng.choice(TEXTS)
            case 5 if isinstance(value, (int, float)):
                container[key] = rng.choice((-value, str(value), float(value)))
            case _:
                container[key] = copy.deepcopy(rng.choice(odd))
    return whole[0]


def encoded(text: str, rng: random.Random) -> bytes:
    """Text in UTF-8, and now and then in another encoding, or behind a byte order mark."""
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    encoding = rng.choice(["utf-8"] * 12 + ["utf-8-sig", "utf-16", "utf-32", "latin-1", "cp500"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def as_json(data: bytes, rng: random.Random) -> bytes:
    tree = exchanged(json.loads(data), rng)
    return encoded(json.dumps(tree, ensure_ascii=rng.random() < 0.7), rng)


def as_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        lines = data.decode().splitlines()
        lines[rng.randrange(len(lines))] = rng.choice(YAML)
        return encoded("\n".join(lines), rng)
    return encoded(yaml.safe_dump(exchanged(yaml.safe_load(data), rng), sort_keys=False), rng)


YAML = """names: !!int foo
names: &a [*a]
nc: 2001-99-99
- : :
? [a]
nc: !!bool x
nc: !!timestamp x
!!x
names: !!python/object/apply:os.system [exit]
nc: .
nc: 0x
nc: !!float _
? {a: b}\\n: c
names: {yes: a}
names: {0: a, 0.5: b}
nc: 1:99:99
path: [a]
train: {a: b}
\t: a
--- a
%TAG
names: {99999999999999999999: a}
nc: !!binary x
nc: !!null x
names: !!set {a, b}
names: !!omap [a: b]""".splitlines()
YAML = [line.replace("\\n", "\n") for line in YAML] + ["names: " + "[" * 3000, "b: &b [x]"]
# each a list of nine of the one before
YAML += [f"a: &{n} [{', '.join([f'*{m}'] * 9)}]" for m, n in zip("bcdefgh", "cdefghi")]
YAML += ["train: &a [x,x,x,x,x,x,x,x,x]\nval: &b [" + "*a," * 9 + "]\ntest: [" + "*b," * 9 + "]"]


def as_xml(data: bytes, rng: random.Random) -> bytes:
    def nested(node: ElementTree.Element) -> list:
        return [node.tag, node.text or "", *map(nested, node)]

    def text(node: Any) -> str:
        if isinstance(node, list) and len(node) > 1:
            tag, inner, *children = node
            return f"<{tag}>{inner}{''.join(map(text, children))}</{tag}>"
        return str(node)

    tree = exchanged(nested(ElementTree.fromstring(data)), rng, TEXTS)
    encoding = rng.choice([""] * 6 + ["utf-16", "latin-1", "cp037", "?", "euc-jp"])
    declared = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding else ""
    deep = "<a>" * 50_000 + "</a>" * 50_000
    return encoded(declared + text(tree).replace(DEEP, deep), rng)


def as_words(data: bytes, rng: random.Random) -> bytes:
    """Of a text of lines and words; commas part them too."""
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        number = rng.randrange(len(lines))
        words = lines[number].replace(",", " , ").split(" ")
        place = rng.randrange(len(words))
        match rng.randrange(4):
            case 0:
                lines.insert(number, rng.choice(lines))
            case 1:
                del words[place]
            case _:
                words[place] = rng.choice(TEXTS)
        lines[number] = " ".join(words).replace(" , ", ",")
    return encoded("\n".join(lines), rng)


def as_pickle(data: bytes, rng: random.Random) -> bytes:
    odd = [*ODD, np.zeros((2, 0)), np.array(["a", None]), np.float32([np.nan]), np.int64(7)]
    odd += [b"x", {1}, np.zeros(9, "M8[s]")]
    return pickle.dumps(exchanged(pickle.loads(data), rng, odd), rng.randrange(6))


def as_zip(data: bytes, rng: random.Random) -> bytes:
    """Of an archive whose members are left out, renamed or mutated themselves."""
    made = io.BytesIO()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    old, new = zipfile.ZipFile(io.BytesIO(data)), zipfile.ZipFile(made, "w", rng.choice(kinds))
    with old, new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of double names
        for name in old.namelist():
            content, others = old.read(name), [f"../../{name}", "/abs.png", ".png", name + "/"]
            match rng.randrange(20):
                case 0 | 1:
                    continue
                case 2:
                    name = rng.choice([*others, "a" * 5000 + ".png"])
                case 3:
                    content = bytewise(content, rng)
            new.writestr(name, content)
    return made.getvalue()


def as_npy(data: bytes, rng: random.Random) -> bytes:
    """Of an array's header."""
    start = data.index(b"\n") + 1
    header = bytewise(data[10 : start - 1], rng).replace(b"\n", b"")
    return data[:8] + struct.pack("<H", len(header) + 1) + header + b"\n" + data[start:]


def with_header(data: bytes, change: Callable[[dict], Any]) -> bytes:
    """A safetensors file with what `change` makes of its header."""
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def said(value: Any) -> str:
    """A value of the metadata, which are json in json."""
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 100_000)


def as_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mostly of what the file says of itself; also of the tensors' types, shapes and places."""

    def change(header: dict) -> Any:
        texts = header.get("__metadata__", {}).items()
        fields = {key: json.loads(text) for key, text in texts if key != "format"}
        if not fields or rng.random() < 0.2:
            types = ["F64", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "C64", "U64"]
            return exchanged(header, rng, ODD + types)
        about = exchanged(fields, rng)
        about = about if isinstance(about, dict) else {"method": about}
        return header | {"__metadata__": {key: said(value) for key, value in about.items()}}

    return with_header(data, change)


def as_calibrated(data: bytes, rng: random.Random) -> bytes:
    """Of what the file says of its calibration alone."""

    def change(header: dict) -> dict:
        kept = header["__metadata__"]
        kept["calibration"] = said(exchanged(json.loads(kept["calibration"]), rng))
        return header

    return with_header(data, change)


def as_pth(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:  # what says what the bytes of tensors are is at the start
        return bytewise(data[:40_000], rng) + data[40_000:]
    odd = [*ODD, torch.zeros(1).expand(10**9, 10**3), torch.zeros(1), torch.tensor(1.0)]
    odd += [torch.zeros(0), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 3).to_sparse()]
    odd += [torch.zeros(2, 2, device="meta"), torch.zeros(10**9, 0), torch.zeros(10**9, 0, 3, 3)]
    odd += [torch.zeros(1, dtype=torch.complex64), torch.full((4,), float("nan"))]
    made = io.BytesIO()
    torch.save(exchanged(torch.load(io.BytesIO(data), weights_only=True), rng, odd), made)
    return made.getvalue()


# the readers


class Reader(NamedTuple):
    """One reader of files from strangers, with a sound sample."""

    make: Callable[[Path], Any]  # writes the sample into a folder
    file: str  # pattern of the file there that is to be mutated
    read: Callable[[Path], Any]  # reads all of the sample, given the folder
    mutate: Mutate


def picture(path: Path, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def written(path: Path, content: Any) -> Path:
    """A text, or json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def xml(name: str) -> str:
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>30</xmax><ymax>35</ymax></bndbox>"
    objects = "".join(
        f"<object><name>{n}</name><difficult>0</difficult>{box}</object>" for n in (name, "cat")
    )
    return f"<annotation><size><width>40</width><height>40</height></size>{objects}</annotation>"


def coco_json(files: list[str], names: list[str]) -> dict[str, list[dict]]:
    """An object of each class on every picture."""
    images = [{"id": n, "file_name": f, "width": 40, "height": 40} for n, f in enumerate(files)]
    categories = [{"id": c, "name": name} for c, name in enumerate(names, 1)]
    pairs = [(image["id"], category["id"]) for image in images for category in categories]
    box = {"bbox": [2, 3, 20, 30], "area": 600, "iscrowd": 0}
    objects = [{"id": i, "image_id": n, "category_id": c, **box} for i, (n, c) in enumerate(pairs)]
    return {"images": images, "annotations": objects, "categories": categories}


def see_all(*sets: detection.DetectionSet) -> None:
    for dataset in sets:
        for i in range(len(dataset)):
            dataset.image(i)


def voc(folder: Path) -> None:
    root = folder / "VOCdevkit" / "VOC2007"
    for n in range(3):
        picture(root / "JPEGImages" / f"00000{n}.jpg")
        written(root / "Annotations" / f"00000{n}.xml", xml("dog"))
    for name in ("trainval", "test"):
        written(root / "ImageSets" / "Main" / f"{name}.txt", "000000\n000001\n000002\n")


def read_published_voc(folder: Path) -> None:
    see_all(detection.open_detection("voc", folder, part="train").restrict(["dog"]))


def own(layout: str, folder: Path) -> None:
    """All that is done with own data before training, also where faults are collected."""
    place = folder / "VOCdevkit" / "VOC2007" if layout == "voc" else folder
    faults: list[str] = []
    try:
        layouts.read_all(place, layout=layout, fault=faults.append)
    except InputError as error:
        faults.append(str(error))
    split = detection.open_split(str(place), "", novel=["dog"], layout=layout)
    assert not faults
    k_shot.select_shots(split.train, 1, 0)
    see_all(split.train, split.test)


def coco(folder: Path, file: str = "train.json", images: str = "images") -> None:
    names = [f"{n}.png" for n in range(5)]
    for name in names:
        picture(folder / images / name)
    written(folder / file, coco_json(names, ["dog", "cat"]))


def read_published_coco(folder: Path) -> None:
    names, records, _ = annotations.read_coco(folder, "train")
    dataset = detection.DetectionSet("coco", "train", list(names), [], records, "coco")
    k_shot.select_shots(dataset.restrict(list(names)), 1, 0)
    annotations.read_coco_json(folder / "annotations" / "instances_train2017.json", "take")


def yolo(folder: Path) -> None:
    for n in range(5):
        picture(folder / "images" / f"{n}.png")
        written(folder / "labels" / f"{n}.txt", "0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.5 0.1 0.5 0.5\n")
    written(folder / "train.txt", "".join(f"./images/{n}.png\n" for n in range(3)))
    content = {"path": ".", "train": "train.txt", "val": "images", "nc": 2, "names": ["dog", "cat"]}
    written(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False))


def shots(folder: Path) -> None:
    coco(folder)
    chosen = k_shot.select_shots(detection.open_split(str(folder), "", novel=["dog"]).train, 1, 0)
    written(folder / "shots.json", k_shot.shots_of(chosen))
    for kind in ("txt", "coco"):
        for name, text in k_shot.lists_of(chosen, 1, kind).items():
            written(folder / kind / name, text)


def read_shots(given: str, folder: Path) -> None:
    train = detection.open_split(str(folder), "", novel=["dog"]).train
    chosen = k_shot.choose_shots(train, 1, 0, folder / given)
    json.dumps(k_shot.files(chosen))
    for record in chosen.records:
        assert np.isfinite(record.boxes).all()
        assert (record.boxes[:, :2] < (record.width, record.height)).all()


def cd_fsod(folder: Path) -> None:
    """A target in the published layout, of pictures with an object of either class."""
    names, home = [f"{n}.png" for n in range(3)], folder / "ArTaxOr"
    for part in ("train", "test"):
        for name in names:
            picture(home / part / name)
        written(home / "annotations" / f"{part}.json", coco_json(names, ["a", "b"]))
    written(home / "annotations" / "1_shot.json", coco_json(names[:1], ["a", "b"]))


def read_cd_fsod(folder: Path) -> None:
    split = detection.open_split("artaxor", folder)
    see_all(k_shot.choose_shots(split.train, 1, 0), split.train, split.test)


def look(name: str, split: str, folder: Path, inner: str = "", novel: str = "", **more) -> None:
    """Open a set for classification, and some of its pictures."""
    given = {"novel": folder / novel} if novel else {}
    dataset = open_dataset(name, folder / inner, split, **given, **more)
    for i in range(0, len(dataset), max(1, len(dataset) // 4)):
        dataset.pixels(i)


def mini_imagenet(folder: Path) -> None:
    rows = ["filename,label"]
    for n in range(16):
        name = f"n{n:02d}00000001.jpg"
        picture(folder / "mini_imagenet" / "images" / name[:3] / name, 12)
        rows.append(f"{name},{name[:3]}")
    written(folder / "mini_imagenet" / "val.csv", "\n".join(rows))


def novel_classes(folder: Path) -> None:
    for n in range(12):
        picture(folder / "data" / f"c{n}" / "0.png", 8)
    written(folder / "novel.json", {"train": ["c0", "c1"], "val": ["c2"], "test": ["c3"]})
    written(folder / "novel.txt", "c3\nc4\nc5\n")


def png(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 90)).save(file, "PNG")
    return file.getvalue()


def pickled(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, 2))


def tiered(folder: Path) -> None:
    names = [f"class {n:03d}" for n in range(97)]
    labels = {"label_specific": np.arange(97), "label_specific_str": names}
    pickled(folder / "val_labels.pkl", labels)
    pickled(folder / "val_images_png.pkl", [np.frombuffer(png(8), np.uint8)] * 97)


def cifar(folder: Path) -> None:
    home = folder / "cifar-100-python"
    listed = {name for part in classification.CIFAR_FS.values() for name in part.split()}
    names = sorted(listed | {f"other{n:02d}" for n in range(100 - len(listed))})
    content = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
    content["coarse_labels"] = [n // 5 for n in range(100)]
    for part in ("train", "test"):
        pickled(home / part, content)
    pickled(home / "meta", {"fine_label_names": names})


def read_cifar(folder: Path) -> None:
    look("cifar_fs", "val", folder)
    look("fc100", "test", folder)


def omniglot(folder: Path) -> None:
    for part in classification.OMNIGLOT_PARTS:
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for n in range(6):
                name = f"{part}/Script_{part}/character{n // 2:02d}/{n % 2}.png"
                archive.writestr(name, png(105))


def picture_file(kind: str, folder: Path) -> None:
    picture(folder / f"a.{kind}", 20)


def read_picture(folder: Path) -> None:
    (path,) = folder.iterdir()
    layouts._size(path, annotations.refuse)
    pictures.tensor(path)


def squares(folder: Path) -> None:
    for n in range(3):
        picture(folder / "train" / f"c{n}" / "0.png", 8)
    open_dataset("folder", folder, "train", cache=True)


MODEL = "model.safetensors"


def classifier(method: str, folder: Path) -> Path:
    args = {"backbone": "conv4", "distance": "squared", "temperature": 64.0}
    args |= {"ways": 5, "test_steps": 5, "inner_lr": 0.1}
    about = {"method": method, "args": args, "classes": ["a", "b"], "size": 32, "stored": 32}
    about |= {"dataset": "folder", "augment": True, "temperature": 64.0, "commit": "0", "step": 10}
    about |= {"results": {"ways": 5, "tasks": 10, "shots": {"5": {"accuracy": 71.25, "ci95": 1.5}}}}
    about["normalisation"] = IMAGENET.to_dict()
    weights.save(folder / MODEL, methods.built(about), about)
    return folder / MODEL


def small_detector() -> tuple[TFA, dict[str, Any]]:
    model = TFA(fpn("small", channels=16), 2, width=32, rpn_channels=16)
    seen = {"short": 64, "long": 96, "multiple": 32, "enlarge": True}
    about = {"method": "tfa", "classes": ["a", "b"], "pictures": seen, **model.describe()}
    return model, about


def detector(folder: Path, **more: Any) -> Path:
    model, about = small_detector()
    about |= {"args": {"backbone": "small"}, "stage": "base", "base": ["a", "b"], "novel": []}
    about |= {"results": {"AP50": {"base": 12.5, "all": 12.5}}, **more}
    weights.save(folder / MODEL, model, about)
    return folder / MODEL


def read_model(folder: Path) -> None:
    model = fewshot.load(folder / MODEL)
    json.dumps(model.about)
    model.generate_model_card()
    if hasattr(model, "pipeline"):
        model.pipeline.resized(100, 50)


def slim(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names and shapes in a small file: all are views of one store of bytes."""
    store = torch.zeros(max(tensor.numel() for tensor in state.values()), dtype=torch.uint8)
    return {name: store[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}


def saved(state: dict[str, torch.Tensor], path: Path, **more: Any) -> Path:
    torch.save({"model": state, **more} if more else state, path)
    return path


def mm_classifier(folder: Path) -> Path:
    state = {}
    for n in range(4):
        layer = f"backbone.layers.{n}.layers"
        state[f"{layer}.0.weight"] = torch.zeros(64, 64 if n else 3, 3, 3)
        for key in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            state[f"{layer}.{key}"] = torch.zeros(64)
        state[f"{layer}.1.num_batches_tracked"] = torch.tensor(0)
    state |= {"head.fc.weight": torch.zeros(5, 1600), "head.fc.bias": torch.zeros(5)}
    content = {"meta": {"CLASSES": ["a", "b"], "config": "type='MAML'"}, "state_dict": state}
    return saved(content, folder / "maml_conv4.pth")


def read_checkpoint(folder: Path) -> None:
    (path,) = folder.iterdir()
    state, meta = mmfewshot.read(path)
    mmfewshot.convert(state, meta, path.stem)


# our names of DeFRCN's tensors -> detectron2's
DETECTRON2 = {".trunk.stage4.": ".roi_heads.res5.", ".trunk.bn1.": ".backbone.stem.conv1.norm."}
DETECTRON2 |= {".trunk.conv1.": ".backbone.stem.conv1.", ".trunk.layer1.": ".backbone.res2."}
DETECTRON2 |= {".trunk.layer2.": ".backbone.res3.", ".trunk.layer3.": ".backbone.res4."}
DETECTRON2 |= {f".bn{n}.": f".conv{n}.norm." for n in (1, 2, 3)}
DETECTRON2 |= {".downsample.0.": ".shortcut.", ".downsample.1.": ".shortcut.norm."}
DETECTRON2 |= {".rpn.cls.": ".rpn.objectness_logits.", ".rpn.reg.": ".rpn.anchor_deltas."}
DETECTRON2 |= {".rpn.": ".proposal_generator.rpn_head."}
DETECTRON2 |= {".cls.": ".roi_heads.box_predictor.cls_score."}
DETECTRON2 |= {".reg.": ".roi_heads.box_predictor.bbox_pred."}


def defrcn(folder: Path) -> None:
    """As detectron2 saves DeFRCN's model."""
    with torch.device("meta"):
        model = DeFRCN(c4("resnet50", style="caffe", norm="frozen"), 5, rpn_channels=8)
    state = {}
    for name, tensor in model.state_dict().items():
        name = f".{name}"
        for ours, theirs in DETECTRON2.items():
            name = name.replace(ours, theirs)
        state[name[1:]] = tensor
    more = {"iteration": 9, "scheduler": {"milestones": [10, 20]}}
    saved(slim(state), folder / "defrcn.pth", **more)


def converted(script: Any, folder: Path, file: str, **options: Any) -> None:
    args = script.Args(folder / file, folder / "out" / "a.safetensors", **options)
    with redirect_stdout(None):
        script.main(args)
    json.dumps(weights.describe_file(args.out))


def read_torchvisions(folder: Path) -> None:
    converted(convert_torchvision, folder, "mine.pth", classes=folder / "names.txt")


@lru_cache
def torchvisions() -> dict[str, torch.Tensor]:
    make = partial(fasterrcnn_mobilenet_v3_large_320_fpn, weights=None, weights_backbone=None)
    return slim(make(num_classes=3).state_dict())


def torchvisions_detector(folder: Path) -> None:
    written(folder / "names.txt", "kettle\ntea pot\n")
    saved(torchvisions(), folder / "mine.pth")


def read_names(folder: Path) -> None:
    """As scripts/convert_torchvision.py before it converts, which takes longer."""
    args = convert_torchvision.Args(folder / "mine.pth", classes=folder / "names.txt")
    assert len(convert_torchvision._categories(args, torchvisions())) == 3


def supports(folder: Path) -> None:
    """Class folders of scripts/predict.py's --support: of two classes, with annotated pictures and
    without.
    """
    for n in range(2):
        picture(folder / "cat" / f"{n}.png")
        picture(folder / "dog" / f"d{n}.png")
    written(folder / "cat" / "0.xml", xml("cat"))
    picture(folder / "cow" / "only.png", 20)
    written(folder / "objects.json", coco_json(["d0.png"], ["dog"]))


@lru_cache
def prototypes() -> fewshot.inference.Detector:
    """A detector that learns from supports alone."""
    model = PrototypeDetector(*small_detector(), 3, clusters=2)
    names = ["a", "b", "c"]
    about = {"method": "prototype_detector", "stage": "supports", "args": {}, "classes": names}
    about |= {"base": [], "novel": names, "pictures": {"short": 64, "long": 96}, **model.describe()}
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


def kept_features(folder: Path) -> None:
    squares(folder)
    keep(folder)


def keep(folder: Path) -> None:
    """As the recipes that train nothing."""
    dataset = open_dataset("folder", folder, "train", size=8)
    given = Accelerator(), Features(), dataset, Keeping(str(folder / "kept"))
    for find, shape in ((frozen.features, (3, 3)), (frozen.base_mean, (3,))):
        found = find(*given)
        assert found.shape == shape and found.dtype == torch.float32 and found.isfinite().all()


@lru_cache
def network(name: str) -> dict[str, torch.Tensor]:
    if name.startswith("timm/"):
        return slim(pytest.importorskip("timm").create_model(name[5:]).state_dict())
    return slim(torchvision.models.get_model(name).state_dict())


def network_file(name: str, folder: Path) -> None:
    saved(network(name), folder / "weights.pth")


def backbone_safetensors(folder: Path) -> None:
    state = torchvision.models.get_model("shufflenet_v2_x0_5").state_dict()
    save_file(dict(state), folder / "weights.safetensors")


def read_backbone(name: str, size: int, folder: Path) -> None:
    (path,) = folder.iterdir()
    pretrained.network(name, size, source=str(path))


def regions(choice: str = "resnet18") -> calibrate.Regions:
    """The mean colours of boxes, in place of a network's."""
    return calibrate.Regions(torch.nn.Identity(), IMAGENET, stride=1)


def calibrated(folder: Path) -> Path:
    """A detector's file with prototypes of its classes."""
    made = calibrate.Calibration(regions(), {"a": torch.ones(3), "b": torch.arange(3.0)})
    return detector(folder, calibration=made.describe("resnet18"))


def read_calibrated(folder: Path) -> None:
    about = weights.describe_file(folder / MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "backbone", regions)
        made = calibrate.restored(about, folder / MODEL)
    image, box = torch.zeros(3, 40, 40, dtype=torch.uint8), torch.tensor([[2.0, 3, 30, 30]])
    for name in ("a", "b"):
        scores = made(image, box, torch.tensor([0.5]), [name])
        assert scores.shape == (1,) and scores.isfinite().all()


def runs(content: dict[str, Any], folder: Path) -> None:
    """metrics.json of two runs, and what they are drawn from."""
    for seed in (0, 1):
        settings = {"seed": seed, "id": f"a{seed}", **content["settings"]}
        written(folder / f"seed{seed}" / "metrics.json", content | {"settings": settings})
        tasks = {"1": [50.0, 50.5, 50.25], "5": [70.0, 75.0, 65.0]}
        if "shots" in content:
            written(folder / f"seed{seed}" / "tasks.json", tasks)


DETECTION = {
    "AP50": {"base": 80.0, "novel": 30.5, "all": 70.0},
    "protocol": {"dataset": "glyphs", "split": 1, "stage": "finetune", "shots": "5"},
    "settings": {
        "method": "tfa",
        "trained": {"dataset": "glyphs", "lr": None},
        "tested": {"shots": 5},
        "run": {"seconds": 3.5, "base": "01234567", "precision": "no", "commit": "0123"},
    },
}
DETECTION["protocol"]["test_pictures"] = 50
DETECTION["settings"]["run"]["command"] = "recipes/tfa.py"
CLASSIFICATION = {
    "ways": 5,
    "tasks": 3,
    "shots": {"1": {"accuracy": 50.25, "ci95": 0.5}, "5": {"accuracy": 70.0, "ci95": 0.25}},
    "settings": {
        "method": "tim",
        "trained": {"dataset": "cub"},
        "tested": {"ways": 5, "shots": [1, 5], "queries": 15, "tasks": None},
    },
}


def read_results(folder: Path) -> None:
    """Tables, a picture and a paired difference of them."""
    second = folder / "seed1" / "metrics.json"
    with redirect_stdout(None):
        results.main(results.Args((folder,), json=folder / "rows.js"))
        results.draw(results.rows(results.collect([folder], "AP50")), "AP50")
        if results.read(second, "AP50"):
            results.main(results.Args((second, second), compare=True))


INSTANCES = "annotations/instances_train2017.json"
SHUFFLE = partial(read_backbone, "torchvision/shufflenet_v2_x0_5", 32)
NOVEL = partial(look, "folder", "val", inner="data")
RESULT, TASKS = "seed1/metrics.json", "seed1/tasks.json"
DETECTED, CLASSIFIED = partial(runs, DETECTION), partial(runs, CLASSIFICATION)
READERS = {
    "COCO json": Reader(
        partial(coco, file=INSTANCES, images="train2017"), INSTANCES, read_published_coco, as_json
    ),
    "own COCO json": Reader(coco, "train.json", partial(own, "coco"), as_json),
    "YOLO txt": Reader(yolo, "labels/1.txt", partial(own, "yolo"), as_words),
    "YOLO list": Reader(yolo, "train.txt", partial(own, "yolo"), as_words),
    "YOLO data.yaml": Reader(yolo, "data.yaml", partial(own, "yolo"), as_yaml),
    "shots.json": Reader(shots, "shots.json", partial(read_shots, "shots.json"), as_json),
    "shot lists, txt": Reader(shots, "txt/*", partial(read_shots, "txt"), as_words),
    "shot lists, json": Reader(shots, "coco/*", partial(read_shots, "coco"), as_json),
    "novel classes, json": Reader(
        novel_classes, "novel.json", partial(NOVEL, novel="novel.json"), as_json
    ),
    "novel classes, txt": Reader(
        novel_classes, "novel.txt", partial(NOVEL, novel="novel.txt"), as_words
    ),
    "mini-ImageNet csv": Reader(
        mini_imagenet, "*/val.csv", partial(look, "mini_imagenet", "val"), as_words
    ),
    "CIFAR pickle": Reader(cifar, "*/train", read_cifar, as_pickle),
    "CIFAR names": Reader(cifar, "*/meta", read_cifar, as_pickle),
    "Omniglot zip": Reader(
        omniglot, "images_background.zip", partial(look, "omniglot", "train"), as_zip
    ),
    "cache npy": Reader(
        squares,
        f"{classification.CACHE_FOLDER}/*",
        partial(look, "folder", "train", cache=True),
        as_npy,
    ),
    "classifier": Reader(partial(classifier, "proto_net"), MODEL, read_model, as_safetensors),
    "MAML": Reader(partial(classifier, "maml"), MODEL, read_model, as_safetensors),
    "detector": Reader(detector, MODEL, read_model, as_safetensors),
    "calibration of a model": Reader(calibrated, MODEL, read_calibrated, as_calibrated),
    "mmfewshot classifier": Reader(mm_classifier, "*.pth", read_checkpoint, as_pth),
    "DeFRCN checkpoint": Reader(
        defrcn, "*.pth", partial(converted, convert_defrcn, file="defrcn.pth", of="voc1"), as_pth
    ),
    "torchvision detector": Reader(torchvisions_detector, "*.pth", read_torchvisions, as_pth),
    "torchvision detector's names": Reader(
        torchvisions_detector, "names.txt", read_names, as_words
    ),
    "backbone weights pth": Reader(
        partial(network_file, "shufflenet_v2_x0_5"), "*", SHUFFLE, as_pth
    ),
    "backbone weights safetensors": Reader(backbone_safetensors, "*", SHUFFLE, as_safetensors),
    "timm weights": Reader(
        partial(network_file, "timm/test_resnet"),
        "*",
        partial(read_backbone, "timm/test_resnet", 64),
        as_pth,
    ),
    "calibration weights": Reader(
        partial(network_file, "squeezenet1_1"),
        "*",
        lambda folder: calibrate.backbone(f"squeezenet1_1={folder / 'weights.pth'}"),
        as_pth,
    ),
    "support xml": Reader(supports, "cat/0.xml", read_supports, as_xml),
    "support json": Reader(supports, "objects.json", read_supports, as_json),
    "support picture": Reader(supports, "cow/only.png", read_supports, bytewise),
    "kept features": Reader(kept_features, "kept/*-features*", keep, as_safetensors),
    "kept mean": Reader(kept_features, "kept/*-mean*", keep, as_safetensors),
    "detector's result": Reader(DETECTED, RESULT, read_results, as_json),
    "classifier's result": Reader(CLASSIFIED, RESULT, read_results, as_json),
    "classifier's tasks": Reader(CLASSIFIED, TASKS, read_results, as_json),
}
for whose, read in (("", read_published_voc), ("own ", partial(own, "voc"))):
    READERS[f"{whose}VOC xml"] = Reader(voc, "*/*/Annotations/000001.xml", read, as_xml)
    READERS[f"{whose}VOC list"] = Reader(voc, "*/*/ImageSets/Main/trainval.txt", read, as_words)
for what, file in (("labels", "val_labels.pkl"), ("pictures", "val_images_png.pkl")):
    read = partial(look, "tiered_imagenet", "val")
    READERS[f"tiered-ImageNet {what}"] = Reader(tiered, file, read, as_pickle)
for part in ("train", "test", "1_shot"):
    file = f"*/annotations/{part}.json"
    READERS[f"CD-FSOD {part} json"] = Reader(cd_fsod, file, read_cd_fsod, as_json)
for kind in ("png", "jpg", "bmp", "gif", "tif", "webp", "ppm"):
    make = partial(picture_file, kind)
    READERS[f"picture {kind}"] = Reader(make, "a.*", read_picture, bytewise)


@pytest.fixture(autouse=True)
def few_characters(monkeypatch):
    """Omniglot of six characters of two drawings."""
    splits = {"train": slice(0, 3), "val": slice(3, 4), "test": slice(4, 6)}
    for name, value in (("CHARACTERS", 6), ("DRAWINGS", 2), ("SPLITS", splits)):
        monkeypatch.setattr(classification, f"OMNIGLOT_{name}", value)


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
        no_text = text.encode(errors="replace") != text.encode("utf-8", "ignore")
        if no_text or len(text.splitlines()) != 1 or "\0" in text or len(text) >= 20_000:
            return f"no text, or more than a line of {len(text)} characters: {text!r:.200}"
        return "refused"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if Path(f.filename).is_relative_to(LIBRARY)] or frames
        return f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].lineno}: {error!r:.120}"


def tried(name: str, numbers: range, folder: Path) -> Counter[str]:
    """Outcomes of mutated files, each told from the number that makes it again."""
    reader = READERS[name]
    reader.make(folder)
    path = max(folder.glob(reader.file))
    sound, called = path.read_bytes(), path.name.removesuffix(".pth")
    assert outcome(lambda: reader.read(folder), called) == "result"

    found: Counter[str] = Counter()
    wrong: dict[str, int] = {}
    for number in numbers:
        rng = random.Random(f"{name} {number}")
        mutate = bytewise if rng.random() < 0.3 else reader.mutate
        path.write_bytes(mutate(sound, rng))
        result = outcome(lambda: reader.read(folder), called)
        found[result] += 1
        if result not in ("result", "refused"):
            wrong.setdefault(result, number)
    print(f"{name}: {len(numbers)} tried, {found['result']} read, {found['refused']} refused")
    assert not wrong, "\n".join(f"{found[w]} x {w} (first: number {n})" for w, n in wrong.items())
    return found


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files(name, tmp_path):
    tried(name, range(8), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files(name, tmp_path):
    assert tried(name, range(8, 2008), tmp_path)["refused"] > 5


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


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The message; reading took next to no time and no memory worth mentioning."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError) as caught:
        read(path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


CHECKPOINTS = (mmfewshot.read, weights.read_state)


def test_code_in_files_is_not_run(tmp_path):
    done = tmp_path / "done"
    planted = Runs(f"touch {done}")
    path = saved({"state_dict": {"a": planted}}, tmp_path / "a.pth")
    for read in CHECKPOINTS:
        refusal(read, path)

    cifar(tmp_path)
    path = tmp_path / "cifar-100-python" / "meta"
    path.write_bytes(pickle.dumps({"fine_label_names": planted}))
    assert "posix.system" in refusal(lambda _: read_cifar(tmp_path), path)
    path.write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # object number 2^31 of its memo
    refusal(lambda _: read_cifar(tmp_path), path)
    assert not done.exists()


def test_bombs_are_refused(tmp_path, monkeypatch):
    for name, content in XML.items():
        refusal(annotations.read_xml, written(tmp_path / f"{name}.xml", content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    refusal(pictures.tensor, tmp_path / "a.png")

    omniglot(tmp_path)
    path = tmp_path / "images_background.zip"
    monkeypatch.setattr(classification, "OMNIGLOT_BYTES", 10**6)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images_background/a/b/c.png", bytes(10**7))
    assert "once unpacked" in refusal(lambda _: look("omniglot", "train", tmp_path), path)

    stored = saved({"a": torch.zeros(10**6)}, tmp_path / "a.pth")
    packed = zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(stored) as old, packed as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    views = {"rpn_head.rpn_conv.weight": torch.zeros(1).expand(10**9, 10**3)}
    saved(views, tmp_path / "c.pth")
    for read in CHECKPOINTS:
        assert "unpack" in refusal(read, tmp_path / "b.pth")
        assert "no plain tensor" in refusal(read, tmp_path / "c.pth")


def say(path: Path, field: str, value: Any) -> Path:
    """The model's file, in which a field is another, or an object has other fields too."""
    state, about = weights.load(path)
    about = {**about, field: about[field] | value if isinstance(value, dict) else value}
    weights.save_state(path, state, about)
    return path


MAML = partial(classifier, "maml")
NO_FIT = "does not suit this code"


@pytest.mark.parametrize(
    ("make", "field", "value", "words"),
    [
        (detector, "sizes", {"rpn_channels": 10**9}, "1000000000"),
        (detector, "sizes", {"rpn_channels": 4096}, "4096"),
        (detector, "sizes", {"width": 65536}, "65536"),
        (detector, "sizes", {"width": 10**18}, NO_FIT),
        (detector, "sizes", {"other": 1}, "unexpected keyword argument 'other'"),
        (detector, "architecture", {"channels": 60_000}, "fc1.weight is (32, 784)"),
        (detector, "architecture", {"name": "resnet101"}, "trunk."),
        (detector, "architecture", {"name": "/etc/passwd"}, "no detection trunk"),
        (detector, "classes", [f"c{n}" for n in range(50_000)], "cls.bias is (3,)"),
        (detector, "classes", [1, 2], "'classes' is [1, 2]"),
        (detector, "pictures", {"other": 1}, "unexpected keyword argument 'other'"),
        (detector, "pictures", {"short": "all"}, NO_FIT),
        (detector, "normalisation", {"std": [1.0, "x", 1.0]}, NO_FIT),
        (detector, "architecture", {"style": ["caffe"]}, "has no style ['caffe']"),
        (detector, "method", "meta_rcnn", NO_FIT),
        (MAML, "args", {"backbone": "torchvision/vit_l_16"}, "features."),
        (MAML, "args", {"backbone": "torchvision/hf-hub:someone/model"}, "no network"),
        (MAML, "args", {"backbone": "../../model"}, "write torchvision/NAME"),
        (MAML, "args", {"ways": 90_000}, "head"),
        (MAML, "size", 10**9, "head"),
        (MAML, "size", 4096, "head"),
    ],
)
def test_a_models_file_does_not_steer_load(make, field, value, words, tmp_path):
    assert words in refusal(fewshot.load, say(make(tmp_path), field, value))


def test_numbers_that_no_tensor_has_take_no_memory_and_no_time(tmp_path):
    path = detector(tmp_path)
    sizes = {"rois": 10**15, "train_proposals": [10**15] * 2, "test_proposals": [10**15] * 2}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = fewshot.load(say(path, "sizes", sizes)).predict(torch.zeros(3, 64, 64).byte())
    assert len(found.boxes) <= 100
    # of a network whose tensors are the same for images of any size, the size is looked up
    made = methods.backbones.build("torchvision/shufflenet_v2_x0_5", 100_000)
    assert made.out_features == 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_a_base_models_file_does_not_steer_what_is_rebuilt_of_it(tmp_path):
    path = say(detector(tmp_path), "sizes", {"rpn_channels": 10**9})
    words = refusal(lambda path: rebuilt(TFA, weights.describe_file(path), 5), path)
    assert "describes a model of" in words
    words = refusal(lambda path: rebuilt(MPSR, from_tfa(*weights.load(path))[1]), path)
    assert "describes a model of" in words


@pytest.mark.parametrize("value", ["imagenet", "/etc/passwd", "../model.pth"])
def test_a_models_file_names_no_other_file_and_no_download(value, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights are asked for")

    monkeypatch.setattr(trunks, "load_pretrained", refuse)
    path = say(detector(tmp_path), "architecture", {"weights": value, "pretrained": True})
    say(path, "sizes", {"weights": value, "source": value})
    fewshot.load(path)
    rebuilt(TFA, weights.describe_file(path))


def test_lying_headers_of_model_files(tmp_path):
    path = classifier("proto_net", tmp_path)
    sound = path.read_bytes()
    (length,) = struct.unpack("<Q", sound[:8])
    tensor = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    for header in (json.dumps({"a": tensor}).encode(), b"{" * 10_000, b"[]"):
        path.write_bytes(struct.pack("<Q", len(header)) + header + sound[8 + length :])
        assert "not a model file" in refusal(fewshot.load, path)
    for size in (2**62, 2**26, 0):
        path.write_bytes(struct.pack("<Q", size) + sound[8:])
        refusal(fewshot.load, path)
