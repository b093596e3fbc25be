"""Image classification data sets: one `ImageSet` per split, whatever lies on the disk.

`open_dataset` reads CUB-200-2011, mini- and tiered-ImageNet, CIFAR-FS, FC100, Omniglot, any folder
of class folders (own_classes.py says how it is divided), and the embedded glyphs. Classes come in
the order in which mmfewshot numbers them, where it has the data set.
"""

import csv
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from PIL import Image

from fewshot import InputError
from fewshot.data import pictures, transforms
from fewshot.data.annotations import inside, is_text, read_text
from fewshot.data.glyphs import glyph
from fewshot.data.image_set import ImageSet, Source, Split
from fewshot.data.label_orders import CIFAR_FS, FC100, MINI_ORDER, TIERED_ORDER
from fewshot.data.own_classes import class_folders, subfolders
from fewshot.data.pictures import SUFFIXES

DatasetName = Literal[
    "glyphs", "omniglot", "cifar_fs", "fc100", "cub", "mini_imagenet", "tiered_imagenet", "folder"
]

T = TypeVar("T")
CACHE_FOLDER = ".fewshot_cache"  # beside the data
SIDE = 84  # what networks see of natural images, unless told otherwise

# as many as mini-ImageNet's
GLYPH_CLASSES = {"train": range(64), "val": range(64, 80), "test": range(80, 100)}
GLYPHS_PER_CLASS = 600

OMNIGLOT_PARTS = "images_background", "images_evaluation"
OMNIGLOT_CHARACTERS, OMNIGLOT_DRAWINGS = 1623, 20  # in both parts; of each character
OMNIGLOT_SIDE = 105  # of the drawings, in pixels
OMNIGLOT_BYTES = 100_000_000  # of an archive once unpacked: a dozen times what the larger one holds
# The published split of 1200 and 423 characters is by chance, as is ours; 172 of the 1200 validate
# (Snell et al. 2017).
OMNIGLOT_SPLITS = {"train": slice(0, 1028), "val": slice(1028, 1200), "test": slice(1200, 1623)}
OMNIGLOT_SEED = 0


