"""Image classification data sets: one `ImageSet` per split, whatever lies on the disk.

`open_dataset` reads CUB-200-2011, mini- and tiered-ImageNet, Omniglot, any folder of class folders, and the embedded
glyphs. Classes come in the order in which mmfewshot numbers them, so that its episodes and its classifiers carry over.
"""

import csv
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewshot import InputError
from fewshot.data import transforms
from fewshot.data.glyphs import glyph

DatasetName = Literal["glyphs", "omniglot", "cub", "mini_imagenet", "tiered_imagenet", "folder"]
Split = Literal["train", "val", "test"]
Source = Callable[[int], Image.Image]  # picture i of a data set, RGB and upright

SIDE = 84  # what networks see of natural images, unless told otherwise
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}  # files in class folders

GLYPH_CLASSES = {"train": range(64), "val": range(64, 80), "test": range(80, 100)}  # as many as mini-ImageNet's
GLYPHS_PER_CLASS = 600

OMNIGLOT_PARTS = "images_background", "images_evaluation"
OMNIGLOT_CHARACTERS, OMNIGLOT_DRAWINGS = 1623, 20  # in both parts; of each character
# The published split of 1200 and 423 characters is by chance, as is ours; 172 of the 1200 validate (Snell et al. 2017).
OMNIGLOT_SPLITS = {"train": slice(0, 1028), "val": slice(1028, 1200), "test": slice(1200, 1623)}
OMNIGLOT_SEED = 0

# Label order: mmfewshot's, as places in the sorted class names of the split (wnids; tiered-ImageNet's full names).
MINI_ORDER = {
    "train": (
        "7 27 38 8 11 2 55 36 1 59 52 10 18 63 22 25 41 47 16 37 9 30 60 42 12 61 45 15 50 29 49 31 40 20 4 6 28 13 "
        "26 46 39 54 58 21 34 44 23 19 53 57 0 5 62 43 32 56 33 3 24 48 35 51 14 17"
    ),
    "val": ("3 7 4 10 12 13 5 14 2 11 1 9 6 0 15 8"),
    "test": ("4 1 19 6 17 8 10 0 12 11 15 14 18 2 9 3 7 5 16 13"),
}
TIERED_ORDER = {
    "train": (
        "44 296 136 250 226 277 120 244 108 307 255 98 313 232 68 24 279 65 103 285 151 122 143 305 66 91 94 302 85 "
        "251 303 256 164 35 231 10 101 213 53 57 309 150 157 7 67 121 220 221 170 47 183 243 161 175 169 171 336 52 "
        "329 286 308 247 293 349 282 28 146 95 314 50 324 23 258 77 268 245 179 223 200 215 100 202 228 163 12 275 "
        "168 133 236 159 333 5 261 187 326 20 257 280 214 31 97 126 292 154 203 312 38 26 78 193 339 212 211 248 "
        "301 8 306 343 194 2 61 43 45 304 332 9 198 104 276 299 83 272 173 4 273 79 144 235 291 218 25 46 177 86 11 "
        "124 191 290 14 21 201 283 172 115 109 34 132 54 350 3 16 197 174 186 114 90 233 116 322 87 340 195 346 225 "
        "40 102 337 342 252 82 254 287 289 125 295 51 155 112 323 96 129 117 33 224 310 142 284 32 156 60 317 69 "
        "205 190 274 166 105 196 185 331 106 341 288 210 222 204 128 123 318 182 199 70 107 165 55 167 160 180 131 "
        "266 219 242 249 345 74 0 113 206 269 265 37 319 84 189 294 278 227 19 316 240 192 264 344 135 230 138 327 "
        "64 209 270 216 139 13 27 88 259 334 29 18 140 178 111 75 36 39 241 348 237 246 17 320 62 267 22 207 145 "
        "238 127 162 176 298 321 81 262 137 260 42 89 152 63 73 15 76 281 56 130 71 41 118 80 208 92 147 49 181 234 "
        "335 271 300 72 338 330 110 119 184 158 30 134 93 149 188 347 1 328 239 311 6 217 148 263 315 297 153 229 "
        "99 253 59 325 48 141 58"
    ),
    "val": (
        "20 53 3 40 17 79 47 26 69 72 12 21 94 45 82 30 54 84 96 4 52 6 9 8 15 38 50 28 62 57 81 24 33 44 18 22 67 "
        "41 39 76 92 93 89 87 56 0 1 23 59 10 19 14 5 34 58 66 36 85 32 61 78 29 13 49 2 86 16 91 42 75 51 90 64 83 "
        "74 68 60 80 70 63 7 73 25 27 71 11 48 77 46 31 55 95 43 35 65 37 88"
    ),
    "test": (
        "16 67 91 109 143 155 77 131 17 113 156 84 39 69 31 141 49 66 159 92 136 41 112 12 63 114 71 32 119 65 130 "
        "34 29 30 38 2 138 158 132 103 146 81 148 140 154 137 40 46 149 147 86 145 95 58 87 62 110 59 115 150 123 "
        "106 118 105 94 144 73 93 23 70 9 52 135 126 14 90 33 61 120 0 85 5 139 107 1 25 153 50 27 151 157 13 36 "
        "124 82 3 47 64 78 44 8 83 99 43 74 26 134 53 75 28 68 125 55 152 108 142 10 129 22 111 6 20 35 24 37 7 54 "
        "51 96 133 100 56 4 117 19 42 76 48 80 97 79 116 45 121 102 60 72 15 128 11 21 57 122 18 89 98 88 127 104 "
        "101"
    ),
}


