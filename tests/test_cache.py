"""A cache changes no number, is made once, follows its source, and is never seen half made."""

import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot import InputError
from fewshot.data import cache, classification, episodes, transforms
from fewshot.data.classification import open_dataset
from fewshot.data.image_set import ImageSet
from fewshot.data.stream import Feed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of four photographs of different sizes, in noise."""
    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(4):
            noise = rng.integers(0, 256, (40 + 5 * i, 60, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path


plain_of = partial(open_dataset, "folder", split="train")
cached_of = partial(plain_of, cache=True)


def files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / classification.CACHE_FOLDER).iterdir())


def same(ours: ImageSet, plain: ImageSet) -> bool:
    return all(
        torch.equal(ours.pixels(i), plain.pixels(i)) and ours.aspect(i) == plain.aspect(i)
        for i in range(len(plain))
    )


def test_cached_pictures_are_the_decoded_ones(root, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 5)  # so that there are several, the last one short
    plain = plain_of(root)
    cached = cached_of(root)
    assert same(cached, plain)
    assert cached.aspect(3) == 60 / 55 and cached.pixels(0).dtype == torch.uint8
    [name] = files(root)
    assert name.startswith(f"folder-train-{plain.stored}-") and name.endswith(".npy")
    assert cached.describe() == plain.describe() and cached.cached(root) is cached
    cached.pixels(0).zero_()  # what is handed out is nobody else's
    assert same(cached, plain)


def test_pictures_are_decoded_once(root, monkeypatch):
    first = cached_of(root)

    def never(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "_write", never)
    os.utime(root / "train")  # a folder's own time is of no account
    again = cached_of(root)
    assert same(again, first)


@pytest.mark.parametrize("change", ["content", "time", "more", "name"])
def test_another_source_is_decoded_anew(root, change):
    old = cached_of(root)
    other = cached_of(root, size=16)  # another S: this one stays
    [before] = set(files(root)) - {other.source.path.name}
    picture = root / "train" / "b" / "1.png"
    if change == "content":
        Image.new("RGB", (60, 45), "red").save(picture)
    elif change == "time":
        os.utime(picture, (0, 0))
    elif change == "name":
        picture.rename(picture.with_name("9.png"))
    else:
        Image.new("RGB", (60, 45), "red").save(root / "train" / "b" / "4.png")
    new = cached_of(root)
    assert same(new, plain_of(root))
    assert before not in files(root) and len(files(root)) == 2
    assert old.pixels(0).shape == new.pixels(0).shape  # who had the removed file open goes on


def test_a_moved_data_set_keeps_its_cache(root, tmp_path_factory, monkeypatch):
    cached_of(root)
    moved = tmp_path_factory.mktemp("elsewhere") / "data"
    root.rename(moved)
    names = files(moved)
    monkeypatch.chdir(moved.parent)
    open_dataset("folder", "data", "train", cache=True)
    assert files(moved) == names


def test_workers_open_the_file_instead_of_being_sent_it(root):
    cached = cached_of(root)
    sent = pickle.dumps(cached)
    assert len(sent) < cached.source.pixels.nbytes / 2
    assert same(pickle.loads(sent), cached)


def test_episodes_are_the_same_from_a_cache(root):
    batches = []
    for dataset in (
        open_dataset("folder", root, "train", size=32, cache=kept) for kept in (False, True)
    ):
        transform = transforms.train_transform(dataset)
        loader = episodes.episode_loader(dataset, 2, 1, 2, Feed(steps=3), transform, tasks=1)
        batches.append([(episode.support, episode.query) for episode in loader])
    for plain, cached in zip(*batches):
        assert all(torch.equal(a, b) for a, b in zip(plain, cached))


def _open_cached(root: Path, begin: float) -> int:
    time.sleep(max(0, begin - time.time()))  # all at once
    return int(cached_of(root).pixels(7).sum())


def test_processes_that_build_at_once_leave_one_whole_file(root):
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        sums = list(pool.map(_open_cached, [root] * 3, [time.time() + 0.2] * 3))
    assert sums == [int(plain_of(root).pixels(7).sum())] * 3
    assert len(files(root)) == 1


def test_nothing_is_left_of_a_build_that_fails(root):
    dataset = plain_of(root)
    broken = root / "train" / "c" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(InputError, match=r"c/2\.png: not readable as a picture"):
        dataset.cached(root / classification.CACHE_FOLDER)
    assert files(root) == []


def test_a_folder_that_cannot_be_written_to(root, monkeypatch):
    (root / classification.CACHE_FOLDER).write_text("in the way")
    with pytest.raises(
        InputError, match=r"\.fewshot_cache: cannot keep decoded pictures here .*link to the data"
    ):
        cached_of(root)
    (root / classification.CACHE_FOLDER).unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        cached_of(root)
    assert files(root) == []


@pytest.mark.parametrize("left", [0, 300, None])
def test_a_damaged_file_is_named(root, left):
    path = cached_of(root).source.path
    if left is None:  # an array, but not of squares
        np.save(path, np.zeros(12))
    else:
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError) as caught:
        cached_of(root)
    assert str(caught.value).startswith(f"{path}: not readable as a cache")


def test_glyphs_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "GLYPHS_PER_CLASS", 2)
    plain = open_dataset("glyphs", tmp_path, "val")
    assert same(open_dataset("glyphs", tmp_path, "val", cache=True), plain)
    [name] = files(tmp_path)
    assert name.startswith("glyphs-val-32-")
    draw = classification.glyph
    monkeypatch.setattr(
        classification, "glyph", lambda *arguments: 255 - draw(*arguments)
    )  # another way of drawing
    redrawn = open_dataset("glyphs", tmp_path, "val", cache=True)
    assert torch.equal(redrawn.pixels(5), 255 - plain_pixels(draw, 66, 1)) and files(tmp_path) != [
        name
    ]


def plain_pixels(draw, class_id: int, index: int) -> torch.Tensor:
    return torch.from_numpy(draw(class_id, 0, index, 32)).permute(2, 0, 1)


def test_pictures_in_memory_need_no_cache(tmp_path):
    class InMemory:
        def __call__(self, index: int) -> Image.Image:
            return Image.new("RGB", (8, 8))

        def version(self) -> None:
            return None

    dataset = ImageSet("some", "val", ["a"], np.zeros(3), InMemory(), size=8, stored=8)
    assert dataset.cached(tmp_path) is dataset and not list(tmp_path.iterdir())


SLOW = """
import os, signal, sys, time
from fewshot.data import cache
from fewshot.data.classification import open_dataset
from fewshot.data.image_set import ImageSet

