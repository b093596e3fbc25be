"""What every recipe needs around its loop: start, log, save, resume, report.

With `meta_test` this is the only place that knows Accelerate's corners. A run's folder holds

    args.json  log.jsonl  metrics.json  curves.png  model.safetensors  last/

where `last/` is Accelerate's state for `--resume` and `model.safetensors` is all that testing needs.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from tqdm.auto import tqdm

from fewshot import InputError, show, weights

T = TypeVar("T")
LOG_EVERY = 10  # steps between lines of log.jsonl; also how often the losses are brought from the device

# Arguments that change how a run is carried out, not what it computes: a resumed run may change these.
FREE_ARGS = {"resume", "wandb", "workers", "out", "test_only", "stage", "base", "save_every", "share_proposals"}


def start(args: Any) -> Accelerator:
    """Seed everything, silence tracebacks for `InputError`, and return the Accelerator of this launch.

    Precision, devices and processes come from `accelerate launch` (or its config file), nothing else does.
    """
    accelerator = Accelerator(log_with="wandb" if args.wandb else None, step_scheduler_with_optimizer=False)
    set_seed(args.seed)

    def one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, (InputError, FloatingPointError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = one_line
    return accelerator


def warmup_step(
    optimizer: torch.optim.Optimizer,
    *,
    warmup: int = 0,
    ratio: float = 0.001,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from `ratio` times the rate over `warmup` steps, times `gamma` at each milestone passed.

    At 0-based step t the factor is gamma^{#(milestones <= t)}, times 1 - (1 - t / warmup)(1 - ratio) while t < warmup:
    the two multiply, as in the reference's schedules.
    """

    def factor(t: int) -> float:
        warm = 1 - (1 - t / warmup) * (1 - ratio) if t < warmup else 1.0
        return warm * gamma ** sum(m <= t for m in milestones)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def finished(accelerator: Accelerator, model: str | Path) -> bool:
    """Whether the run that leaves `model` is done; says so when its base model must be trained first."""
    path = Path(model)
    done = path.exists() and (path.parent / "metrics.json").exists()
    accelerator.print(f"base model: {path}" if done else f"no finished base model at {path}: training it first")
    return done


def scaled(
    accelerator: Accelerator, published: int, schedule: tuple[int, float, Sequence[int], int], args: Any
) -> tuple[int, int, float, tuple[int, ...], int]:
    """(batch size, steps, learning rate, milestones, warm-up) for what `args` ask of a published `schedule`.

    The schedule (steps, rate, milestones, warm-up) is for a global batch of `published` pictures. Another
    `--batch-size` scales the rate by the ratio and the steps by its inverse (the linear rule); `--iters` stretches
    milestones and warm-up with the steps; `--lr` replaces the rate.
    """
    steps, lr, milestones, warmup = schedule
    batch = args.batch_size or published
    ratio = batch / published
    wanted = args.iters or max(1, round(steps / ratio))
    stretch = wanted / steps
    rate = lr * ratio if args.lr is None else args.lr
    if ratio != 1:
        accelerator.print(f"batch of {batch}, published {published}: {wanted} steps at rate {rate:g} (linear rule)")
    return batch, wanted, rate, tuple(round(m * stretch) for m in milestones), round(warmup * stretch)


def gather_by_id(accelerator: Accelerator, results: dict[Any, T]) -> dict[Any, T]:
    """Merge every process's `{id: result}` into one dict, sorted by id, on every process.

    Keyed by id, the outcome does not depend on how many processes there are or who did what; a picture that two
    processes both did counts once.
    """
    merged = {key: value for part in gather_object([results]) for key, value in part.items()}
    return dict(sorted(merged.items()))