def open_splits(
    name: str, root: str | os.PathLike, novel: str | os.PathLike | None = None, **options: Any
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """What trains, what validates and what tests: `open_dataset` of every split, with its options
    and errors.
    """
    train_set, val_set, test_set = (
        open_dataset(name, root, split, novel=novel, **options) for split in get_args(Split)
    )
    return train_set, val_set, test_set


def open_domain(
    name: str, root: str | os.PathLike, like: ImageSet, *, cache: bool = False
) -> ImageSet:
    """What another data set tests on, for a model that learnt on `like`: of the same size and
    normalisation.

    That is its test split or, of a folder of class folders that is not divided, all classes: none
    was learnt on. See `open_dataset` for the other arguments and errors.
    """
    place = _folder(name, Path(root))
    if place is None or any((place / part).is_dir() for part in get_args(Split)):
        return open_dataset(
            name, root, "test", size=like.size, normalisation=like.normalisation, cache=cache
        )
    opened = _open_class_folders("folder", "test", subfolders(place), like.size)
    opened.origin, opened.normalisation = str(place), like.normalisation
    return opened.cached(place / CACHE_FOLDER) if cache else opened


def open_dataset(
    name: str,
    root: str | os.PathLike,
    split: Split,
    *,
    novel: str | os.PathLike | None = None,
    size: int | None = None,
    normalisation: transforms.Normalisation | None = None,
    seed: int = 0,
    cache: bool = False,
) -> ImageSet:
    """The pictures of one split of a data set.

    Args:
        name: a `DatasetName`, or the path, also one in `root`, of a folder of class folders; that
            set's name is "folder".
        root: the data set's folder, or one that holds it under its usual name. Glyphs need none but
            for the cache.
        novel: file that divides the classes of a folder, see `own_classes.listed`.
        size: side in pixels of what networks see; by default 28 for Omniglot, 32 for glyphs and
            CIFAR, 84 for the rest.
        normalisation: by default ImageNet's, but from -1 to 1 for glyphs and Omniglot.
        seed: of the pictures of glyphs, and of the class split of a folder without train, val and
            test folders. The other data sets have one fixed split.
        cache: keep decoded pictures in a memory map in `root`/.fewshot_cache, as `ImageSet.cached`
            does.

    Raises InputError naming the folder or file that is missing, incomplete or unreadable.
    """
    if split not in get_args(Split):
        raise InputError(f"split {split!r}: must be one of {', '.join(get_args(Split))}")
    root = Path(root)
    place = _folder(name, root)
    if place is not None:
        name, root = "folder", place
    if novel is not None and name != "folder":
        raise InputError(
            f"{novel}: {name} has a published split; leave --novel out, or give --dataset a folder"
        )
    opened = _open(name, root, split, size, seed, novel and Path(novel))
    opened.normalisation = normalisation or opened.normalisation
    return opened.cached(root / CACHE_FOLDER) if cache else opened


def _folder(name: str, root: Path) -> Path | None:
    """The folder of class folders that `name` means; None if it is a data set's own name."""
    if name in get_args(DatasetName):
        return root if name == "folder" else None
    for place in (root / name, Path(name)):
        if place.is_dir():
            return place
    known = ", ".join(get_args(DatasetName))
    raise InputError(f"data set {name!r}: must be one of {known}, or a folder of class folders")


def _open(
    name: DatasetName, root: Path, split: Split, size: int | None, seed: int, novel: Path | None
) -> ImageSet:
    match name:
        case "glyphs":
            return _open_glyphs(split, size or 32, seed)
        case "omniglot":
            return _open_omniglot(root, split, size or 28)
        case "cifar_fs" | "fc100":
            return _open_cifar(name, root, split, size or 32)
        case "cub":
            return _open_cub(root, split, size or SIDE)
        case "mini_imagenet":
            return _open_mini_imagenet(root, split, size or SIDE)
        case "tiered_imagenet":
            return _open_tiered_imagenet(root, split, size or SIDE)
        case "folder":
            opened = _open_class_folders(
                "folder", split, class_folders(root, split, novel, seed), size or SIDE
            )
            opened.origin = f"{root} {split}" + (f" (as {novel} divides it)" if novel else "")
            return opened


class InMemory:
    """A source whose pictures are in memory anyway: it needs no cache."""

    def version(self) -> None:
        return None


@dataclass(frozen=True)
class _Files:
    """Pictures in files."""

    paths: list[str]

    def __call__(self, index: int) -> Image.Image:
        return pictures.read(self.paths[index])

    def version(self) -> object:
        return [_file_version(path) for path in self.paths]


@dataclass(frozen=True)
class _Buffers:
    """Encoded pictures in memory, which came from one file."""

    path: str
    buffers: list[np.ndarray]

    def __call__(self, index: int) -> Image.Image:
        return pictures.decode(self.buffers[index], f"{self.path}, picture {index}")

    def version(self) -> object:
        return _file_version(self.path)


def _file_version(path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    # of folders only what is in them counts
    return os.path.basename(path), status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class _Glyphs:
    """Glyphs of consecutive classes."""

    first: int
    seed: int
    size: int

    def __call__(self, index: int) -> Image.Image:
        number, picture = divmod(index, GLYPHS_PER_CLASS)
        return Image.fromarray(glyph(self.first + number, self.seed, picture, self.size))

    def version(self) -> object:
        # the program that draws may change: a picture of each of sixteen classes would show it
        some = [np.asarray(self(number * GLYPHS_PER_CLASS)) for number in range(16)]
        return self, zlib.crc32(np.stack(some).tobytes())


@dataclass(frozen=True)
class _Drawings(InMemory):
    """Omniglot's drawings (characters, drawings, S, S) uint8 with four classes per character, one
    per turn.
    """

    ink: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        number, drawing = divmod(index, OMNIGLOT_DRAWINGS)
        character, turns = divmod(number, 4)
        return Image.fromarray(np.rot90(self.ink[character, drawing], turns)).convert("RGB")


@dataclass(frozen=True)
class _Pixels(InMemory):
    """Pictures in memory: uint8 RGB (n, 3, H, W)."""

    pixels: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))


