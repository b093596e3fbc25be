"""Trained models in use: supports, predictions, pictures of any kind, the hub's files, exports, and
bad input.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from runs import QUICK, run_here
from safetensors.torch import load_file
from torch import nn

import fewshot
from fewshot import InputError, backbones, heads, inference, weights
from fewshot.backbones.fpn import fpn
from fewshot.backbones.trunks import c4
from fewshot.data import detection
from fewshot.data.classification import open_dataset
from fewshot.data.glyphs import glyph
from fewshot.data.pipeline import Pipeline
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.meta_rcnn import MetaDetector, MetaRCNN
from fewshot.detectors.tfa import TFA
from fewshot.heads import (
    CosineLinear,
    FewShotClassifier,
    FineTuned,
    NegMargin,
    SupervisedClassifier,
    frn,
)
from fewshot.heads.feat import FEAT
from fewshot.heads.maml import MAML

ROOT = Path(__file__).parents[1]
NAMES = ["house", "tree", "star"]  # of classes that no recipe trains on
ARGS = {
    "dataset": "glyphs",
    "backbone": "conv4",
    "distance": "squared",
    "temperature": 20.0,
    "test_temperature": 2.0,
}
ARGS |= {"ways": 3, "test_steps": 2, "inner_lr": 0.1}
WORKED_OUT = {"feat": {"temperature": 64.0}}  # what a recipe adds to its file
# a model of every classifier's recipe, by its backbone
RECIPES = {
    "baseline": lambda net: SupervisedClassifier(
        net, nn.Linear(net.out_features, 6), FineTuned("linear")
    ),
    "baseline_plus": lambda net: SupervisedClassifier(
        net, CosineLinear(net.out_features, 6), FineTuned("cosine", 2.0)
    ),
    "neg_margin": lambda net: SupervisedClassifier(
        net, NegMargin(net.out_features, 6, -0.02, 10.0), FineTuned("normalised", 2.0)
    ),
    "proto_net": lambda net: FewShotClassifier(net, heads.Prototype("squared")),
    "matching_net": lambda net: FewShotClassifier(net, heads.Matching(20.0)),
    "relation_net": lambda net: FewShotClassifier(
        net, heads.RelationHead(net.out_channels, net.map_size)
    ),
    "meta_baseline": lambda net: FewShotClassifier(net, heads.MetaBaseline()),
    "maml": lambda net: MAML(net, 3, test_steps=2, lr=0.1),
    "feat": lambda net: FewShotClassifier(net, FEAT(net.out_features)),
    "frn": lambda net: FewShotClassifier(*frn.parts(net)),
}


def save_classifier(folder: Path, method: str, model: nn.Module) -> Path:
    """A model as a recipe saves it on the glyphs, with results."""
    results = {"ways": 5, "tasks": 10, "shots": {"5": {"accuracy": 71.25, "ci95": 1.5}}}
    about = {
        "method": method,
        "args": ARGS,
        **open_dataset("glyphs", "", "train").describe(),
        "results": results,
    }
    about |= WORKED_OUT.get(method, {})
    folder.mkdir()
    weights.save(folder / "model.safetensors", model, about)
    return folder


def save_classifiers(folder: Path) -> dict[str, Path]:
    """An untrained model of every classifier."""
    torch.manual_seed(0)
    places = {}
    for method, build in RECIPES.items():
        model = build(backbone(pooled=method != "relation_net"))
        places[method] = save_classifier(folder / method, method, model)
    return places


def save_detector(folder: Path, method: str, model: nn.Module, **more) -> Path:
    dataset = detection.open_detection("glyphs", "", part="test")
    about = {
        "method": method,
        "args": ARGS | {"split": 1, "shots": 5},
        "stage": "base",
        **model.describe(),
    }
    about |= dataset.restrict(dataset.base).describe() | {
        "pictures": Pipeline().describe(),
        "support_size": 96,
        **more,
    }
    folder.mkdir()
    weights.save(
        folder / "model.safetensors",
        model,
        about | {"results": {"AP50": {"base": 12.5, "all": 12.5}}},
    )
    return folder


def backbone(**options) -> nn.Module:
    return backbones.build("conv4", open_dataset("glyphs", "", "train").size, **options)


def meta_rcnn(cls: type[MetaDetector] = MetaRCNN) -> MetaDetector:
    """An untrained one that finds something of each of the 15 classes."""
    model = cls(c4("small", meta=True), 15, test_proposals=(300, 30))
    nn.init.normal_(model.cls.weight, std=0.2)
    model.set_prototypes(torch.rand(15, model.prototypes.shape[1]), torch.arange(15))
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """An untrained model of every classifier, and of a detector of each sort, as recipes save them."""
    folder = tmp_path_factory.mktemp("runs")
    places = save_classifiers(folder)
    places["tfa"] = save_detector(
        folder / "tfa", "tfa", TFA(fpn("small"), 15, test_proposals=(300, 30))
    )
    places["meta_rcnn"] = save_detector(folder / "meta_rcnn", "meta_rcnn", meta_rcnn())
    attention = AttentionRPN(c4("small"), 15, test_proposals=(300, 30))
    places["attention_rpn"] = save_detector(
        folder / "attention_rpn", "attention_rpn", attention, context=4
    )
    return places


def pictures(n: int, first: int = 0) -> list[np.ndarray]:
    """n pictures of each of the three classes, class by class."""
    return [glyph(1000 + c, 0, i) for c in range(3) for i in range(first, first + n)]


def scenes(n: int) -> list[torch.Tensor]:
    dataset = detection.open_detection("glyphs", "", part="test")
    return [dataset.image(i) for i in range(n)]


def extracted(model: inference.Classifier, pictures: list) -> torch.Tensor:
    return model.extracted(model.transformed([inference.decoded(p) for p in pictures], None))


def table(guesses: list[inference.Guess]) -> torch.Tensor:
    return torch.tensor([list(guess.probabilities.values()) for guess in guesses])


@pytest.mark.parametrize("method", RECIPES)
def test_classifiers_learn_classes_from_supports(method, runs):
    model = fewshot.load(runs[method])
    labels = [name for name in NAMES for _ in range(3)]
    model.support(pictures(3), labels)
    guesses = model.predict(pictures(4, first=3))
    assert model.classes == NAMES and len(guesses) == 12
    for guess in guesses:
        assert sum(guess.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert (
            guess.probability
            == max(guess.probabilities.values())
            == guess.probabilities[guess.name]
        )
    # as the recipe's model classifies
    recipe = RECIPES[method](backbone(pooled=method != "relation_net"))
    recipe.load_state_dict(load_file(runs[method] / "model.safetensors"))
    recipe.eval()
    x = [
        model.transformed([inference.decoded(p) for p in pictures(*a)], None)[None]
        for a in ((3,), (4, 3))
    ]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        if method == "maml":
            logits = recipe.predict(*x, 3)
        else:
            logits = recipe.classify(*(recipe.features(part[0])[None] for part in x), 3)
    assert torch.allclose(table(guesses), logits[0].softmax(1), atol=1e-5)
    if method != "maml":  # to which it matters what else is asked
        assert torch.allclose(
            table(model.predict(pictures(1, first=3))), table([guesses[0], guesses[4], guesses[8]])
        )


def test_pictures_come_in_any_form(runs, tmp_path):
    model = fewshot.load(runs["proto_net"])
    model.support(pictures(2), [name for name in NAMES for _ in range(2)])
    array = pictures(1)[1]
    Image.fromarray(array).save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array]
    forms.append(torch.from_numpy(array).permute(2, 0, 1))
    one = model.predict(forms[0])
    assert isinstance(one, inference.Guess)
    assert [model.predict(form) for form in forms] == [one] * 5 and model.predict(forms)[
        4
    ].name == one.name
    assert model.predict([]) == []
    dataset = open_dataset("glyphs", "", "test")  # and as the recipe's test sees them
    (x,) = model.transformed([dataset.pixels(7)], None)
    assert torch.equal(x, dataset.normalisation(dataset.pixels(7)))


def test_classes_may_have_different_numbers_of_supports(runs):
    three, unequal = pictures(3), pictures(3)[:-2]  # the last class has one
    labels = ["a"] * 3 + ["b"] * 3 + ["c"]
    query = pictures(2, first=5)
    model = fewshot.load(runs["proto_net"])
    model.support(unequal, labels)
    means = extracted(model, three).view(3, 3, -1)
    prototypes = torch.stack([means[0].mean(0), means[1].mean(0), means[2, 0]])
    expected = (-torch.cdist(extracted(model, query), prototypes).square()).softmax(1)
    assert torch.allclose(table(model.predict(query)), expected, atol=1e-4)
    for method in (
        "matching_net",
        "relation_net",
        "meta_baseline",
        "feat",
        "frn",
        "baseline",
        "maml",
    ):
        model = fewshot.load(runs[method])
        model.support(unequal, labels)
        guesses = model.predict(query)
        assert {guess.name for guess in guesses} <= {"a", "b", "c"}
        if method in ("matching_net", "frn"):
            model.support(unequal + unequal[-1:], [*labels, "c"])  # a support twice is no other
            assert torch.allclose(table(model.predict(query)), table(guesses), atol=1e-5)


class Angles(nn.Module):
    """A recipe of one's own: the cosine to class means, times a learnt temperature, and whatever
    `draws` adds.
    """

    def __init__(self, features: nn.Module, draws: float = 0.0):
        super().__init__()
        self.features, self.draws, self.sharpness = features, draws, nn.Parameter(torch.tensor(3.0))

    def classify(self, support, query, ways):
        means = support.unflatten(1, (ways, -1)).mean(2)
        noise = self.draws * torch.randn(len(query), query.shape[1], ways)
        return self.sharpness * heads.cosines(query, means) + noise


def test_a_classifier_of_ones_own(tmp_path):
    trained = Angles(backbone()).eval()
    trained.sharpness.data += 4.5
    place = save_classifier(tmp_path / "mine", "my_angles", trained)
    with pytest.raises(
        InputError, match=r"'my_angles', which is none of baseline, .*model=MyModel"
    ):
        fewshot.load(place)
    model = fewshot.load(place, model=Angles(backbone()))
    assert isinstance(model, inference.Classifier) and model.method == "my_angles"
    model.support(pictures(2), [name for name in NAMES for _ in range(2)])
    given = table(model.predict(pictures(3, first=2)))
    x = [
        model.transformed([inference.decoded(p) for p in pictures(*a)], None)
        for a in ((2,), (3, 2))
    ]
    with torch.no_grad():
        logits = trained.classify(trained.features(x[0])[None], trained.features(x[1])[None], 3)[0]
    assert torch.allclose(given, logits.softmax(1), atol=1e-5)
    model = fewshot.load(
        place, model=Angles(backbone(), draws=1.0)
    )  # as one that trains a head for every task
    model.support(pictures(2)[:-1], ["a", "a", "b", "b", "c"])
    before, once = torch.get_rng_state(), model.predict(pictures(1, first=2))
    assert once == model.predict(pictures(1, first=2)) and torch.equal(
        torch.get_rng_state(), before
    )

    with pytest.raises(InputError, match=r"was it made with another backbone or recipe\?"):
        fewshot.load(place, model=Angles(backbones.build("resnet12", 32)))
    with pytest.raises(InputError, match=r"sharpness is missing from .*proto"):
        place = save_classifier(
            tmp_path / "proto", "proto_net", FewShotClassifier(backbone(), heads.Prototype())
        )
        fewshot.load(place, model=trained)
    with pytest.raises(
        InputError, match="Linear has neither features and classify, nor predict, nor detect"
    ):
        fewshot.load(place, model=nn.Linear(1, 1))
    with pytest.raises(InputError, match="is a classifier, and MetaRCNN is a detector"):
        fewshot.load(place, model=meta_rcnn())
    # one that adapts all of itself
    place = save_classifier(tmp_path / "maml", "my_maml", MAML(backbone(), 3, test_steps=1))
    model = fewshot.load(place, model=MAML(backbone(), 3, test_steps=1))
    with pytest.raises(InputError, match="2 classes of supports: this my_maml was trained for 3"):
        model.support(pictures(1)[:2], ["a", "b"])
    model.support(pictures(1), NAMES)
    assert model.predict(pictures(1, first=2))[0].name in NAMES


class Sum(MetaDetector):
    def aggregate(self, queries, vector):
        return queries + vector


class Wider(AttentionRPN):
    pass


def test_a_detector_of_ones_own(tmp_path, runs):
    trained = meta_rcnn(Sum).eval()
    place = save_detector(tmp_path / "sum", "sum_rcnn", trained)
    model = fewshot.load(place, model=meta_rcnn(Sum))
    (image,) = scenes(1)
    with torch.no_grad():
        x = model.normalisation(image[None])
        ((boxes, scores, labels),) = trained.detect(x, [(160, 160)])
    found = model.predict(image)
    assert len(scores) and torch.equal(found.scores, scores) and torch.equal(found.boxes, boxes)
    assert found.names == [model.classes[i] for i in labels]
    one, other = ((10, 10, 60, 70), (0, 0, 160, 160))
    model.support([image, image], [one, other], ["glyph-03", "glyph-05"])
    assert model.network.known.nonzero()[:, 0].tolist() == [3, 5]
    vectors = torch.cat(
        [model._support_vectors(image, torch.tensor(box).float(), None) for box in (one, other)]
    )
    trained.set_prototypes(vectors, torch.tensor([3, 5]))
    assert torch.equal(model.predict(image).scores, trained.detect(x, [(160, 160)])[0].scores)
    with pytest.raises(InputError, match="Sum has no box head that prototypes fold into"):
        model.exportable()
    with pytest.raises(InputError, match="is a detector, and Angles is a classifier"):
        fewshot.load(place, model=Angles(backbone()))

    model = fewshot.load(
        runs["attention_rpn"], model=Wider(c4("small"), 15, test_proposals=(300, 30))
    )
    model.support([image], [one], ["house"])
    expected = fewshot.load(runs["attention_rpn"])
    expected.support([image], [one], ["house"])
    assert torch.allclose(model.predict(image).scores, expected.predict(image).scores, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pictures_and_boxes_on_a_gpu(runs):
    for method in ("meta_rcnn", "attention_rpn"):
        for device in ("cpu", "cuda"):
            model = fewshot.load(runs[method], device)
            image = scenes(1)[0].cuda()
            model.support([image], torch.tensor([[10, 10, 60, 70]]).cuda(), ["glyph-03"])
            assert model.predict(image).boxes.device.type == "cpu"


def test_detectors(runs):
    tfa = fewshot.load(runs["tfa"])
    images = scenes(2)
    found = tfa.predict(images)
    assert len(found) == 2 and all(len(f.boxes) == len(f.scores) == len(f.names) for f in found)
    with pytest.raises(InputError, match=r"tfa has no supports: fine-tune it .* recipes/tfa\.py"):
        tfa.support(images, None, ["a", "b"])
    meta = fewshot.load(runs["meta_rcnn"])
    assert meta.predict(images[0]).boxes.shape[1] == 4  # the file holds prototypes
    with pytest.raises(InputError, match="not trained for 'house' but for glyph-00"):
        meta.support(images, None, ["house", "glyph-01"])
    meta.support(images, [(10, 10, 60, 70), (0, 0, 160, 160)], ["glyph-03", "glyph-05"])
    assert meta.network.known.nonzero()[:, 0].tolist() == [3, 5]
    assert set(meta.predict(images[0]).names) <= {"glyph-03", "glyph-05"} | set(meta.classes)


def test_attention_rpn_takes_classes_that_nobody_trained(runs):
    model = fewshot.load(runs["attention_rpn"])
    images = scenes(3)
    model.support(images[:2], [(10, 10, 60, 70), (20, 20, 90, 80)], ["house", "tree"])
    found = model.predict(images, score_above=0.3)
    assert model.classes == ["house", "tree"] and {name for f in found for name in f.names} <= {
        "house",
        "tree",
    }
    shared = model.predict(images[0], share_proposals=True)
    assert shared.boxes.shape[1] == 4
    large = torch.nn.functional.interpolate(images[2][None].float(), scale_factor=2).to(
        torch.uint8
    )[0]
    model.pipeline = Pipeline(
        short=160
    )  # resized back to what it was, boxes are those of the larger picture
    again = model.predict(large)
    assert (
        torch.allclose(again.boxes, 2 * model.predict(images[2]).boxes, atol=3.0)
        or len(again.boxes) == 0
    )
    assert model.show(images[:2]).axes and model.show(images[0]).axes


def test_saved_and_loaded_again(runs, tmp_path, monkeypatch):
    """What push_to_hub uploads, without a hub: the file, and a card with the results."""
    model = fewshot.load(runs["proto_net"])
    model.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert (
        "| 5-way 5-shot, 10 tasks | 71.25 ± 1.50 % |" in card and "# proto_net on glyphs\n" in card
    )
    again = inference.Classifier.from_pretrained(tmp_path / "m")
    assert again.method == "proto_net" and again.about == model.about
    uploaded = {}
    api = "huggingface_hub.hub_mixin.HfApi"
    monkeypatch.setattr(
        f"{api}.create_repo", lambda self, repo_id, **more: type("Url", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(
        f"{api}.upload_folder",
        lambda self, **more: uploaded.update(
            {p.name: p.read_text(errors="ignore") for p in more["folder_path"].iterdir()}
        ),
    )
    fewshot.load(runs["tfa"]).push_to_hub("me/glyph-detector")
    assert set(uploaded) >= {"model.safetensors", "README.md"}
    assert (
        'fewshot.load("me/glyph-detector")' in uploaded["README.md"]
        and "| AP50 | base" in uploaded["README.md"]
    )


def test_exports_equal_the_model(runs, tmp_path):
    model = fewshot.load(runs["proto_net"])
    model.support(pictures(2), [name for name in NAMES for _ in range(2)])
    images = model.transformed([inference.decoded(p) for p in pictures(2, first=4)], None)
    box_head = fewshot.load(runs["meta_rcnn"])
    vectors = torch.randn(9, box_head.network.prototypes.shape[1])
    cases = []
    for method in ("proto_net", "meta_baseline", "relation_net", "feat"):
        model = fewshot.load(runs[method])
        model.support(pictures(2), [name for name in NAMES for _ in range(2)])
        cases.append((model.exportable(), images, [model.classify(model.extracted(images))]))
    cases += [
        (box_head.exportable(), vectors, list(box_head.network.classify(vectors))),
    ]
    for module, example, expected in cases:
        batch = torch.export.Dim("batch", min=2, max=1000)
        program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "m.pt2")
        loaded = torch.export.load(tmp_path / "m.pt2").module()
        for some in (example, example[:4]):  # another batch than the example
            given = loaded(some)
            for ours, wanted in zip(given if isinstance(given, tuple) else [given], expected):
                assert torch.allclose(ours, wanted[: len(some)], atol=1e-4)
    with pytest.raises(InputError, match="TFA has no box head"):
        fewshot.load(runs["tfa"]).exportable()
    with pytest.raises(InputError, match="baseline does not classify by its supports' means"):
        fewshot.load(runs["baseline"]).exportable()


def test_bad_input_is_named(runs, tmp_path, monkeypatch):
    model = fewshot.load(runs["proto_net"])
    with pytest.raises(InputError, match="no supports yet"):
        model.predict(pictures(1))
    with pytest.raises(InputError, match="no supports: give"):
        model.support([], [])
    with pytest.raises(InputError, match="3 pictures and 2 labels"):
        model.support(pictures(1), ["a", "b"])
    with pytest.raises(InputError, match="bytes in RGB"):
        model.support(np.zeros((32, 32), np.uint8)[None] * 0.5, ["a"])
    with pytest.raises(InputError, match="leave it out"):
        model.support(pictures(1), NAMES, size="large")
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(InputError, match=r"bad\.png: not readable as a picture"):
        model.support([tmp_path / "bad.png"], ["a"])
    model.support(pictures(1), NAMES)
    before = model.predict(pictures(1, first=4))
    with pytest.raises(InputError):
        model.support(pictures(1), ["a", "b"])
    assert (
        model.classes == NAMES and model.predict(pictures(1, first=4)) == before
    )  # what was known stays
    detector = fewshot.load(runs["attention_rpn"])
    for box in ((10, 10, 200, 50), (-1, 0, 5, 5), (30, 30, 20, 40)):
        with pytest.raises(InputError, match="of support 0 is not inside its picture of 160 x 160"):
            detector.support(scenes(1), [box], ["a"])
    with pytest.raises(InputError, match="one set of proposals anyway"):
        fewshot.load(runs["tfa"]).predict(scenes(1), share_proposals=True)

    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        fewshot.load(tmp_path)
    with pytest.raises(InputError, match="no such model file"):
        fewshot.load(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"x\.safetensors: not a model file"):
        fewshot.load(tmp_path / "x.safetensors")
    weights.save(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), {"method": "mine"})
    with pytest.raises(
        InputError, match=r"a model of 'mine', which is none of .*: give the model of its recipe"
    ):
        fewshot.load(tmp_path / "x.safetensors")
    monkeypatch.setattr(weights, "FORMAT", 2)
    weights.save(tmp_path / "x.safetensors", torch.nn.Linear(1, 1), {"method": "proto_net"})
    monkeypatch.setattr(weights, "FORMAT", 1)
    with pytest.raises(InputError, match="written by a newer version"):
        fewshot.load(tmp_path / "x.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"someone/something: no such local file.*works without network"
    ):
        fewshot.load("someone/something")


def test_what_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def refuse(repo_id: str, name: str, **options) -> str:
        asked.append(repo_id)
        raise OSError("not today")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for source in (
        "runs/proto_net",
        "./user/model",
        "../x/y",
        "/no/such",
        "models/x",
        "user/a.safetensors",
        "a/b/c",
        "a",
    ):
        with pytest.raises(InputError, match="no such model file or folder; give a run's folder"):
            fewshot.load(source)
    assert not asked
    for source in ("user/resnet-1.5.x", "user/model"):
        with pytest.raises(InputError, match=r"not to be had from the hub \(not today\)"):
            fewshot.load(source)
    assert asked == ["user/resnet-1.5.x", "user/model"]
    (tmp_path / "models" / "args.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"models holds no model\.safetensors: its run has saved no model yet"
    ):
        fewshot.load(tmp_path / "models")


def test_names_on_a_card_are_only_names(runs, tmp_path):
    model = fewshot.load(runs["tfa"])
    names = ["a | b", "<script>", "_x_", "line\n---\ntitle: no", "traffic_light: `1`"]
    model.about |= {"classes": names, "novel": names[:1]}
    model.about["args"] = model.about["args"] | {"dataset": "[me](http://x)\n# *mine*"}
    model.method = "mine: [1]"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["few-shot", "mine: [1]"] and card.data.to_dict().keys() == {
        *("library_name", "pipeline_tag", "tags")
    }
    expected = r"| classes | a \| b, \<script\>, \_x\_, line --- title: no, traffic_light: \`1\` |"
    lines = card.text.splitlines()
    assert expected in lines and r"# mine: \[1\] on \[me\](http://x) \# \*mine\*" in lines


def test_what_importing_costs():
    """A recipe that only says how it is used should not load what it never uses."""
    heavy = "torch torchvision matplotlib pycocotools accelerate huggingface_hub".split()
    needed = {"fewshot": "", "fewshot.inference": "torch torchvision pycocotools huggingface_hub"}
    for module, allowed in needed.items():
        code = f"import sys, {module}; from fewshot import InputError, load; print(*sys.modules.keys() & set({heavy}))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert set(done.stdout.split()) <= set(allowed.split())


def predict(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_predict_script_classifies(runs, tmp_path):
    for i, array in enumerate(pictures(2)):
        place = tmp_path / "support" / NAMES[i // 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place / f"{i}.png")
    (tmp_path / "new").mkdir()
    for i, array in enumerate(pictures(1, first=5)):
        Image.fromarray(array).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "support" / "tree" / "broken.jpg").write_text("no picture")
    flags = (
        "--support",
        tmp_path / "support",
        "--query",
        tmp_path / "new",
        "--out",
        tmp_path / "out",
    )
    done = predict(runs["proto_net"], *flags)
    assert done.returncode == 0, done.stderr
    assert (
        "warning: left out" in done.stderr
        and "broken.jpg" in done.stderr
        and "house 2, star 2, tree 2" in done.stdout
    )
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(r["picture"]).name for r in results] == ["0.png", "1.png", "2.png"]
    assert all(set(r["probabilities"]) == set(NAMES) for r in results)
    assert Image.open(tmp_path / "out" / "sheet.png").width > 128

    for path in (tmp_path / "support" / "tree").glob("*.png"):
        path.unlink()
    done = predict(runs["proto_net"], *flags[:4], "--out", tmp_path / "none")
    assert done.returncode == 1 and "error: no picture of class tree can be read" in done.stderr
    (tmp_path / "support" / "tree" / "broken.jpg").unlink()
    done = predict(runs["proto_net"], *flags[:4], "--out", tmp_path / "none")
    assert (
        done.returncode == 1
        and "tree holds no picture" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "none").exists()


def test_predict_script_detects(runs, tmp_path):
    images = scenes(3)
    for name, image in zip(("house", "tree"), images):
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(
            tmp_path / "support" / name / f"{name}.png"
        )
    xml = "<annotation><object><name>house</name><bndbox>{}</bndbox></object></annotation>"
    corners = "<xmin>11</xmin><ymin>21</ymin><xmax>60</xmax><ymax>80</ymax>"
    (tmp_path / "support" / "house" / "house.xml").write_text(xml.format(corners))
    listed = {"images": [{"id": 1, "file_name": "tree.png", "width": 160, "height": 160}]}
    listed |= {"categories": [{"id": 4, "name": "tree"}]}
    listed |= {"annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [5, 6, 50, 60]}]}
    (tmp_path / "support" / "boxes.json").write_text(json.dumps(listed))
    Image.fromarray(images[2].permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    flags = (
        "--support",
        tmp_path / "support",
        "--query",
        tmp_path / "photo.png",
        "--out",
        tmp_path / "out",
    )
    done = predict(runs["attention_rpn"], *flags, "--score-above", "0.06")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    model = fewshot.load(runs["attention_rpn"])
    model.support(images[:2], [(10, 20, 60, 80), (5, 6, 55, 66)], ["house", "tree"])
    expected = model.predict(images[2], score_above=0.06)
    assert [o["class"] for o in result["objects"]] == expected.names
    assert np.allclose(
        [o["box"] for o in result["objects"]], expected.boxes.numpy().reshape(-1, 4), atol=0.01
    )
    assert (tmp_path / "out" / "photo.png").exists()
    done = predict(runs["attention_rpn"], "--query", tmp_path / "nowhere")
    assert done.returncode == 1 and "nowhere: no such picture or folder" in done.stderr


def test_what_recipes_save_is_loaded(tmp_path):
    for recipe in ("proto_net", "meta_rcnn"):
        stage = "--stage base" if recipe == "meta_rcnn" else ""
        run_here(recipe, f"{QUICK[recipe]} {stage} --out {tmp_path / recipe}")
    about = weights.load(tmp_path / "meta_rcnn" / "base" / "model.safetensors")[1]
    assert (
        about["results"]["AP50"].keys() == {"base", "all"} and "per_class" not in about["results"]
    )
    assert (
        about["pictures"] == {"short": None, "long": None, "multiple": 1, "enlarge": True}
        and about["step"] == 6
    )
    assert load_file(tmp_path / "meta_rcnn" / "base" / "model.safetensors")["known"].all()
    assert fewshot.load(tmp_path / "meta_rcnn" / "base").predict(scenes(1)[0]).boxes.shape[1] == 4
    with pytest.raises(
        InputError, match=r"meta_rcnn holds no model\.safetensors: give one of base in it"
    ):
        fewshot.load(tmp_path / "meta_rcnn")
    model = fewshot.load(tmp_path / "proto_net")
    model.support(pictures(1), NAMES)
    assert len(model.predict(pictures(2))) == 6
