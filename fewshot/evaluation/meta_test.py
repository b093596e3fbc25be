"""Meta-test: thousands of tasks at once, mean accuracy and its 95 % interval."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from fewshot.data import episodes, transforms
from fewshot.data.image_set import ImageSet
from fewshot.data.stream import Feed
from fewshot.training import launch
from fewshot.training.run import Run

# images per forward pass; fixed, so that features do not depend on the number of processes
BATCH = 256
# features gathered at once: a chunk of tasks should stay in the processor's cache
CHUNK_BYTES = 8 << 20
ADAPTED = 8  # tasks in a chunk for `meta_test_images`
HELD_BYTES = 2 << 30  # images that it keeps on the device, or features that `meta_test` does


class FewShotModel(Protocol):
    """What meta-test needs: features once per image, and a classifier batched over tasks.

    `tasks_at_once`, where a model has it, says how many tasks a call of `classify` is best given.
    """

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, ...)."""

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Features (tasks, ways * shots, ...), class-major, and (tasks, m, ...) -> logits (tasks,
        m, ways).
        """


class AdaptingModel(Protocol):
    """What `meta_test_images` needs: a classifier of images, batched over tasks, that adapts all of
    itself to each.
    """

    def predict(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Images (tasks, ways * shots, 3, H, W), class-major, and (tasks, m, 3, H, W) -> logits
        (tasks, m, ways).
        """


@dataclass
class Result:
    """Accuracies in percent: every task's own (tasks,), their mean, and its 95 % half-width."""

    per_task: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.per_task.mean())

    @property
    def ci95(self) -> float:
        """1.96 standard deviations of the mean (the population's, as the published intervals are)."""
        return float(1.96 * self.per_task.std() / np.sqrt(len(self.per_task)))

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} ± {self.ci95:.2f} %"


def report(
    run: Run,
    results: dict[int, Result],
    ways: int,
    save_tasks: bool = False,
    setting: str | None = None,
) -> None:
    """Print the results by shots, finish the run with its metrics.json, and with every task's
    accuracy if asked.

    `setting`: "inductive", a query is classified by itself, or "transductive", together with the
    others of its task.
    """
    metrics: dict[str, Any] = {"ways": ways, "shots": {}}
    told = f" ({setting})" if setting else ""
    for shots, result in results.items():
        tasks = metrics["tasks"] = len(result.per_task)
        run.accelerator.print(f"{ways}-way {shots}-shot, {tasks} tasks{told}: {result}")
        numbers = {"accuracy": round(result.accuracy, 4), "ci95": round(result.ci95, 4)}
        metrics["shots"][str(shots)] = numbers
    if setting:
        metrics["setting"] = setting

    files = {}
    if save_tasks:
        files["tasks.json"] = {k: result.per_task.tolist() for k, result in results.items()}
    run.finish(metrics, files)


@torch.no_grad()
def extract(
    accelerator: Accelerator,
    model: FewShotModel,
    dataset: ImageSet,
    indices: np.ndarray,
    workers: int = 0,
) -> Tensor:
    """Features (n, ...) of the pictures `indices` (n,) in this order, float32, on every process;
    `model` in eval mode.

    Processes share the batches; each fills its rows of a zero tensor and the sum over processes is
    the whole.
    """
    batches = np.split(indices, range(BATCH, len(indices), BATCH))
    rank, world = accelerator.process_index, accelerator.num_processes
    # a process too many learns the shape of features from the first batch
    own = batches[rank::world] or batches[:1]
    loader = _loader(accelerator, dataset, np.concatenate(own), workers)
    features = None
    for i, (images, _) in enumerate(_progress(accelerator, loader, "features", len(own))):
        with accelerator.autocast():
            batch = model.features(images).float()
        if features is None:
            features = batch.new_zeros(len(indices), *batch.shape[1:])
        if rank < len(batches):
            first = (rank + i * world) * BATCH
            features[first : first + len(batch)] = batch
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
    imbalance: float | None = None,
    features: Tensor | None = None,
) -> dict[int, Result]:
    """Accuracy of `model` on `tasks` tasks of `dataset`, for each number of shots, from one pass
    over the images.

    Task i is a pure function of (seed, i) and the numbers are the same for any number of processes.
    The model is put into eval mode for supports and queries alike, and back afterwards.

    Args:
        imbalance: distribute a task's ways * queries queries over its classes by Dirichlet's
            distribution of this concentration, as `episodes.draw_imbalanced` does; None gives every
            class the same number.
        features: of all pictures of `dataset` (n, ...), if they are there already.
    """
    drawn = {k: _drawn(dataset, ways, k, queries, seed, tasks, imbalance) for k in shots}
    per_task: dict[int, list[np.ndarray]] = {k: [] for k in shots}

    with _in_eval_mode(accelerator, model) as model:
        blocks = [slice(0, tasks)]
        if features is None:
            blocks = _blocks(accelerator, model, dataset, drawn)
        for block in blocks:
            rows = {k: _Drawn(*(part[block] for part in drawn[k])) for k in shots}
            found = features
            if found is None:  # only what some task needs goes through the network
                needed = _pictures(rows)
                found = extract(accelerator, model, dataset, needed, workers)
                rows = {k: d.among(needed) for k, d in rows.items()}
            for k in shots:
                correct = _tasks(accelerator, model, found, rows[k], ways, seed, block.start)
                per_task[k].append(correct)

    return {k: Result(np.concatenate(parts)) for k, parts in per_task.items()}


