"""MAML against the reference's numbers, and its shortcuts against plain versions of themselves."""

import copy
import re
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from naming_rule import close, fill, golden, image, rgb_input
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from fewshot import InputError, backbones, heads
from fewshot.data.image_set import ImageSet
from fewshot.evaluation import meta_test
from fewshot.heads.maml import MAML, batch_statistics, inner_loop

CASES = golden("cls_maml")


def our_name(key: str) -> str:
    """The reference's name of a tensor -> ours."""
    return re.sub(
        r"^backbone\.layers\.(\d)\.layers", r"features.blocks.\1", key.replace("head.fc", "head")
    )


def reference(case: str, **options) -> tuple[MAML, dict[str, Tensor]]:
    """The model of a golden case and the arguments of its forward: one 5-way 1-shot task with 10
    queries.
    """
    side = int(case.split("_")[0])
    model = MAML(
        backbones.build("conv4", side), 5, first_order=case.endswith("first_order"), **options
    )
    fill(model, CASES[case]["state"], our_name)
    support, query = (
        rgb_input(*(image(f"maml_{part}{k}", side, side) for k in range(n)))[None]
        for part, n in (("s", 5), ("q", 10))
    )
    labels = torch.arange(5)[None]
    return model, {
        "support": support,
        "labels": labels,
        "query": query,
        "query_labels": labels.repeat_interleave(2, 1),
    }


@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_the_reference(case):
    """In float64: at 84 pixels float32's rounding moves single gradients by 4 % on some processors."""
    expected = CASES[case]
    model, task = reference(case)
    model = model.double()
    task = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in task.items()
    }
    loss = model(**task)
    assert loss.item() == pytest.approx(expected["query_loss"], rel=1e-5)
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert ours.keys() == {our_name(key) for key in expected["meta_grad_norm"]}
    for key, norm in expected["meta_grad_norm"].items():
        gradient = ours[our_name(key)]
        if norm < 1e-5:  # biases in front of batch norm: rounding errors of 0
            assert gradient.norm() < 1e-12
        else:
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-5)
            close(gradient, expected["meta_grad"][key], 2e-5)


@pytest.mark.parametrize("case", ["32_second_order", "84_second_order"])
@torch.no_grad()
def test_adaptation_equals_the_reference(case):
    expected = CASES[case]
    model, task = reference(case)
    network, theta = (
        nn.Sequential(OrderedDict(model.named_children())),
        dict(model.named_parameters()),
    )
    support, labels, query, target = (x[0] for x in task.values())
    for steps, loss in enumerate(expected["inner_losses"]):
        adapted = inner_loop(network, theta, support, labels, steps=steps, lr=0.01)
        logits = functional_call(network, adapted, (support,))
        assert F.cross_entropy(logits, labels).item() == pytest.approx(loss, rel=1e-4)
    loss = F.cross_entropy(network(query), target).item()
    assert loss == pytest.approx(expected["loss_without_adaptation"], rel=1e-4)
    # the logits of a query depend on the queries beside it, also in eval mode
    model.eval()
    few = expected["meta_test_query_prob_5_steps_first_two_images_only"]
    for probabilities in (expected["meta_test_query_prob_5_steps"], few):
        logits = model.predict(task["support"], task["query"][:, : len(probabilities)], 5)
        close(logits[0].softmax(1), probabilities, 1e-4)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


SECOND = (
    [30.412032, 14.138350, 23.303923, 0.594631],
    [0.024631, 0.384726, -0.035571, -0.05328, -0.320507],
)
FIRST = (
    [17.136421, 9.531695, 10.896046, 0.360854],
    [-0.006987, 0.145091, 0.012691, -0.025338, -0.125457],
)


