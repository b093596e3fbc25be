"""Backbones of torchvision and timm: what their own code computes, from files, at other sizes,
frozen; no network.
"""

import sys

import pytest
import torch
import torchvision
from accelerate import Accelerator
from runs import metrics, parse, results_of_tests, run_here
from safetensors.torch import save_file
from torch import nn

import fewshot
from fewshot import InputError, backbones
from fewshot.backbones import pretrained
from fewshot.training import plan

STEPS = "--iters 2 --eval-every 2 --val-tasks 2 --tasks 4 --shots 1 --queries 3"


def before_the_last_linear(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a network's classifier gets, seen by a hook on it."""
    seen = []
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_hook(lambda module, given, result: seen.append(given[0]))
    net.eval()(images)
    return seen[0]


@pytest.fixture
def saved(tmp_path):
    """A seeded random network of torchvision and a file of its weights."""

    def save(name: str, **options):
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, weights=None, **options)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        save_file(net.state_dict(), tmp_path / f"{name}.safetensors")
        return net, tmp_path / f"{name}.safetensors"

    return save


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "swin_t"])
@torch.no_grad()
def test_vectors_are_what_torchvisions_classifier_gets(name, saved):
    net, path = saved(name)
    images = torch.randn(2, 3, 64, 64)
    ours = backbones.build(f"torchvision/{name}", 64, source=str(path)).eval()
    expected = before_the_last_linear(net, images).flatten(1)
    assert ours.out_features == expected.shape[1] and ours.map_size == 1
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_map_is_what_is_pooled(saved):
    _, path = saved("resnet18")
    images = torch.randn(2, 3, 64, 64)
    vector, maps = (
        backbones.build("torchvision/resnet18", 64, p, str(path)).eval() for p in (True, False)
    )
    assert (maps.out_channels, maps.map_size, maps.out_features) == (512, 2, 2048)
    torch.testing.assert_close(maps(images).mean((2, 3)), vector(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_vit_takes_other_sizes(saved):
    """At its own size exactly; at another its position embeddings are resampled, all else is the
    same.
    """
    net, path = saved("vit_b_32")
    images = torch.randn(1, 3, 224, 224)
    same = backbones.build("torchvision/vit_b_32", 224, source=str(path)).eval()
    torch.testing.assert_close(
        same(images), before_the_last_linear(net, images), rtol=1e-4, atol=1e-5
    )
    smaller = backbones.build("torchvision/vit_b_32", 96, source=str(path)).eval()
    ours, theirs = (model.state_dict() for model in (smaller.net, net))
    resampled = ours.pop("encoder.pos_embedding")
    assert all(
        torch.equal(value, theirs[key])
        for key, value in ours.items()
        if not key.startswith("heads.")
    )
    assert resampled.shape == (1, 10, 768) and smaller(images[..., :96, :96]).shape == (1, 768)


def test_features_alone_are_enough(saved, tmp_path):
    """MobileNet's file may leave out the classifier, whose tensors are not used."""
    net, _ = saved("mobilenet_v2")
    state = {key: value for key, value in net.state_dict().items() if key.startswith("features.")}
    save_file(state, tmp_path / "features.safetensors")
    ours = backbones.build(
        "torchvision/mobilenet_v2", 64, source=str(tmp_path / "features.safetensors")
    )
    assert torch.equal(ours.net.features[0][0].weight, net.features[0][0].weight)


def test_pictures_are_as_published():
    size, normalisation = pretrained.inputs("torchvision/resnet50")
    assert size == 224 and normalisation.mean == (123.675, 116.28, 103.53)
    assert pretrained.inputs("torchvision/vit_h_14").size == 518


def test_a_frozen_backbone_does_not_move():
    net = backbones.build("torchvision/mobilenet_v3_small", 32)
    model = nn.Sequential(net, nn.Linear(net.out_features, 3))
    images, before = (
        torch.randn(4, 3, 32, 32),
        {key: value.clone() for key, value in net.state_dict().items()},
    )
    model.train()(images)
    assert any(not torch.equal(before[key], value) for key, value in net.state_dict().items()), (
        "norms learn in training"
    )
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.freeze()
    first, second = (model.train()(images) for _ in range(2))
    first.sum().backward()
    assert torch.equal(first, second), "no dropout"
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert (
        all(parameter.grad is None for parameter in net.parameters())
        and model[1].weight.grad is not None
    )


@pytest.mark.parametrize(
    "name, size, source, message",
    [
        (
            "resnet50",
            84,
            "none",
            "no backbone is called 'resnet50': choose conv4, .*torchvision/resnet50",
        ),
        (
            "torchvision/resnet5",
            84,
            "none",
            "torchvision has no network 'resnet5': did you mean resnet50",
        ),
        ("keras/resnet50", 84, "none", "write torchvision/NAME or timm/NAME"),
        ("torchvision/googlenet", 84, "none", "torchvision has no network 'googlenet'"),
        ("torchvision/squeezenet1_0", 84, "none", "ends without a linear layer: choose another"),
        (
            "torchvision/vit_b_16",
            84,
            "none",
            "--size 84: vit_b_16 needs a multiple of its patches' 16 pixels",
        ),
        (
            "torchvision/vgg11",
            8,
            "none",
            "torchvision/vgg11 cannot take 8 pixels .* give another --size",
        ),
        ("torchvision/resnet18", 84, "nothing.pth", "nothing.pth: no such weights file"),
        (
            "conv4",
            84,
            "pretrained",
            "conv4 has no pretrained weights: give --weights a model's file, or leave it out",
        ),
        ("conv4", 84, "nothing.safetensors", "nothing.safetensors: no such model file"),
    ],
)
def test_what_cannot_be_had(name, size, source, message):
    with pytest.raises(InputError, match=message):
        backbones.build(name, size, source=source)


def test_no_map_and_weights_of_another_network(saved):
    with pytest.raises(
        InputError, match="torchvision/vit_b_32 gives no map: choose a convolutional network"
    ):
        backbones.build("torchvision/vit_b_32", 64, pooled=False)
    _, path = saved("resnet18")
    with pytest.raises(InputError, match=r"layer1.0.bn3.bias is missing from .*resnet18"):
        backbones.build("torchvision/resnet50", 64, source=str(path))


def test_a_download_that_fails(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(
        InputError, match=r"cannot be downloaded \(no route to host\): give --weights FILE, or none"
    ):
        backbones.build("torchvision/resnet18", 64, source="pretrained")


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="need an extra package: pip install timm"):
        backbones.build("timm/vit_small_patch14_dinov2.lvd142m", 224)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
@torch.no_grad()
def test_timms_networks(name, tmp_path):
    """Vectors and maps of tiny random ones, from a file, are what timm's own code gives."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    net.reset_classifier(0)
    published = pretrained.inputs(f"timm/{name}")
    images = torch.randn(2, 3, published.size, published.size)
    vector, maps = (
        backbones.build(
            f"timm/{name}", published.size, pooled, str(tmp_path / "weights.safetensors")
        ).eval()
        for pooled in (True, False)
    )
    torch.testing.assert_close(vector(images), net(images))
    tokens = net.forward_features(images)
    if tokens.ndim == 3:  # of patches, after the class token
        tokens = tokens[:, net.num_prefix_tokens :].mT.unflatten(2, (maps.map_size, -1))
    torch.testing.assert_close(maps(images), tokens)


def test_timms_vit_at_another_size_and_its_errors(tmp_path):
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    smaller = backbones.build("timm/test_vit", 64, source=str(tmp_path / "vit.safetensors"))
    assert smaller.net.pos_embed.shape[1] == 16 + 1 and smaller.out_features == 64
    with pytest.raises(
        InputError, match="--size 65: timm/test_vit needs a multiple of its patches' 16 pixels"
    ):
        backbones.build("timm/test_vit", 65)
    with pytest.raises(InputError, match="timm has no network 'test_vitt': did you mean test_vit"):
        backbones.build("timm/test_vitt", 64)
    with pytest.raises(
        InputError, match=r"timm/test_resnet cannot be had with weights .*does the file fit"
    ):
        backbones.build("timm/test_resnet", 64, source=str(tmp_path / "vit.safetensors"))


def test_a_recipe_on_a_pretrained_backbone(tmp_path, saved, monkeypatch):
    """Trained, tested on another data set, rebuilt from the file without the weights' file."""
    _, path = saved("mobilenet_v3_small")
    flags = f"--backbone torchvision/mobilenet_v3_small --weights {path} --size 40 --out {tmp_path}/run {STEPS}"
    run_here("baseline", f"{flags} --freeze --batch-size 8")
    model = fewshot.load(tmp_path / "run")
    trunk = model.network.features.net
    given = backbones.build("torchvision/mobilenet_v3_small", 40, source=str(path)).net.state_dict()
    assert all(torch.equal(given[key], value) for key, value in trunk.state_dict().items()), (
        "it was frozen"
    )
    assert model.about["size"] == 40 and model.about["normalisation"]["mean"][0] == 123.675
    assert (
        metrics(tmp_path / "run")["settings"]["trained"]["backbone"]
        == "torchvision/mobilenet_v3_small"
    )
    path.unlink()
    folders, picture = tmp_path / "domain", torch.zeros(3, 30, 30, dtype=torch.uint8)
    for name in "abcde":
        (folders / name).mkdir(parents=True)
        for i in range(4):
            torchvision.io.write_png(picture + 9 * i, str(folders / name / f"{i}.png"))
    run_here(
        "baseline",
        f"--test-only --test-dataset {folders} --out {tmp_path}/run --shots 1 --queries 3 --tasks 4",
    )
    (result,) = results_of_tests(tmp_path / "run")
    assert result["settings"]["tested"]["test_dataset"] == str(folders)
    assert result["settings"]["trained"]["dataset"] == "glyphs"


def test_freezing_all_that_learns_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"--freeze leaves nothing to train: .*simple_shot\.py"):
        run_here("proto_net", f"--freeze --out {tmp_path}/run {STEPS}")


def test_a_domain_too_small_is_refused_before_training(tmp_path):
    (tmp_path / "domain/a").mkdir(parents=True)
    torchvision.io.write_png(
        torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "domain/a/0.png")
    )
    with pytest.raises(SystemExit, match=r"--ways 5: .*domain.* has 1 class"):
        run_here("proto_net", f"--test-dataset {tmp_path}/domain --out {tmp_path}/run {STEPS}")
    assert not (tmp_path / "run").exists()


def test_default_folders_name_the_backbone():
    args = parse("proto_net", "--backbone torchvision/resnet18 --seed 2")
    stage = plan.find_stage(Accelerator(cpu=True), "proto_net", args)
    assert stage.folder == "runs/proto_net/glyphs-torchvision-resnet18-seed2"
    assert stage.args.out == stage.folder and args.out is None
