"""A run's record: schedules, logs, exact resume, and what stops a run."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewshot import InputError, weights
from fewshot.training import folders, launch, run
from fewshot.training.run import Schedule


@dataclass
class Args:
    lr: float | None = 0.1
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    test_only: bool = False
    wandb: bool = False
    workers: int = 0
    batch_size: int | None = None
    iters: int | None = None


def rates(base: float, steps: list[int], **schedule) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = Schedule(1, base, **schedule).of(optimizer)
    return [base * scheduler.lr_lambdas[0](t) for t in steps]


def test_schedule_equals_the_published_ones():
    tfa = rates(0.02, [0, 50, 100, 12000], warmup=100, milestones=(12000, 16000))
    assert tfa == pytest.approx([2e-5, 0.01001, 0.02, 0.002])
    baseline = rates(
        0.05,
        [0, 1500, 2999, 3000, 36000, 72000],
        warmup=3000,
        ratio=0.25,
        milestones=(36000, 72000),
    )
    assert baseline == pytest.approx([0.0125, 0.03125, 0.0499875, 0.05, 0.005, 0.0005])
    # a milestone inside the warm-up multiplies with it
    assert rates(1.0, [5], warmup=10, ratio=0.0, milestones=(5,), gamma=0.5) == pytest.approx(
        [0.25]
    )


def test_another_batch_size_scales_rate_and_steps():
    published = Schedule(1000, 0.02, (700,), 100)
    assert published.scaled(Args(lr=None), 16) == Schedule(1000, 0.02, (700,), 100, batch=16)
    assert published.scaled(Args(lr=None, batch_size=4), 16) == Schedule(
        4000, 0.005, (2800,), 400, batch=4
    )
    assert published.scaled(Args(lr=0.5, iters=100), 16) == Schedule(100, 0.5, (70,), 10, batch=16)
    # without a published batch the rate and the steps are what they are
    assert published.scaled(Args(lr=None, batch_size=4)) == Schedule(
        1000, 0.02, (700,), 100, batch=4
    )


def train(
    folder,
    total: int,
    args: Args,
    poison: int | None = None,
    describe: dict | None = None,
    stop=None,
) -> nn.Module:
    """A tiny recipe whose every step draws from the global stream, as dropout and RoI sampling do.

    `poison` makes the loss of a step NaN, or with a minus sign a weight after it; `stop` is called
    in every step.
    """
    with launch.started("tiny", args) as accelerator:
        if not folders.due(accelerator, "tiny", args, folder):
            return None
        torch.manual_seed(1)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
        schedule = Schedule(total, args.lr, (12,), 5)
        record = run.Record(
            accelerator, "tiny", args, folder, model, optimizer, schedule, describe or {}
        )
        data = [torch.full((3, 4), float(i)) for i in range(record.step, total)]
        for step, batch in record.steps(data):
            loss = record.model(batch + torch.randn(3, 4)).square().mean()
            if step == poison:
                loss = loss * float("nan")
            accelerator.backward(loss)
            record.optimizer.step()
            record.scheduler.step()
            record.optimizer.zero_grad()
            if poison is not None and step == -poison:
                model.weight.data[1, 2] = float("nan")
            record.log(step, {"loss": loss}, ids=[f"picture-{step}"])
            if stop is not None:
                stop(step)
            if step % 4 == 0 or step == total:
                record.save(step)
        record.finish({"accuracy": 1.0})
        return model


def test_resumed_run_equals_straight_run_to_the_bit(tmp_path):
    straight = train(tmp_path / "a", 20, Args())
    with pytest.raises(SystemExit):
        train(tmp_path / "b", 20, Args(), poison=11)  # dies after the save at step 8
    resumed = train(tmp_path / "b", 20, Args(resume=True))
    assert torch.equal(straight.weight, resumed.weight) and torch.equal(straight.bias, resumed.bias)
    logs = [[json.loads(line) for line in (tmp_path / x / "log.jsonl").open()] for x in "ab"]
    for line in logs[0] + logs[1]:
        del line["seconds"]
    # the resumed log may have one more line, where its first part was flushed by a save
    assert {(e["step"], e["loss"]) for e in logs[0]} <= {(e["step"], e["loss"]) for e in logs[1]}


def test_non_finite_loss_names_term_step_and_images(tmp_path):
    with pytest.raises(
        SystemExit,
        match=r"error: loss is nan at step 7 .*lower --lr, or look at its images: picture-7",
    ):
        train(tmp_path, 20, Args(), poison=7)
    assert json.loads((tmp_path / "last" / "record.json").read_text())["step"] == 4


def test_resume_of_another_run_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path / "a", 8, Args(), poison=6)
    with pytest.raises(SystemExit, match=r"begun with lr=0.1, not 0.2"):
        train(tmp_path / "a", 8, Args(lr=0.2, resume=True))
    args = json.loads((tmp_path / "a" / "args.json").read_text())
    (tmp_path / "a" / "args.json").write_text(json.dumps({**args, "method": "other"}))
    with pytest.raises(SystemExit, match="is a run of other, not of tiny"):
        train(tmp_path / "a", 8, Args(resume=True))
    (tmp_path / "a" / "args.json").write_text("{")
    with pytest.raises(SystemExit, match=r"args.json cannot be read .*--overwrite"):
        train(tmp_path / "a", 8, Args(resume=True))


def test_resuming_what_never_began_begins_it(tmp_path, capsys):
    train(tmp_path / "a", 4, Args(resume=True))
    assert "no saved state to resume, beginning with step 1" in capsys.readouterr().out


def test_nothing_is_replaced_unasked(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "a", 8, Args(), poison=6)
    with pytest.raises(
        SystemExit,
        match="holds an unfinished run: --resume goes on with it, --overwrite begins anew",
    ):
        train(tmp_path / "a", 8, Args())
    train(tmp_path / "a", 8, Args(resume=True))
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.*") if p.is_file()}
    assert train(tmp_path / "a", 8, Args()) is None
    assert train(tmp_path / "a", 8, Args(resume=True)) is None
    assert "is finished (--overwrite would replace it)" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"begun with lr=0.1, not 0.2; give another --out, or --overwrite"
    ):
        train(tmp_path / "a", 8, Args(lr=0.2))
    after = {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.*") if p.is_file()}
    assert {k: v for k, v in before.items() if k != "lock.json"} == {
        k: v for k, v in after.items() if k != "lock.json"
    }
    assert train(tmp_path / "a", 8, Args(lr=0.2, overwrite=True)) is not None
    assert json.loads((tmp_path / "a" / "args.json").read_text())["lr"] == 0.2
    with pytest.raises(SystemExit, match="give one of them"):
        train(tmp_path / "a", 8, Args(resume=True, overwrite=True))


def test_a_folder_belongs_to_one_run(tmp_path):
    holder = f"""
