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
from runs import EVERY, load, parse
from torch import nn

from fewshot import InputError, weights
from fewshot.training import folders, launch, run, stages
from fewshot.training.folders import Stage
from fewshot.training.run import open_run
from fewshot.training.schedule import Schedule


@dataclass
class Args:
    # test
    tasks: int = 4
    save_tasks: bool = False
    # training
    lr: float | None = 0.1
    batch_size: int | None = None
    iters: int | None = None
    # run
    out: str | None = None
    seed: int = 0
    resume: bool = False
    overwrite: bool = False
    test_only: bool = False
    wandb: bool = False
    workers: int = 0


def train(
    folder,
    total: int,
    args: Args,
    poison: int | None = None,
    more: dict | None = None,
    stop=None,
) -> nn.Module:
    """A tiny recipe whose every step draws from the global stream, as dropout and RoI sampling do.

    `poison` makes the loss of a step NaN, or with a minus sign a weight after it; `stop` is called
    in every step.
    """
    with launch.started("tiny", args) as accelerator:
        stage = folders.due(accelerator, "tiny", Stage("train", args, folder))
        if stage is None:
            return None

        torch.manual_seed(1)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
        schedule = Schedule(total, args.lr, (12,), 5)
        run = open_run("tiny", stage, accelerator, model, optimizer, schedule, metadata=more or {})

        data = [torch.full((3, 4), float(i)) for i in range(run.step, total)]
        for step, batch in run.steps(data):
            loss = run.model(batch + torch.randn(3, 4)).square().mean()
            if step == poison:
                loss = loss * float("nan")
            accelerator.backward(loss)
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
            if poison is not None and step == -poison:
                model.weight.data[1, 2] = float("nan")
            run.log(step, {"loss": loss}, ids=[f"picture-{step}"])
            if stop is not None:
                stop(step)
            if step % 4 == 0 or step == total:
                run.save(step)

        model = run.best()
        run.finish({"accuracy": 1.0}, {"tasks.json": [1.0]} if stage.args.save_tasks else {})
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


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but those of the lock and the state."""
    paths = [path for path in folder.glob("*.*") if path.is_file() and path.name != "lock.json"]
    return {path.name: path.read_bytes() for path in paths}


def test_nothing_is_replaced_unasked(tmp_path, capsys):
    folder = tmp_path / "a"
    with pytest.raises(SystemExit):
        train(folder, 8, Args(), poison=6)
    with pytest.raises(
        SystemExit,
        match="holds an unfinished run: --resume goes on with it, --overwrite begins anew",
    ):
        train(folder, 8, Args())

    train(folder, 8, Args(resume=True, save_tasks=True))
    before = contents(folder)
    assert train(folder, 8, Args()) is None
    assert train(folder, 8, Args(resume=True)) is None
    assert "is finished (--overwrite would replace it)" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"begun with lr=0.1, not 0.2; give another --out, or --overwrite"
    ):
        train(folder, 8, Args(lr=0.2))
    assert contents(folder) == before
    with pytest.raises(SystemExit, match="give one of them"):
        train(folder, 8, Args(resume=True, overwrite=True))


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "begun before runs listed"])
def test_overwriting_removes_what_the_run_wrote_and_nothing_else(listed, tmp_path):
    train(tmp_path, 4, Args(save_tasks=True))
    train(tmp_path, 4, Args(test_only=True, save_tasks=True))
    (tmp_path / "notes.txt").write_text("mine")
    arguments = json.loads((tmp_path / "args.json").read_text())
    assert "tasks.json" in arguments["files"] and len(list(tmp_path.glob("test-*"))) == 2
    if not listed:
        del arguments["files"]
        (tmp_path / "args.json").write_text(json.dumps(arguments))

    train(tmp_path, 4, Args(overwrite=True, lr=0.2))
    assert not (tmp_path / "tasks.json").exists() and not list(tmp_path.glob("test-*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 0.2


def test_a_run_that_another_process_finished_meanwhile_is_kept(tmp_path, monkeypatch):
    model = train(tmp_path, 4, Args())
    monkeypatch.setattr(folders, "due", lambda accelerator, method, stage: stage)
    with pytest.raises(SystemExit, match="was finished by another process meanwhile"):
        train(tmp_path, 4, Args())
    assert torch.equal(weights.load(tmp_path)[0]["weight"], model.weight)


def test_a_test_takes_its_own_flags_from_the_command_and_all_others_from_the_file(tmp_path):
    args = Args(lr=0.2)
    model = train(tmp_path, 4, args)
    before = contents(tmp_path)
    test = Args(test_only=True, tasks=9, seed=3)
    assert torch.equal(train(tmp_path, 4, test).weight, model.weight)
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("test-*.json")]
    settings = result["settings"]
    assert settings["tested"] == {"tasks": 9} and settings["seed"] == 0
    assert settings["trained"] == {"lr": 0.2, "batch_size": None, "iters": None}
    assert contents(tmp_path).items() >= before.items()
    assert test == Args(test_only=True, tasks=9, seed=3), "arguments are never written to"
    with pytest.raises(SystemExit, match=r"made with lr=0\.2, not 0\.3: leave that flag out"):
        train(tmp_path, 4, Args(test_only=True, lr=0.3))


def test_arguments_whose_source_cannot_be_read_are_told_before_the_first_step(tmp_path):
    """As of a class that was written into a notebook."""
    names = {"__name__": "__main__"}
    exec("class Args:\n    # test\n    tasks: int = 4\n", names)
    with pytest.raises(InputError, match=r"source of Args .* put the recipe into a file"):
        folders.blocks(names["Args"])


def test_every_flag_of_a_recipe_is_in_a_block():
    order = ["data", "test", "training", "model", "run"]
    for recipe in EVERY:
        args = load(recipe).Args
        found = folders.blocks(args)
        assert found.keys() == args.__dataclass_fields__.keys()
        assert list(dict.fromkeys(found.values())) == [b for b in order if b in found.values()]
        assert {"test", "run"} <= set(found.values())


def test_stages_are_listed_and_arguments_stay():
    args = parse("tfa", "--seeds 3 4 --shots 5")
    before = dict(vars(args))
    base, *tuned = stages.list_stages("tfa", args, "small")
    out = "runs/tfa/glyphs-split1-small"
    assert (base.name, base.folder, base.args.backbone) == ("base", f"{out}/base", "small")
    assert [stage.folder for stage in tuned] == [f"{out}/5shot-seed3", f"{out}/5shot-seed4"]
    assert [(stage.name, stage.args.seed) for stage in tuned] == [("finetune", 3), ("finetune", 4)]
    assert {stage.args.base for stage in tuned} == {f"{out}/base/model.safetensors"}
    assert vars(args) == before

    for flags, expected in (
        ("--stage base", ["base"]),
        ("--stage novel", ["10shot-seed0-novel"]),
        ("--base coco", ["10shot-seed0"]),
        ("--test-only", ["10shot-seed0"]),
        ("--test-only --stage base", ["base"]),
    ):
        listed = stages.list_stages("tfa", parse("tfa", f"{flags} --out a"), "small")
        assert [stage.folder for stage in listed] == [f"a/{name}" for name in expected]


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
    model = train(tmp_path, 4, Args(), more={"classes": ["a", "b"]})
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
