"""VFA against the reference's outputs, losses and gradients, weights given by the naming rule."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from detector_goldens import (
    EVERY,
    SIZE,
    all_rois,
    check_all_classes_at_once,
    check_gradients,
    check_losses,
    check_query_path,
    fill,
    normalised,
    support_stack,
    training_batch,
)
from first_losses import module_of
from naming_rule import array, close, golden
from torch import Tensor

import fewshot
from fewshot import InputError
from fewshot.backbones import trunks
from fewshot.convert.mmfewshot import detector_name
from fewshot.detectors.meta_rcnn import MetaDetector
from fewshot.detectors.vfa import KL_WEIGHT, VFA, SupportVAE
from fewshot.inference.export import RoIHead
from fewshot.training import stages
from fewshot.training.folders import Stage

our_key = partial(detector_name, method="vfa")
# batch statistics divide by how little supports differ, and so enlarge rounding errors
BATCH_STATISTICS = 3e-4
FLAGS = "--iters 1 --batch-size 2 --test-images 1 --shots 1 --workers 0"


@pytest.fixture(scope="module")
def reference() -> tuple[VFA, dict]:
    """A detector with the reference's weights, and its results."""
    expected = golden("vfa")
    trunk = trunks.c4(f"resnet{expected['depth']}", meta=True, style="caffe")
    model = VFA(trunk, expected["num_classes"])
    fill(model, expected["state"], our_key, own=["prototypes", "known"], gains=expected["gains"])
    return model.eval(), expected


@pytest.fixture
def case(reference) -> tuple[VFA, dict]:
    """The same for a test that may change it: in training the autoencoder's norms move."""
    model, expected = reference
    return copy.deepcopy(model), expected


@pytest.fixture
def noise(case, monkeypatch) -> Tensor:
    """The reference's draw from the normal distribution in place of ours."""
    stored = torch.from_numpy(array("vfa_eps", (20, 2048)))
    monkeypatch.setattr(torch, "randn_like", lambda like: stored.to(like))
    return stored


@torch.no_grad()
def test_query_path(case):
    model, expected = case[0], case[1]["test"]
    check_query_path(model, expected)


@torch.no_grad()
def test_support_path_and_detections(case):
    model, expected = case[0], case[1]["test"]
    stack, labels = support_stack(expected["support_order"])
    close(stack, expected["support_input"])
    vectors = model.support_vectors(stack)
    close(vectors, expected["support_roi_feat"])
    means = torch.stack([vectors[labels == c].mean(0) for c in range(model.classes)])
    for c, wanted in expected["class_feat"].items():
        close(means[int(c)][None], wanted)
    mean, log_variance = model.vae.encode(means)
    close(mean, expected["vae"]["mu"])
    close(log_variance, expected["vae"]["log_var"])
    close(mean + log_variance.exp().sqrt(), expected["vae"]["mu_plus_std"])
    close(model.vae.decode(mean), expected["vae"]["decoded_mu"])
    model.set_prototypes(vectors, labels)
    close(model.prototypes, expected["vae"]["scale"])

    query, fixed = normalised("query0")[None], torch.tensor(expected["fixed_proposals"])
    queries = model.roi_vectors(model.trunk(query), [fixed])
    for c, wanted in expected["per_class"].items():  # the head as in training, a class at a time
        logits, deltas = model.outputs(queries, model.prototypes[int(c)])
        close(logits, wanted["cls_score"])
        close(deltas.flatten(1), wanted["bbox_pred"])
    check_all_classes_at_once(model, expected, queries, vectors, labels)


def test_autoencoder_in_training(case, noise):
    model, train = case[0].train(), case[1]["train"]
    stack, _ = support_stack(train["support_order"])
    vectors, wanted = model.support_vectors(stack), train["fixed"]["tensors"]
    close(vectors, wanted["support_feat"], BATCH_STATISTICS)
    spread = vectors.std(0).mean().item()
    assert spread == pytest.approx(wanted["support_feat_std_over_classes"], rel=BATCH_STATISTICS)
    mean, log_variance = model.vae.encode(vectors)
    latent = mean + noise * log_variance.exp().sqrt()
    decoded = model.vae.decode(latent)
    for ours, theirs in (
        (mean, "mu"),
        (log_variance, "log_var"),
        (latent, "z"),
        (mean + log_variance.exp().sqrt(), "mu_plus_std"),
        (decoded, "decoded"),
    ):
        close(ours, wanted[theirs], BATCH_STATISTICS)
    for key, value in train["fixed"]["vae_bn_after"].items():
        close(model.get_buffer(our_key(f"roi_head.vae.{key}")), value, BATCH_STATISTICS)


@pytest.mark.slow  # the next one has all losses and their gradients together
def test_training_losses_and_gradients(case, noise):
    model, train = case[0].train(), case[1]["train"]
    images, truth, labels = training_batch(train)
    stack, support_labels = support_stack(train["support_order"])
    rois = all_rois(train, truth, labels, model.classes)
    queries = model.roi_vectors(model.trunk(images), [r.boxes for r in rois])
    queries = queries.split([len(r.boxes) for r in rois])
    drawn = torch.tensor(train["drawn_support_class"])
    losses = model.head_losses(queries, rois, drawn, model.support_vectors(stack), support_labels)
    check_losses(losses, train["fixed"]["losses"], "cls box meta vae")
    terms = train["fixed"]["vae_terms"]
    assert losses["vae"].item() == pytest.approx(terms["mse"] + KL_WEIGHT * terms["kl"], rel=1e-4)
    losses["vae"].backward(retain_graph=True)
    check_gradients(model, train["fixed"]["grad_norms_loss_vae_only"], our_key)
    model.zero_grad()
    sum(losses.values()).backward()
    check_gradients(model, train["fixed"]["grad_norms"], our_key)


