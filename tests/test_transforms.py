"""Batched crops and colours against torchvision's, one picture at a time."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as V

from fewshot.data import transforms
from fewshot.data.image_set import ImageSet

PLAIN = transforms.Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
WHOLE_BOX, QUARTER_BOX = (
    1.0,
    (0.25 - 0.08) / 0.92,
)  # uniform numbers that make a crop of all or a quarter of the area


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with edges, colours and fine texture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(
        0, 8, (height, width, 3)
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tensor(picture: Image.Image, side: int | None = None) -> torch.Tensor:
    """uint8 (3, H, W), or (3, side, side) squashed as data sets do."""
    picture = picture if side is None else picture.resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def uniforms(
    area=WHOLE_BOX, place=(0.5, 0.5), flip=0.9, strength=(0.5, 0.5, 0.5), order=(0.1, 0.2, 0.3)
) -> torch.Tensor:
    """Random numbers (1, draws) that make TrainAugment do as told; by default nothing but resize."""
    shape = [area] * transforms.ATTEMPTS + [0.5] * transforms.ATTEMPTS  # 0.5: a square crop
    return torch.tensor([[*shape, *place, flip, *strength, *order]])


def test_normalisation_in_rgb_and_bgr_order():
    pixels = torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(1, 3, 1, 1)
    rgb = transforms.IMAGENET(pixels)
    assert rgb.dtype == torch.float32
    np.testing.assert_allclose(
        rgb.flatten(),
        [(10 - 123.675) / 58.395, (20 - 116.28) / 57.12, (30 - 103.53) / 57.375],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        transforms.CAFFE_MPSR(pixels).flatten(),
        [30 - 102.9801, 20 - 115.9465, 10 - 122.7717],
        rtol=1e-6,
    )
    assert transforms.HALF(torch.tensor([0, 255, 0]).reshape(3, 1, 1)).flatten().tolist() == [
        -1,
        1,
        -1,
    ]


def test_normalisation_survives_json():
    for norm in (transforms.IMAGENET, transforms.CAFFE):
        assert transforms.Normalisation.from_dict(json.loads(json.dumps(norm.to_dict()))) == norm


@pytest.mark.parametrize("width, height", [(500, 375), (333, 500), (300, 300), (640, 200)])
def test_test_crop_is_resize_and_centre_crop_of_the_original(width, height):
    picture = scene(width, height)
    short = V.resize(tensor(picture), [96], antialias=True)
    wanted = V.center_crop(short, [84, 84]).float()
    got = transforms.TestCrop(84, PLAIN)(
        tensor(picture, 256)[None], torch.tensor([width / height])
    )[0]
    assert got.shape == (3, 84, 84)
    assert (got - wanted).abs().mean() < 2.5
    # what a wrong box costs: the squashed picture's own centre, as if it had been square
    if width != height:
        wrong = transforms.TestCrop(84, PLAIN)(tensor(picture, 256)[None], torch.ones(1))[0]
        assert (wrong - wanted).abs().mean() > 10


def test_test_crop_of_small_squares_is_exact():
    pixels = tensor(scene(84, 84))[None]
    big = F.interpolate(pixels.float(), size=96, mode="bilinear", align_corners=False)
    got = transforms.TestCrop(84, PLAIN)(pixels, torch.ones(1))
    torch.testing.assert_close(got, big[..., 6:90, 6:90], atol=1e-2, rtol=0)


@pytest.mark.parametrize("aspect", [1.0, 4 / 3, 0.5, 3.0])
def test_random_crops_are_distributed_as_torchvisions(aspect, n=3000):
    height, width = 1000, round(1000 * aspect)
    blank = torch.empty(3, height, width, device="meta")
    torch.manual_seed(0)
    boxes = [
        RandomResizedCrop.get_params(blank, transforms.AREA, transforms.RATIO) for _ in range(n)
    ]
    top, left, tall, wide = np.array(boxes, float).T
    wanted = statistics(left / width, top / height, wide / width, tall / height, aspect)

    rng = torch.Generator().manual_seed(0)
    shape, place = (
        torch.rand(n, 2 * transforms.ATTEMPTS, generator=rng),
        torch.rand(n, 2, generator=rng),
    )
    x1, y1, x2, y2 = (
        transforms._random_boxes(torch.full((n,), aspect), shape, place).double().numpy().T
    )
    assert min(x1.min(), y1.min()) >= 0 and max(x2.max(), y2.max()) <= 1 + 1e-6
    got = statistics(x1, y1, x2 - x1, y2 - y1, aspect)
    for name, values in wanted.items():
        error = values.std() * (2 / n) ** 0.5  # of the difference of two means
        assert abs(got[name].mean() - values.mean()) < 4 * error + 1e-3, name
        assert abs(got[name].std() - values.std()) < 4 * error + 1e-3, name


def statistics(left, top, wide, tall, aspect) -> dict[str, np.ndarray]:
    return {
        "area": wide * tall,
        "log ratio": np.log(wide / tall * aspect),
        "centre x": left + wide / 2,
        "centre y": top + tall / 2,
        "corner x": left,
    }


def test_random_crop_takes_these_pixels():
    pixels = tensor(scene(168, 168))[None]
    augment = transforms.TrainAugment(84, PLAIN)
    top_right = pixels[..., :84, 84:].float()
    got = augment(pixels, torch.ones(1), uniforms(QUARTER_BOX, place=(1.0, 0.0)))
    torch.testing.assert_close(got, top_right, atol=1e-2, rtol=0)
    got = augment(pixels, torch.ones(1), uniforms(QUARTER_BOX, place=(1.0, 0.0), flip=0.1))
    torch.testing.assert_close(got, top_right.flip(-1), atol=1e-2, rtol=0)


def test_random_crop_of_a_large_picture_is_as_smooth_as_torchvisions():
    picture = scene(500, 375)
    side = round((500 * 375 / 4) ** 0.5)  # of a square quarter of the area
    wanted = V.resized_crop(
        tensor(picture), 375 - side, 0, side, side, [84, 84], antialias=True
    ).float()
    pixels, aspect = tensor(picture, 256)[None], torch.tensor([500 / 375])
    got = transforms.TrainAugment(84, PLAIN)(
        pixels, aspect, uniforms(QUARTER_BOX, place=(0.0, 1.0))
    )[0]
    rough = V.resized_crop(
        tensor(picture), 375 - side, 0, side, side, [84, 84], antialias=False
    ).float()
    assert (got - wanted).abs().mean() < 0.6 * (rough - wanted).abs().mean()


def test_when_no_crop_fits_the_centred_one_is_taken():
    pixels = tensor(scene(168, 168))[None]  # squashed from 8 : 3
    got = transforms.TrainAugment(84, PLAIN)(
        pixels, torch.tensor([8 / 3]), uniforms(WHOLE_BOX, place=(0.0, 0.0))
    )
    middle = pixels[..., 42:126].float()  # 4/3 of the height wide: a half
    torch.testing.assert_close(got, F.avg_pool2d(middle, (2, 1)), atol=1e-2, rtol=0)


def test_colour_jitter_is_torchvisions_in_every_order():
    adjust = V.adjust_brightness, V.adjust_contrast, V.adjust_saturation
    orders = list(itertools.permutations(range(3)))
    pixels = torch.stack([tensor(scene(32, 32, seed)) for seed in range(len(orders))])
    strength = torch.rand(len(orders), 3, generator=torch.Generator().manual_seed(0))
    rows = [
        uniforms(strength=strength[i].tolist(), order=[order.index(k) / 3 for k in range(3)])
        for i, order in enumerate(orders)
    ]
    got = transforms.TrainAugment(32, PLAIN)(pixels, torch.ones(len(orders)), torch.cat(rows))
    for i, order in enumerate(orders):
        wanted = pixels[i] / 255
        for which in order:
            wanted = adjust[which](wanted, float(0.6 + 0.8 * strength[i, which]))
        torch.testing.assert_close(got[i], wanted * 255, atol=0.02, rtol=0)


def test_a_picture_does_not_depend_on_its_batch():
    augment = transforms.TrainAugment(32, transforms.IMAGENET)
    pixels = torch.stack([tensor(scene(60, 60, seed)) for seed in range(4)])
    aspect, numbers = torch.tensor([0.5, 1.0, 1.5, 3.0]), torch.rand(4, augment.draws)
    together = augment(pixels, aspect, numbers)
    alone = torch.cat(
        [augment(*(x[i : i + 1] for x in (pixels, aspect, numbers))) for i in range(4)]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert not torch.equal(together, augment(pixels, aspect, torch.rand(4, augment.draws)))


def test_whole_only_normalises_and_averages_when_it_must_reduce():
    pixels = tensor(scene(64, 64))[None]
    torch.testing.assert_close(
        transforms.Whole(64, transforms.HALF)(pixels, torch.ones(1)), pixels / 127.5 - 1
    )
    half = transforms.Whole(32, PLAIN)(pixels, torch.ones(1))
    torch.testing.assert_close(half, F.avg_pool2d(pixels.float(), 2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("natural", [True, False])
def test_transforms_fit_the_data_set(natural):
    pictures = [scene(40, 40)]
    dataset = ImageSet(
        "some", "train", ["a"], np.zeros(1), pictures.__getitem__, size=32, stored=40, normalisation=transforms.CAFFE,
        augment=natural,
    )  # fmt: skip
    train, test = transforms.train_transform(dataset), transforms.test_transform(dataset)
    assert (train.draws > 0) == natural and test.draws == 0
    kinds = (
        (transforms.TrainAugment, transforms.TestCrop)
        if natural
        else (transforms.Whole, transforms.Whole)
    )
    assert (type(train), type(test)) == kinds
    assert (
        train.size == test.size == 32
        and train.normalisation == test.normalisation == transforms.CAFFE
    )
