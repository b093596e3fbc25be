"""Few-shot classification and detection: a small library under one recipe per method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fewshot.inference import Classifier, Detector


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: which thing is wrong, and what to
    do about it.
    """

    def __init__(self, message: str):
        # it quotes names and values out of files, of which none may break the line or whatever
        # prints it
        unprintable = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
        super().__init__(re.sub(unprintable, lambda found: repr(found[0])[1:-1], message))


def load(
    source: str | Path, device: str | torch.device = "cpu", *, model: torch.nn.Module | None = None
) -> Classifier | Detector:
    """The model in a file or a run's folder, or on the Hugging Face hub under this id, ready to be
    used.

    `model` is that of a recipe of your own, to be filled with the file's weights: see
    `fewshot.inference.load`.
    """
    from fewshot import inference  # here, so that a recipe that only trains does not wait for it

    return inference.load(source, device, model=model)


__all__ = ["InputError", "load"]