class ImageSet:
    """The pictures of one split of one data set, decoded one at a time when asked for.

    Args:
        classes: names in label order.
        labels: (n,) label of each picture.
        source: gives picture i; picklable, so that loading processes can have it.
        size: side in pixels of what networks see.
        stored: side S in pixels of the square that a picture is squashed to.
        augment: whether the augmentation of natural images suits these pictures.

    Further attributes: `by_class`, for each class the indices of its pictures, ascending.

    Raises InputError when a class has no picture.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        classes: list[str],
        labels: np.ndarray,
        source: Source,
        *,
        size: int,
        stored: int,
        normalisation: transforms.Normalisation = transforms.IMAGENET,
        augment: bool = True,
    ):
        self.name, self.split, self.classes, self.source = name, split, classes, source
        self.size, self.stored, self.normalisation, self.augment = size, stored, normalisation, augment
        self.labels = np.asarray(labels, np.int64)
        counts = np.bincount(self.labels, minlength=len(classes))
        if not counts.all():
            raise InputError(f"{name} {split}: class {classes[counts.argmin()]} has no picture; add some or remove it")
        self.by_class = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(counts)[:-1])
        self._aspects = np.full(len(self.labels), np.nan)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> Tensor:
        """Picture `index` squashed to a square: uint8 RGB (3, S, S). Raises InputError when it cannot be read."""
        picture = self.source(index)
        self._aspects[index] = picture.width / picture.height
        if picture.size != (self.stored, self.stored):
            picture = picture.resize((self.stored, self.stored), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()

    def aspect(self, index: int) -> float:
        """Width / height of picture `index` before it was squashed; free once its pixels were read."""
        if np.isnan(self._aspects[index]):
            self.pixels(index)
        return float(self._aspects[index])

    def describe(self) -> dict[str, Any]:
        """What a model trained on this should say of its data, for json: whatever it takes to feed it pictures."""
        return {
            "dataset": self.name,
            "classes": self.classes,
            "size": self.size,
            "normalisation": self.normalisation.to_dict(),
            "augment": self.augment,
        }


def open_dataset(
    name: DatasetName, root: str | os.PathLike, split: Split, *, size: int | None = None, seed: int = 0
) -> ImageSet:
    """The pictures of one split of a data set.

    Args:
        root: the data set's folder, or one that holds it under its usual name. Glyphs need none.
        size: side in pixels of what networks see; by default 32 for glyphs, 28 for Omniglot and 84 for photographs.
        seed: of the pictures of glyphs, and of the class split of a folder without train, val and test folders. The
            other data sets have one fixed split.

    Raises InputError naming the folder or file that is missing, incomplete or unreadable.
    """
    if split not in get_args(Split):
        raise InputError(f"split {split!r}: must be one of {', '.join(get_args(Split))}")
    root = Path(root)
    match name:
        case "glyphs":
            return _open_glyphs(split, size or 32, seed)
        case "omniglot":
            return _open_omniglot(root, split, size or 28)
        case "cub":
            return _open_cub(root, split, size or SIDE)
        case "mini_imagenet":
            return _open_mini_imagenet(root, split, size or SIDE)
        case "tiered_imagenet":
            return _open_tiered_imagenet(root, split, size or SIDE)
        case "folder":
            return _open_folder(root, split, size or SIDE, seed)
    raise InputError(f"data set {name!r}: must be one of {', '.join(get_args(DatasetName))}")


def read_picture(path: str | os.PathLike) -> Image.Image:
    """A picture file as an RGB image, upright if its EXIF says how. Raises InputError naming an unreadable file."""
    return _decode(path, str(path))


def _decode(file: str | os.PathLike | BinaryIO, name: str, mode: str = "RGB") -> Image.Image:
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL's own words on an unknown format are the file's name once more
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise InputError(f"{name}: not readable as a picture ({reason}); replace or remove it") from error


@dataclass(frozen=True)
class _Files:
    """Pictures in files."""

    paths: list[str]

    def __call__(self, index: int) -> Image.Image:
        return read_picture(self.paths[index])


@dataclass(frozen=True)
class _Buffers:
    """Encoded pictures in memory, which came from one file."""

    path: str
    buffers: list[np.ndarray]

    def __call__(self, index: int) -> Image.Image:
        return _decode(io.BytesIO(self.buffers[index]), f"{self.path}, picture {index}")


@dataclass(frozen=True)
class _Glyphs:
    """Glyphs of consecutive classes."""

    first: int
    seed: int
    size: int

    def __call__(self, index: int) -> Image.Image:
        number, picture = divmod(index, GLYPHS_PER_CLASS)
        return Image.fromarray(glyph(self.first + number, self.seed, picture, self.size))


@dataclass(frozen=True)
class _Drawings:
    """Omniglot's drawings (characters, drawings, size, size) uint8 with four classes per character, one per turn."""

    ink: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        number, drawing = divmod(index, OMNIGLOT_DRAWINGS)
        character, turns = divmod(number, 4)
        return Image.fromarray(np.rot90(self.ink[character, drawing], turns)).convert("RGB")


