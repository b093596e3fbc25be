"""Threads that share a model get what one alone would, and supports change between predictions, not
in them.
"""

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from test_inference import (
    NAMES,
    RECIPES,
    backbone,
    meta_rcnn,
    pictures,
    save_classifier,
    save_classifiers,
    save_detector,
    scenes,
)
from test_prototype_detector import base as untrained
from torch import nn

import fewshot
from fewshot import InputError, weights
from fewshot.backbones.fpn import fpn
from fewshot.backbones.trunks import c4
from fewshot.detectors import calibrate
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.prototype import PrototypeDetector
from fewshot.detectors.tfa import TFA
from fewshot.heads.pmf import PMF

DETECTORS = ["tfa", "meta_rcnn", "attention_rpn", "prototype_detector"]
BOXES = [(10, 10, 60, 70), (20, 20, 90, 80)]
TAUGHT = {  # whose supports can be changed, and by which two sets of classes
    "meta_rcnn": (["glyph-03", "glyph-05"], ["glyph-01", "glyph-02"]),
    "attention_rpn": (["house", "tree"], ["star", "moon"]),
    "prototype_detector": (["house", "tree"], ["star", "moon"]),
}
THREADS, TIMES = 4, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """An untrained model of every classifier, and of detectors, these with novel classes that can
    be calibrated.
    """
    folder = tmp_path_factory.mktemp("runs")
    places = save_classifiers(folder)
    detectors = {"tfa": TFA(fpn("small"), 15, test_proposals=(300, 30)), "meta_rcnn": meta_rcnn()}
    detectors["attention_rpn"] = AttentionRPN(c4("small"), 15, test_proposals=(300, 30))
    for method, model in detectors.items():
        places[method] = save_detector(folder / method, method, model, context=4)
    first_stage, about = untrained()
    model = PrototypeDetector(first_stage, about, 15, roi_size=2)
    places["prototype_detector"] = save_detector(folder / "prototypes", "prototype_detector", model)
    file = folder / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    fingerprint = calibrate.backbone(f"resnet18={file}").fingerprint()
    for method in DETECTORS:
        path = places[method] / "model.safetensors"
        state, about = weights.load(path)
        names = ["house", "star", *about["classes"][:8]]
        vectors = {name: torch.rand(1000).tolist() for name in names}
        kept = {"backbone": f"resnet18={file}", "fingerprint": fingerprint, "prototypes": vectors}
        weights.save_state(path, state, {**about, "calibration": kept})
    return places


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """What each gives in a thread of its own, begun together, where threads take turns as often as
    they can.
    """
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            return list(pool.map(begin, works))
    finally:
        sys.setswitchinterval(interval)


def plain(results: list) -> list:
    """To be compared by ==."""
    return [
        tuple(x.tolist() if isinstance(x, torch.Tensor) else x for x in result)
        for result in results
    ]


class Between:
    """Calls `work` in another thread the first time that it is called itself, and gives it half a
    second to end.
    """

    def __init__(self, work: Callable[[], Any]):
        self.work, self.thread, self.failed = work, None, []

    def _work(self) -> None:
        try:
            self.result = self.work()
        except Exception as error:
            self.failed.append(error)

    def __call__(self, *_: Any) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._work)
            self.thread.start()
            self.thread.join(0.5)

    def join(self) -> Any:
        self.thread.join()
        assert not self.failed, self.failed
        return self.result


def taught(runs: dict[str, Path], method: str, second: bool = False) -> Any:
    model = fewshot.load(runs[method])
    teach(model, second)
    return model


def teach(model: Any, second: bool) -> None:
    """One of two sets of supports, where a model has any."""
    if model.method in TAUGHT:
        names = TAUGHT[model.method][second]
        model.support(scenes(4)[2 * second :][:2], BOXES, names)
    elif model.method not in DETECTORS:
        shown = pictures(2, first=5 if second else 0)
        names = ["moon", "sun", "cloud"] if second else NAMES
        # the second classes are the first ones' pictures in another order: what is mixed up would
        # be seen
        model.support(
            shown[2:] + shown[:2] if second else shown, [name for name in names for _ in range(2)]
        )


def check_threads(model: Any) -> None:
    if detects := model.method in DETECTORS:
        asked = [
            ([scene], {"test_proposals": 10 + 5 * i, "score_above": -1})
            for i, scene in enumerate(scenes(THREADS))
        ]
        proposals = getattr(model.network, "base", model.network).rpn
        before = tuple(proposals.test_proposals)
    else:
        asked = [(pictures(2, first=3 + i), {}) for i in range(THREADS)]
    works = [
        lambda pictures=pictures, options=options: model.predict(pictures, **options)
        for pictures, options in asked
    ]
    alone = [plain(work()) for work in works]
    assert all(alone) and len({str(result) for result in alone}) == THREADS, (
        "the threads ask for different things"
    )
    for _ in range(TIMES):
        assert [plain(result) for result in at_once(works)] == alone
    assert not detects or tuple(proposals.test_proposals) == before