def _open_glyphs(split: Split, size: int, seed: int) -> ImageSet:
    numbers = GLYPH_CLASSES[split]
    labels = np.arange(len(numbers)).repeat(GLYPHS_PER_CLASS)
    names = [f"glyph{number:03d}" for number in numbers]
    source = _Glyphs(numbers[0], seed, size)
    return _drawn("glyphs", split, names, labels, source, size, size)


def _drawn(
    name: str,
    split: Split,
    classes: list[str],
    labels: np.ndarray,
    source: Source,
    size: int,
    stored: int,
) -> ImageSet:
    """An image set of characters, which are not augmented."""
    return ImageSet(
        name,
        split,
        classes,
        labels,
        source,
        size=size,
        stored=stored,
        normalisation=transforms.HALF,
        augment=False,
    )


def _open_photographs(
    name: str, split: Split, classes: list[str], labels: np.ndarray, source: Source, size: int
) -> ImageSet:
    """An image set of natural images of any size.

    The stored square's side is 3.05 times the network's (256 for 84), or the pictures' own longest
    side where that is less, as sixteen of them show. Random crops cover 8 to 100 % of the area: at
    3.05 all but the smallest 3 % of them have at least as many pixels as the network sees, and
    those are enlarged by a sixth. More would be averaged away.
    """
    some = np.unique(np.linspace(0, len(labels) - 1, 16).astype(int))
    longest = max(max(source(index).size) for index in some)
    stored = min(round(size * 256 / 84), longest)
    return ImageSet(name, split, classes, labels, source, size=size, stored=stored)


def _find(
    root: Path, name: DatasetName, subfolders: tuple[str, ...], wanted: tuple[str, ...]
) -> Path:
    """The data set's folder: `root` or one of its usual subfolders, whichever holds one of the
    wanted entries.
    """
    homes = [*(root / folder for folder in subfolders), root]
    for home in homes:
        if any((home / entry).exists() for entry in wanted):
            return home
    expected = " or ".join(str(home / wanted[0]) for home in homes)
    raise InputError(
        f"{root}: no {name} here; expected {expected}; scripts/prepare_data.py {name} gets it, or says where it is"
    )


def _open_omniglot(root: Path, split: Split, size: int) -> ImageSet:
    archives = tuple(f"{part}.zip" for part in OMNIGLOT_PARTS)
    home = _find(root, "omniglot", ("omniglot-py", "omniglot"), OMNIGLOT_PARTS + archives)
    # ALPHABET/characterNN -> its drawings
    characters: dict[str, list[tuple[str, bytes, Path]]] = {}
    for part in OMNIGLOT_PARTS:
        place = home / part if (home / part).is_dir() else home / f"{part}.zip"
        for file, encoded in _omniglot_drawings(home, part):
            characters.setdefault(file.rpartition("/")[0], []).append((file, encoded, place))
    counts = [len(drawings) for drawings in characters.values()]
    if len(counts) != OMNIGLOT_CHARACTERS or set(counts) != {OMNIGLOT_DRAWINGS}:
        raise InputError(
            f"{home}: holds {sum(counts)} drawings of {len(counts)} characters, all of Omniglot is {OMNIGLOT_DRAWINGS} "
            f"of each of {OMNIGLOT_CHARACTERS}; get {' and '.join(archives)} again"
        )

    shuffled = np.random.default_rng(OMNIGLOT_SEED).permutation(sorted(characters)).tolist()
    chosen = shuffled[OMNIGLOT_SPLITS[split]]
    stored = min(size, OMNIGLOT_SIDE)
    ink = np.stack(
        [
            [_ink(x, f"{place}: {file}", stored) for file, x, place in sorted(characters[name])]
            for name in chosen
        ]
    )
    classes = [f"{name}/rot{90 * turns:03d}" for name in chosen for turns in range(4)]
    labels = np.arange(len(classes)).repeat(OMNIGLOT_DRAWINGS)
    return _drawn("omniglot", split, classes, labels, _Drawings(ink), size, stored)