@contextmanager
def _in_eval_mode(accelerator: Accelerator, model: nn.Module) -> Iterator[nn.Module]:
    """The model itself, the same on every process; its mode is back after the block."""
    model = launch.synchronised(accelerator, model)
    training = model.training
    model.eval()
    yield model
    model.train(training)


class _Drawn(NamedTuple):
    """Pictures of tasks: supports (tasks, ways * shots) and queries (tasks, m), class by class, and
    queries' labels.
    """

    support: np.ndarray
    query: np.ndarray
    labels: np.ndarray

    def among(self, pictures: np.ndarray) -> "_Drawn":
        """The same by the places of the pictures in an ascending list of some."""
        support, query = (np.searchsorted(pictures, part) for part in self[:2])
        return _Drawn(support, query, self.labels)


def _drawn(
    dataset: ImageSet,
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    tasks: int,
    imbalance: float | None,
) -> _Drawn:
    episodes.check(dataset, ways, shots, queries)
    if imbalance is None:
        draws = [episodes.draw(dataset, ways, shots, queries, seed, i) for i in range(tasks)]
        labels = np.tile(np.arange(ways).repeat(queries), (tasks, 1))
    else:
        unequal = [
            episodes.draw_imbalanced(dataset, ways, shots, queries, imbalance, seed, i)
            for i in range(tasks)
        ]
        draws, counts = zip(*unequal)
        labels = np.stack([np.arange(ways).repeat(count) for count in counts])
    return _Drawn(
        np.stack([d.support.ravel() for d in draws]),
        np.stack([d.query.ravel() for d in draws]),
        labels,
    )


def _pictures(drawn: dict[int, _Drawn]) -> np.ndarray:
    """What these tasks are made of, each picture once, ascending."""
    return np.unique(
        np.concatenate([part.ravel() for d in drawn.values() for part in (d.support, d.query)])
    )