def _open_glyphs(split: Split, size: int, seed: int) -> ImageSet:
    numbers = GLYPH_CLASSES[split]
    labels = np.arange(len(numbers)).repeat(GLYPHS_PER_CLASS)
    names = [f"glyph{number:03d}" for number in numbers]
    source = _Glyphs(numbers[0], seed, size)
    return _drawn("glyphs", split, names, labels, source, size)


def _drawn(name: str, split: Split, classes: list[str], labels: np.ndarray, source: Source, size: int) -> ImageSet:
    """An image set of characters, which come at the network's size and are not augmented."""
    return ImageSet(
        name, split, classes, labels, source, size=size, stored=size, normalisation=transforms.HALF, augment=False
    )


def _open_photographs(
    name: str, split: Split, classes: list[str], labels: np.ndarray, source: Source, size: int
) -> ImageSet:
    """An image set of natural images of any size.

    The stored square's side is 3.05 times the network's (256 for 84), or the pictures' own longest side where that is
    less, as sixteen of them show. Random crops cover 8 to 100 % of the area: at 3.05 all but the smallest 3 % of them
    have at least as many pixels as the network sees, and those are enlarged by a sixth. More would be averaged away.
    """
    some = np.unique(np.linspace(0, len(labels) - 1, 16).astype(int))
    longest = max(max(source(index).size) for index in some)
    stored = min(round(size * 256 / 84), longest)
    return ImageSet(name, split, classes, labels, source, size=size, stored=stored)


def _find(root: Path, name: str, subfolders: tuple[str, ...], wanted: tuple[str, ...]) -> Path:
    """The data set's folder: `root` or one of its usual subfolders, whichever holds one of the wanted entries."""
    homes = [*(root / folder for folder in subfolders), root]
    for home in homes:
        if any((home / entry).exists() for entry in wanted):
            return home
    expected = " or ".join(str(home / wanted[0]) for home in homes)
    raise InputError(f"{root}: no {name} here; expected {expected}")


