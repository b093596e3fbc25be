"""Pickles of other people's: numbers, text and arrays are read, and nothing that they name is called."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fewshot import InputError


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


# All that the published pickles call. numpy's own functions would make objects of any bytes, and so crash.
HARMLESS = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{("numpy", "ndarray"): None, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _bytes},
}


class _Unpickler(pickle._Unpickler):
    """Calls nothing but `HARMLESS`: a pickle may name any function and have it called.

    It is the one in Python: that in C takes 64 GiB for two bytes that number an object highly.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return HARMLESS[module, name]


def read(path: Path, check: Callable[[Any], str | None], *keys: str) -> Any:
    """The content of a pickle: a dictionary with these keys, if any are given, of which `check` finds no flaw."""
    try:
        with path.open("rb") as file:
            found = _Unpickler(file, encoding="latin1").load()  # Python 2 wrote the published ones
        if keys and not (isinstance(found, dict) and set(keys) <= set(found)):
            raise ValueError(f"not a dictionary with {', '.join(keys)}")
        if flaw := check(found):
            raise ValueError(flaw)
        return found
    except Exception as error:  # a broken pickle calls anything with anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not readable ({reason:.300}); get the published archive again") from error
