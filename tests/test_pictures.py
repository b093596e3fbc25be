"""One decoder for all pictures: every mode comes out in RGB, and no damage goes unnamed or ends the
process.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot import InputError
from fewshot.data import pictures


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    """What the decoder makes of a picture: uint8 (H, W, 3). A warning fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = pictures.decode(encoded(image, kind, **options), "it")
    assert read.mode == "RGB"
    return np.asarray(read)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_files_bytes_and_tensors_agree(tmp_path, noise, kind):
    path, options = tmp_path / "a.file", {"lossless": True} if kind == "WEBP" else {}
    path.write_bytes(encoded(noise, kind, **options))
    assert np.array_equal(pictures.read(path), noise)
    assert np.array_equal(pictures.decode(np.fromfile(path, np.uint8)[:, None], "it"), noise)
    tensor = pictures.tensor(path)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous() and tensor.shape == (3, 9, 13)
    assert np.array_equal(tensor.permute(1, 2, 0), noise)
    tensor.zero_()  # memory of its own


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_all_modes_become_rgb(noise, mode):
    kind = "TIFF" if mode in ("PA", "CMYK", "YCbCr") else "PNG"
    image = noise.convert("P").convert(mode) if mode == "PA" else noise.convert(mode)
    assert np.array_equal(pixels(image, kind), image.convert("RGB"))
    assert pictures.decode(encoded(image, kind), "it", mode="L").mode == "L"


def test_alpha_is_dropped(noise):
    seen = noise.copy()
    seen.putalpha(Image.linear_gradient("L").resize(noise.size))
    assert np.array_equal(pixels(seen), noise)
    palette = noise.quantize(8)
    for transparency in (3, bytes([0, 128, 255])):  # one colour, or an alpha for each
        assert np.array_equal(pixels(palette, transparency=transparency), palette.convert("RGB"))
    assert np.array_equal(pixels(noise, transparency=noise.getpixel((0, 0))), noise)


GREYS = np.array([[0, 256, 32768, 65535]])


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", "<i4"), ("TIFF", "<f4")]
)
def test_grey_of_16_bits_is_scaled(kind, dtype):
    assert pixels(Image.fromarray(GREYS.astype(dtype)), kind)[0].tolist() == [
        [v] * 3 for v in (0, 1, 128, 255)
    ]


def test_grey_from_other_places():
    big = encoded(Image.frombytes("I;16B", (4, 1), GREYS.astype(">u2").tobytes()), "TIFF")
    assert np.asarray(pictures.decode(big, "it"))[0, :, 0].tolist() == [0, 1, 128, 255]
    pgm = b"P5 4 1 65535\n" + GREYS.astype(">u2").tobytes()
    assert np.asarray(pictures.decode(pgm, "it"))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF")[
        0, :, 0
    ].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [-1, 65536, np.nan, np.inf])
def test_greys_that_are_not_of_16_bits_are_refused(value):
    with pytest.raises(InputError, match=r"it: .* grey values are not from 0 to 65535"):
        pixels(Image.fromarray(np.array([[7, value]], np.float32)), "TIFF")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.png").write_bytes(encoded(image, exif=exif))
    stored = np.asarray(image)
    upright = {
        **{1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]},
        **{5: stored.T, 6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored)},
    }
    assert np.array_equal(pictures.tensor(tmp_path / "a.png")[0], upright[orientation])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    assert (
        np.abs(
            pixels(frames[0], kind, save_all=True, append_images=frames[1:])[2, 2] - [255.0, 0, 0]
        ).max()
        < 3
    )


def png(width: int, height: int) -> bytes:
    """A PNG of one bit per pixel whose header says so, and next to no content."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


# PIL itself warns from 90 and refuses from 179 million pixels
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (9434, 9434, "9434 x 9434 pixels are more than 89000000"),
        (12000, 12000, "12000 x 12000 pixels"),
        (2**31 - 1, 2**31 - 1, "pixels"),
        (0, 5, "unknown format"),
        (5, 0, "unknown format"),
    ],
)
def test_size_is_judged_by_the_header(monkeypatch, width, height, words):
    def never(*_):
        raise AssertionError("took memory for it")

    monkeypatch.setattr(Image.core, "new", never)
    with pytest.raises(InputError) as caught:
        pictures.decode(png(width, height), "it")
    assert str(caught.value).startswith("it: not readable as a picture (") and words in str(
        caught.value
    )


@pytest.mark.parametrize(
    "content", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None]
)
def test_what_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    for read in (pictures.read, pictures.tensor):
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value).startswith(
            f"{path}: not readable as a picture"
        ) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not readable as a picture"):
        pictures.read(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
@pytest.mark.filterwarnings("ignore")  # PIL's, of damaged EXIF
def test_any_flipped_or_missing_byte_gives_a_picture_or_a_named_error(tmp_path: Path, kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a scene"
    whole = encoded(
        Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)), kind, exif=exif
    )
    rng = np.random.default_rng(0)
    places = (
        range(len(whole))
        if len(whole) < 400
        else sorted(rng.choice(len(whole), 400, replace=False).tolist())
    )
    failures = 0
    for place in places:
        flips = [
            whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
            for mask in (1, 128, 255)
        ]
        for damaged in (*flips, whole[:place]):
            try:
                assert pictures.decode(damaged, "it").mode == "RGB"
            except InputError as error:
                failures += 1
                assert str(error).startswith("it: ") and "\n" not in str(error)
    assert failures > len(places) / 4
