"""What classifiers and detectors in use have in common, and the pictures that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

from fewshot import InputError, weights
from fewshot.data import pictures as files
from fewshot.data.transforms import Normalisation
from fewshot.inference.hub import HubModel

if TYPE_CHECKING:
    from fewshot.inference import Classifier, Detector

Picture = str | Path | Image.Image | np.ndarray | Tensor
Size = Literal["keep"] | None  # None: as in the method's tests
NO_SUPPORTS = "no supports yet: call support with a few pictures of every class first"


def decoded(picture: Picture) -> Tensor:
    """A picture as uint8 RGB (3, H, W), on the CPU.

    Raises:
        InputError: naming the file that cannot be decoded, or what is wrong with the array.
    """
    if isinstance(picture, (str, Path)):
        return files.tensor(picture)
    if isinstance(picture, Image.Image):
        return T.pil_to_tensor(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(picture)
        picture = picture.permute(2, 0, 1) if picture.ndim == 3 else picture
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        what = f"{tuple(picture.shape)} of {str(picture.dtype).removeprefix('torch.')}"
        raise InputError(
            f"a picture is {what}: give bytes in RGB, as an array (H, W, 3) or a tensor (3, H, W)"
        )
    return picture.cpu().contiguous()


def listed(pictures: Picture | Sequence[Picture]) -> tuple[list[Tensor], bool]:
    """The pictures as tensors, and whether it was one alone."""
    alone = isinstance(pictures, (str, Path, Image.Image)) or getattr(pictures, "ndim", 0) == 3
    return [decoded(picture) for picture in ([pictures] if alone else pictures)], alone


def check_size(size: Size) -> None:
    if size not in (None, "keep"):
        raise InputError(
            f"size {size!r}: leave it out to resize as in the method's tests, or say keep"
        )


class Model(HubModel):
    """What classifiers and detectors have in common.

    Args:
        network: with its weights. state, about: what `weights.load` gave.

    Attributes:
        method: the recipe's name. about: all that the file says of itself. classes: that it looks
            for.
        network: the model itself, in eval mode. lock: held by the thread that uses or changes what
            supports taught.
    """

    def __init__(
        self,
        network: nn.Module,
        state: dict[str, Tensor],
        about: dict[str, Any],
        device: Any = "cpu",
    ):
        super().__init__(state, about)
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device)
        with weights.naming(about):
            self.normalisation = Normalisation.from_dict(about["normalisation"])
            self.normalisation(torch.zeros(3, 1, 1))  # stops at what are no numbers
        self.classes: list[str] = []
        self.lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        # which no copy shares
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, lock=RLock())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Classifier | Detector:
        from fewshot.inference import load  # here, for it needs this

        if Path(model_id).is_dir():
            return load(Path(model_id) / weights.FILE)
        known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        return load(weights.download(model_id, **{key: options[key] for key in known}))
