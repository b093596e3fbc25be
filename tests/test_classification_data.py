"""Every layout of every data set, small and made up; and the real ones where they are at hand."""

import csv
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot import InputError
from fewshot.data import classification, label_orders, transforms
from fewshot.data.classification import ImageSet, open_dataset
from fewshot.data.glyphs import glyph

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
SPLITS = "train", "val", "test"


def picture(path: Path, shade: int = 0, width: int = 12, height: int = 12, **options) -> None:
    """A picture file of one grey level, which tells it from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (shade,) * 3).save(path, **options)


def shades(dataset: ImageSet) -> list[int]:
    return [int(dataset.pixels(i)[0].float().mean().round()) for i in range(len(dataset))]


def test_glyphs_are_drawn_on_demand():
    sets = {split: open_dataset("glyphs", "unused", split) for split in SPLITS}
    assert [len(s.classes) for s in sets.values()] == [64, 16, 20]
    assert len({name for s in sets.values() for name in s.classes}) == 100
    val = sets["val"]
    assert len(val) == 16 * 600 and val.size == val.stored == 32 and not val.augment
    assert torch.equal(val.pixels(601), torch.from_numpy(glyph(65, 0, 1, 32)).permute(2, 0, 1))
    assert val.labels[601] == 1 and val.aspect(601) == 1
    other = open_dataset("glyphs", "unused", "val", size=40, seed=3)
    assert torch.equal(other.pixels(0), torch.from_numpy(glyph(64, 3, 0, 40)).permute(2, 0, 1))


def test_image_set_groups_images_by_class():
    dataset = ImageSet(
        "some", "val", ["a", "b"], np.array([1, 0, 1, 1]), lambda i: None, size=84, stored=84
    )
    assert [images.tolist() for images in dataset.by_class] == [[1], [0, 2, 3]]
    assert dataset.labels.dtype == np.int64
    with pytest.raises(InputError, match="some val: class b has no picture"):
        ImageSet("some", "val", ["a", "b"], np.zeros(3), lambda i: None, size=84, stored=84)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="data set 'imagenet': must be one of glyphs, omniglot"):
        open_dataset("imagenet", tmp_path, "train")
    with pytest.raises(InputError, match="split 'dev': must be one of train, val, test"):
        open_dataset("glyphs", tmp_path, "dev")


# a folder of class folders


def test_folder_with_splits(tmp_path):
    for i, name in enumerate(("b", "a", "c")):
        picture(tmp_path / "train" / name / "1.png", shade=i)
        picture(tmp_path / "train" / name / "0.png", shade=10 + i)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "a" / "._0.png").write_text("no picture either")
    train = open_dataset("folder", tmp_path, "train")
    assert train.classes == ["a", "b", "c"] and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert shades(train) == [11, 1, 10, 0, 12, 2]
    assert train.size == 84 and train.augment and train.normalisation == transforms.IMAGENET
    with pytest.raises(InputError) as caught:
        open_dataset("folder", tmp_path, "val")
    assert str(caught.value).startswith(f"{tmp_path / 'val'}: no such folder")


def test_folder_without_splits_divides_its_classes(tmp_path):
    for i in range(25):
        picture(tmp_path / f"c{i:02d}" / "0.png")
    sets = [open_dataset("folder", tmp_path, split).classes for split in SPLITS]
    assert [len(classes) for classes in sets] == [16, 4, 5]
    assert sorted(name for classes in sets for name in classes) == [f"c{i:02d}" for i in range(25)]
    assert sets[0] != open_dataset("folder", tmp_path, "train", seed=1).classes
    for i in range(3, 25):
        shutil.rmtree(tmp_path / f"c{i:02d}")
    with pytest.raises(InputError, match="3 class folders are too few to set some aside for val"):
        open_dataset("folder", tmp_path, "val")


def test_folder_without_pictures(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        open_dataset("folder", tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="has no sub-folders"):
        open_dataset("folder", tmp_path, "train")
    picture(tmp_path / "train" / "a" / "0.png")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(InputError) as caught:
        open_dataset("folder", tmp_path, "train")
    assert str(caught.value).startswith(f"{tmp_path / 'train' / 'b'}: no picture in this class")


@pytest.mark.parametrize(
    "width, height, size, stored",
    [(84, 84, 84, 84), (120, 60, 84, 120), (500, 300, 84, 256), (300, 500, 32, 98)],
)
def test_pictures_are_squashed_to_a_square_that_crops_need(tmp_path, width, height, size, stored):
    picture(tmp_path / "train" / "a" / "0.png", 7, width, height)
    dataset = open_dataset("folder", tmp_path, "train", size=size)
    assert (dataset.size, dataset.stored) == (size, stored)
    assert dataset.aspect(0) == width / height  # before its pixels were asked for
    pixels = dataset.pixels(0)
    assert (
        pixels.shape == (3, stored, stored) and pixels.dtype == torch.uint8 and (pixels == 7).all()
    )


def test_pictures_are_turned_upright_and_made_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: its left is the scene's bottom
    image = Image.new("L", (20, 10))
    image.paste(255, (0, 0, 10, 10))
    (tmp_path / "train" / "a").mkdir(parents=True)
    image.save(tmp_path / "train" / "a" / "0.jpg", exif=exif, quality=95)
    dataset = open_dataset("folder", tmp_path, "train")
    assert dataset.aspect(0) == 0.5 and dataset.stored == 20
    upper, lower = dataset.pixels(0).float().mean((0, 2)).chunk(2)  # over channels and columns
    assert upper.mean() > 240 and lower.mean() < 15


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_an_unreadable_picture_is_named(tmp_path, content):
    for i in range(40):
        picture(tmp_path / "train" / "a" / f"{i:02d}.png", i, width=50, height=50)
    broken = tmp_path / "train" / "a" / "04.png"
    broken.write_bytes(broken.read_bytes()[:60] if content is None else content)  # None: cut short
    dataset = open_dataset("folder", tmp_path, "train")
    assert dataset.pixels(5).float().mean() == 5
    with pytest.raises(InputError) as caught:
        dataset.pixels(4)
    assert str(caught.value).startswith(f"{broken}: not readable as a picture") and "\n" not in str(
        caught.value
    )


def test_data_sets_can_be_sent_to_other_processes(tmp_path):
    picture(tmp_path / "train" / "a" / "0.png", 9)
    for dataset in (open_dataset("folder", tmp_path, "train"), open_dataset("glyphs", "", "test")):
        sent = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(sent.pixels(0), dataset.pixels(0))


def test_describe_is_json_and_enough_to_feed_a_model(tmp_path):
    about = open_dataset("glyphs", "", "test").describe()
    assert transforms.Normalisation.from_dict(about["normalisation"]) == transforms.HALF
    assert about["size"] == 32 and len(about["classes"]) == 20 and about["augment"] is False


# CUB


def test_cub_splits_by_the_number_of_a_class(tmp_path):
    images = tmp_path / "CUB_200_2011" / "images"
    for number in range(1, 201):
        picture(images / f"{number:03d}.Bird_{number}" / "Bird_0001_1.jpg", shade=number)
    sets = {split: open_dataset("cub", tmp_path, split) for split in SPLITS}
    assert [len(s.classes) for s in sets.values()] == [100, 50, 50]
    for split, dataset in sets.items():
        numbers = [int(name[:3]) for name in dataset.classes]
        of = {
            "train": lambda i: i % 2 == 0,
            "val": lambda i: i % 4 == 1,
            "test": lambda i: i % 4 == 3,
        }[split]
        assert numbers == [i + 1 for i in range(200) if of(i)]
        assert shades(dataset) == pytest.approx(numbers, abs=1)
    assert open_dataset("cub", tmp_path / "CUB_200_2011", "val").classes == sets["val"].classes

    shutil.rmtree(images / "037.Bird_37")
    with pytest.raises(InputError, match=r"images: the folder of class 037 is missing"):
        open_dataset("cub", tmp_path, "val")
    with pytest.raises(InputError) as caught:
        open_dataset("cub", tmp_path / "elsewhere", "val")
    assert str(tmp_path / "elsewhere" / "CUB_200_2011" / "images") in str(caught.value)


# mini-ImageNet

WNIDS = [f"n{i:08d}" for i in range(16)]  # of a made-up val split


def mini_csv(home: Path, ranks: tuple[int, ...]) -> None:
    home.mkdir(parents=True, exist_ok=True)
    with (home / "val.csv").open(
        "w", newline="", encoding="utf-8-sig"
    ) as file:  # as a spreadsheet writes it
        csv.writer(file).writerows(
            [
                ("filename", "label"),
                *((f"{wnid}{rank:08d}.jpg", wnid) for wnid in WNIDS for rank in ranks),
            ]
        )


def wanted_mini(dataset: ImageSet, ranks: tuple[int, ...]) -> list[int]:
    """What a made-up val split should show, in its table's order: 10 times the class, and the rank."""
    order = [int(i) for i in label_orders.MINI_ORDER["val"].split()]
    assert dataset.classes == [WNIDS[i] for i in order]
    assert [dataset.classes[label] for label in dataset.labels] == [
        wnid for wnid in WNIDS for _ in ranks
    ]
    return [10 * i + rank for i in range(len(WNIDS)) for rank in ranks]


