"""Few-shot classification and detection: a small library under one recipe per method."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: which thing is wrong, and what to do about it."""


from fewshot.inference import load  # noqa: E402  (what it imports needs InputError)

__all__ = ["InputError", "load"]