import sys, time
from pathlib import Path
from fewshot.training import folders
lock = folders.lock(Path({str(tmp_path)!r}))
print("held", flush=True)
time.sleep(60)
"""
    (tmp_path / "args.json").write_text("{}")
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match=rf"in use by process {process.pid} on .*, since 2"):
        train(tmp_path, 4, Args())
    process.kill()  # the system releases the lock of a process that was killed
    process.wait()
    (tmp_path / "args.json").unlink()
    assert train(tmp_path, 4, Args()) is not None


def test_what_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: weight of the model is not finite after step 8 .*lower --lr"
    ):
        train(tmp_path / "a", 12, Args(), poison=-8)
    assert json.loads((tmp_path / "a" / "last" / "record.json").read_text())["step"] == 4
    state, _ = weights.load(tmp_path / "a" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    straight = train(tmp_path / "b", 12, Args())
    assert torch.equal(straight.weight, train(tmp_path / "a", 12, Args(resume=True)).weight)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_after_the_step_and_resume_goes_on(name, tmp_path, capsys):
    import signal

    number = getattr(signal, name)
    straight = train(tmp_path / "a", 12, Args())
    with pytest.raises(SystemExit) as stopped:
        train(
            tmp_path / "b",
            12,
            Args(),
            stop=lambda step: os.kill(os.getpid(), number) if step == 6 else None,
        )
    assert stopped.value.code == 128 + number
    assert "step 6 of" in capsys.readouterr().out
    assert json.loads((tmp_path / "b" / "last" / "record.json").read_text())["step"] == 6
    assert torch.equal(straight.weight, train(tmp_path / "b", 12, Args(resume=True)).weight)


def test_processes_that_would_each_work_alone_are_refused(monkeypatch):
    alone = SimpleNamespace(num_processes=1)
    launch.check_together(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_together(SimpleNamespace(num_processes=2))
    with pytest.raises(
        InputError, match=r"2 processes were started, but each works alone .* ACCELERATE_USE_CPU=1"
    ):
        launch.check_together(alone)


def test_gradient_accumulation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(SystemExit, match="gradient accumulation is not supported"):
        train(tmp_path, 4, Args())


def test_default_folders_tell_runs_apart():
    assert folders.default("tfa", "voc", "split2", "resnet101") == "runs/tfa/voc-split2-resnet101"
    names = {
        folders.default("tfa", data, "seed0")
        for data in ("/a/objects", "/b/objects", "a/objects.json", "objects")
    }
    assert len(names) == 4


def test_main_loads_nothing_that_help_does_not_need():
    """curves, pictures and evaluation are imported when they are needed: --help should not wait for
    them.
    """
    heavy = "'matplotlib', 'pycocotools', 'wandb', 'huggingface_hub.hf_api'"
    code = f"import sys; from fewshot.training import run; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.strip()
    assert "matplotlib" not in loaded and "pycocotools" not in loaded
    light = "import sys; from fewshot import InputError; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", light], capture_output=True, text=True).stdout.strip()
        == "False"
    )
    assert Path(run.__file__).exists()


def test_a_kill_between_the_renames_of_a_save_loses_nothing(tmp_path):
    straight = train(tmp_path / "a", 12, Args())
    with pytest.raises(SystemExit):
        train(tmp_path / "b", 12, Args(), poison=10)
    shutil.rmtree(tmp_path / "b" / "last.old")
    (tmp_path / "b" / "last").rename(tmp_path / "b" / "last.old")
    (tmp_path / "b" / "last.tmp").mkdir()
    assert torch.equal(straight.weight, train(tmp_path / "b", 12, Args(resume=True)).weight)


def test_the_model_file_describes_itself(tmp_path):
    model = train(tmp_path, 4, Args(), describe={"classes": ["a", "b"]})
    state, about = weights.load(tmp_path / "model.safetensors")
    assert torch.equal(state["weight"], model.weight)
    assert (
        about["method"] == "tiny" and about["classes"] == ["a", "b"] and about["args"]["lr"] == 0.1
    )
    assert about["step"] == 4 and len(about["commit"]) >= 7
    assert (tmp_path / "curves.png").stat().st_size > 1000
    result = json.loads((tmp_path / "metrics.json").read_text())
    settings = result.pop("settings")
    assert result == {"accuracy": 1.0} and settings["method"] == "tiny" and settings["seed"] == 0
    assert settings["trained"]["lr"] == 0.1 and settings["id"] == about["id"]


def test_wrong_model_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such model file"):
        weights.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(InputError, match="not a model file"):
        weights.load(tmp_path / "text")
    weights.save(tmp_path / "m", nn.Linear(4, 2), {})
    state, _ = weights.load(tmp_path / "m")
    with pytest.raises(InputError, match=r"is \(2.* this model has \(3"):
        weights.fill(nn.Linear(4, 3), state, tmp_path / "m")
    with pytest.raises(InputError, match="bias does not belong"):
        weights.fill(nn.Linear(4, 2, bias=False), state, tmp_path / "m")
    weights.fill(nn.Linear(4, 2, bias=False), state, tmp_path / "m", fresh=("bias",))


@pytest.mark.parametrize("file", [(), ("log.jsonl",)])
def test_a_full_disk_is_named(file):
    """The failure of a write to an open file names none: then the run's folder is."""
    args = SimpleNamespace(wandb=False, resume=False, overwrite=False, seed=0, out="runs/a")
    told = "log.jsonl" if file else r"error: runs/a: .*: make room on the disk; --resume"
    with pytest.raises(SystemExit, match=told), launch.started("tiny", args):
        raise OSError(errno.ENOSPC, "No space left on device", *file)