@pytest.mark.parametrize("flat", [False, True])
def test_mini_imagenet_with_the_tables_file_names(tmp_path, flat):
    home, ranks = tmp_path / "mini_imagenet", (2, 5)
    mini_csv(home, ranks)
    for i, wnid in enumerate(WNIDS):
        for rank in ranks:
            picture(
                home / "images" / ("" if flat else wnid) / f"{wnid}{rank:08d}.jpg", 10 * i + rank
            )
    dataset = open_dataset("mini_imagenet", tmp_path, "val")
    assert shades(dataset) == pytest.approx(wanted_mini(dataset, ranks), abs=1)

    missing = home / "images" / ("" if flat else WNIDS[3]) / f"{WNIDS[3]}00000005.jpg"
    missing.unlink()
    with pytest.raises(InputError, match=f"{missing}: missing"):
        open_dataset("mini_imagenet", home, "val")


def test_mini_imagenet_from_whole_ilsvrc_folders(tmp_path):
    ranks = (1, 2, 4)
    mini_csv(tmp_path, ranks)
    for i, wnid in enumerate(WNIDS):
        for rank, number in enumerate((9, 10, 77, 100), 1):  # as text, 10 and 100 come before 9
            picture(tmp_path / "images" / wnid / f"{wnid}_{number}.JPEG", 10 * i + rank)
    dataset = open_dataset("mini_imagenet", tmp_path, "val")
    assert shades(dataset) == pytest.approx(wanted_mini(dataset, ranks), abs=1)

    (tmp_path / "images" / WNIDS[5] / f"{WNIDS[5]}_77.JPEG").unlink()
    with pytest.raises(
        InputError, match=rf"{WNIDS[5]}: expected .* needs picture 4 of it, and 3 are there"
    ):
        open_dataset("mini_imagenet", tmp_path, "val")
    shutil.rmtree(tmp_path / "images" / WNIDS[5])
    with pytest.raises(InputError, match=f"{tmp_path / 'images' / WNIDS[5]}: missing"):
        open_dataset("mini_imagenet", tmp_path, "val")
    mini_csv(tmp_path, (1, 0))
    with pytest.raises(InputError, match=rf"{WNIDS[0]}: expected .* needs picture 00000 of it"):
        open_dataset("mini_imagenet", tmp_path, "val")


