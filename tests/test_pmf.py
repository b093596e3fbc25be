"""P>M>F against the official code's numbers, and its fine-tuning against a plain loop on a copy of
the network.
"""

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming_rule import array, close, fill, golden, image, rgb_input
from runs import metrics, results_of_tests, run_here
from torch import Tensor, nn

import fewshot
from fewshot import InputError, backbones, inference, weights
from fewshot.data.classification import open_dataset
from fewshot.data.glyphs import glyph
from fewshot.heads import pmf, transductive
from fewshot.heads.pmf import PMF
from fewshot.training.schedule import Cosine

CASES = golden("cls_pmf_frozen")


def features(case: dict) -> list[Tensor]:
    """Supports (1, ways * shots, D) and queries (1, m, D) of a golden case."""
    tag, ways, d = case["tag"], case["ways"], case["dim"]
    centres = np.float32(case["separation"]) * array(f"{tag}/centre", (ways, d))[:, None]
    many = {"support": case["shots"], "query": case["queries_per_class"]}
    drawn = {
        part: np.maximum(centres + array(f"{tag}/{part}", (ways, n, d)), 0)
        for part, n in many.items()
    }
    found = [torch.from_numpy(x.reshape(1, -1, d)) for x in drawn.values()]
    for x, part in zip(found, drawn, strict=True):
        close(x[0], case[part], 1e-6)
    return found


@pytest.mark.parametrize("name", ["pmf_1shot_64", "pmf_5shot_384"])
def test_logits_and_gradients_equal_the_official_ones(name):
    case = CASES[name]
    model = PMF(nn.Identity())
    model.scale.data.fill_(case["scale"]), model.bias.data.fill_(case["bias"])
    support, query = (x.requires_grad_() for x in features(case))
    logits = model(support, query, case["ways"])
    close(logits[0], case["logits"], 1e-5)
    loss = F.cross_entropy(logits[0], torch.arange(5).repeat_interleave(case["queries_per_class"]))
    loss.backward()
    found = [loss, support.grad.norm(), query.grad.norm(), model.scale.grad]
    expected = [case[key] for key in ("loss", "grad_norm_support", "grad_norm_query", "grad_scale")]
    assert torch.stack(found).tolist() == pytest.approx(expected, rel=1e-4)
    assert abs(model.bias.grad) < 1e-6


@pytest.mark.parametrize("name", ["frozen_1shot_64", "frozen_5shot_384"])
def test_nearest_class_mean_on_frozen_features_equals_the_official_one(name):
    """Where supports are brought to unit length before their mean is taken, as P>M>F's are not."""
    support, query = features(CASES[name])
    logits = 10 * transductive.simple_shot(
        *map(transductive.unit, (support, query)), 5, metric="cosine"
    )
    close(logits[0], CASES[name]["proto_cosine_logits"], 1e-5)
    ours = PMF(nn.Identity())(support, query, 5)
    assert torch.allclose(ours, logits, atol=1e-4) == name.startswith("frozen_1shot")


