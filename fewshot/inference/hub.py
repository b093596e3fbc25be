"""Models on the Hugging Face hub: one file, and a card that says what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from torch import Tensor

from fewshot import weights

CARD = """---
{{ card_data }}
---

# {{ title }}

A few-shot model: it learns classes from a few examples of each.

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
        weights.save_state(Path(save_directory) / weights.FILE, self.state, self.about)
        # what the hub looks for to count downloads
        (Path(save_directory) / "config.json").write_text(
            json.dumps({"method": self.method}) + "\n"
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with its card; see huggingface_hub's `ModelHubMixin.push_to_hub` for the
        options.
        """
        options["model_card_kwargs"] = {"repo_id": repo_id} | (
            options.get("model_card_kwargs") or {}
        )
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(self, repo_id: str = "USER/MODEL", **ignored: Any) -> ModelCard:
        """What the model is, what it was trained on, and what it reached, from the file's own
        description.
        """
        about, args = self.about, self.about.get("args", {})
        task = "object-detection" if "architecture" in about else "image-classification"
        dataset = about.get("dataset") or args.get("dataset") or "unknown"

        rows = {
            "method": self.method,
            "data": dataset,
            "backbone": args.get("backbone") or about.get("architecture"),
        }
        if "stage" in about:
            rows["stage"] = about["stage"]
            rows["split"] = args.get("split")
            rows["novel classes"] = ", ".join(about["novel"])
            rows["shots"] = args.get("shots") if about["stage"] != "base" else None
        rows["classes"] = ", ".join(about.get("classes", ()))
        with weights.naming(about):
            rows |= _results(about.get("results", {}))
        rows["commit"] = about.get("commit")
        lines = [
            f"| {_markdown(key)} | {_markdown(value)} |"
            for key, value in rows.items()
            if value not in (None, "")
        ]

        return ModelCard.from_template(
            ModelCardData(
                library_name="fewshot", pipeline_tag=task, tags=["few-shot", self.method]
            ),
            template_str=CARD,
            title=_markdown(f"{self.method} on {dataset}"),
            rows="\n".join(lines),
            repo_id=repo_id,
            usage=USAGE[task],
        )


def _markdown(text: Any) -> str:
    """Text that means nothing to markdown or HTML, on one line: names are the user's. Within words
    _ is only itself.
    """
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