def _open_omniglot(root: Path, split: Split, size: int) -> ImageSet:
    archives = tuple(f"{part}.zip" for part in OMNIGLOT_PARTS)
    home = _find(root, "Omniglot", ("omniglot-py", "omniglot"), OMNIGLOT_PARTS + archives)
    characters: dict[str, list[tuple[str, bytes]]] = {}  # ALPHABET/characterNN -> its drawings
    for part in OMNIGLOT_PARTS:
        for file, encoded in _omniglot_drawings(home, part):
            characters.setdefault(file.rpartition("/")[0], []).append((file, encoded))
    counts = [len(drawings) for drawings in characters.values()]
    if len(counts) != OMNIGLOT_CHARACTERS or set(counts) != {OMNIGLOT_DRAWINGS}:
        raise InputError(
            f"{home}: holds {sum(counts)} drawings of {len(counts)} characters, all of Omniglot is {OMNIGLOT_DRAWINGS} "
            f"of each of {OMNIGLOT_CHARACTERS}; get {' and '.join(archives)} again"
        )

    shuffled = np.random.default_rng(OMNIGLOT_SEED).permutation(sorted(characters)).tolist()
    chosen = shuffled[OMNIGLOT_SPLITS[split]]
    ink = np.stack([[_ink(encoded, file, size) for file, encoded in sorted(characters[name])] for name in chosen])
    classes = [f"{name}/rot{90 * turns:03d}" for name in chosen for turns in range(4)]
    labels = np.arange(len(classes)).repeat(OMNIGLOT_DRAWINGS)
    return _drawn("omniglot", split, classes, labels, _Drawings(ink), size)


def _omniglot_drawings(home: Path, part: str) -> list[tuple[str, bytes]]:
    """(ALPHABET/characterNN/FILE, contents) of every drawing of one part, unpacked or zipped."""
    folder, archive = home / part, home / f"{part}.zip"
    if folder.is_dir():
        return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in folder.glob("*/*/*.png")]
    try:
        with zipfile.ZipFile(archive) as opened:
            files = [name for name in opened.namelist() if name.endswith(".png")]
            return [(name.removeprefix(f"{part}/"), opened.read(name)) for name in files]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive}: not readable ({error}); put it there again, or unpack it to {folder}") from error


def _ink(encoded: bytes, name: str, size: int) -> np.ndarray:
    """A drawing as uint8 (size, size), 255 where there is ink: the files are black on white."""
    paper = _decode(io.BytesIO(encoded), name, mode="L").resize((size, size), Image.Resampling.BILINEAR)
    return 255 - np.asarray(paper)


def _open_cub(root: Path, split: Split, size: int) -> ImageSet:
    images = _find(root, "CUB-200-2011", ("CUB_200_2011",), ("images",)) / "images"
    folders = {int(path.name[:3]): path for path in _subfolders(images) if re.match(r"\d{3}\.", path.name)}
    for number in range(1, 201):
        if number not in folders:
            raise InputError(f"{images}: the folder of class {number:03d} is missing; unpack CUB_200_2011.tgz again")
    first, step = {"train": (1, 2), "val": (2, 4), "test": (4, 4)}[split]
    return _open_class_folders("cub", split, [folders[number] for number in range(first, 201, step)], size)


def _open_folder(root: Path, split: Split, size: int, seed: int) -> ImageSet:
    if not any((root / name).is_dir() for name in get_args(Split)):
        folders = _subfolders(root)
        n = len(folders)
        cuts = {"train": (0, 0.64), "val": (0.64, 0.8), "test": (0.8, 1)}[split]
        low, high = (round(cut * n) for cut in cuts)
        if low == high:
            raise InputError(f"{root}: {n} class folders are too few to set some aside for {split}; add classes")
        chosen = np.random.default_rng(seed).permutation(n)[low:high]
        return _open_class_folders("folder", split, [folders[i] for i in sorted(chosen)], size)
    return _open_class_folders("folder", split, _subfolders(root / split), size)


def _open_class_folders(name: str, split: Split, folders: list[Path], size: int) -> ImageSet:
    """One class per folder, in this order; sub-folders of a class are ignored."""
    files = [_pictures(folder) for folder in folders]
    labels = np.arange(len(folders)).repeat([len(f) for f in files])
    source = _Files([path for paths in files for path in paths])
    return _open_photographs(name, split, [folder.name for folder in folders], labels, source, size)


def _subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one folder of pictures per class in it")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise InputError(f"{folder}: has no sub-folders; expected one folder of pictures per class in it")
    return found


