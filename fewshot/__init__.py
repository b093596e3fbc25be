"""Few-shot classification and detection: a small library under one recipe per method."""

from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: which thing is wrong, and what to do about it."""


def load(source: Any, device: Any = "cpu", **options: Any) -> Any:
    """The model in a file or a run's folder, or on the Hugging Face hub: see `fewshot.inference.load`."""
    from fewshot import inference  # here, so that a recipe that only trains does not wait for it

    return inference.load(source, device, **options)


__all__ = ["InputError", "load"]
