"""Models on the Hugging Face hub: one file, and a card that says what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from fewshot import InputError, weights

FILE = "model.safetensors"
CARD = """---
{{ card_data }}
---

# {{ title }}

{{ sentence }}

| | |
|---|---|
{{ rows }}

```python
import fewshot

model = fewshot.load("{{ repo_id }}")
{{ usage }}
```
"""
USAGE = {
    "image-classification": "model.support(images, labels)  # a few of every class\nprint(model.predict(others))",
    "object-detection": "print(model.predict(images))",
}


class HubModel(ModelHubMixin):
    """A model that is one self-describing file: `save_pretrained` and `push_to_hub`.

    Args:
        state: tensors by name. about: what the file says of itself.
    """

    def __init__(self, state: dict[str, Tensor], about: dict[str, Any]):
        self.state, self.about, self.method = state, about, about["method"]

    def _save_pretrained(self, save_directory: Path) -> None:
        weights.save_state(Path(save_directory) / FILE, self.state, self.about)
        # what the hub looks for to count downloads
        (Path(save_directory) / "config.json").write_text(json.dumps({"method": self.method}) + "\n")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with its card; see huggingface_hub's `ModelHubMixin.push_to_hub` for the options."""
        options["model_card_kwargs"] = {"repo_id": repo_id} | (options.get("model_card_kwargs") or {})
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, repo_id: str = "USER/MODEL", **ignored: Any) -> ModelCard:
        """What the model is, what it was trained on, and what it reached, from the file's own description."""
        about, args = self.about, self.about.get("args", {})
        task = "object-detection" if "architecture" in about else "image-classification"
        dataset = about.get("dataset") or args.get("dataset") or "unknown"
        data = ModelCardData(library_name="fewshot", pipeline_tag=task, tags=["few-shot", self.method])
        rows = {"method": self.method, "data": dataset, "backbone": args.get("backbone") or about.get("architecture")}
        if "stage" in about:
            rows |= {"stage": about["stage"], "split": args.get("split"), "novel classes": ", ".join(about["novel"])}
            rows |= {"shots": args.get("shots") if about["stage"] != "base" else None}
        rows |= {"classes": ", ".join(about["classes"]) if about.get("classes") else None}
        rows |= _results(about.get("results", {})) | {"commit": about.get("commit")}
        return ModelCard.from_template(
            data,
            template_str=CARD,
            title=_markdown(f"{self.method} on {dataset}"),
            sentence="A few-shot model: it learns classes from a few examples of each.",
            rows="\n".join(f"| {_markdown(k)} | {_markdown(v)} |" for k, v in rows.items() if v not in (None, "")),
            repo_id=repo_id,
            usage=USAGE[task],
        )


def _markdown(text: Any) -> str:
    """Text that means nothing to markdown or HTML, on one line: names are the user's. Within words _ is only itself."""
    return re.sub(r"[\\`*<>&|~$#\[\]{}]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(str(text).split()))


def _results(results: dict[str, Any]) -> dict[str, str]:
    """Lines of a card: accuracies with their intervals, or the average precisions by class group."""
    lines = {}
    for shots, result in results.get("shots", {}).items():
        what = f"{results['ways']}-way {shots}-shot, {results['tasks']} tasks"
        lines[what] = f"{result['accuracy']:.2f} ± {result['ci95']:.2f} %"
    for name, groups in results.items():
        if name.startswith(("AP", "mAP")):
            lines[name] = ", ".join(f"{group} {value:.1f}" for group, value in groups.items())
    return lines


def find(source: str | Path) -> Path:
    """The model file that `source` means: a file, a folder that holds one, or a hub id, which is downloaded.

    An id is two words and a slash. What looks like a path is never asked of the hub: what ends in .safetensors, begins
    with a dot, a slash, ~ or runs/, or would lie in a folder that is there.

    Raises:
        InputError: there is none; of an id that cannot be had it says why.
    """
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise InputError(f"{path} holds no {FILE}: {_instead(path)}")
        return path / FILE
    if path.exists():
        return path
    local = text.startswith((".", "/", "~", "runs/")) or path.suffix == ".safetensors" or path.parent.exists()
    if local or text.count("/") != 1:
        raise InputError(
            f"{path}: no such model file or folder; give a run's folder, its {FILE}, or a hub id, user/model"
        )
    return download(text)


def _instead(folder: Path) -> str:
    """What to load where a folder has no model."""
    if inner := sorted(p.parent.name for p in folder.glob(f"*/{FILE}") if not p.parent.name.startswith("last")):
        return f"give one of {', '.join(inner)} in it"
    if (folder / "args.json").exists():
        return "its run has saved no model yet, go on with it (--resume)"
    return "give a run's folder, or the file itself"


def download(repo_id: str, **options: Any) -> Path:
    """The model file under this id, from the hub or its local cache; `options` of huggingface_hub's `hf_hub_download`.

    Raises:
        InputError: it cannot be had; the message says why.
    """
    try:
        return Path(hf_hub_download(repo_id, FILE, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{repo_id}: no such local file, and not to be had from the hub ({reason}); "
            "a path to a model.safetensors or a run's folder works without network"
        ) from None