def test_fine_tuning_equals_the_official_one(monkeypatch):
    monkeypatch.setattr(pmf, "augment", lambda images: images)
    case = CASES["pmf_finetune"]
    prefix, ways, side = case["prefix"], case["ways"], case["size"]
    layers = {
        "conv1": nn.Conv2d(3, 16, 3, 2, 1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 32, 3, 2, 1),
    }
    pooling = {"relu2": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    network = nn.Sequential(OrderedDict(layers | pooling))
    fill(network, case["state"], str, prefix)
    support, query = (
        rgb_input(
            *(
                image(f"{prefix}{part}{c}_{k}", side, side)
                for c in range(ways)
                for k in range(case[number])
            )
        )
        for part, number in (("s", "shots"), ("q", "queries_per_class"))
    )
    close(support, case["support"], 1e-6)
    close(query, case["query"], 1e-6)
    model, labels = PMF(network, lr=case["lr"]), torch.arange(ways).repeat_interleave(case["shots"])
    for model.steps in (0, 1, 10, 19):
        adapted = copy.deepcopy(network)
        adapted.load_state_dict(model.fine_tune(support, ways, case["lr"]))
        loss = F.cross_entropy(PMF(adapted)(support[None], support[None], ways)[0], labels)
        assert loss.item() == pytest.approx(case["loss_per_step"][model.steps], rel=1e-5)
    for model.steps, when in ((0, "before"), (case["steps"], "after")):
        close(model.predict(support[None], query[None], ways)[0], case[f"logits_{when}"], 1e-5)
    for name, parameter in model.fine_tune(support, ways, case["lr"]).items():
        close(parameter, case["weights_after"][name], 1e-4)


def test_augmentations_equal_the_official_ones():
    images = torch.from_numpy(array("aug/x", (2, 3, 16, 16)))
    case = CASES["augment_translation"]
    shifts = torch.tensor([case["first_axis_shift"], case["second_axis_shift"]]).T
    close(pmf.translate(images, shifts), case["output"], 1e-6)
    case = CASES["augment_color"]
    uniforms = torch.tensor(
        [case["uniform"][key] for key in ("brightness", "saturation", "contrast")]
    ).T
    for done, key in enumerate(("brightness", "saturation", "contrast")):
        some = torch.where(torch.arange(3) <= done, uniforms, 0.5)  # by which nothing changes
        close(pmf.recolour(images, some), case[f"after_{key}"], 1e-5)


def test_what_is_drawn_for_a_step():
    """A picture with one bright pixel tells how it was flipped and moved, and its mean that its
    brightness changed.
    """
    torch.manual_seed(0)
    images = torch.zeros(8, 3, 24, 24)
    images[:, :, 12, 3] = 100.0
    as_they_are, flipped, shifts, brightness = 0, 0, [], []
    for _ in range(400):
        seen = pmf.augment(images)
        if torch.equal(seen, images):
            as_they_are += 1
            continue
        places = seen.sum(1).flatten(1).argmax(1)
        rows, columns = places // 24, places % 24
        mirrored = columns > 12
        assert mirrored.all() or not mirrored.any()  # all or none
        flipped += int(mirrored[0])
        shifts.append(torch.stack([12 - rows, torch.where(mirrored, 20, 3) - columns], 1))
        brightness.append(seen[:, 0, 12, 12])
    assert 0.07 < as_they_are / 400 < 0.13
    assert 0.43 < flipped / len(shifts) < 0.57
    shifts, brightness = torch.cat(shifts), torch.cat(brightness)
    for axis in shifts.T:  # up to int(24 / 8 + .5), each as often
        numbers, often = axis.unique(return_counts=True)
        assert numbers.tolist() == list(range(-3, 4)) and often.min() > 0.8 * often.max()
    assert np.corrcoef(shifts.T.numpy())[0, 1] == pytest.approx(0, abs=0.05)
    assert brightness.std() > 0.1
    torch.manual_seed(3)
    once = pmf.augment(images)
    torch.manual_seed(3)
    assert torch.equal(pmf.augment(images), once)


def tasks(number: int, shots: int, side: int = 16, noise: float = 1.0) -> list[Tensor]:
    """3-way tasks: noisy supports and 4 queries a class, around an image of the class."""
    r = torch.Generator().manual_seed(shots)
    centres = torch.randn(number, 3, 1, 3, side, side, generator=r)
    parts = (
        centres + noise * torch.randn(number, 3, n, 3, side, side, generator=r) for n in (shots, 4)
    )
    return [x.flatten(1, 2) for x in parts]


def by_a_copy(model: PMF, support: Tensor, query: Tensor, lr: float) -> Tensor:
    """Logits (m, 3) of one task, plainly: a copy of it all, Adam on its backbone, two forward
    passes a step.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.features.parameters(), lr=lr)
    labels = torch.arange(3).repeat_interleave(len(support) // 3)
    for _ in range(model.steps):
        logits = model(support[None], pmf.augment(support)[None], 3)[0]
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return model(support[None], query[None], 3)[0].detach()


@pytest.mark.parametrize("name, side", [("conv4", 16), ("timm/test_vit", 32)])
def test_fine_tuning_equals_a_plain_loop_and_leaves_no_trace(name, side):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = PMF(
        backbones.build(name, side), steps=3, lr=1e-3
    ).double()  # Adam makes rounding as large as gradients
    before = copy.deepcopy(model.state_dict())
    support, query = (x.double() for x in tasks(2, 2, side))
    torch.manual_seed(7)
    logits = model.predict(support, query, 3)
    torch.manual_seed(7)
    plain = torch.stack([by_a_copy(model, s, q, 1e-3) for s, q in zip(support, query)])
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-8)
    assert not logits.requires_grad
    model.steps = 0
    with torch.no_grad():
        clean = model(support, query, 3)
    assert torch.allclose(model.predict(support, query, 3), clean, atol=1e-5)
    assert (logits - clean).abs().max() > 0.05
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} moved"
    assert all(p.grad is None for p in model.parameters())


def test_rate_is_found_from_supports_alone():
    """By a plain loop: fine-tune on each class's first support, and count which of the others are
    then right.
    """
    torch.manual_seed(0)
    model, chosen = PMF(backbones.build("conv4", 16), steps=4), []
    for seed, support in enumerate(tasks(6, 3, noise=5.0)[0]):
        first, others = (
            support[::3],
            torch.cat([support[1::3][:, None], support[2::3][:, None]], 1).flatten(0, 1),
        )
        labels = torch.arange(3).repeat_interleave(2)
        torch.manual_seed(seed)
        right = {0.0: (model(first[None], others[None], 3)[0].argmax(1) == labels).sum()}
        right |= {
            lr: (by_a_copy(model, first, others, lr).argmax(1) == labels).sum()
            for lr in (0.01, 0.001, 0.0001)
        }
        most = max(right.values())
        torch.manual_seed(seed)
        with torch.no_grad():
            chosen.append(model.choose_lr(support, 3))
        assert chosen[-1] == next(lr for lr, number in right.items() if number == most)
    assert len(set(chosen)) > 1 and max(chosen) > 0
    support, query = tasks(2, 1)  # one shot leaves none to choose by
    assert model.choose_lr(support[0], 3) == 0
    assert torch.equal(
        model.predict(support, query, 3), PMF(model.features, steps=0).predict(support, query, 3)
    )


def test_auto_fine_tunes_at_the_rate_it_finds(monkeypatch):
    torch.manual_seed(0)
    network, (support, query) = backbones.build("conv4", 16), tasks(2, 2)
    monkeypatch.setattr(PMF, "choose_lr", lambda self, support, ways: 0.01)
    found = []
    for lr in ("auto", 0.01, 0.001, 0.0):
        torch.manual_seed(1)
        found.append(PMF(network, steps=2, lr=lr).predict(support, query, 3))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2], atol=1e-2) and not torch.allclose(
        found[2], found[3], atol=1e-2
    )


def test_fine_tuning_learns_under_autocast(monkeypatch):
    """Which would go on with the copies of weights that it made before the first step."""
    monkeypatch.setattr(pmf, "augment", lambda images: images)
    torch.manual_seed(0)
    model = PMF(backbones.build("conv4", 16), steps=8, lr=1e-3)
    support, query = tasks(1, 2, noise=3.0)
    exact = model.predict(support, query, 3)
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        handle = model.features.register_forward_hook(
            lambda module, images, output: seen.append(output.dtype)
        )
        rough = model.predict(support, query, 3)
        handle.remove()
        model.steps = 0
        clean = model.predict(support, query, 3)
    assert set(seen) == {torch.bfloat16}
    assert (rough - exact).abs().max() < 0.25 * (clean - exact).abs().max()


def test_stays_in_eval_mode_in_training():
    model = PMF(backbones.build("wrn28_10", 8, depth=10, widen=1))
    wrapped = nn.Sequential(model).train()
    assert wrapped.training and not any(module.training for module in model.modules())
    support, query = tasks(1, 1, side=8)
    before = copy.deepcopy(dict(model.named_buffers()))
    assert torch.equal(model(support, query, 3), model(support, query, 3))  # nothing is dropped
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


@pytest.mark.parametrize("options", [{"steps": -1}, {"lr": -1e-3}, {"lr": math.nan}])
def test_numbers_below_zero_are_refused(options):
    with pytest.raises(
        InputError, match=r"--test-steps .* and --test-lr .*: give numbers from 0 on"
    ):
        PMF(nn.Identity(), **options)


def test_schedule_is_the_published_one():
    """From 1e-6 to 5e-5 in 5 of 100 epochs, then along a cosine that began with the training back
    to 1e-6.
    """
    row = Cosine(200_000, 5e-5, (), 10_000, ratio=0.02)
    assert isinstance(row.stretched(100), Cosine) and row.stretched(100)[:4] == (100, 5e-5, (), 5)
    factor = row.of(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=row.lr)).lr_lambdas[0]
    rates = [row.lr * factor(epoch * 2000) for epoch in (0, 2, 5, 50, 100)]
    cosine = 1e-6 + 0.5 * 4.9e-5 * (1 + math.cos(math.pi * 0.05))
    assert rates == pytest.approx([1e-6, 1e-6 + 0.4 * 4.9e-5, cosine, 2.55e-5, 1e-6])


def test_a_loaded_model_adapts_when_it_predicts(tmp_path):
    torch.manual_seed(0)
    network = backbones.build("conv4", 32)
    args = {"backbone": "conv4", "test_steps": 2, "test_lr": 0.01}
    about = {"method": "pmf", "args": args, **open_dataset("glyphs", "", "train").describe()}
    weights.save(tmp_path / "model.safetensors", PMF(network), about)
    model = fewshot.load(tmp_path)
    assert isinstance(model.network, PMF) and (model.network.steps, model.network.lr) == (2, 0.01)
    pictures, queries = (
        [glyph(1000 + c, 0, i) for c in range(3) for i in some] for some in ((0, 1), (5,))
    )
    model.support(pictures[:-1], ["a", "a", "b", "b", "c"])  # the last class's support counts twice
    guesses = model.predict(queries)
    assert guesses == model.predict(queries)
    support, query = (
        model.transformed([inference.decoded(p) for p in part], None)
        for part in (pictures, queries)
    )
    support[5] = support[4]
    torch.manual_seed(0)
    expected = PMF(network, steps=2, lr=0.01).predict(support[None], query[None], 3)[0].softmax(1)
    found = torch.tensor([list(guess.probabilities.values()) for guess in guesses])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    model.support(pictures[:4], ["a", "a", "b", "b"])  # any number of classes
    assert model.predict(pictures[0]).name in "ab"
    with pytest.raises(InputError, match=r"^pmf adapts all of itself to a task"):
        model.calibrate()


def test_a_trained_model_is_tested_with_other_steps_and_rates(tmp_path):
    flags, fine_tuning = f"--tasks 2 --shots 2 --out {tmp_path}", "--test-steps 2 --test-lr 0.01"
    run_here(
        "pmf",
        f"{flags} {fine_tuning} --size 16 --iters 2 --val-tasks 2 --train-queries 2 --save-tasks",
    )
    trained, before = metrics(tmp_path), weights.load(tmp_path / "model.safetensors")[0]
    assert trained["tasks"] == 2 and len(trained["shots"]) == 1
    assert before.keys() == PMF(backbones.build("conv4", 16)).state_dict().keys()
    for other in (fine_tuning, "--test-steps 0", "--test-steps 2 --test-lr 0.5"):
        run_here("pmf", f"{flags} --test-only {other}")
    found = results_of_tests(tmp_path)
    results = {
        tuple(r["settings"]["tested"][key] for key in ("test_steps", "test_lr")): r["shots"]
        for r in found
    }
    assert results.keys() == {(2, 0.01), (0, "auto"), (2, 0.5)}
    assert results[2, 0.01] == trained["shots"], "what is drawn follows from the task"
    after = weights.load(tmp_path / "model.safetensors")[0]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
