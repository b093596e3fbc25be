"""A run's record: schedules, logs, exact resume, and what stops a run."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fewshot import InputError, run, weights


@dataclass
class Args:
    lr: float = 0.1
    seed: int = 0
    resume: bool = False
    test_only: bool = False
    wandb: bool = False
    workers: int = 0
    batch_size: int | None = None
    iters: int | None = None


def rates(base: float, steps: list[int], **schedule) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = run.warmup_step(optimizer, **schedule)
    return [base * scheduler.lr_lambdas[0](t) for t in steps]


def test_schedule_equals_the_published_ones():
    tfa = rates(0.02, [0, 50, 100, 12000], warmup=100, milestones=(12000, 16000))
    assert tfa == pytest.approx([2e-5, 0.01001, 0.02, 0.002])
    baseline = rates(0.05, [0, 1500, 2999, 3000, 36000, 72000], warmup=3000, ratio=0.25, milestones=(36000, 72000))
    assert baseline == pytest.approx([0.0125, 0.03125, 0.0499875, 0.05, 0.005, 0.0005])
    # a milestone inside the warm-up multiplies with it
    assert rates(1.0, [5], warmup=10, ratio=0.0, milestones=(5,), gamma=0.5) == pytest.approx([0.25])


def test_another_batch_size_scales_rate_and_steps(capsys):
    accelerator = run.start(Args())
    published = (1000, 0.02, (700,), 100)
    assert run.scaled(accelerator, 16, published, Args(lr=None)) == (16, 1000, 0.02, (700,), 100)
    assert run.scaled(accelerator, 16, published, Args(lr=None, batch_size=4)) == (4, 4000, 0.005, (2800,), 400)
    assert "batch of 4" in capsys.readouterr().out
    assert run.scaled(accelerator, 16, published, Args(lr=0.5, iters=100)) == (16, 100, 0.5, (70,), 10)


def train(folder, total: int, args: Args, poison: int | None = None, describe: dict | None = None) -> nn.Module:
    """A tiny recipe whose every step draws from the global stream, as dropout and RoI sampling do."""
    accelerator = run.start(args)
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    scheduler = run.warmup_step(optimizer, warmup=5, milestones=(12,))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    record = run.Record(accelerator, "tiny", args, folder, model, optimizer, scheduler, describe or {})
    data = [torch.full((3, 4), float(i)) for i in range(record.step, total)]
    for step, batch in record.steps(data, total):
        loss = model(batch + torch.randn(3, 4)).square().mean()
        if step == poison:
            loss = loss * float("nan")
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        record.log(step, {"loss": loss}, ids=[f"picture-{step}"])
        if step % 4 == 0 or step == total:
            record.save(step)
    record.finish({"accuracy": 1.0})
    return model


def test_resumed_run_equals_straight_run_to_the_bit(tmp_path):
    straight = train(tmp_path / "a", 20, Args())
    with pytest.raises(FloatingPointError):
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
        FloatingPointError, match=r"loss is nan at step 7 .*lower --lr, or look at its images: picture-7"
    ):
        train(tmp_path, 20, Args(), poison=7)
    assert json.loads((tmp_path / "last" / "record.json").read_text())["step"] == 4


def test_resume_of_another_run_is_refused(tmp_path):
    train(tmp_path / "a", 4, Args())
    with pytest.raises(InputError, match=r"begun with lr=0.1, not 0.2"):
        train(tmp_path / "a", 4, Args(lr=0.2, resume=True))
    args = json.loads((tmp_path / "a" / "args.json").read_text())
    (tmp_path / "a" / "args.json").write_text(json.dumps({**args, "method": "other"}))
    with pytest.raises(InputError, match="another recipe"):
        train(tmp_path / "a", 4, Args(resume=True))
    with pytest.raises(InputError, match="nothing to resume"):
        train(tmp_path / "empty", 4, Args(resume=True))


def test_a_kill_between_the_renames_of_a_save_loses_nothing(tmp_path):
    straight = train(tmp_path / "a", 12, Args())
    with pytest.raises(FloatingPointError):
        train(tmp_path / "b", 12, Args(), poison=10)
    (tmp_path / "b" / "last").rename(tmp_path / "b" / "last.old")
    (tmp_path / "b" / "last.tmp").mkdir()
    assert torch.equal(straight.weight, train(tmp_path / "b", 12, Args(resume=True)).weight)


def test_the_model_file_describes_itself(tmp_path):
    model = train(tmp_path, 4, Args(), describe={"classes": ["a", "b"]})
    state, about = weights.load(tmp_path / "model.safetensors")
    assert torch.equal(state["weight"], model.weight)
    assert about["method"] == "tiny" and about["classes"] == ["a", "b"] and about["args"]["lr"] == 0.1
    assert about["step"] == 4 and len(about["commit"]) >= 7
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"accuracy": 1.0}


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