def _pictures(folder: Path) -> list[str]:
    """The picture files in a folder, sorted by name; macOS archives scatter hidden ones that are no pictures."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    found = sorted(name for name in names if os.path.splitext(name)[1].lower() in PICTURES)
    if not found:
        raise InputError(f"{folder}: no picture in this class; add some or remove the folder")
    return [str(folder / name) for name in found]


def _open_mini_imagenet(root: Path, split: Split, size: int) -> ImageSet:
    home = _find(root, "mini-ImageNet", ("mini_imagenet",), ("images",))
    table = home / f"{split}.csv"
    if not table.is_file():
        raise InputError(f"{table}: missing; Ravi and Larochelle's split belongs there")
    with table.open(newline="") as lines:
        header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    if header != ["filename", "label"] or any(len(row) != 2 for row in rows):
        raise InputError(f"{table}: its first line must be filename,label, and all lines alike")
    names: dict[str, list[str]] = {}  # wnid -> what the split calls its pictures
    for file, wnid in rows:
        names.setdefault(wnid, []).append(file)
    classes = _in_order(names, MINI_ORDER[split], table)
    paths = {
        wnid: dict(zip(files, _mini_imagenet_files(home / "images", wnid, files))) for wnid, files in names.items()
    }
    label = {wnid: i for i, wnid in enumerate(classes)}
    labels = np.array([label[wnid] for _, wnid in rows])
    source = _Files([str(paths[wnid][file]) for file, wnid in rows])
    return _open_photographs("mini_imagenet", split, classes, labels, source, size)


def _mini_imagenet_files(images: Path, wnid: str, names: list[str]) -> list[Path]:
    """The files of one class's pictures, which the split calls `names`, in one of three layouts.

    Files called as in the split, in a folder per class or all in `images`; or ILSVRC12's whole folder of the class: the
    last five digits of a name then count, from 1, its files by the number after the underscore.
    """
    folder = images / wnid
    if not folder.is_dir():
        files = [images / name for name in names]
        if not files[0].is_file():
            raise InputError(f"{folder}: missing; expected the pictures of this class there")
    elif (folder / names[0]).is_file():
        files = [folder / name for name in names]
    else:
        ranked = [path for path in folder.iterdir() if re.fullmatch(rf"{wnid}_\d+", path.stem)]
        ranked.sort(key=lambda path: int(path.stem.rpartition("_")[2]))
        ranks = [int(Path(name).stem[-5:]) for name in names]
        if max(ranks) > len(ranked):
            raise InputError(
                f"{folder}: expected {names[0]} there, or ILSVRC12's whole folder of this class: the split needs "
                f"picture {max(ranks)} of it, and {len(ranked)} are there"
            )
        return [ranked[rank - 1] for rank in ranks]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing, though others of this class are there; unpack the data set again")
    return files


def _open_tiered_imagenet(root: Path, split: Split, size: int) -> ImageSet:
    home = _find(root, "tiered-ImageNet", ("tiered_imagenet",), (f"{split}_labels.pkl",))
    table = home / f"{split}_labels.pkl"
    found = _unpickle(table)
    names, specific = list(found["label_specific_str"]), np.asarray(found["label_specific"])
    classes = _in_order(names, TIERED_ORDER[split], table)
    label = {name: i for i, name in enumerate(classes)}
    labels = np.array([label[name] for name in names])[specific]

    unpacked, pickled = home / split, home / f"{split}_images_png.pkl"
    if unpacked.is_dir():
        files, there = [f"{split}_image_{i}.byte" for i in range(len(labels))], set(os.listdir(unpacked))
        for file in files:
            if file not in there:
                raise InputError(f"{unpacked / file}: missing; unpack {pickled.name} again, or remove {unpacked}")
        source = _Files([str(unpacked / file) for file in files])
    else:
        source = _Buffers(str(pickled), _unpickle(pickled))
        if len(source.buffers) != len(labels):
            raise InputError(f"{pickled}: {len(source.buffers)} pictures for the {len(labels)} labels of {table.name}")
    return _open_photographs("tiered_imagenet", split, classes, labels, source, size)


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return pickle.load(file, encoding="latin1")  # Python 2 wrote the published ones
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not readable ({error}); get the published archive again") from error


def _in_order(names: Collection[str], order: str, where: Path) -> list[str]:
    """Class names in label order: `order` says which of the sorted names comes next."""
    ranks = [int(rank) for rank in order.split()]
    if len(names) != len(ranks):
        raise InputError(f"{where}: {len(names)} classes, this split has {len(ranks)}; get the published one")
    ranked = sorted(names)
    return [ranked[rank] for rank in ranks]