def _omniglot_drawings(home: Path, part: str) -> list[tuple[str, bytes]]:
    """(ALPHABET/characterNN/FILE, contents) of every drawing of one part, unpacked or zipped."""
    folder, archive = home / part, home / f"{part}.zip"
    if folder.is_dir():
        return [
            (path.relative_to(folder).as_posix(), path.read_bytes())
            for path in folder.glob("*/*/*.png")
        ]
    try:
        with zipfile.ZipFile(archive) as opened:
            if (size := sum(entry.file_size for entry in opened.infolist())) > OMNIGLOT_BYTES:
                raise ValueError(f"its files are {size} bytes once unpacked")
            files = [name for name in opened.namelist() if name.endswith(".png")]
            return [(name.removeprefix(f"{part}/"), opened.read(name)) for name in files]
    except Exception as error:  # what unpacks a broken archive stumbles over many things
        raise InputError(
            f"{archive}: not readable ({error!s:.300}); put it there again, or unpack it to {folder}"
        ) from error


def _ink(encoded: bytes, name: str, size: int) -> np.ndarray:
    """A drawing as uint8 (size, size), 255 where there is ink: the files are black on white."""
    paper = pictures.decode(encoded, name, mode="L").resize((size, size), Image.Resampling.BILINEAR)
    return 255 - np.asarray(paper)


def _open_cifar(
    name: Literal["cifar_fs", "fc100"], root: Path, split: Split, size: int
) -> ImageSet:
    """A part of CIFAR-100's classes with all their pictures, those for training and those for
    testing.
    """
    home = _find(root, name, ("cifar100",), ("cifar-100-python",)) / "cifar-100-python"
    parts = [read_pickle(home / part, _cifar_part) for part in ("train", "test")]
    pixels, fine, coarse = map(np.concatenate, zip(*parts))
    names = read_pickle(
        home / "meta", lambda found: _different_texts(found["fine_label_names"], 100)
    )
    if name == "fc100":
        chosen = np.unique(fine[np.isin(coarse, FC100[split])])
    else:
        split_of = {
            listed: part for part, classes in CIFAR_FS.items() for listed in classes.split()
        }
        chosen = np.array(
            [i for i, listed in enumerate(names) if split_of.get(listed, "train") == split]
        )
    ours = np.isin(fine, chosen)
    if missing := sorted(set(chosen.tolist()) - set(fine.tolist())):
        raise InputError(
            f"{home / 'train'}: no picture of {names[missing[0]]!r:.60}, of meta; get the published archive again"
        )
    labels = np.searchsorted(chosen, fine[ours])
    source = _Pixels(pixels[ours])
    return _open_photographs(name, split, [names[i] for i in chosen], labels, source, size)


