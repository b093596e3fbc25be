"""Decode once: the stored squares of an image set in one file, which all processes map into memory
and share.

The file is a plain .npy of one record (aspect, pixels (3, S, S)) per picture. Squares are what a
set hands out in any case, so a cache changes no number; their side S, chosen where the set is
opened, is large enough for random crops: all but the smallest 3 % of those have at least as many
pixels as the network sees.
"""

from __future__ import annotations

import glob
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from fewshot import InputError

# counts up when a picture comes to be stored in another way, so that no older file is taken for a
# new one
LAYOUT = 1
CHUNK = 512  # pictures decoded before they are written


def kind(side: int) -> np.dtype:
    """Of a picture's record, whose square has so many pixels a side."""
    return np.dtype([("aspect", "<f8"), ("pixels", "u1", (3, side, side))])


class Squares:
    """The squares in a file: `pixels` uint8 (n, 3, S, S) and `aspects` float64 (n,), read when they
    are looked at.

    Raises InputError naming a file that is damaged.
    """

    def __init__(self, path: Path):
        try:
            records = np.load(path, mmap_mode="r")
            self.pixels = np.asarray(records["pixels"])
            self.aspects = np.asarray(records["aspect"])
            if records.ndim != 1 or records.dtype != kind(self.pixels.shape[-1]):
                raise ValueError("it holds something else")
        # numpy reads the header as a line of Python, so that damage raises all sorts of errors
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{path}: not readable as a cache ({reason:.300}); delete it to have it made again"
            ) from error
        self.path = path

    def __reduce__(self) -> tuple:
        # a loading process opens the file instead of being sent its contents
        return Squares, (self.path,)


class Decoder(NamedTuple):
    """What is decoded: `read(i)` gives the square, uint8 (3, side, side), and the aspect of picture
    i of `number`.
    """

    name: str  # of the data set and its split
    number: int
    side: int
    read: Callable[[int], tuple[Tensor, float]]


def squares(decoder: Decoder, folder: Path, version: object) -> Squares:
    """The squares of a data set, decoded into a file of `folder` unless they are there.

    `version` is something whose repr changes when the pictures do. Files of the same set, split and
    S with another version are stale and removed; whoever has one open keeps it. Of several
    processes that find no file one makes it, and the others wait (`alone`).

    Raises InputError when the folder cannot be written to, and for a picture that cannot be read.
    """
    digest = hashlib.sha256(repr((LAYOUT, decoder.number, version)).encode()).hexdigest()[:12]
    prefix = f"{decoder.name}-{decoder.side}"
    path = folder / f"{prefix}-{digest}.npy"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with alone(path):
                if not path.exists():
                    _write(path, decoder)
                for stale in set(folder.glob(f"{prefix}-*.npy")) - {path}:
                    stale.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"{folder}: cannot keep decoded pictures here ({error}); make it writable, or make room, or give a "
                "folder of your own that has a link to the data in it, or do without the cache"
            ) from error
    found = Squares(path)
    if found.pixels.shape != (decoder.number, 3, decoder.side, decoder.side):
        raise InputError(
            f"{path}: not readable as a cache of this set; delete it to have it made again"
        )
    return found


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """A turn to make a file, if it is not there by then: other processes that want it wait until
    the block ends.

    Raises OSError when its folder cannot be written to.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"{path} is being made by another process: waiting for it")
        lock.acquire()
    try:
        # Whoever makes this file has the lock: what is begun is of processes that were killed.
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)

        yield
    finally:
        # whoever waits for a lock that is no longer there gets it all the same, and finds the file
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def unfinished(path: Path) -> Path:
    """A name of its own under which a file is written, which is then renamed to `path`."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def _write(path: Path, decoder: Decoder) -> None:
    """Decode all pictures into a file of this process's own, which becomes `path` once it is whole."""
    n, side = decoder.number, decoder.side
    header = {
        "descr": np.lib.format.dtype_to_descr(kind(side)),
        "fortran_order": False,
        "shape": (n,),
    }

    def record(index: int) -> bytes:
        pixels, aspect = decoder.read(index)
        return np.array((aspect, pixels.numpy()), kind(side)).tobytes()

    own = unfinished(path)
    progress = tqdm(total=n, desc=f"decoding {decoder.name}", leave=False, dynamic_ncols=True)
    try:
        # Written, not mapped: on a full disk writing raises an error, storing through a memory map
        # kills the process.
        with progress, own.open("wb") as file, ThreadPoolExecutor() as pool:
            np.lib.format.write_array_header_1_0(file, header)
            for first in range(0, n, CHUNK):
                numbers = range(first, min(first + CHUNK, n))
                file.writelines(pool.map(record, numbers))
                progress.update(len(numbers))
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)