root, how = sys.argv[1:]
pixels = ImageSet.pixels

def slowly(dataset, index):
    print("decodes", flush=True)
    if how == "killed" and index == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    while how == "slow" and index == 7 and not os.path.exists(f"{root}/go"):
        time.sleep(0.02)
    return pixels(dataset, index)

cache.CHUNK, ImageSet.pixels = 2, slowly
dataset = open_dataset("folder", root, "train", cache=True)
print(int(dataset.source.pixels.sum()))
"""


def begun(root: Path, how: str) -> subprocess.Popen:
    """Another program that opens the cached pictures, and decodes at once, until there is a file
    "go", or is killed.
    """
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(root), how], stdout=subprocess.PIPE, text=True
    )


def test_one_program_decodes_and_another_waits(root):
    first = begun(root, "slow")
    assert first.stdout.readline().startswith("decodes")  # two threads may write at once
    second = begun(root, "quick")
    assert second.stdout.readline().endswith("is being made by another process: waiting for it\n")
    (root / "go").touch()
    said = second.communicate(timeout=60)[0].splitlines()
    plain = plain_of(root)
    expected = sum(int(plain.pixels(i).sum()) for i in range(len(plain)))
    assert said == [str(expected)], "it decoded nothing"
    assert expected == int(first.communicate(timeout=60)[0].splitlines()[-1])
    assert len(files(root)) == 1


def test_what_a_killed_program_left_is_not_taken(root):
    for _ in range(2):
        killed = begun(root, "killed")
        assert killed.wait(60) == -signal.SIGKILL
        killed.stdout.close()
        (left,) = [name for name in files(root) if name.endswith(".tmp")]  # the older one is gone
        assert not [name for name in files(root) if name.endswith(".npy")]
    size = (root / classification.CACHE_FOLDER / left).stat().st_size
    cached = cached_of(root)
    assert same(cached, plain_of(root)) and 0 < size < cached.source.path.stat().st_size
    assert files(root) == [cached.source.path.name]
