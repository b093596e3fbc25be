"""Other projects' names of tensors, for those who come with a checkpoint."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fewshot import InputError, weights


def write(
    state: dict[str, Tensor], about: dict[str, Any], source: Path, out: Path | None = None
) -> None:
    """Write what was converted, by default beside its source, and say what it is.

    Raises:
        InputError: it would replace its source.
    """
    out = out or source.with_suffix(".safetensors")
    if out == source:
        raise InputError(f"{out} would replace what it is made of: give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    about = about | {"source": source.name, "commit": weights.commit()}
    weights.save_state(out, state, about)

    print(f"{source.name}: {about['method']}, {about['args']['backbone']}, {len(state)} tensors")
    classes = about["classes"]
    if classes:
        print(f"{len(classes)} classes: {', '.join(classes)}")
    print(f"written to {out}")
