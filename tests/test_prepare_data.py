"""What is downloaded, where it goes, and what is said of data that are missing, incomplete, or not
to be downloaded.
"""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tyro
from PIL import Image
from test_scripts import load

from fewshot import InputError
from fewshot.data import classification

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prepare_data.py"
DATA = ROOT / ".." / "shared" / "data"


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    module = load("prepare_data")

    def offline(*arguments, **options):
        raise OSError("no network in tests")

    for name in ("CIFAR100", "Omniglot", "VOCDetection"):
        monkeypatch.setattr(module, name, offline)
    monkeypatch.setattr(module.utils, "download_and_extract_archive", offline)
    return module


def run(script: ModuleType, flags: str, root: Path) -> None:
    script.main(tyro.cli(script.Args, args=[*flags.split(), "--root", str(root)]))


def refused(words: str, script: ModuleType, flags: str, root: Path) -> str:
    with pytest.raises(InputError, match=words) as caught:
        run(script, flags, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def numbers(printed: str) -> dict[str, list[int]]:
    """The table, by part: classes, pictures, and published pictures."""
    rows = [
        line.replace(",", "").split()
        for line in printed.splitlines()
        if line.startswith(("train", "val", "test"))
    ]
    return {part: [int(number) for number in row] for part, *row in rows}


def test_cifar_is_downloaded_once(script, tmp_path, monkeypatch, capsys):
    names = [f"c{i:02d}" for i in range(100)]
    calls = []

    def cifar100(root: Path, download: bool) -> None:
        calls.append((root, download))
        home = root / "cifar-100-python"
        home.mkdir(parents=True)
        content = {"data": np.zeros((100, 3072), np.uint8)}
        content |= {"fine_labels": np.arange(100), "coarse_labels": np.arange(100) // 5}
        for part in ("train", "test"):
            (home / part).write_bytes(pickle.dumps(content))
        (home / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))

    monkeypatch.setattr(script, "CIFAR100", cifar100)
    published = {"train": (60, 120), "val": (20, 40), "test": (20, 40)}
    monkeypatch.setitem(script.PUBLISHED, "fc100", published)
    run(script, "fc100", tmp_path / "data")
    assert calls == [(tmp_path / "data", True)]
    printed = capsys.readouterr().out
    assert "170 MB" in printed
    assert numbers(printed) == {"train": [60, 120, 120], "val": [20, 40, 40], "test": [20, 40, 40]}
    run(script, "fc100", tmp_path / "data")
    assert len(calls) == 1


def test_cub_comes_with_its_checksum(script, tmp_path, monkeypatch, capsys):
    calls = []

    def download(url: str, root: Path, md5: str) -> None:
        calls.append((url.rpartition("/")[2], md5))
        for number in range(1, 201):
            picture(root / "CUB_200_2011" / "images" / f"{number:03d}.Bird" / "1.png")

    monkeypatch.setattr(script.utils, "download_and_extract_archive", download)
    # one picture of each class is not all of them: said after the download, not downloaded again
    # and again
    words = "train has 100 pictures of 100 classes, published are 5,885 of 100"
    refused(words, script, "cub", tmp_path)
    assert calls == [("CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78")]
    counted = {"train": [100, 100, 5885], "val": [50, 50, 2950], "test": [50, 50, 2953]}
    assert numbers(capsys.readouterr().out) == counted


def voc(root: Path, year: str, part: str, download: bool) -> None:
    """One picture per part, on which nothing is."""
    home, name = root / "VOCdevkit" / f"VOC{year}", f"{year}_{part}"
    for folder in ("ImageSets/Main", "Annotations"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{name}\n")
    size = "<size><width>4</width><height>4</height></size>"
    (home / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}</annotation>")
    picture(home / "JPEGImages" / f"{name}.jpg")


def test_voc_has_three_archives_and_lists_elsewhere(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "VOCDetection", voc)
    monkeypatch.setitem(script.PUBLISHED, "voc", {"train": (20, 2), "test": (20, 1)})
    voc(tmp_path, "2007", "trainval", True)  # one of three is there already, which is not enough
    run(script, "voc", tmp_path)
    printed = capsys.readouterr().out
    assert numbers(printed) == {"train": [20, 2, 2], "test": [20, 1, 1]}
    assert f"--shot-lists {tmp_path}/few_shot_ann/voc" in printed


def test_omniglot_has_two_archives(script, tmp_path, monkeypatch):
    calls = []

    def omniglot(root: Path, background: bool, download: bool) -> None:
        calls.append((root, background))

    monkeypatch.setattr(script, "Omniglot", omniglot)
    refused("no omniglot here", script, "omniglot", tmp_path)
    assert calls == [(tmp_path, True), (tmp_path, False)]


def test_coco_is_downloaded_only_when_its_size_was_agreed_to(script, tmp_path, monkeypatch, capsys):
    refused(r"coco 2017: 20 GB to download .* add --yes", script, "coco", tmp_path)
    assert not list(tmp_path.iterdir())

    def download(url: str, home: Path, md5: str, remove_finished: bool) -> None:
        assert remove_finished and len(md5) == 32
        archive = url.rpartition("/")[2]
        archives.append(archive)
        if archive.startswith("annotations"):
            for part in ("train", "val"):
                image = {"id": 7, "file_name": "7.png", "width": 4, "height": 4}
                lists = {"images": [image], "annotations": []}
                lists["categories"] = [{"id": 1, "name": "cat"}]
                path = home / "annotations" / f"instances_{part}{archive[-8:-4]}.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(lists))
        else:
            picture(home / archive.removesuffix(".zip") / "7.png")

    monkeypatch.setattr(script.utils, "download_and_extract_archive", download)
    archives: list[str] = []
    run(script, "coco --yes", tmp_path)
    assert archives == ["train2017.zip", "val2017.zip", "annotations_trainval2017.zip"]
    assert numbers(capsys.readouterr().out) == {"train": [1, 1, 1], "test": [1, 1, 1]}

    # what is there is not got again, but for an archive whose unpacking was interrupted
    (tmp_path / "coco" / "val2017.zip").write_bytes(b"")
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").unlink()
    archives.clear()
    run(script, "coco --yes", tmp_path)
    assert archives == ["val2017.zip", "annotations_trainval2017.zip"]
    # that 2017 is there does not do for 2014
    refused("coco 2014: 20 GB", script, "coco --year 2014", tmp_path)


@pytest.mark.parametrize("name", ["cub", "voc", "omniglot", "cifar_fs", "coco --yes"])
def test_a_failed_download_is_one_line(script, tmp_path, name):
    words = r"download to .* failed \(no network in tests\); run this again"
    refused(words, script, name, tmp_path)


def test_what_may_not_be_downloaded_is_explained(script, tmp_path):
    said = refused("tiered-imagenet.tar", script, "tiered_imagenet", tmp_path)
    assert said.endswith(f"in {tmp_path}/tiered_imagenet")


def test_an_error_is_one_line_on_the_screen(tmp_path):
    command = [sys.executable, str(SCRIPT), "mini_imagenet", "--root", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "https://image-net.org" in ended.stderr
    assert f"{tmp_path}/mini_imagenet/images" in ended.stderr


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data here")
def test_real_omniglot_is_complete(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "omniglot").symlink_to(DATA.resolve() / "omniglot")
    # which is what takes long
    monkeypatch.setattr(classification, "_ink", lambda *_: np.zeros((1, 1), np.uint8))
    run(script, "omniglot", tmp_path)
    counted = {
        "train": [4112, 82240, 82240],
        "val": [688, 13760, 13760],
        "test": [1692, 33840, 33840],
    }
    assert numbers(capsys.readouterr().out) == counted


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data here")
def test_real_but_cut_down_sets_are_incomplete(script, tmp_path, capsys):
    (tmp_path / "mini_imagenet").symlink_to(DATA.resolve() / "mini_imagenet_40")
    (tmp_path / "VOCdevkit").symlink_to(DATA.resolve() / "VOCdevkit")
    words = r"train has 2,560 pictures of 64 classes, .*38,400 of 64; complete it.*ILSVRC"
    refused(words, script, "mini_imagenet", tmp_path)
    counted = {"train": [64, 2560, 38400], "val": [16, 640, 9600], "test": [20, 800, 12000]}
    assert numbers(capsys.readouterr().out) == counted
    refused(r"voc: download to .* failed", script, "voc", tmp_path)
    printed = capsys.readouterr().out
    assert numbers(printed) == {"train": [20, 384, 16551], "test": [20, 372, 4952]}
    assert "train has 384 pictures" in printed and "2.8 GB" in printed
