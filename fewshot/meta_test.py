"""Meta-test: thousands of tasks at once, mean accuracy and its 95 % interval."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from fewshot.data import episodes, transforms
from fewshot.data.classification import ImageSet

BATCH = 256  # images per forward pass; fixed, so that features do not depend on the number of processes
CHUNK_BYTES = 8 << 20  # features gathered at once: a chunk of tasks should stay in the processor's cache


class FewShotModel(Protocol):
    """What meta-test needs: features once per image, and a classifier batched over tasks."""

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, ...)."""

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Features (tasks, ways * shots, ...), class-major, and (tasks, m, ...) -> logits (tasks, m, ways)."""


@dataclass
class Result:
    """Accuracies in percent: the mean over tasks, its 95 % half-width, and every task's own (tasks,)."""

    accuracy: float
    ci95: float
    per_task: np.ndarray

    @classmethod
    def of(cls, per_task: np.ndarray) -> "Result":
        """Mean and 1.96 standard deviations of the mean (the population's, as the published intervals are)."""
        half_width = 1.96 * per_task.std() / np.sqrt(len(per_task))
        return cls(float(per_task.mean()), float(half_width), per_task)

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} ± {self.ci95:.2f} %"


def metrics(results: dict[int, Result], ways: int) -> dict:
    """What metrics.json holds of results by shots."""
    shots = {str(k): {"accuracy": round(r.accuracy, 4), "ci95": round(r.ci95, 4)} for k, r in results.items()}
    return {"ways": ways, "tasks": len(next(iter(results.values())).per_task), "shots": shots}


@torch.no_grad()
def extract(accelerator: Accelerator, model: FewShotModel, dataset: ImageSet, workers: int = 0) -> Tensor:
    """Features (images, ...) of a whole split in its order, float32, on every process. `model` is in eval mode.

    Processes share the batches; each fills its rows of a zero tensor and the sum over processes is the whole.
    """
    batches = np.split(np.arange(len(dataset)), range(BATCH, len(dataset), BATCH))
    own = batches[accelerator.process_index :: accelerator.num_processes]
    loader = episodes.image_loader(
        dataset,
        np.concatenate(own) if own else np.zeros(0, np.int64),
        device=accelerator.device,
        transform=transforms.test_transform(dataset),
        batch_size=BATCH,
        workers=workers,
    )
    features = None
    for images, indices in _progress(accelerator, loader, "features", len(own)):
        with accelerator.autocast():
            batch = model.features(images).float()
        if features is None:
            features = batch.new_zeros(len(dataset), *batch.shape[1:])
        features[indices] = batch
    shape = accelerator.gather(torch.tensor([features.dim() if features is not None else 0], device=accelerator.device))
    if shape.min() == 0:
        raise RuntimeError(f"{dataset.name}/{dataset.split}: fewer batches of {BATCH} images than processes")
    return accelerator.reduce(features, reduction="sum")


@torch.no_grad()
def meta_test(
    accelerator: Accelerator,
    model: FewShotModel,
    dataset: ImageSet,
    *,
    ways: int,
    shots: Sequence[int],
    queries: int,
    tasks: int,
    seed: int = 0,
    workers: int = 0,
) -> dict[int, Result]:
    """Accuracy of `model` on `tasks` tasks of `dataset`, for each number of shots, from one pass over the images.

    Task i is a pure function of (seed, i) and the numbers are the same for any number of processes. The model is put
    into eval mode for supports and queries alike, and back afterwards.
    """
    for k in shots:
        episodes.check(dataset, ways, k, queries)
    model = accelerator.unwrap_model(model)
    training = model.training
    model.eval()
    features = extract(accelerator, model, dataset, workers)
    results = {
        k: Result.of(_tasks(accelerator, model, features, dataset, ways, k, queries, tasks, seed)) for k in shots
    }
    model.train(training)
    return results


def _tasks(
    accelerator: Accelerator,
    model: FewShotModel,
    features: Tensor,
    dataset: ImageSet,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    seed: int,
) -> np.ndarray:
    """Accuracy in percent (tasks,) of every task; each process does every n-th chunk of tasks."""
    bytes_per_task = ways * (shots + queries) * features[0].numel() * 4
    chunk = max(1, CHUNK_BYTES // bytes_per_task)
    labels = torch.arange(ways, device=features.device).repeat_interleave(queries)
    correct = torch.zeros(tasks, device=features.device)
    starts = range(0, tasks, chunk)[accelerator.process_index :: accelerator.num_processes]
    for first in _progress(accelerator, starts, f"{ways}-way {shots}-shot", len(starts)):
        wanted = range(first, min(first + chunk, tasks))
        drawn = [episodes.draw(dataset, ways, shots, queries, seed, i) for i in wanted]
        support, query = (torch.from_numpy(np.stack([d[j] for d in drawn])).flatten(1) for j in (1, 2))
        logits = model.classify(features[support], features[query], ways)  # (chunk, ways * queries, ways)
        correct[wanted.start : wanted.stop] = (logits.argmax(-1) == labels).float().mean(1) * 100
    return accelerator.reduce(correct, reduction="sum").double().cpu().numpy()


def _progress(accelerator: Accelerator, items: Iterable, what: str, total: int) -> Iterable:
    hidden = not accelerator.is_main_process
    return tqdm(items, total=total, desc=what, leave=False, disable=hidden, dynamic_ncols=True)