def _blocks(
    accelerator: Accelerator, model: FewShotModel, dataset: ImageSet, drawn: dict[int, _Drawn]
) -> list[slice]:
    """Tasks in blocks whose pictures' features fit into `HELD_BYTES`: one, but for large maps of
    many pictures.
    """
    tasks = len(next(iter(drawn.values())).labels)
    needed = len(_pictures(drawn))
    example = torch.zeros(2, 3, dataset.size, dataset.size, device=accelerator.device)
    with accelerator.autocast():
        bytes_each = model.features(example)[0].numel() * 4
    if needed * bytes_each <= HELD_BYTES:
        return [slice(0, tasks)]
    per_task = sum(d.support.shape[1] + d.query.shape[1] for d in drawn.values())
    each = max(1, HELD_BYTES // bytes_each // per_task)
    return [slice(first, min(first + each, tasks)) for first in range(0, tasks, each)]


def _tasks(
    accelerator: Accelerator,
    model: FewShotModel,
    features: Tensor,
    drawn: _Drawn,
    ways: int,
    seed: int,
    number: int,
) -> np.ndarray:
    """Accuracy in percent (tasks,) of tasks given as rows of `features`.

    Each process does every n-th chunk of tasks. `number` is that of the first task.
    """
    tasks, shots = len(drawn.labels), drawn.support.shape[1] // ways
    # in one go: a copy waits for the device
    rows = torch.from_numpy(np.concatenate(drawn, 1)).to(features.device)
    support, query, labels = rows.split([part.shape[1] for part in drawn], 1)
    bytes_per_task = (support.shape[1] + query.shape[1]) * features[0].numel() * 4
    chunk = getattr(model, "tasks_at_once", None) or max(1, CHUNK_BYTES // bytes_per_task)
    correct = torch.zeros(tasks, device=features.device)
    starts = range(0, tasks, chunk)[accelerator.process_index :: accelerator.num_processes]
    for first in _progress(accelerator, starts, f"{ways}-way {shots}-shot", len(starts)):
        # whatever a classifier draws, a fresh head say, follows from the chunk, not from the
        # process that tests it
        torch.manual_seed(launch.mix(seed, shots, number + first))
        some = slice(first, first + chunk)
        # (chunk, m, ways)
        logits = model.classify(features[support[some]], features[query[some]], ways)
        correct[some] = _accuracy(logits, labels[some])
    return _summed(accelerator, correct)


@torch.no_grad()
def meta_test_images(
    accelerator: Accelerator,
    model: AdaptingModel,
    dataset: ImageSet,
    *,
    ways: int,
    shots: Sequence[int],
    queries: int,
    tasks: int,
    seed: int = 0,
    workers: int = 0,
) -> dict[int, Result]:
    """`meta_test`, on the same tasks, of a model that has no features apart from a task.

    A task is tested with all numbers of shots while its pictures are there. Chunks of tasks are the
    same for any number of processes, and so are the numbers.
    """
    for k in shots:
        episodes.check(dataset, ways, k, queries)
    most = max(shots)
    own = range(0, tasks, ADAPTED)[accelerator.process_index :: accelerator.num_processes]
    chunks = []
    for first in own:
        wanted = range(first, min(first + ADAPTED, tasks))
        drawn = [episodes.draw(dataset, ways, most, queries, seed, i) for i in wanted]
        chunks.append(np.stack([np.concatenate([d.support, d.query], axis=None) for d in drawn]))

    images = _images(accelerator, dataset, chunks, workers)
    loaded = _progress(accelerator, images, f"{ways}-way tasks", len(own))
    labels = torch.arange(ways, device=accelerator.device).repeat_interleave(queries)
    correct = {k: torch.zeros(tasks, device=accelerator.device) for k in shots}
    with _in_eval_mode(accelerator, model) as model:
        for chunk, first in zip(loaded, own):
            support, query = chunk.split((ways * most, ways * queries), 1)  # (chunk, n, 3, H, W)
            support = support.unflatten(1, (ways, most))
            for k in shots:  # the fewer shots of a task are the first among the more
                # augmentations, say, follow from the chunk too
                torch.manual_seed(launch.mix(seed, k, first))
                with accelerator.autocast():
                    logits = model.predict(support[:, :, :k].flatten(1, 2), query, ways)
                correct[k][first : first + len(logits)] = _accuracy(logits, labels)

    return {k: Result(_summed(accelerator, c)) for k, c in correct.items()}


def _images(
    accelerator: Accelerator, dataset: ImageSet, chunks: list[np.ndarray], workers: int
) -> Iterator[Tensor]:
    """Images (tasks, n, 3, H, W) of chunks of indices (tasks, n), one chunk after another.

    Pictures are loaded ahead for as many chunks as memory allows, for all if the data set fits:
    each is read once.
    """
    if not chunks:  # more processes than chunks
        return
    room = HELD_BYTES // (4 * 3 * dataset.size**2)  # images
    ahead = len(chunks) if len(dataset) <= room else max(1, room // chunks[0].size)

    for i in range(0, len(chunks), ahead):
        block = chunks[i : i + ahead]
        indices = np.unique(np.concatenate([chunk.ravel() for chunk in block]))
        loader = _loader(accelerator, dataset, indices, workers)
        batches = _progress(accelerator, loader, "images", -(-len(indices) // BATCH))
        images = torch.cat([batch for batch, _ in batches])
        for chunk in block:
            yield images[torch.from_numpy(np.searchsorted(indices, chunk))]


def _loader(
    accelerator: Accelerator, dataset: ImageSet, indices: np.ndarray, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    feed = Feed(device=accelerator.device, workers=workers)
    transform = transforms.test_transform(dataset)
    return episodes.image_loader(dataset, indices, feed, transform, batch_size=BATCH)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Percent (tasks,) of right answers in logits (tasks, m, ways)."""
    return (logits.argmax(-1) == labels).float().mean(1) * 100


def _summed(accelerator: Accelerator, correct: Tensor) -> np.ndarray:
    """Accuracies (tasks,), to which every process has given those of its own tasks."""
    return accelerator.reduce(correct, reduction="sum").cpu().double().numpy()


def _progress(accelerator: Accelerator, items: Iterable, what: str, total: int) -> Iterable:
    hidden = not accelerator.is_main_process
    return tqdm(items, total=total, desc=what, leave=False, disable=hidden, dynamic_ncols=True)
