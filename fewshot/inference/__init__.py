"""Trained models in use: one file in, a few supports of each class, then any pictures.

    model = fewshot.load("runs/proto_net/glyphs")
    model.support(images, labels)
    for guess in model.predict(others): print(guess.name, guess.probability)

`load` gives a `Classifier` or a `Detector`. Pictures are paths, PIL images, arrays (H, W, 3) or
tensors (3, H, W) of bytes in RGB; one alone, or a list of them. They are resized as in the method's
tests, or with `size="keep"` not at all.

Several threads may share a model: what one learns or predicts, the others wait for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewshot import InputError, methods, weights
from fewshot.detectors.build import folded
from fewshot.inference.classifier import NONE, Classifier, Guess
from fewshot.inference.detector import Detector, Found
from fewshot.inference.model import decoded

__all__ = ["NONE", "Classifier", "Detector", "Found", "Guess", "decoded", "load"]


def load(
    source: str | Path, device: str | torch.device = "cpu", *, model: nn.Module | None = None
) -> Classifier | Detector:
    """The model in a file or a run's folder, or on the Hugging Face hub under this id, ready to be
    used.

    Args:
        model: of a recipe of your own, built as there and with any weights, which those of the file
            replace. It has `features` and `classify`, or `predict`, as `meta_test` asks for (a
            classifier), or `detect(images, sizes)` (a detector). By default one of
            `fewshot.methods`, by the name in the file.

    Raises:
        InputError: there is no such file or model, it is not of this project, is of a newer format,
            or the hub cannot be reached; or the weights do not fit `model`, or it is no model of
            the file's task.
    """
    path = weights.find(source)
    state, about = weights.load(path)
    if model is None:
        model = methods.built(about)
        methods.fill(model, state, path)
        # only our own: what somebody else's network does with its norms is not known
        model = folded(model)
    else:
        _check_task(model, about, path)
        weights.fill(model, state, path)
    return (Detector if hasattr(model, "detect") else Classifier)(model, state, about, device)


def _check_task(model: nn.Module, about: dict[str, Any], path: Path) -> None:
    name, detects = type(model).__name__, hasattr(model, "detect")
    if not (
        detects
        or hasattr(model, "predict")
        or (hasattr(model, "features") and hasattr(model, "classify"))
    ):
        raise InputError(
            f"{name} has neither features and classify, nor predict, nor detect: give a recipe's model"
        )
    if detects != ("architecture" in about):
        theirs, ours = ("classifier", "detector") if detects else ("detector", "classifier")
        raise InputError(
            f"{path} is a {theirs}, and {name} is a {ours}: give the model that the file was saved from"
        )