def test_mini_imagenet_without_its_tables(tmp_path):
    with pytest.raises(InputError, match="no mini_imagenet here"):
        open_dataset("mini_imagenet", tmp_path, "val")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=f"{tmp_path / 'test.csv'}: missing"):
        open_dataset("mini_imagenet", tmp_path, "test")
    (tmp_path / "test.csv").write_text("filename,label\na.jpg,n01\n")
    with pytest.raises(InputError, match=r"test.csv: 1 classes, this split has 20"):
        open_dataset("mini_imagenet", tmp_path, "test")
    for row in ("../a.jpg,n01", "/a.jpg,n01", "a.jpg,../n01"):
        (tmp_path / "test.csv").write_text(f"filename,label\n{row}\n")
        with pytest.raises(InputError, match=r"test.csv: '.*' leads out of the data's folder"):
            open_dataset("mini_imagenet", tmp_path, "test")
    (tmp_path / "test.csv").write_bytes("filename,label\nä.jpg,n01\n".encode("latin1"))
    with pytest.raises(InputError, match=r"test.csv: not text in UTF-8"):
        open_dataset("mini_imagenet", tmp_path, "test")
    (tmp_path / "test.csv").write_text("a.jpg,n01\n")
    with pytest.raises(InputError, match=r"test.csv: its first line must be filename,label"):
        open_dataset("mini_imagenet", tmp_path, "test")