@pytest.mark.parametrize("method", [*RECIPES, *DETECTORS])
def test_threads_get_what_one_alone_gets(method, runs):
    check_threads(taught(runs, method))


@pytest.mark.parametrize("method", DETECTORS)
def test_threads_get_the_calibrated_scores_of_one_alone(method, runs):
    model = taught(runs, method)
    model.calibrate()
    check_threads(model)


@pytest.mark.parametrize("method", RECIPES)
def test_supports_of_classifiers_wait_for_a_prediction(method, runs):
    model, asked = taught(runs, method), pictures(2, first=3)
    first, second = (
        plain(taught(runs, method, second=second).predict(asked)) for second in (False, True)
    )
    assert first != second
    between, classify = Between(lambda: teach(model, second=True)), model.classify

    def slowly(query: torch.Tensor) -> torch.Tensor:
        logits = classify(query)
        between()
        return logits

    model.classify = slowly
    assert plain(model.predict(asked)) == first
    between.join()
    assert plain(model.predict(asked)) == second


def test_rejections_are_by_the_supports_of_the_prediction(runs):
    model, asked = taught(runs, "proto_net"), pictures(2, first=3)
    model.calibrate()
    first = plain(model.predict(asked))
    between, classify = (
        Between(lambda: (teach(model, second=True), model.calibrate())),
        model.classify,
    )
    model.classify = lambda query: (classify(query), between())[0]
    assert plain(model.predict(asked)) == first and first[0][4] is not None
    between.join()
    assert model.predict(asked)[0].name in ("moon", "sun", "cloud")


@pytest.mark.parametrize("method", TAUGHT)
def test_supports_of_detectors_wait_for_a_prediction(method, runs):
    model, images = taught(runs, method), scenes(3)
    first, second = (
        plain(taught(runs, method, second=second).predict(images, at_once=1, score_above=0))
        for second in (False, True)
    )
    assert first != second and all(names for _, _, names in first)
    passes, between = [], Between(lambda: teach(model, second=True))

    def hook(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:  # with one picture found out and two to come
            between()

    handle = model.network.trunk.register_forward_pre_hook(hook)
    assert plain(model.predict(images, at_once=1, score_above=0)) == first
    between.join()
    handle.remove()
    assert plain(model.predict(images, at_once=1, score_above=0)) == second


class Drawing(nn.Module):
    """A classifier of one's own that draws twice for every answer."""

    def __init__(self):
        super().__init__()
        self.weight, self.between = nn.Parameter(torch.ones(1)), lambda: None

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :5]

    def classify(self, support: torch.Tensor, query: torch.Tensor, ways: int) -> torch.Tensor:
        first = torch.rand(query.shape[1], ways)
        self.between()
        return (first + torch.rand(query.shape[1], ways))[None]


def test_what_a_model_draws_is_its_own(tmp_path):
    """Of torch's one stream of random numbers, which all models of a process share."""
    place = save_classifier(tmp_path / "drawing", "drawing", Drawing())
    one, other = (fewshot.load(place, model=Drawing()) for _ in range(2))
    for model in (one, other):
        teach(model, second=False)
    expected, state = plain(one.predict(pictures(2))), torch.get_rng_state()
    inside, ended = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        seconds = []

        def begin_the_other() -> None:
            seconds.append(pool.submit(other.predict, pictures(2)))
            inside.wait(0.5)

        one.network.between = begin_the_other
        other.network.between = lambda: (inside.set(), ended.wait(0.5))
        assert plain(one.predict(pictures(2))) == expected
        ended.set()
        assert plain(seconds[0].result()) == expected
    assert torch.equal(torch.get_rng_state(), state), "the stream is where it was"


def test_p_m_f_draws_its_own_augmentations(tmp_path):
    place = save_classifier(tmp_path / "pmf", "my_pmf", PMF(backbone(), steps=2, lr=0.01))
    model = fewshot.load(place, model=PMF(backbone(), steps=2, lr=0.01))
    teach(model, second=False)
    works = [lambda first=i: model.predict(pictures(1, first=3 + first)) for i in range(2)]
    alone = [plain(work()) for work in works]
    for _ in range(TIMES):
        assert [plain(result) for result in at_once(works)] == alone


def test_supports_that_are_wrong_leave_the_old_ones(runs):
    model, images = taught(runs, "attention_rpn"), scenes(2)
    before = plain(model.predict(images))
    with pytest.raises(InputError, match=r"box .* is not inside its picture"):
        model.support(images, [(0, 0, 10, 10), (0, 0, 900, 10)], ["star", "moon"])
    assert plain(model.predict(images)) == before and model.classes == TAUGHT["attention_rpn"][0]


@pytest.mark.parametrize("name", ["tfa", "proto_net"])
def test_models_are_copied_and_sent_to_processes(name, runs):
    model = fewshot.load(runs[name])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.lock is not model.lock
        teach(other, second=False)
        assert len(other.predict(scenes(2) if name == "tfa" else pictures(1))) >= 2
