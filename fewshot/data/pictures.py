"""Picture files to pixels: the one decoder of everything that reads pictures.

A damaged file is an `InputError` that names it, whatever is damaged. PIL decodes: torchvision's
decoder of PNG ends the process on one flipped bit.
"""

import io
import os

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewshot import InputError

# suffixes of files
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
# What such files hold. PIL would try more, whatever the suffix, and hands one of these (EPS) to
# another program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
# of a picture; above this PIL warns, and one picture as RGB is more than 256 MiB
MAX_PIXELS = 89_000_000


def read(path: str | os.PathLike) -> Image.Image:
    """A picture file as RGB; `decode` has the errors."""
    return decode(path, str(path))


def tensor(path: str | os.PathLike) -> Tensor:
    """A picture file as uint8 RGB (3, H, W); `decode` has the errors."""
    return torch.from_numpy(np.array(np.asarray(read(path)).transpose(2, 0, 1), order="C"))


def decode(
    file: str | os.PathLike | bytes | np.ndarray, name: str, mode: str = "RGB"
) -> Image.Image:
    """A picture in a file, or in the bytes of one, in RGB or another `mode`: the first of several.

    It is upright if its EXIF says how. Alpha is dropped. Of 16-bit grey 65535 becomes white; floats
    go from 0 to 1 if none is above 1, else like 16-bit grey.

    Raises:
        InputError: calling the picture `name`, if it is no picture, is damaged or has more than
            `MAX_PIXELS`.
    """
    try:
        source = file if isinstance(file, (str, os.PathLike)) else io.BytesIO(file)
        with Image.open(source, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:  # before memory for them is taken
                raise ValueError(
                    f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}"
                )
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
        # one of a palette's colours would make `convert` warn
        picture.info.pop("transparency", None)
        if picture.mode.startswith(("I", "F")):
            picture = _eight_bits(picture)
        return picture if picture.mode == mode else picture.convert(mode)
    except Exception as error:
        # Damage makes PIL stumble anywhere: over struct.error, IndexError, TypeError, zlib.error,
        # MemoryError ... Its own words on an unknown format are the file's name once more.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = (
            "unknown format" if unknown else " ".join(str(error).split()) or type(error).__name__
        )
        raise InputError(
            f"{name}: not readable as a picture ({reason}); replace or remove it"
        ) from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Integers or floats as bytes: PIL's own `convert` would clip them."""
    grey = np.asarray(picture, np.float64)
    if not (grey.min() >= 0 and grey.max() <= 65535):  # nor is NaN
        raise ValueError("its grey values are not from 0 to 65535; save it with 8 or 16 bits")
    white = 1 if picture.mode == "F" and grey.max() <= 1 else 65535
    return Image.fromarray((grey * (255 / white)).round().astype(np.uint8))