@pytest.mark.skipif(not (DATA / "mini_imagenet_40").is_dir(), reason="no real data here")
@pytest.mark.parametrize(
    "split, classes, first", zip(SPLITS, (64, 16, 20), ("n02074367", "n02138441", "n02110341"))
)
def test_real_mini_imagenet(split, classes, first):
    root = DATA / "mini_imagenet_40"
    dataset = open_dataset("mini_imagenet", root, split)
    assert len(dataset.classes) == classes and dataset.classes[0] == first
    assert [len(images) for images in dataset.by_class] == [40] * classes
    assert dataset.stored == 84
    with (root / f"{split}.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for index in (0, 123, len(rows) - 1):
        file = Image.open(root / "images" / rows[index]["label"] / rows[index]["filename"])
        assert dataset.classes[dataset.labels[index]] == rows[index]["label"]
        assert np.array_equal(
            dataset.pixels(index).permute(1, 2, 0), np.asarray(file.convert("RGB"))
        )


# tiered-ImageNet


def encoded(shade: int) -> np.ndarray:
    file = io.BytesIO()
    Image.new("RGB", (84, 84), (shade,) * 3).save(file, "png")
    return np.frombuffer(file.getvalue(), np.uint8)[:, None]


def tiered(home: Path, names: list[str], specific: list[int]) -> None:
    home.mkdir(parents=True)
    labels = {"label_specific": np.array(specific, np.int32), "label_specific_str": names}
    (home / "val_labels.pkl").write_bytes(pickle.dumps(labels, protocol=2))
    images = [encoded(i) for i in range(len(specific))]
    (home / "val_images_png.pkl").write_bytes(pickle.dumps(images, protocol=2))


def test_tiered_imagenet_from_pickles_and_unpacked(tmp_path):
    names = [f"name {i:02d}, also {97 - i}" for i in np.random.default_rng(0).permutation(97)]
    home = tmp_path / "tiered_imagenet"
    tiered(home, names, [*range(97), 3, 3])
    dataset = open_dataset("tiered_imagenet", tmp_path, "val")
    order = [int(i) for i in label_orders.TIERED_ORDER["val"].split()]
    assert dataset.classes == [sorted(names)[i] for i in order]
    assert [dataset.classes[label] for label in dataset.labels] == [*names, names[3], names[3]]
    assert shades(dataset) == list(range(99)) and dataset.stored == 84

    (home / "val").mkdir()
    for i in range(99):
        (home / "val" / f"val_image_{i}.byte").write_bytes(encoded(100 + i).tobytes())
    assert shades(open_dataset("tiered_imagenet", home, "val")) == list(range(100, 199))
    (home / "val" / "val_image_42.byte").unlink()
    with pytest.raises(InputError, match=r"val_image_42\.byte: missing"):
        open_dataset("tiered_imagenet", home, "val")


def test_incomplete_tiered_imagenet(tmp_path):
    with pytest.raises(InputError, match=r"no tiered_imagenet here; expected .*val_labels\.pkl"):
        open_dataset("tiered_imagenet", tmp_path, "val")
    names = [f"{i:02d}" for i in range(97)]
    tiered(tmp_path / "a", names[:96], list(range(96)))
    with pytest.raises(InputError, match=r"val_labels\.pkl: 96 classes, this split has 97"):
        open_dataset("tiered_imagenet", tmp_path / "a", "val")
    tiered(tmp_path / "b", names, list(range(96)))
    with pytest.raises(InputError, match=r"tiered_imagenet val: class .* has no picture"):
        open_dataset("tiered_imagenet", tmp_path / "b", "val")
    tiered(tmp_path / "c", names, list(range(97)))
    archive = tmp_path / "c" / "val_images_png.pkl"
    archive.write_bytes(archive.read_bytes()[:500])
    with pytest.raises(InputError, match=r"val_images_png\.pkl: not readable"):
        open_dataset("tiered_imagenet", tmp_path / "c", "val")
    archive.unlink()
    with pytest.raises(InputError, match=r"val_images_png\.pkl: not readable"):
        open_dataset("tiered_imagenet", tmp_path / "c", "val")


def test_label_orders_are_permutations():
    for orders, sizes in (
        (label_orders.MINI_ORDER, (64, 16, 20)),
        (label_orders.TIERED_ORDER, (351, 97, 160)),
    ):
        for split, size in zip(SPLITS, sizes):
            assert sorted(int(i) for i in orders[split].split()) == list(range(size))


# Omniglot


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch):
    """Six characters of two drawings instead of 1623 of 20: drawing k of character c has c + 1
    black rows, at row k.
    """
    monkeypatch.setattr(classification, "OMNIGLOT_CHARACTERS", 6)
    monkeypatch.setattr(classification, "OMNIGLOT_DRAWINGS", 2)
    splits = {"train": slice(0, 3), "val": slice(3, 4), "test": slice(4, 6)}
    monkeypatch.setattr(classification, "OMNIGLOT_SPLITS", splits)
    for character in range(6):
        part = classification.OMNIGLOT_PARTS[character // 3]
        for drawing in range(2):
            image = Image.new("1", (105, 105), 1)
            image.paste(0, (0, drawing, 105, drawing + character + 1))
            path = (
                tmp_path
                / "omniglot-py"
                / part
                / f"Script{part[-3]}"
                / f"character0{character}"
                / f"{drawing}.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return tmp_path


def test_omniglot_unpacked_and_zipped_are_the_same(small_omniglot):
    home = small_omniglot / "omniglot-py"
    unpacked = {
        split: open_dataset("omniglot", small_omniglot, split, size=105) for split in SPLITS
    }
    assert [len(s.classes) for s in unpacked.values()] == [12, 4, 8]
    names = [name for s in unpacked.values() for name in s.classes]
    assert len(set(names)) == 24 and len({name.rpartition("/")[0] for name in names}) == 6
    for dataset in unpacked.values():
        for i, label in enumerate(dataset.labels):
            rows = np.zeros((105, 105), np.uint8)
            character = int(dataset.classes[label].split("/")[1][-1])
            rows[i % 2 : i % 2 + character + 1] = 255
            turned = np.rot90(rows, int(dataset.classes[label][-3:]) // 90)
            assert np.array_equal(dataset.pixels(i), np.stack([turned] * 3))

    for part in classification.OMNIGLOT_PARTS:
        shutil.make_archive(str(small_omniglot / part), "zip", home, part)
    shutil.rmtree(home)
    for split, dataset in unpacked.items():
        zipped = open_dataset("omniglot", small_omniglot, split, size=105)
        assert zipped.classes == dataset.classes
        assert all(torch.equal(zipped.pixels(i), dataset.pixels(i)) for i in range(len(dataset)))


def test_incomplete_omniglot(small_omniglot):
    home = small_omniglot / "omniglot-py"
    next(home.glob("images_background/*/character01/1.png")).unlink()
    with pytest.raises(
        InputError,
        match="omniglot-py: holds 11 drawings of 6 characters, all of Omniglot is 2 of each",
    ):
        open_dataset("omniglot", small_omniglot, "val")
    shutil.rmtree(home / "images_evaluation")
    with pytest.raises(InputError, match=r"images_evaluation\.zip: not readable"):
        open_dataset("omniglot", small_omniglot, "val")
    shutil.rmtree(home)
    with pytest.raises(InputError, match="no omniglot here; expected"):
        open_dataset("omniglot", small_omniglot, "val")


@pytest.mark.skipif(not (DATA / "omniglot").is_dir(), reason="no real data here")
def test_real_omniglot(monkeypatch):
    val = open_dataset("omniglot", DATA, "val")
    assert len(val.classes) == 4 * 172 and [len(images) for images in val.by_class] == [20] * 688
    assert (val.size, val.stored, val.augment, val.normalisation) == (
        28,
        28,
        False,
        transforms.HALF,
    )
    ink = torch.stack([val.pixels(i) for i in range(200)]).float()
    assert 10 < ink.mean() < 60  # strokes are thin, and bright

    alphabet, character, _ = val.classes[0].split("/")
    with zipfile.ZipFile(DATA / "omniglot" / "images_background.zip") as background:
        names = sorted(n for n in background.namelist() if f"/{alphabet}/{character}/" in n)
        assert len(names) == 20
        drawing = np.asarray(Image.open(background.open(names[7])).convert("L"), float)
    # ink is conserved where a drawing is averaged down, though not to the digit: the kernel is a
    # triangle
    assert val.pixels(7).float().mean() == pytest.approx((255 - drawing).mean(), rel=0.1)
    assert torch.equal(val.pixels(27)[0], torch.rot90(val.pixels(7)[0]))

    monkeypatch.setattr(
        classification, "_ink", lambda *_: np.zeros((1, 1), np.uint8)
    )  # which is what takes long
    sets = {split: open_dataset("omniglot", DATA, split).classes for split in SPLITS}
    assert [len(classes) for classes in sets.values()] == [4 * 1028, 4 * 172, 4 * 423]
    assert len(set().union(*sets.values())) == 4 * 1623 and sets["val"] == val.classes


# CIFAR-FS and FC100

SUPERCLASSES = """
beaver dolphin otter seal whale, aquarium_fish flatfish ray shark trout, orchid poppy rose sunflower tulip,
bottle bowl can cup plate, apple mushroom orange pear sweet_pepper, clock keyboard lamp telephone television,
bed chair couch table wardrobe, bee beetle butterfly caterpillar cockroach, bear leopard lion tiger wolf,
bridge castle house road skyscraper, cloud forest mountain plain sea, camel cattle chimpanzee elephant kangaroo,
fox porcupine possum raccoon skunk, crab lobster snail spider worm, baby boy girl man woman,
crocodile dinosaur lizard snake turtle, hamster mouse rabbit shrew squirrel,
maple_tree oak_tree palm_tree pine_tree willow_tree, bicycle bus motorcycle pickup_truck train,
lawn_mower rocket streetcar tank tractor
"""
COARSE = {
    name: number for number, names in enumerate(SUPERCLASSES.split(",")) for name in names.split()
}
FINE = sorted(COARSE)
# published by itself, superclass after superclass
CIFAR_FS_TRAIN = """
dolphin seal aquarium_fish ray trout orchid sunflower tulip bottle bowl can cup plate apple mushroom orange pear clock
keyboard chair couch bee caterpillar cockroach bear lion tiger wolf bridge castle house road skyscraper cloud forest
mountain elephant kangaroo porcupine possum raccoon skunk lobster spider boy girl dinosaur lizard snake turtle hamster
mouse rabbit shrew squirrel oak_tree palm_tree pine_tree willow_tree bus train lawn_mower streetcar tank
"""


def cifar(home: Path) -> None:
    """CIFAR-100 with three pictures of each class instead of 600, of the shade of the class's
    number.
    """
    home.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("test", 100)):
        fine = rng.permutation(np.arange(count) % 100)
        content = {
            "data": np.repeat(fine[:, None], 3072, 1).astype(np.uint8),
            "fine_labels": fine.tolist(),
            "coarse_labels": [COARSE[FINE[label]] for label in fine],
        }
        (home / part).write_bytes(pickle.dumps(content, protocol=2))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": FINE}, protocol=2))


@pytest.mark.parametrize("name, counts", [("cifar_fs", (64, 16, 20)), ("fc100", (60, 20, 20))])
def test_cifar_splits_have_all_pictures_of_their_classes(tmp_path, name, counts):
    cifar(tmp_path / "cifar100" / "cifar-100-python")
    sets = [open_dataset(name, tmp_path, split) for split in SPLITS]
    assert tuple(len(s.classes) for s in sets) == counts
    assert sorted(c for s in sets for c in s.classes) == FINE
    for dataset in sets:
        assert [len(images) for images in dataset.by_class] == [3] * len(dataset.classes)
        assert shades(dataset) == [FINE.index(dataset.classes[label]) for label in dataset.labels]
        assert dataset.size == dataset.stored == 32
        assert dataset.augment and dataset.normalisation == transforms.IMAGENET


def test_cifar_splits_are_the_published_ones(tmp_path):
    cifar(tmp_path / "cifar-100-python")
    assert open_dataset("cifar_fs", tmp_path, "train").classes == sorted(CIFAR_FS_TRAIN.split())
    val, test = (open_dataset("cifar_fs", tmp_path, split).classes for split in ("val", "test"))
    assert val[0] == "beaver" and val[-1] == "tractor" and test[0] == "baby" and test[-1] == "worm"
    val, test = (open_dataset("fc100", tmp_path, split).classes for split in ("val", "test"))
    assert {COARSE[name] for name in val} == {
        COARSE[name] for name in ("bear", "camel", "crab", "hamster")
    }
    assert {COARSE[name] for name in test} == {
        COARSE[name] for name in ("whale", "bee", "fox", "baby")
    }


def test_cifar_pixels_are_rows_of_three_planes(tmp_path):
    home = tmp_path / "cifar-100-python"
    cifar(home)
    content = pickle.loads((home / "train").read_bytes())
    content["data"][:] = np.arange(3072) % 251
    (home / "train").write_bytes(pickle.dumps(content, protocol=2))
    dataset = open_dataset("cifar_fs", tmp_path, "train")
    assert np.array_equal(dataset.pixels(0).flatten(), np.arange(3072) % 251)
    assert dataset.aspect(0) == 1


def test_missing_or_broken_cifar(tmp_path):
    with pytest.raises(InputError) as caught:
        open_dataset("fc100", tmp_path, "train")
    assert str(tmp_path / "cifar-100-python") in str(caught.value)
    assert "scripts/prepare_data.py fc100" in str(caught.value)
    cifar(tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "test").unlink()
    with pytest.raises(InputError, match=r"cifar-100-python/test: not readable"):
        open_dataset("cifar_fs", tmp_path, "train")


def test_broken_pickles_are_named(tmp_path):
    home = tmp_path / "cifar-100-python"
    cifar(home)
    for content in (
        b"",
        b"no pickle",
        pickle.dumps(["no dictionary"]),
        pickle.dumps({"data": 1}),
        b"\x80\x02]K\x01}b.",
    ):
        (home / "meta").write_bytes(content)
        with pytest.raises(InputError, match="meta: not readable") as caught:
            open_dataset("cifar_fs", tmp_path, "train")
        assert "\n" not in str(caught.value)
    whole = pickle.dumps({"a": np.arange(9), "b": ["x", np.int32(3)]}, protocol=2)
    broken = tmp_path / "broken.pkl"
    for place in range(len(whole)):
        for damaged in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        ):
            broken.write_bytes(damaged)
            try:
                classification.read_pickle(broken, lambda found: found["a"])
            except InputError as error:
                assert str(error).startswith(f"{broken}: not readable")


class Planted:
    """Has a function called when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_no_code(tmp_path, protocol):
    path, done = tmp_path / "val_images_png.pkl", tmp_path / "done"
    for planted, name in [
        (Planted(os.system, f"touch {done}"), "system"),
        (Planted(eval, f"open({str(done)!r}, 'w')"), "eval"),
        (Planted(np.fromfile, str(path)), "fromfile"),
        (
            Planted(np.ndarray, (1,), np.dtype("O"), b"anywhere"),
            "",
        ),  # would take eight bytes for an object's address
    ]:
        path.write_bytes(pickle.dumps([planted], protocol=protocol))
        with pytest.raises(InputError, match=f"val_images_png.pkl: not readable .*{name}"):
            classification.read_pickle(path, lambda found: found)
        assert not done.exists()


def test_pickles_of_python_2_and_3_give_their_arrays(tmp_path):
    content = {
        "bytes": np.array([7, 255], np.uint8),
        "f": np.arange(6.0).reshape(2, 3).T,
        "n": np.int64(-3),
    }
    content |= {
        "s": np.array(["a", "bc"]),
        "o": np.array([1, "x"], object),
        ">": np.array([258], ">i2"),
    }
    for protocol in (2, 3, 4):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        found = classification.read_pickle(tmp_path / "a.pkl", lambda found: found)
        for key, wanted in pickle.loads((tmp_path / "a.pkl").read_bytes()).items():
            assert np.array_equal(found[key], wanted) and found[key].dtype == wanted.dtype
    # by Python 2, whose texts are bytes
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02" + array + b"(K\x01K\x02\x85" + dtype + b"\x89U\x02\x07\xfftb."
    )
    assert classification.read_pickle(tmp_path / "a.pkl", lambda found: found).tolist() == [7, 255]
