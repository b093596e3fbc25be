"""The reference's inputs and weights as pure functions of their names, and comparison with its
stored results.

The golden files hold results of mmfewshot 0.1.0, whose weights, images, boxes and features were all
drawn from a generator seeded by their name, so that no file has to hold them. The numbers, not the
code, come from there.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDENS = Path(__file__).parent / "goldens"

# detectors' weights of these names are scaled, so that random networks give neither saturated
# scores nor wild boxes
GAINS = (
    ("backbone.conv1.weight", 1 / 64),
    ("backbone.meta_conv.weight", 1 / 64),
    ("rpn_reg.weight", 0.2),
    ("rpn_cls.weight", 0.5),
    ("local_correlation_fc_cls.weight", 1 / 64),
)


def golden(name: str) -> dict[str, Any]:
    """The reference's results in goldens/`name`.json."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def stream(name: str) -> np.random.RandomState:
    """The generator that belongs to a name."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def weight(key: str, shape: Sequence[int], gains: Sequence[tuple[str, float]] = ()) -> np.ndarray:
    """The parameter or buffer that the reference calls `key`; give `GAINS` for detectors."""
    key, shape = (
        key.removeprefix("support_") if key.startswith("support_backbone.") else key,
        tuple(shape),
    )
    draw = stream(key)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith(("running_var", "weight_g")):
        values = draw.uniform(0.5, 1.5, shape)
    elif key.endswith("temperature"):
        values = np.full(shape, 10.0)
    elif len(shape) >= 2:
        gain = next((gain for part, gain in gains if part in key), 1.0)
        values = draw.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:])) * gain
    elif key.endswith("weight"):
        values = 1 + 0.1 * draw.standard_normal(shape)
    else:  # biases and running means
        values = 0.1 * draw.standard_normal(shape)
    return np.asarray(values, np.float32).reshape(shape)


def image(name: str, height: int, width: int) -> np.ndarray:
    """A smooth RGB picture (height, width, 3) uint8: noise on a grid of 16 pixels, bilinearly
    enlarged.
    """
    grid = stream(name).uniform(0, 255, (height // 16 + 2, width // 16 + 2, 3))
    row, y = np.divmod(np.arange(height) / 16, 1)
    column, x = np.divmod(np.arange(width) / 16, 1)
    row, column = row.astype(int), column.astype(int)
    y, x = y[:, None, None], x[None, :, None]
    top = grid[row][:, column] * (1 - y) * (1 - x) + grid[row][:, column + 1] * (1 - y) * x
    below = grid[row + 1][:, column] * y * (1 - x) + grid[row + 1][:, column + 1] * y * x
    return np.round(top + below).clip(0, 255).astype(np.uint8)


def array(name: str, shape: Sequence[int], kind: str = "normal") -> np.ndarray:
    """Features (`shape`) float32: standard normal, or uniform in [0, 1) if `kind` is "uniform"."""
    draw = stream(name)
    values = draw.standard_normal(shape) if kind == "normal" else draw.uniform(0, 1, shape)
    return np.asarray(values, np.float32).reshape(shape)


def boxes(
    name: str, n: int, height: int, width: int, lo: float = 16, hi: float = 0.7
) -> np.ndarray:
    """Boxes (n, 4) xyxy in a picture; their sides run from `lo` pixels to the share `hi` of the
    picture's.
    """
    u = stream(name).uniform(0, 1, (n, 4))
    sides = lo + u[:, 2:] * (hi * np.array([width, height]) - lo)
    corners = u[:, :2] * ([width, height] - sides)
    return np.round(np.concatenate([corners, corners + sides], 1), 2).astype(np.float32)


def jitter(
    name: str, base: np.ndarray, n: int, height: int, width: int, s: float = 0.12
) -> np.ndarray:
    """Boxes (n, 4) xyxy around those of `base` in turn: corners moved by up to the share `s` of the
    sides.
    """
    u = stream(name).uniform(-1, 1, (n, 4))
    around = np.asarray(base, np.float32).astype(np.float64)[np.arange(n) % len(base)]
    sides = around[:, 2:] - around[:, :2]
    moved = around + s * u * np.tile(sides, 2)
    return np.round(np.clip(moved, 0, [width, height, width, height]), 2).astype(np.float32)


def summary(values: Any, n: int = 24) -> dict[str, Any]:
    """Shape, mean, standard deviation and up to `n` evenly spread values of an array or tensor."""
    values = values.detach().cpu() if isinstance(values, Tensor) else values
    flat = np.asarray(values, np.float64).ravel()
    places = np.linspace(0, flat.size - 1, min(n, flat.size)).astype(np.int64)
    std = flat.std(ddof=1) if flat.size > 1 else 0.0
    return {
        "shape": list(np.shape(values)),
        "mean": flat.mean(),
        "std": std,
        "samples": flat[places],
    }


def rgb_input(*pictures: np.ndarray) -> Tensor:
    """Classification's input (n, 3, H, W): RGB pictures less ImageNet's mean, over its standard
    deviation.
    """
    pixels = (np.stack(pictures) - np.array([123.675, 116.28, 103.53])) / np.array(
        [58.395, 57.12, 57.375]
    )
    return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def bgr_input(mean_bgr: Sequence[float], *pictures: np.ndarray) -> Tensor:
    """Detection's input (n, 3, H, W): RGB pictures turned to BGR, less the mean, not divided."""
    pixels = np.stack(pictures)[..., ::-1].astype(np.float32) - np.array(mean_bgr, np.float32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def fill(
    module: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    rename: Callable[[str], str | None],
    prefix: str = "",
    gains: Sequence[tuple[str, float]] = (),
) -> None:
    """Give a module the reference's weights, strictly: no tensor may be left over on either side.

    Args:
        shapes: the golden file's `state`, the reference's names and shapes.
        rename: from the reference's name to the module's, or to None for tensors to leave out.
        prefix: what the file's names lack in front to be the reference's full names, by which
            weights are drawn.
    """
    state = {
        rename(key): torch.from_numpy(weight(prefix + key, shape, gains))
        for key, shape in shapes.items()
    }
    state.pop(None, None)
    module.load_state_dict(state)


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Assert that a tensor equals a stored number, nested list or summary.

    The tolerance is relative to the largest absolute value expected; for a summary's mean, to the
    standard deviation.
    """
    if isinstance(expected, Mapping):
        ours = summary(actual, len(expected["samples"]))
        assert ours["shape"] == expected["shape"], (
            f"shape {ours['shape']}, expected {expected['shape']}"
        )
        close(ours["samples"], expected["samples"], tolerance)
        close(ours["std"], expected["std"], tolerance)
        spread = expected["std"] or abs(expected["mean"])
        off = abs(ours["mean"] - expected["mean"])
        assert off <= tolerance * spread, f"mean {ours['mean']}, expected {expected['mean']}"
        return
    actual = np.asarray(actual.detach().cpu() if isinstance(actual, Tensor) else actual, np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"off by {error:.3g} where the largest value is {scale:.3g}"
