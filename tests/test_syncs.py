"""What every recipe would do on a GPU, on a pretended one: it mixes no devices, and seldom waits.

Each runs as a user runs it, on the embedded data with pictures two at a time. A step that waits for
a number, or for how long a result is, leaves the GPU idle until the next operation arrives. The
bounds are what there is today.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import accelerate
import pytest
import torch
import torch.nn.functional as F
import tyro
from fake_device import FakeDevice
from first_losses import RUNS, module_of
from torch.func import grad, vmap

from fewshot import show
from fewshot.data.query_aware import QueryAware
from fewshot.data.support import NWayKShot
from fewshot.evaluation import detect, meta_test
from fewshot.training import run

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
PICTURES = 2  # of a step
SAMPLING = (
    4  # draws for each picture that is trained on, or pair: positives and negatives of RPN and RoIs
)


class Counts(NamedTuple):
    syncs: Counter[str]  # for each place in the code
    copies: Counter[str]


class Bounds(NamedTuple):
    """Of waits, but for the draws of `SAMPLING`, in a step: for each picture, and whatever their
    number.
    """

    picture: int
    step: int


# For each picture: which proposals are boxes, NMS. MPSR and those with one level: which anchors are
# inside. Pyramids: how many RoIs are of each level.
DETECTORS = {
    "tfa": Bounds(2, 1),
    "fsce": Bounds(2, 1 + 1),  # which RoIs are anchors of the contrastive loss
    "mpsr": Bounds(2 + 1, 1 + 1),  # which proposals are among the best of all pictures'
    "meta_rcnn": Bounds(2 + 1, 1),  # which supports show the class that was drawn
    "vfa": Bounds(2 + 1, 1),
    "defrcn": Bounds(2, 1),
    "fsdetview": Bounds(2 + 1, 1),
    "attention_rpn": Bounds(2, 0),
}
CLASSIFIERS = ["baseline", "proto_net", "maml"]
OTHERS = [
    "baseline_plus",
    "neg_margin",
    "matching_net",
    "relation_net",
    "meta_baseline",
    "feat",
    "frn",
]


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Runs a recipe on a FakeDevice: counts of each step but a stage's first, and of each test."""

    def recipe(name: str, *flags: str) -> tuple[list[Counts], list[Counts]]:
        fake, steps, tests = FakeDevice(), [], []

        def remember(found: list[Counts]) -> None:
            found.append(Counts(fake.syncs.copy(), fake.copies.copy()))
            fake.clear()

        def logged(
            record: run.Training, step: int, *arguments, log=run.Training.log, **more
        ) -> None:
            log(record, step, *arguments, **more)
            remember(steps if step > 1 else [])  # the first makes constants

        def watched(test):
            def counting(*arguments, **more):
                fake.clear()
                result = test(*arguments, **more)
                remember(tests)
                return result

            return counting

        for module, name_of_test in (
            (detect, "detect"),
            (meta_test, "meta_test"),
            (meta_test, "meta_test_images"),
        ):
            monkeypatch.setattr(module, name_of_test, watched(getattr(module, name_of_test)))
        for source in (NWayKShot, QueryAware):
            monkeypatch.setattr(source, "table", first_of_each(source.table))
        monkeypatch.setattr(run.Training, "log", logged)
        monkeypatch.setattr(accelerate.Accelerator, "device", fake.device)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
        monkeypatch.setattr(show, "curves", lambda *_: None)  # drawing takes longer than training
        monkeypatch.setattr(detect, "report", lambda *_, **__: None)
        flags = [*RUNS[name].split(), "--iters", "2", *flags, "--out", str(tmp_path / name)]
        with fake:
            module = module_of(name)
            module.main(tyro.cli(module.Args, args=flags))
        return steps, tests

    return recipe


def first_of_each(table):
    """The table of supports with one support of each class: more take only time."""

    def short(self, *arguments, **more):
        self.entries = [entries[:1] for entries in self.entries]
        return table(self, *arguments, **more)

    return short


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name, counted):
    stages = 2 if name == "fsce" else 1  # its fine-tuning has a loss of its own
    steps, tests = counted(name, *(["--stage", "base"] if stages == 1 else []))
    assert len(steps) == stages and len(tests) == stages
    drawn = PICTURES * (
        2 if name == "attention_rpn" else 1
    )  # pairs of a picture and a class, of which one is absent
    per_picture, per_step = DETECTORS[name]
    for syncs, copies in steps:
        draws = {place: n for place, n in syncs.items() if place.endswith(" sample")}
        assert sum(draws.values()) <= SAMPLING * drawn
        assert syncs.total() - sum(draws.values()) <= per_picture * drawn + per_step, syncs
        # what is drawn, on the CPU, where there is too much; a constant in torchvision's NMS
        assert {place.split()[1] for place in copies} <= {"sample", "nms_by_class"}
        assert copies.total() <= (SAMPLING + 1) * drawn, copies
    # one picture: proposals that are boxes, NMS, scores that count, NMS, for each class where
    # classes are searched for one by one; which classes are known, or levels; boxes, scores and
    # labels brought back
    classes = 15 if name == "attention_rpn" else 1
    for syncs, copies in tests:
        assert syncs.total() <= 4 * classes + 1 + 3, syncs
        assert copies.total() <= 2 * classes + 1, copies


