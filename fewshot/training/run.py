"""What every recipe needs around its loop: schedule, log, save, resume, report (`folders` has what
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
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from filelock import FileLock
from torch import nn
from tqdm.auto import tqdm

from fewshot import InputError, show, weights
from fewshot.data.stream import Feed
from fewshot.training import folders, launch, state
from fewshot.training.launch import on_main
from fewshot.training.schedule import Schedule

T = TypeVar("T")
# steps between lines of log.jsonl; also how often the losses are brought from the device
LOG_EVERY = 10
# above all signals: this and its index is what a process tells the others if its data cannot be
# read
FAILED = 1000
# of a run's steps: what the rest will take is estimated from these; the first ones warm up
TIMED = range(3, 23)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn. Raises InputError if `--freeze` has left none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(
            "--freeze leaves nothing to train: leave it out, or test the backbone by recipes/simple_shot.py"
        )
    return parameters


def each_seed(args: T) -> Iterator[T]:
    """`args` for every one of `--seeds`, or as they are; each begins as a run of that `--seed`
    alone would.
    """
    for one in [replace(args, seed=seed, seeds=()) for seed in args.seeds] or [args]:
        set_seed(one.seed)
        yield one


class Record:
    """One training run and its folder.

    Args:
        accelerator: from `launch.started`.
        method: the recipe's name, written into everything that is saved.
        args: the recipe's dataclass of arguments.
        folder: the run's folder, made when missing, and this run's alone while it lives.
        model, optimizer: not yet prepared by Accelerate; this does it. A method that trains nothing
            has no optimizer and no schedule.
        schedule: of the training, scaled to what `args` ask for.
        description: what the saved model says of itself besides method and arguments (classes,
            normalisation, ...).
        files: json values to keep in the folder from the beginning, such as shots.json.

    Attributes:
        model, optimizer, scheduler: as Accelerate prepared them.
        feed: what loaders need to know of the run.
        step: the number of steps done so far: 0, or where `--resume` found the run.
        about: what the model's file says of itself.

    With `--test-only` nothing is trained, and nothing that training left is changed: there are no
    steps, `best` is the model in the folder, and the result goes to a file of its own.

    Raises:
        InputError: another process has the folder, it cannot be seen from every machine, or
            `--resume` meets a run of another recipe or with other arguments.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        method: str,
        args: Any,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        schedule: Schedule | None,
        description: Mapping[str, Any],
        files: Mapping[str, Any] | None = None,
    ):
        self.accelerator, self.folder, self.args = accelerator, Path(folder), args
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.step, self.saved, self.best_score = 0, None, None
        self.pending: list[tuple[int, dict[str, torch.Tensor], Sequence[Any]]] = []
        self.about = {"method": method, "args": dict(vars(args)), **description}
        self.began, self.bar = time.time(), None
        self.test_only, self.files = args.test_only, files or {}
        self.lock = launch.on_main_only(accelerator, self._take_folder)
        self._total = 0 if schedule is None else schedule.steps
        if optimizer is None or self.test_only:
            self.model = model.to(accelerator.device)
        else:
            scheduler = schedule.of(optimizer)
            self.model, self.optimizer, self.scheduler = accelerator.prepare(
                model, optimizer, scheduler
            )
        if self.test_only:
            accelerator.print(f"testing {self.folder}/model.safetensors")
        else:
            self._begin_or_resume()
        steps = self.step if self.test_only else self._total
        rank, world = accelerator.process_index, accelerator.num_processes
        self.feed = Feed(args.seed, self.step, steps, rank, world, accelerator.device, args.workers)
        # its own group, so that a GPU need not wait for the others' word
        self._together = torch.distributed.new_group(backend="gloo") if world > 1 else None
        if args.wandb:
            self._begin_wandb()

    def _take_folder(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = folders.lock(self.folder)
        launch.ending.callback(lock.release)
        return lock

    def _begin_or_resume(self) -> None:
        accelerator = self.accelerator

        def look() -> tuple[state.State | None, str]:
            if not self.args.resume or (last := state.find(self.folder, self._total)) is None:
                return None, self._begin()
            before = folders.began(self.folder)
            now = json.loads(json.dumps(self.about["args"]))
            advice = "resume with the same arguments or give another --out"
            folders.check_same(self.folder, self.about["method"], before, now, None, advice)
            return last, before["id"]

        last, self.id = on_main(accelerator, look)
        if last is not None:
            accelerator.load_state(str(last.path))
            accelerator.wait_for_everyone()
            launch.on_main_only(accelerator, lambda: state.keep(self.folder, last))
            self.step, self.best_score, self.saved = last.step, last.best, last.step
            instead = f" ({last.damaged})" if last.damaged else ""
            accelerator.print(f"{self.folder}: resuming after step {self.step}{instead}")
            if accelerator.is_main_process:
                self._cut_log()
        elif self.args.resume:
            accelerator.print(f"{self.folder}: no saved state to resume, beginning with step 1")
        if not all(gather_object([(self.folder / "args.json").is_file()])):
            raise InputError(
                f"{self.folder} is not seen by every machine: give an --out on a disk that they share"
            )

    def _begin(self) -> str:
        for stale in (
            *self.folder.glob("test-*"),
            *self.folder.glob("*.jsonl"),
            *self.folder.glob("*.png"),
        ):
            stale.unlink(missing_ok=True)
        for stale in (
            "metrics.json",
            "model.safetensors",
            "shots.json",
            "detections.json",
            "tasks.json",
        ):
            (self.folder / stale).unlink(missing_ok=True)
        state.remove(self.folder)
        identity = uuid.uuid4().hex[:12]
        about = {"method": self.about["method"], "id": identity, **self.about["args"]}
        folders.write_json(self.folder / "args.json", about)
        for file, content in self.files.items():
            folders.write_json(self.folder / file, content)
        return identity

    def _cut_log(self) -> None:
        """Steps after the save are done again, and a kill may have cut the last line."""
        log, kept = self.folder / "log.jsonl", []
        for line in (
            log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []
        ):
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        temporary = log.with_name(log.name + ".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, log)

    def _begin_wandb(self) -> None:
        name = str(
            self.folder.relative_to("runs") if self.folder.is_relative_to("runs") else self.folder
        )
        about = {"name": name, "dir": str(self.folder)}
        about |= {"name": f"{name} test"} if self.test_only else {"id": self.id, "resume": "allow"}
        config = {"method": self.about["method"], **self.about["args"]}
        self.accelerator.init_trackers("fewshot", config=config, init_kwargs={"wandb": about})

    def steps(self, batches: Iterable[T]) -> Iterator[tuple[int, T]]:
        """(step, batch) for the steps that remain, the first being step `self.step + 1`, with a
        progress bar.

        Every step begins from a seed made of (seed, step, process), so that whatever it draws, a
        resumed run draws too. Ctrl-C, SIGTERM and data that cannot be read end the loop after the
        step at hand, whose state is saved.
        """
        if self.test_only:
            return
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
                self._estimate(step - self.feed.start, total - step)
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

    def _estimate(self, done: int, remaining: int) -> None:
        """Say once how long the rest takes, if one would go and get a coffee."""
        if done == TIMED.start:
            self.timed_from = time.perf_counter()
        if done != TIMED.stop:
            return
        seconds = (time.perf_counter() - self.timed_from) / len(TIMED) * remaining
        shorter = (
            ": more than a day; fewer steps (--iters), smaller pictures or a GPU make it shorter"
        )
        if seconds > 60 and self.accelerator.is_main_process:
            tqdm.write(
                f"{remaining} more steps take about {_duration(seconds)}{shorter * (seconds > 86400)}"
            )

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
        """Write model.safetensors with its description, to which `more` adds for good; not in
        `--test-only`.
        """
        if self.test_only:
            return
        self.about |= more
        model = self._finite(more.get("step", self.step))
        if self.accelerator.is_main_process:
            weights.save(self.folder / "model.safetensors", model, self.about)
        self.accelerator.wait_for_everyone()

    def best(self) -> nn.Module:
        """The model with the weights of model.safetensors, without wrappers, to be tested."""
        path = self.folder / "model.safetensors"
        tensors, about = weights.load(path)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        weights.fill(model, tensors, path)
        if self.test_only:
            self.about = about
        else:
            self.about["step"] = about.get("step")
        return model.eval()

    def finish(
        self,
        metrics: Mapping[str, Any],
        files: Mapping[str, Any] | None = None,
        took: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the result with the settings it was reached with, and end the run: trackers, lock,
        memory, seed.

        The result is metrics.json, beside curves.png and `files`: json values, or PIL images for
        names in .png. A test of a finished run writes test-ID.json, and its files likewise, ID
        telling its settings apart. After a training the model's file is told the results, without
        those of single classes. `took`: what else to say of the effort.
        """
        # a folder of class folders has no other name than its place
        place = {"data_root"} if self.about["args"].get("dataset") == "folder" else set()
        trained = {
            k: v
            for k, v in self.about["args"].items()
            if k in place or k not in folders.UNTOLD | folders.TEST_ARGS
        }
        settings = {
            "method": self.about["method"],
            "seed": self.about["args"]["seed"],
            "trained": trained,
        }
        settings |= {
            "tested": folders.tested(self.args),
            "run": self._provenance() | dict(took or {}),
        }
        settings |= {"stage": self.about["stage"]} if "stage" in self.about else {}
        path = folders.result_file(self.args, self.folder)
        if self.test_only:
            settings["id"] = f"{self.about.get('id')}-{path.stem.removeprefix('test-')}"
        else:
            settings["id"] = self.id
            results = {key: value for key, value in metrics.items() if key != "per_class"}
            self.save_model(results=results, id=self.id)
        if self.accelerator.is_main_process:
            for file, content in (files or {}).items():
                place = self.folder / (f"{path.stem}-{file}" if self.test_only else file)
                content.save(place) if place.suffix == ".png" else folders.write_json(
                    place, content
                )
            if not self.test_only:
                show.curves(self.folder / "log.jsonl", self.folder / "curves.png")
            folders.write_json(path, {**metrics, "settings": settings})
        self.accelerator.wait_for_everyone()
        self.accelerator.log(_flat(metrics), step=self.step)
        self._log_pictures({k: v for k, v in (files or {}).items() if k.endswith(".png")})
        self.accelerator.print(f"written to {path}")
        # the next stage starts as if it came alone: with its own tracker, no model of this one, and
        # from the seed
        launch.end_trackers(self.accelerator)
        self.accelerator.free_memory()
        if self.lock is not None:
            self.lock.release()
        set_seed(self.args.seed)

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


def _processor() -> str:
    """What the CPU calls itself, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = value
    return flat