@pytest.mark.parametrize("first_order", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equals_the_specification_in_double_precision(first_order):
    model = MAML(backbones.build("conv4", 84), 5, first_order=first_order).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                scale = (2 / (p.shape[0] * p[0, 0].numel())) ** 0.5 if p.dim() == 4 else 0.02
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
            else:
                p.fill_(float(name.endswith("1.weight")))
    support, query, labels = (
        noise(5, 3, 84, 84, seed=2)[None],
        noise(10, 3, 84, 84, seed=3)[None],
        torch.arange(5),
    )
    loss = model(support, labels[None], query, torch.cat([labels, labels.flip(0)])[None])
    assert loss.item() == pytest.approx(1.735606, abs=1e-6)
    loss.backward()
    norms, bias = FIRST if first_order else SECOND
    gradients = {name: p.grad for name, p in model.named_parameters()}
    every = torch.cat([g.flatten() for g in gradients.values()])
    some = [
        gradients[f"{name}.weight"]
        for name in ("features.blocks.0.0", "head", "features.blocks.0.1")
    ]
    assert [g.norm().item() for g in (every, *some)] == pytest.approx(norms, abs=2e-6)
    assert gradients["head.bias"].tolist() == pytest.approx(bias, abs=1e-6)
    rows = (
        [0.23816, 0.326533, 0.102491, 0.16376, 0.169056],
        [0.269235, 0.275525, 0.175948, 0.169148, 0.110144],
    )
    for row, logits in zip(rows, model.predict(support, query, 5)[0]):
        assert logits.softmax(0).tolist() == pytest.approx(row, abs=1e-6)


def small(tasks: int, **options) -> tuple[MAML, list[Tensor]]:
    """A 3-way model in double precision and `tasks` tasks of 2 shots and 3 queries, as arguments of
    forward.
    """
    torch.manual_seed(0)
    model = MAML(backbones.build("conv4", 16), 3, lr=0.05, **options).double()
    support, query = noise(tasks, 6, 3, 16, 16, seed=1), noise(tasks, 9, 3, 16, 16, seed=2)
    labels = torch.arange(3).expand(tasks, -1)
    return model, [support, labels.repeat_interleave(2, 1), query, labels.repeat_interleave(3, 1)]


def plain() -> nn.Module:
    """The network of the small model with PyTorch's own batch norms."""
    backbone = backbones.build("conv4", 16)
    return (
        nn.Sequential(OrderedDict(features=backbone, head=nn.Linear(backbone.out_features, 3)))
        .double()
        .train()
    )


def gradient(loss: Tensor, model: MAML) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("first_order", [False, True])
def test_tasks_at_once_equal_a_plain_loop(first_order):
    """The plain loop takes one task after another, with torch.autograd alone and PyTorch's batch
    norms.
    """
    model, (support, labels, query, targets) = small(3, first_order=first_order)
    losses, logits = [], []
    for s, y, q, t in zip(support, labels, query, targets):
        theta = dict(model.named_parameters())
        for _ in range(2):
            loss = F.cross_entropy(functional_call(plain(), theta, (s,)), y)
            steps = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            theta = {name: p - 0.05 * g for (name, p), g in zip(theta.items(), steps)}
        logits.append(functional_call(plain(), theta, (q,)).detach())
        losses.append(F.cross_entropy(functional_call(plain(), theta, (q,)), t))
    expected = torch.stack(losses).mean()
    expected_gradient = gradient(expected, model)
    model.test_steps = 2
    for at_once in (None, 1, 2, 3):  # one by one on a CPU, the same, with one left over, all
        model.at_once = at_once
        loss = model(support, labels, query, targets)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, model), expected_gradient)
        torch.testing.assert_close(model.predict(support, query, 3), torch.stack(logits))


def test_first_order_is_another_gradient_of_the_same_loss():
    (second, task), (first, _) = small(1), small(1, first_order=True)
    a, b = second(*task), first(*task)
    assert a.item() == b.item()
    exact, approximate = gradient(a, second), gradient(b, first)
    assert (exact - approximate).norm() > 0.01 * exact.norm()


def test_batch_norms_ignore_and_keep_their_running_statistics():
    network = backbones.build("resnet12", 16)
    names = list(network.state_dict())
    images = noise(4, 3, 16, 16, seed=3).float()
    expected = copy.deepcopy(network).train()(images)  # by batch statistics
    batch_statistics(network)
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(images), expected)
    assert list(network.state_dict()) == names
    for name, buffer in network.named_buffers():
        assert (buffer == float(name.endswith("running_var"))).all(), f"{name} moved"


def test_other_ways_than_the_head_has_are_refused():
    model, (support, _, query, _) = small(1)
    with pytest.raises(InputError, match="2-way tasks: this MAML is made for 3 ways"):
        model.predict(support, query, 2)


class Brightness(nn.Module):
    """A class is the mean brightness of its supports: with and without features."""

    def features(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None]

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return heads.prototype(support, query, ways)

    def predict(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        assert support.dim() == query.dim() == 5 and not self.training
        return self.classify(
            support.mean((2, 3, 4))[..., None], query.mean((2, 3, 4))[..., None], ways
        )


@dataclass(frozen=True)
class Grey:
    """Pictures of a brightness of their own."""

    def __call__(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4), (37 * index % 256,) * 3)

    def version(self) -> None:
        return None


@dataclass(frozen=True)
class Process:
    """What meta-test uses of an Accelerator, in one of several processes; the sum is left to the
    test.
    """

    process_index: int
    num_processes: int
    is_main_process = False
    device = torch.device("cpu")

    def unwrap_model(self, model: nn.Module, keep_torch_compile: bool) -> nn.Module:
        return model

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def autocast(self) -> nullcontext:
        return nullcontext()


@pytest.mark.parametrize("held", [meta_test.HELD_BYTES, 1], ids=["all held", "chunk by chunk"])
def test_images_are_tested_on_the_tasks_that_features_are(held, monkeypatch):
    monkeypatch.setattr(meta_test, "HELD_BYTES", held)
    labels = np.arange(60) % 4
    grey = ImageSet("grey", "test", list("abcd"), labels, Grey(), size=4, stored=4, augment=False)
    options = {"ways": 3, "shots": (1, 4), "queries": 5, "tasks": 20, "seed": 2}
    model = Brightness()
    expected = meta_test.meta_test(Process(0, 1), model, grey, **options)
    assert expected[1].ci95 > 0 and expected[1].accuracy < 100
    for world in (1, 2, 5):
        parts = [
            meta_test.meta_test_images(Process(r, world), model, grey, **options)
            for r in range(world)
        ]
        for k in (1, 4):
            assert np.array_equal(sum(part[k].per_task for part in parts), expected[k].per_task)
    assert model.training


def descend() -> dict[str, Tensor]:
    """The small model after three steps of SGD on a process's share of four tasks:
    tests/test_same.py compares processes.
    """
    model, tasks = small(4)
    accelerator = Accelerator(cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(3):
        accelerator.backward(model(*(x[rank::world] for x in tasks)))
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model).state_dict()