def _cifar_part(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels uint8 (n, 3, 32, 32), fine and coarse labels (n,)."""
    pixels = _bytes_array(found["data"]).reshape(-1, 3, 32, 32)
    fine = _whole_numbers(found["fine_labels"], 100, len(pixels))
    return pixels, fine, _whole_numbers(found["coarse_labels"], 20, len(pixels))


def _bytes_array(array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        raise ValueError("its pictures are no arrays of bytes")
    return array


def _whole_numbers(numbers: Any, below: int, many: int | None = None) -> np.ndarray:
    """Labels from 0 to `below` - 1, as many as asked for."""
    array = np.asarray(numbers)
    shape = (len(array) if many is None else many,)
    if array.dtype.kind not in "iu" or array.shape != shape:
        raise ValueError(f"its labels are not {many or 'some'} whole numbers")
    if not ((array >= 0) & (array < below)).all():
        raise ValueError(f"one of its labels is not from 0 to {below - 1}")
    return array


def _different_texts(names: Any, many: int | None = None) -> list[str]:
    sound = isinstance(names, list) and all(map(is_text, names))
    if not sound or len(set(names)) != (many or len(names)):
        raise ValueError(f"its class names are not {many or 'some'} different texts")
    return names


def _open_cub(root: Path, split: Split, size: int) -> ImageSet:
    images = _find(root, "cub", ("CUB_200_2011",), ("images",)) / "images"
    folders = {
        int(path.name[:3]): path for path in subfolders(images) if re.match(r"\d{3}\.", path.name)
    }
    for number in range(1, 201):
        if number not in folders:
            raise InputError(
                f"{images}: the folder of class {number:03d} is missing; unpack CUB_200_2011.tgz again"
            )
    first, step = {"train": (1, 2), "val": (2, 4), "test": (4, 4)}[split]
    return _open_class_folders(
        "cub", split, [folders[number] for number in range(first, 201, step)], size
    )


def _open_class_folders(name: str, split: Split, folders: list[Path], size: int) -> ImageSet:
    """One class per folder, in this order; sub-folders of a class are ignored."""
    files = [_pictures(folder) for folder in folders]
    labels = np.arange(len(folders)).repeat([len(f) for f in files])
    source = _Files([path for paths in files for path in paths])
    return _open_photographs(name, split, [folder.name for folder in folders], labels, source, size)


def _pictures(folder: Path) -> list[str]:
    """The picture files in a folder, sorted by name; macOS archives scatter hidden ones that are no
    pictures.
    """
    with os.scandir(folder) as entries:
        names = [
            entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()
        ]
    found = sorted(name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder}: no picture in this class; add some or remove the folder")
    return [str(folder / name) for name in found]


def _open_mini_imagenet(root: Path, split: Split, size: int) -> ImageSet:
    home = _find(root, "mini_imagenet", ("mini_imagenet",), ("images",))
    table = home / f"{split}.csv"
    if not table.is_file():
        raise InputError(f"{table}: missing; Ravi and Larochelle's split belongs there")
    try:
        header, *rows = [row for row in csv.reader(read_text(table).splitlines()) if row] or [[]]
    except csv.Error as error:
        raise InputError(f"{table}: not a table ({error}); get the published one") from error
    if header != ["filename", "label"] or any(len(row) != 2 for row in rows):
        raise InputError(f"{table}: its first line must be filename,label, and all lines alike")
    names: dict[str, list[str]] = {}  # wnid -> what the split calls its pictures
    for file, wnid in rows:
        names.setdefault(inside(wnid, table), []).append(inside(file, table))
    classes = _in_order(names, MINI_ORDER[split], table)
    try:
        paths = {
            w: dict(zip(files, _mini_imagenet_files(home / "images", w, files)))
            for w, files in names.items()
        }
    except InputError as error:
        raise InputError(f"{error} (listed in {table})") from None
    label = {wnid: i for i, wnid in enumerate(classes)}
    labels = np.array([label[wnid] for _, wnid in rows])
    source = _Files([str(paths[wnid][file]) for file, wnid in rows])
    return _open_photographs("mini_imagenet", split, classes, labels, source, size)


def _mini_imagenet_files(images: Path, wnid: str, names: list[str]) -> list[Path]:
    """The files of one class's pictures, which the split calls `names`, in one of three layouts.

    Files called as in the split, in a folder per class or all in `images`; or ILSVRC12's whole
    folder of the class: the last five digits of a name then count, from 1, its files by the number
    after the underscore.
    """
    folder = images / wnid
    if not folder.is_dir():
        files = [images / name for name in names]
        if not files[0].is_file():
            raise InputError(f"{folder}: missing; expected the pictures of this class there")
    elif (folder / names[0]).is_file():
        files = [folder / name for name in names]
    else:
        ranked = [
            path for path in folder.iterdir() if re.fullmatch(rf"{re.escape(wnid)}_\d+", path.stem)
        ]
        ranked.sort(key=lambda path: int(path.stem.rpartition("_")[2]))
        by_rank = {f"{rank:05d}": path for rank, path in enumerate(ranked, 1)}
        for name in names:
            if (rank := Path(name).stem[-5:]) not in by_rank:
                raise InputError(
                    f"{folder}: expected {names[0]} there, or ILSVRC12's whole folder of this class: the split needs "
                    f"picture {rank.lstrip('0') or rank} of it, and {len(ranked)} are there"
                )
        return [by_rank[Path(name).stem[-5:]] for name in names]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file}: missing, though others of this class are there; unpack the data set again"
            )
    return files


def _open_tiered_imagenet(root: Path, split: Split, size: int) -> ImageSet:
    home = _find(root, "tiered_imagenet", ("tiered_imagenet",), (f"{split}_labels.pkl",))
    table = home / f"{split}_labels.pkl"
    names, specific = read_pickle(table, _tiered_labels)
    classes = _in_order(names, TIERED_ORDER[split], table)
    label = {name: i for i, name in enumerate(classes)}
    labels = np.array([label[name] for name in names])[specific]
    if empty := set(range(len(classes))) - set(labels.tolist()):
        raise InputError(
            f"tiered_imagenet {split}: class {classes[min(empty)]} has no picture; get {table} again"
        )

    unpacked, pickled = home / split, home / f"{split}_images_png.pkl"
    if unpacked.is_dir():
        files, there = (
            [f"{split}_image_{i}.byte" for i in range(len(labels))],
            set(os.listdir(unpacked)),
        )
        for file in files:
            if file not in there:
                raise InputError(
                    f"{unpacked / file}: missing; unpack {pickled.name} again, or remove {unpacked}"
                )
        source = _Files([str(unpacked / file) for file in files])
    else:
        buffers = read_pickle(pickled, lambda found: [_bytes_array(buffer) for buffer in found])
        source = _Buffers(str(pickled), buffers)
        if len(source.buffers) != len(labels):
            raise InputError(
                f"{pickled}: {len(source.buffers)} pictures for the {len(labels)} labels of {table.name}"
            )
    return _open_photographs("tiered_imagenet", split, classes, labels, source, size)


def _tiered_labels(found: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    names = _different_texts(found["label_specific_str"])
    return names, _whole_numbers(found["label_specific"], len(names))


def _in_order(names: Collection[str], order: str, table: Path) -> list[str]:
    """Class names in label order: `order` says which of the sorted names comes next."""
    ranks = [int(rank) for rank in order.split()]
    if len(names) != len(ranks):
        raise InputError(
            f"{table}: {len(names)} classes, this split has {len(ranks)}; get the published one"
        )
    ranked = sorted(names)
    return [ranked[rank] for rank in ranks]


class _Array(np.ndarray):
    """An array whose pickle says what it holds, but not what numpy should take that for in memory."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, *rest = state
        super().__setstate__((version, shape, np.dtype(dtype.str), *rest))


def _array(*_: Any) -> _Array:
    return _Array(0, np.uint8)  # its state, shape and all, follows in the pickle


def _scalar(dtype: np.dtype, raw: bytes | str) -> np.generic:
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.str)[0]


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode({"latin1": "latin1"}[encoding])  # how Python 3 writes bytes for Python 2


# All that the published pickles call. numpy's own functions would make objects of any bytes, and so
# crash.
HARMLESS = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{("numpy", "ndarray"): None, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _bytes},
}


class _Unpickler(pickle.Unpickler):
    """Calls nothing but `HARMLESS`: a pickle may name any function and have it called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return HARMLESS[module, name]


def read_pickle(path: Path, take: Callable[[Any], T]) -> T:
    """What `take` takes from a pickle's content. Raises InputError naming the file if it cannot."""
    try:
        with path.open("rb") as file:
            # Python 2 wrote the published ones
            return take(_Unpickler(file, encoding="latin1").load())
    except Exception as error:  # a broken pickle calls anything with anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it has no {reason}"
        raise InputError(
            f"{path}: not readable ({reason:.300}); get the published archive again"
        ) from error