@pytest.mark.parametrize(
    "name", [*CLASSIFIERS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_classifiers(name, counted):
    steps, tests = counted(name, "--queries", "3")
    assert (
        len(steps) == 1 and len(tests) == 2
    )  # the validation and the test, of one and of two numbers of shots
    assert not any(counts.syncs or counts.copies for counts in steps), steps
    for shots, (syncs, copies) in enumerate(tests, 1):
        assert syncs.total() <= shots, syncs  # the accuracies are brought back
        assert copies.total() <= 4 * shots, (
            copies
        )  # which pictures a task has; weights and batches of new heads


def test_devices_do_not_mix():
    with FakeDevice() as fake:
        ours, theirs = torch.ones(3, device=fake.device), torch.ones(3)
        assert ours.device == fake.device and ours.is_cuda and theirs.device.type == "cpu"
        made = (
            ours.view(3, 1).detach(),
            ours.new_zeros(2),
            torch.zeros_like(ours),
            ours + theirs[0],
            F.relu(ours),
        )
        assert all(
            tensor.device == fake.device
            for tensor in (*made, theirs.to(ours), torch.zeros(2, device="cuda"))
        )
        assert torch.arange(3).device.type == ours.cpu().device.type == "cpu"
        for mixed in (
            lambda: ours + theirs,
            lambda: theirs[0].add_(ours[0]),
            lambda: torch.stack([ours, theirs]),
            lambda: vmap(grad(lambda x: (x * torch.ones(1)).sum()))(ours),
        ):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            ours.numpy()


def test_a_module_is_trained_where_it_is():
    with FakeDevice() as fake:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(fake.device)
        optimizers = (
            torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
            torch.optim.Adam(model.parameters()),
        )
        fake.clear()
        for _ in range(2):
            F.cross_entropy(
                model(torch.rand(5, 3, device="cuda")), torch.zeros(5, dtype=int, device="cuda")
            ).backward()
            assert {p.grad.device for p in model.parameters()} == {fake.device}
            for optimizer in optimizers:
                optimizer.step()
        assert not fake.syncs and not fake.copies
        with pytest.raises(RuntimeError, match="same device"):
            model(torch.rand(5, 3))


WAITS = {
    "item": (lambda x: x[0].item(), 1, 0),
    "bool": (lambda x: bool(x.any()), 1, 0),
    "list": (lambda x: x.tolist(), 1, 0),
    "cpu": (lambda x: x.cpu(), 1, 0),
    "copied from": (lambda x: torch.zeros(3).copy_(x), 1, 0),
    "nonzero": (lambda x: (x > 0).nonzero(), 1, 0),
    "where": (lambda x: torch.where(x > 0), 1, 0),
    "mask": (lambda x: x[x > 0], 1, 0),
    "unique": (lambda x: x.unique(), 1, 0),
    "repeated": (lambda x: x.repeat_interleave(torch.ones_like(x, dtype=int)), 1, 0),
    "repeated to a size": (
        lambda x: x.repeat_interleave(torch.ones_like(x, dtype=int), output_size=3),
        0,
        0,
    ),
    "number in a mask": (lambda x: x.__setitem__(x > 0, 0.0), 0, 0),
    "number at an index": (lambda x: x.__setitem__(torch.ones_like(x, dtype=int), 0.0), 0, 1),
    "number in a row": (lambda x: x[1:].fill_(0.0), 0, 0),
    "index": (lambda x: x[torch.ones_like(x, dtype=int)], 0, 0),
    "one hot": (lambda x: F.one_hot(x.long(), 4), 0, 0),
    "list as index": (lambda x: x[[0, 2]], 0, 1),
    "mask of the CPU": (lambda x: x[torch.ones(3, dtype=bool)], 0, 1),
    "constant": (lambda x: torch.tensor([1.0], device=x.device), 0, 1),
    "moved": (lambda x: torch.zeros(3).to(x.device), 0, 1),
    "sent ahead": (lambda x: torch.zeros(3).to(x.device, non_blocking=True), 0, 0),
    "made there": (lambda x: torch.zeros(3, device=x.device), 0, 0),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted(what):
    act, syncs, copies = WAITS[what]
    with FakeDevice() as fake:
        x = torch.ones(3, device=fake.device)
        act(x)
    assert (fake.syncs.total(), fake.copies.total()) == (syncs, copies)
    assert all(place.startswith(f"{Path(__file__).name}:") for place in (*fake.syncs, *fake.copies))
