"""What every recipe needs around its loop: a folder, log, save, resume, report (`folders` has what
a folder holds).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock
from torch import nn
from tqdm.auto import tqdm

from fewshot import InputError, show, weights
from fewshot.data.stream import Feed
from fewshot.training import folders, launch, state
from fewshot.training.folders import Stage
from fewshot.training.launch import on_main
from fewshot.training.schedule import Schedule

T = TypeVar("T")
# steps between lines of log.jsonl; also how often the losses are brought from the device
LOG_EVERY = 10
# above all signals: this and its index is what a process tells the others if its data cannot be
# read
FAILED = 1000


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn. Raises InputError if `--freeze` has left none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(
            "--freeze leaves nothing to train: leave it out, or test the backbone by recipes/simple_shot.py"
        )
    return parameters


class Run:
    """A test of a saved model, and its folder, where nothing that training left is changed.

    Args:
        method: the recipe's name, written into everything that is saved.
        args: the recipe's dataclass of arguments.
        accelerator: from `launch.started`.
        model: as its file describes it; `best` fills in the weights.
        folder: of the model; made when missing, and this run's alone while it lives.
        metadata: what the model's file says of itself.

    Attributes:
        feed: what loaders need to know of the run.
        step: the number of steps done so far.

    Raises:
        InputError: another process has the folder.
    """

    steps_in_all = 0

    def __init__(
        self,
        method: str,
        args: Any,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        folder: str | Path,
        metadata: Mapping[str, Any],
    ):
        self.method = method
        self.args = args
        self.accelerator = accelerator
        self.model = model.to(accelerator.device)
        self.folder = Path(folder)
        self.metadata = dict(metadata)
        self.began = time.time()
        self.step = 0

        self.tested = folders.tested(args)
        self.result = folders.result_file(args, folder)
        self.lock = launch.on_main_only(accelerator, self._take_folder)
        self.id = self._begin()

        rank, world = accelerator.process_index, accelerator.num_processes
        device, steps = accelerator.device, self.steps_in_all
        self.feed = Feed(args.seed, self.step, steps, rank, world, device, args.workers)
        if args.wandb:
            self._begin_tracker()

    def _take_folder(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = folders.lock(self.folder)
        launch.ending.callback(lock.release)
        return lock

    def _begin(self) -> str:
        """What is to be done before anything else; gives the run's id."""
        self.accelerator.print(f"testing {self.folder}/model.safetensors")
        return f"{self.metadata.get('id')}-{self.result.stem.removeprefix('test-')}"

    def _begin_tracker(self) -> None:
        name = self.folder
        if name.is_relative_to("runs"):
            name = name.relative_to("runs")
        options = {"dir": str(self.folder), **self._tracker(str(name))}
        config = {"method": self.method, **self.metadata["args"]}
        self.accelerator.init_trackers("fewshot", config=config, init_kwargs={"wandb": options})

    def _tracker(self, name: str) -> dict[str, Any]:
        return {"name": f"{name} test"}

    def steps(self, batches: Iterable[T]) -> Iterable[tuple[int, T]]:
        """None: a saved model is not trained, and a recipe's loop is passed over."""
        return ()

    def best(self) -> nn.Module:
        """The model with the weights of model.safetensors, without wrappers, to be tested."""
        path = self.folder / "model.safetensors"
        tensors, metadata = weights.load(path)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        weights.fill(model, tensors, path)
        self.metadata["step"] = metadata.get("step")
        return model.eval()

    def finish(
        self,
        metrics: Mapping[str, Any],
        files: Mapping[str, Any] | None = None,
        took: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the result with the settings it was reached with, and end the run: trackers, lock,
        memory.

        The result is metrics.json beside `files`: json values, or PIL images for names in .png. A
        test of a finished run writes test-ID.json, and its files likewise, ID telling its settings
        apart. `took`: what else to say of the effort.
        """
        files = files or {}
        made = self.metadata["args"]
        settings = {
            "method": self.metadata["method"],
            "seed": made["seed"],
            "trained": folders.trained(self.args, made),
            "tested": self.tested,
            "run": self._provenance() | dict(took or {}),
            "id": self.id,
        }
        if "stage" in self.metadata:
            settings["stage"] = self.metadata["stage"]

        if self.accelerator.is_main_process:
            for name, content in files.items():
                self._write(name, content)
            folders.write_json(self.result, {**metrics, "settings": settings})

        self.accelerator.wait_for_everyone()
        self.accelerator.log(_flat(metrics), step=self.step)
        self._log_pictures({k: v for k, v in files.items() if k.endswith(".png")})
        self.accelerator.print(f"written to {self.result}")

        # the next stage starts as if it came alone: with its own tracker, and no model of this one
        launch.end_trackers(self.accelerator)
        self.accelerator.free_memory()
        if self.lock is not None:
            self.lock.release()

    def _write(self, name: str, content: Any) -> None:
        path = self._path(name)
        if path.suffix == ".png":
            content.save(path)
        else:
            folders.write_json(path, content)

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.result.stem}-{name}"

    def _provenance(self) -> dict[str, Any]:
        """How the numbers came about: the command, the code, the machine, and what it took."""
        device, base = self.accelerator.device, getattr(self.args, "base", None)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        name = f"{_processor()}, threads: {torch.get_num_threads()}"
        if device.type == "cuda":
            peak, name = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
        return {
            "command": shlex.join(sys.argv),
            "commit": weights.commit(),
            "hardware": name,
            "processes": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "seconds": round(time.time() - self.began, 1),
            "peak_memory_gb": round(peak / 1e9, 2),
            "base": weights.digest(base) if base and Path(base).exists() else base,
        }

    def _log_pictures(self, pictures: Mapping[str, Any]) -> None:
        if pictures and self.accelerator.trackers and self.accelerator.is_main_process:
            images = {Path(name).stem: [np.asarray(picture)] for name, picture in pictures.items()}
            self.accelerator.get_tracker("wandb").log_images(images, step=self.step)


class Training(Run):
    """A training and its folder, with the test at its end.

    Args:
        method, args, accelerator, folder: as of `Run`.
        model, optimizer: not yet prepared by Accelerate; this does it. A method that trains nothing
            has no optimizer and no schedule.
        schedule: of the training, scaled to what `args` ask for.
        metadata: what the model's file is to say of itself besides method and arguments (classes,
            normalisation, ...).
        files: json values to keep in the folder from the beginning, such as shots.json.

    Attributes:
        model, optimizer, scheduler: as Accelerate prepared them.
        step: the number of steps done so far: 0, or where `--resume` found the run.

    Raises:
        InputError: another process has the folder, it cannot be seen from every machine, or
            `--resume` meets a run of another recipe or with other arguments.
    """

    def __init__(
        self,
        method: str,
        args: Any,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Schedule | None = None,
        *,
        folder: str | Path,
        metadata: Mapping[str, Any],
        files: Mapping[str, Any] | None = None,
    ):
        self.optimizer, self.scheduler = optimizer, None
        self.schedule = schedule
        self.steps_in_all = 0 if schedule is None else schedule.steps
        self.files = dict(files or {})
        self.bar = None
        self.saved: int | None = None  # the step of the last state
        self.best_score: float | None = None
        self.pending: list[tuple[int, dict[str, torch.Tensor], Sequence[Any]]] = []
        metadata = {"method": method, "args": dict(vars(args)), **metadata}
        super().__init__(method, args, accelerator, model, folder=folder, metadata=metadata)

    def _begin(self) -> str:
        accelerator = self.accelerator
        if self.optimizer is not None:
            scheduler = self.schedule.of(self.optimizer)
            self.model, self.optimizer, self.scheduler = accelerator.prepare(
                self.model, self.optimizer, scheduler
            )
        # its own group, so that a GPU need not wait for the others' word
        several = accelerator.num_processes > 1
        self._together = torch.distributed.new_group(backend="gloo") if several else None

        last, identity = on_main(accelerator, self._find_state)
        if last is not None:
            self._resume(last)
        elif self.args.resume:
            accelerator.print(f"{self.folder}: no saved state to resume, beginning with step 1")

        if not all(gather_object([(self.folder / "args.json").is_file()])):
            raise InputError(
                f"{self.folder} is not seen by every machine: give an --out on a disk that they share"
            )
        return identity

    def _find_state(self) -> tuple[state.State | None, str]:
        """The state to go on from and the run's id, or None and the id of a run that is begun."""
        if self.args.resume:
            last = state.find(self.folder, self.steps_in_all)
            if last is not None:
                before = folders.began(self.folder)
                advice = "resume with the same arguments or give another --out"
                folders.check_same(self.folder, self.method, before, self.args, advice)
                return last, before["id"]

        if (self.folder / "metrics.json").exists() and not self.args.overwrite:
            raise InputError(
                f"{self.folder} was finished by another process meanwhile: the same command shows it"
            )
        folders.remove_files(self.folder)
        identity = uuid.uuid4().hex[:12]
        written = ["log.jsonl", "curves.png", "metrics.json", "model.safetensors", *self.files]
        begun = {"method": self.method, "id": identity, "files": written, **self.metadata["args"]}
        folders.write_json(self.folder / "args.json", begun)
        for file, content in self.files.items():
            folders.write_json(self.folder / file, content)
        return None, identity

    def _resume(self, last: state.State) -> None:
        accelerator = self.accelerator
        accelerator.load_state(str(last.path))
        accelerator.wait_for_everyone()
        launch.on_main_only(accelerator, lambda: state.keep(self.folder, last))

        self.step, self.best_score, self.saved = last.step, last.best, last.step
        instead = f" ({last.damaged})" if last.damaged else ""
        accelerator.print(f"{self.folder}: resuming after step {self.step}{instead}")
        if accelerator.is_main_process:
            self._cut_log()

    def _cut_log(self) -> None:
        """Steps after the save are done again, and a kill may have cut the last line."""
        log, kept = self.folder / "log.jsonl", []
        text = log.read_text(errors="replace") if log.exists() else ""
        for line in text.splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue

        temporary = log.with_name(log.name + ".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, log)

    def _tracker(self, name: str) -> dict[str, Any]:
        return {"name": name, "id": self.id, "resume": "allow"}

    def steps(self, batches: Iterable[T]) -> Iterator[tuple[int, T]]:
        """(step, batch) for the steps that remain, the first being step `self.step + 1`, with a
        progress bar.

        Every step begins from a seed made of (seed, step, process), so that whatever it draws, a
        resumed run draws too. Ctrl-C, SIGTERM and data that cannot be read end the loop after the
        step at hand, whose state is saved.
        """
        self.model.train()
        total, main = self.schedule.steps, self.accelerator.is_main_process
        options = {"unit": "step", "mininterval": 0.5, "disable": not main, "dynamic_ncols": True}
        self.bar = tqdm(batches, initial=self.step, total=total, desc=self.folder.name, **options)
        launch.signals.waiting = True
        try:
            rest = iter(self.bar)
            while (batch := self._next(rest)) is not None:
                step = self.step + 1
                torch.manual_seed(launch.mix(self.args.seed, step, self.accelerator.process_index))
                yield step, batch
                self.step = step
        finally:
            launch.signals.waiting = False
            self.bar.close()  # before what ends the run is said, which is to be the last line
        self._flush()
        if self.step != total:
            raise RuntimeError(f"the data ended after step {self.step} of {total}")

    def _next(self, batches: Iterator[T]) -> T | None:
        """The next batch, or None after the last; if any process was told to stop, or has no data,
        all stop here.

        Raises:
            InputError: this process's data cannot be read; the state of the last step is saved.
            KeyboardInterrupt: a process was told to stop; likewise.
        """
        failure, told = None, torch.zeros(1, dtype=torch.long)
        try:
            batch = next(batches, None)
            told += launch.signals.received
        except InputError as error:
            failure = error
            told += FAILED + self.accelerator.process_index
        if self._together is not None:
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self._together)
        if not told:
            return batch
        if self.step not in (0, self.saved):
            self._flush()
            self._save_state(self.step)
        saved = (
            self.step
            and f"step {self.step} of {self.folder} is saved; the same command with --resume goes on"
        )
        if told == FAILED + self.accelerator.process_index:
            where = (
                f"met in step {self.step + 1}, {saved}"
                if saved
                else f"met in the first step of {self.folder}"
            )
            raise InputError(f"{failure}; {where}") from failure
        if told >= FAILED:
            launch.end_after_another(self.accelerator, self._together)
        launch.signals.received = int(told)  # another process's signal is the status of all
        raise KeyboardInterrupt(saved or "")

    def log(self, step: int, losses: Mapping[str, torch.Tensor], ids: Sequence[Any] = ()) -> None:
        """Remember this step's terms; every tenth step their means over steps and processes go to
        the log.

        Raises:
            FloatingPointError: a term is not finite; the message names the step, the term and
                `ids`.
        """
        self.pending.append((step, {name: value.detach() for name, value in losses.items()}, ids))
        if step % LOG_EVERY == 0:
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        names = sorted(self.pending[0][1])
        values = torch.stack(
            [torch.stack([terms[n].float() for n in names]) for _, terms, _ in self.pending]
        )
        for (step, _, ids), row in zip(self.pending, values.tolist(), strict=True):
            for name, value in zip(names, row, strict=True):
                if not np.isfinite(value):
                    seen = (
                        f", or look at its images: {', '.join(map(str, ids))}" if len(ids) else ""
                    )
                    raise FloatingPointError(
                        f"{name} is {value} at step {step} of {self.folder}: try a lower --lr{seen}"
                    )
        means = self.accelerator.reduce(values.mean(0), reduction="mean").tolist()
        step = self.pending[-1][0]
        self.pending.clear()
        entry = dict(zip(names, means, strict=True)) | {"lr": self.optimizer.param_groups[0]["lr"]}
        self.write(step, entry)
        self.bar.set_postfix({n: f"{v:.3g}" for n, v in entry.items()}, refresh=False)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a line of numbers to log.jsonl and to the tracker."""
        if self.accelerator.is_main_process:
            line = {"step": step, **values, "seconds": round(time.time() - self.began, 1)}
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
        self.accelerator.log(values, step=step)

    def save(self, step: int, score: float | None = None) -> None:
        """Keep the state for `--resume` in last/ and, if `score` is the best so far or None,
        model.safetensors.

        Atomic: a run that is killed at any moment finds a whole state.

        Raises:
            FloatingPointError: a parameter or buffer is not finite; nothing is saved then.
        """
        self._flush()
        if score is not None:
            self.write(step, {"validation": score})
        if score is None or self.best_score is None or score > self.best_score:
            self.best_score = score
            self.save_model(step=step)
        self._save_state(step)

    def _finite(self, step: int) -> nn.Module:
        """The model itself, after a look at all its numbers."""
        model = launch.synchronised(self.accelerator, self.model)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise FloatingPointError(
                    f"{name} of the model is not finite after step {step} of {self.folder}, and is not saved: "
                    "try a lower --lr; --resume goes on from the state before"
                )
        return model

    def _save_state(self, step: int) -> None:
        self._finite(step)
        state.save(self.accelerator, self.folder, step, self.best_score)
        self.saved = step

    def save_model(self, **more: Any) -> None:
        """Write model.safetensors with its metadata, to which `more` adds for good."""
        self.metadata |= more
        model = self._finite(more.get("step", self.step))
        if self.accelerator.is_main_process:
            weights.save(self.folder / "model.safetensors", model, self.metadata)
        self.accelerator.wait_for_everyone()

    def finish(
        self,
        metrics: Mapping[str, Any],
        files: Mapping[str, Any] | None = None,
        took: Mapping[str, Any] | None = None,
    ) -> None:
        """As of `Run`; the model's file is told the results, without those of single classes."""
        results = {key: value for key, value in metrics.items() if key != "per_class"}
        self.save_model(results=results, id=self.id)
        if self.accelerator.is_main_process:
            folders.list_files(self.folder, files or {})
            show.curves(self.folder / "log.jsonl", self.folder / "curves.png")
        super().finish(metrics, files, took)

    def _path(self, name: str) -> Path:
        return self.folder / name


def open_run(
    method: str,
    stage: Stage,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Schedule | None = None,
    *,
    metadata: Mapping[str, Any],
) -> Run:
    """The `Training` of a stage or, of a recipe's `--test-only`, a `Run`, which has no steps."""
    args, folder = stage.args, stage.folder
    if stage.name == "test":
        return Run(method, args, accelerator, model, folder=folder, metadata=stage.metadata)
    return Training(
        method, args, accelerator, model, optimizer, schedule, folder=folder, metadata=metadata
    )


def _processor() -> str:
    """What the CPU calls itself, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = value
    return flat