def write_json(path: Path, value: Any) -> None:
    """Write json so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


class Record:
    """One training run and its folder.

    Args:
        accelerator: from `start`.
        method: the recipe's name, written into everything that is saved.
        args: the recipe's dataclass of arguments.
        folder: the run's folder, made when missing.
        model, optimizer, scheduler: as `accelerator.prepare` returned them (one call for all three).
        describe: what the saved model says of itself besides method and arguments (classes, normalisation, ...).

    `step` is the number of steps done so far: 0, or where `--resume` found the run.

    Raises:
        InputError: when `--resume` meets a run of another recipe or with other arguments.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        method: str,
        args: Any,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        describe: dict[str, Any],
    ):
        self.accelerator, self.folder, self.seed = accelerator, Path(folder), args.seed
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.step, self.best = 0, None
        self.pending: list[tuple[int, dict[str, torch.Tensor], Sequence[Any]]] = []
        self.metadata = {"method": method, "args": vars(args), **describe}
        self.test_only = args.test_only
        self.began = time.time()
        if args.test_only:
            self.accelerator.print(f"testing {self.folder}/model.safetensors")
        elif args.resume:
            self._resume()
        elif accelerator.is_main_process:
            self._begin()
        accelerator.wait_for_everyone()
        if args.wandb:
            accelerator.trackers.clear()
            name = str(self.folder.relative_to("runs") if self.folder.is_relative_to("runs") else self.folder)
            accelerator.init_trackers(
                "fewshot", config=vars(args), init_kwargs={"wandb": {"name": name, "dir": str(self.folder)}}
            )

    def _begin(self) -> None:
        unfinished = self._last()
        if unfinished is not None and not (self.folder / "metrics.json").exists():
            print(f"{self.folder} holds an unfinished run: starting over (--resume would go on with it)")
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in ("log.jsonl", "metrics.json", "model.safetensors"):
            (self.folder / stale).unlink(missing_ok=True)
        for stale in ("last", "last.old", "last.tmp"):
            shutil.rmtree(self.folder / stale, ignore_errors=True)
        write_json(self.folder / "args.json", {"method": self.metadata["method"], **self.metadata["args"]})

    def _last(self) -> Path | None:
        # A kill between the two renames of `save` leaves only last.old: it is whole.
        return next((p for p in (self.folder / "last", self.folder / "last.old") if p.is_dir()), None)

    def _resume(self) -> None:
        check_same_run(self.folder, self.metadata["method"], self.metadata["args"])
        last = self._last()
        if last is None:
            self.accelerator.print(f"{self.folder}: no saved state yet, starting from step 0")
            if self.accelerator.is_main_process:
                self._begin()
            return
        self.accelerator.load_state(str(last))
        state = json.loads((last / "record.json").read_text())
        self.step, self.best = state["step"], state["best"]
        self.accelerator.print(f"{self.folder}: resuming after step {self.step}")
        if self.accelerator.is_main_process:
            log = self.folder / "log.jsonl"
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            # Steps after the save are done again, and a kill may have cut the last line.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            log.write_text("".join(kept))

    def steps(self, batches: Iterable[T], total: int) -> Iterator[tuple[int, T]]:
        """(step, batch) for the steps that remain, the first being step `self.step + 1`, with a progress bar.

        Every step begins from a seed made of (seed, step, process), so that whatever it draws, a resumed run draws too.
        """
        bar = tqdm(
            batches,
            initial=self.step,
            total=total,
            desc=self.folder.name,
            unit="step",
            mininterval=0.5,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        self.bar = bar
        for step, batch in enumerate(bar, self.step + 1):
            torch.manual_seed(mix(self.seed, step, self.accelerator.process_index))
            yield step, batch
            self.step = step
        self._flush()
        if self.step != total:
            raise RuntimeError(f"the data ended after step {self.step} of {total}")

    def log(self, step: int, losses: dict[str, torch.Tensor], ids: Sequence[Any] = ()) -> None:
        """Remember this step's terms; every tenth step their means over steps and processes go to the log.

        Raises:
            FloatingPointError: a term is not finite; the message names the step, the term and `ids`.
        """
        self.pending.append((step, {name: value.detach() for name, value in losses.items()}, ids))
        if step % LOG_EVERY == 0:
            self._flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        names = sorted(self.pending[0][1])
        values = torch.stack([torch.stack([terms[n].float() for n in names]) for _, terms, _ in self.pending])
        for (step, _, ids), row in zip(self.pending, values.tolist(), strict=True):
            for name, value in zip(names, row, strict=True):
                if not np.isfinite(value):
                    seen = f", or look at its images: {', '.join(map(str, ids))}" if len(ids) else ""
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
        """Keep the state for `--resume` in last/ and, if `score` is the best so far or None, model.safetensors.

        Atomic: a run that is killed at any moment finds a whole state.
        """
        self._flush()
        if score is not None:
            self.write(step, {"validation": score})
        if score is None or self.best is None or score > self.best:
            self.best = score
            self.save_model({"step": step})
        temporary, last, old = (self.folder / name for name in ("last.tmp", "last", "last.old"))
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(temporary / "record.json", {"step": step, "best": self.best})
            shutil.rmtree(old, ignore_errors=True)
            if last.exists():
                os.rename(last, old)
            os.rename(temporary, last)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, also: dict[str, Any] | None = None) -> None:
        """Write model.safetensors with its description, to which `also` adds for good."""
        self.metadata |= also or {}
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            weights.save(self.folder / "model.safetensors", model, self.metadata)
        self.accelerator.wait_for_everyone()

    def load_best(self) -> None:
        """Put the weights of model.safetensors into the model."""
        path = self.folder / "model.safetensors"
        state, about = weights.load(path)
        weights.fill(self.accelerator.unwrap_model(self.model), state, path)
        self.metadata["step"] = about.get("step")

    def finish(self, metrics: dict[str, Any], pictures: dict[str, Any] | None = None) -> None:
        """Write metrics.json, curves.png and `pictures` ({name: PIL image} -> name.png); close the tracker.

        After a training the model's file is told the results, without those of single classes.
        """
        if not self.test_only:
            self.save_model({"results": {key: value for key, value in metrics.items() if key != "per_class"}})
        if self.accelerator.is_main_process:
            write_json(self.folder / "metrics.json", metrics)
            show.curves(self.folder / "log.jsonl", self.folder / "curves.png")
            for name, picture in (pictures or {}).items():
                picture.save(self.folder / f"{name}.png")
        self.accelerator.log(_flat(metrics), step=self.step)
        if pictures and self.accelerator.trackers and self.accelerator.is_main_process:
            images = {name: [np.asarray(picture)] for name, picture in pictures.items()}
            self.accelerator.get_tracker("wandb").log_images(images, step=self.step)
        self.accelerator.end_training()
        self.accelerator.print(f"written to {self.folder}/")


def check_same_run(folder: Path, method: str, args: dict[str, Any]) -> None:
    """`--resume` needs the recipe and the arguments that the folder's run began with.

    Raises:
        InputError: naming the first thing that differs.
    """
    path = folder / "args.json"
    if not path.exists():
        raise InputError(f"{folder}: nothing to resume there (no args.json); leave out --resume to begin")
    before = json.loads(path.read_text())
    if before.pop("method") != method:
        raise InputError(f"{folder} is a run of another recipe; choose another --out")
    now = json.loads(json.dumps(args))
    for name in sorted(set(before) | set(now)):
        if name not in FREE_ARGS and before.get(name) != now.get(name):
            raise InputError(
                f"{folder} was begun with {name}={before.get(name)}, not {now.get(name)}; "
                "resume with the same arguments or choose another --out"
            )


def mix(*numbers: int) -> int:
    """A seed for torch from several numbers: nearby ones give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = value
    return flat