def test_whole_training_step(case, noise, monkeypatch):
    model, train = case[0].train(), case[1]["train"]
    trained = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm1d) and m.training
    ]
    assert sorted(trained) == sorted(
        our_key(f"{n}.weight")[:-7] for n in train["batchnorm_in_train_mode"]
    )
    images, truth, labels = training_batch(train)
    stack, support_labels = support_stack(train["support_order"])
    model.rois = model.rpn.number = EVERY
    model.rpn.train_proposals = (12000, 50)
    monkeypatch.setattr(model, "drawn", lambda *_: torch.tensor(train["drawn_support_class"]))
    losses = model(images, [SIZE, SIZE], truth, labels, stack, support_labels)
    check_losses(losses, train["e2e"]["losses"], "rpn_cls rpn_box cls box meta vae")
    (losses["rpn_cls"] + losses["rpn_box"]).backward(retain_graph=True)
    check_gradients(model, train["e2e"]["rpn_loss_grad_norms"], our_key)
    (losses["cls"] + losses["box"] + losses["meta"] + losses["vae"]).backward()
    check_gradients(model, train["e2e"]["all_loss_grad_norms"], our_key)


def test_every_support_can_be_drawn_whatever_the_images_show():
    torch.manual_seed(0)
    model = VFA(trunks.c4("small", meta=True), 6)
    labels = [torch.tensor([2]), torch.tensor([2, 3])]  # Meta R-CNN would draw none but 2 and 3
    draws = torch.stack([model.drawn(labels, torch.tensor([5, 0, 1, 2, 4])) for _ in range(500)])
    counts = torch.stack([draws[:, image].bincount(minlength=6) for image in range(2)])
    assert (
        counts[:, 3].eq(0).all() and counts[:, [0, 1, 2, 4, 5]].sub(100).abs().max() < 40
    )  # four deviations
    assert not torch.equal(draws[:, 0], draws[:, 1])


@torch.no_grad()
def test_boxes_depend_on_no_support_and_classes_do():
    torch.manual_seed(0)
    model = VFA(trunks.c4("small", meta=True), 5).eval()
    d = model.prototypes.shape[1]
    for layer in (model.cls, model.reg):
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
    queries, classes = torch.randn(9, d), torch.tensor([0, 1, 3, 4])
    vectors = torch.randn(4, d)
    model.set_prototypes(vectors, classes)
    logits, deltas = model.classify(queries)
    one_by_one = MetaDetector.classify(model, queries)
    for ours, each in zip((logits, deltas), one_by_one, strict=True):
        assert torch.allclose(ours, each, atol=1e-4)
    assert logits[:, 2].eq(0).all() and deltas[:, 2].eq(0).all()  # the class without a support
    for ours, exported in zip((logits, deltas), RoIHead(model)(queries), strict=True):
        assert torch.allclose(ours, exported, atol=1e-4)
    model.exchange_supports()
    exchanged = model.classify(queries)
    assert (
        torch.equal(exchanged[1], deltas) and (exchanged[0] - logits)[:, classes].abs().min() > 1e-4
    )
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        model.train().set_prototypes(vectors, classes)


def test_autoencoder_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    vae, vectors = SupportVAE(64), 0.7 + 0.01 * torch.randn(15, 64)
    expected = *vae.encode(vectors), vae.decode(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        found = *vae.encode(vectors), vae.decode(vectors)
        rounded = vae.mean(vae.encoder(vectors))
    assert all(map(torch.equal, found, expected))
    assert (rounded - expected[0]).abs().max() > 0.05 * expected[
        0
    ].std()  # what autocast alone would make of them


def test_one_class_is_refused(tmp_path):
    recipe = module_of("vfa")
    args = recipe.Args(novel_classes=(), out=str(tmp_path))
    glyphs = stages.opened(args).train
    with pytest.raises(
        InputError, match="has one class: VFA's batch norms need two or more; take meta_rcnn"
    ):
        stage = Stage("base", args, str(tmp_path))
        recipe.fit(stage, None, None, glyphs.restrict(glyphs.classes[:1]), None, None)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model by the recipe, after one step."""
    recipe, folder = module_of("vfa"), tmp_path_factory.mktemp("vfa")
    recipe.main(tyro.cli(recipe.Args, args=f"{FLAGS} --stage base --out {folder}".split()))
    return folder / "base"


def test_a_base_model_knows_its_classes(base):
    loaded = fewshot.load(base)
    assert isinstance(loaded.network, VFA) and loaded.network.known.all()


@pytest.mark.parametrize("published", ["voc", "coco"])
def test_fine_tuning_trains_what_is_published(published, base, tmp_path, monkeypatch):
    """By the recipe, on the embedded data but by the rules of another data set."""
    recipe = module_of("vfa")
    models = []
    monkeypatch.setattr(recipe, "fit", lambda stage, accelerator, model, *_: models.append(model))
    args = tyro.cli(recipe.Args, args=f"{FLAGS} --base {base}".split())
    monkeypatch.setattr(recipe.Args, "published", published)
    recipe.finetune(Stage("finetune", args, str(tmp_path)), None)
    trained = {name for name, parameter in models[0].named_parameters() if parameter.requires_grad}
    assert trained == {
        our_key(name) for name in golden("vfa")["finetune_trains"][published]["trained"]
    }
