"""Episodes: which images they hold, and that nothing but the seed and the step's number decides it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot import InputError
from fewshot.data import episodes, pictures, transforms
from fewshot.data.image_set import ImageSet
from fewshot.data.stream import Feed

SIZE = 8


@dataclass(frozen=True)
class Numbered:
    """Pictures that show their own index: red and green hold it, blue is `broken` for one that
    cannot be read.
    """

    broken: str = ""
    at: int = -1

    def __call__(self, index: int) -> Image.Image:
        if index == self.at:
            return pictures.read(self.broken)
        return Image.new("RGB", (SIZE, SIZE), (index // 256, index % 256, 0))


def numbered(
    classes: int = 7, images: int = 40, source: Numbered | None = None, augment: bool = False
) -> ImageSet:
    labels = np.random.default_rng(0).permutation(
        np.arange(classes * images) % classes
    )  # classes not in a row
    names = [f"class{i}" for i in range(classes)]
    return ImageSet(
        "numbered", "train", names, labels, source or Numbered(), size=SIZE, stored=SIZE, augment=augment,
        normalisation=transforms.Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )  # fmt: skip


def shown(images: torch.Tensor) -> torch.Tensor:
    """The indices (...) that plain pictures (..., 3, H, W) show."""
    return (256 * images[..., 0, 0, 0] + images[..., 1, 0, 0]).round().long()


def load(dataset: ImageSet, ways=3, shots=2, queries=4, tasks=1, **feed) -> list[episodes.Episode]:
    feed, transform = Feed(**{"steps": 3, **feed}), transforms.train_transform(dataset)
    return list(
        episodes.episode_loader(dataset, ways, shots, queries, feed, transform, tasks=tasks)
    )


def batches(
    dataset: ImageSet, batch_size: int, **feed
) -> list[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    transform = transforms.train_transform(dataset)
    return list(
        episodes.class_batch_loader(dataset, Feed(**feed), transform, batch_size=batch_size)
    )


def same(one: episodes.Episode, other: episodes.Episode) -> bool:
    tensors = (k for k in vars(one) if k != "indices")
    return one.indices == other.indices and all(
        torch.equal(getattr(one, k), getattr(other, k)) for k in tensors
    )


def test_a_drawn_episode_is_one():
    dataset = numbered()
    classes, support, query = episodes.draw(dataset, 5, 3, 6, seed=1, index=2)
    assert len(set(classes)) == 5 and support.shape == (5, 3) and query.shape == (5, 6)
    assert len({*support.flat, *query.flat}) == 5 * 9
    for images in (support, query):
        assert (dataset.labels[images] == classes[:, None]).all()


def test_draw_depends_on_seed_and_index_only():
    dataset = numbered()
    first = episodes.draw(dataset, 5, 3, 6, 1, 2)
    np.random.seed(3)
    assert all(
        np.array_equal(a, b) for a, b in zip(first, episodes.draw(dataset.by_class, 5, 3, 6, 1, 2))
    )
    for other in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(first.query, episodes.draw(dataset, 5, 3, 6, *other).query)


def test_fewer_shots_are_among_more_and_queries_stay():
    one, five = (episodes.draw(numbered(), 5, shots, 15, 0, 7) for shots in (1, 5))
    assert np.array_equal(one.classes, five.classes) and np.array_equal(one.query, five.query)
    assert np.array_equal(one.support, five.support[:, :1])


def test_every_image_is_as_likely():
    by_class = [np.arange(10) + 10 * i for i in range(4)]
    drawn = [episodes.draw(by_class, 2, 1, 1, 0, i) for i in range(4000)]
    for part in ("support", "query"):
        counts = np.bincount(
            np.concatenate([getattr(d, part).ravel() for d in drawn]), minlength=40
        )
        assert abs(counts - 200).max() < 5 * 200**0.5


# mmfewshot's own generator: ranks within a class, of images per class that the published data sets
# have
CUB_VAL = (
    "60 41 60 60 45 56 60 60 59 60 60 60 60 60 58 60 60 60 60 59 60 60 60 60 60 60 60 60 60 60 60 59 60 60 60 60 60 60 "
    "60 60 60 59 60 60 56 60 60 58 60 60"
)
CUB_TEST = (
    "60 48 56 58 59 52 59 53 60 60 60 60 60 60 59 60 60 60 60 60 53 60 60 60 60 60 60 60 60 60 59 60 60 60 60 60 60 60 "
    "60 59 60 59 60 60 60 60 60 60 59 60"
)
COUNTS = {
    "mini": [600] * 20,
    "mini val": [600] * 16,
    "cub": [int(n) for n in CUB_TEST.split()],
    "cub val": [int(n) for n in CUB_VAL.split()],
}
# data, shots, episode, classes, first support of each, first 3 queries of the first class, sum of
# all queries
REFERENCE = [
    ("mini", 1, 0, [18, 1, 19, 8, 10], [578, 18, 447, 138, 442], [52, 533, 367], 20616),
    ("mini", 1, 1, [18, 10, 14, 0, 4], [482, 8, 432, 170, 79], [576, 205, 552], 25974),
    ("mini", 1, 1999, [9, 15, 6, 4, 1], [496, 355, 591, 184, 134], [381, 411, 474], 25393),
    ("mini", 5, 0, [18, 1, 19, 8, 10], [578, 18, 447, 138, 442], [62, 350, 306], 20463),
    ("mini", 5, 1999, [9, 15, 6, 4, 1], [496, 355, 591, 184, 134], [292, 533, 573], 22644),
    ("mini val", 1, 99, [2, 8, 0, 14, 12], [75, 311, 533, 73, 203], [218, 164, 41], 21488),
    ("cub", 1, 0, [28, 11, 10, 41, 2], [25, 7, 23, 55, 52], [30, 10, 22], 2091),
    ("cub", 1, 1, [1, 20, 25, 8, 14], [27, 14, 33, 33, 53], [46, 21, 14], 2143),
    ("cub", 1, 1999, [10, 35, 36, 16, 5], [8, 52, 26, 37, 42], [33, 25, 44], 2441),
    ("cub", 5, 0, [28, 11, 10, 41, 2], [25, 7, 23, 55, 52], [7, 24, 2], 2183),
    ("cub val", 1, 0, [28, 11, 10, 41, 2], [25, 7, 23, 55, 5], [30, 10, 22], 2195),
]


@pytest.mark.parametrize("data, shots, index, classes, support, query, total", REFERENCE)
def test_reference_episodes_are_mmfewshots(data, shots, index, classes, support, query, total):
    by_class = [np.arange(n) for n in COUNTS[data]]
    drawn = episodes.reference_episodes(by_class, 5, shots, 15, index + 1, seed=0)[index]
    assert drawn.classes.tolist() == classes
    assert drawn.support.shape == (5, shots) and drawn.support[:, 0].tolist() == support
    assert drawn.query.shape == (5, 15) and drawn.query[0, :3].tolist() == query
    assert drawn.query.sum() == total


def test_reference_training_episodes_are_mmfewshots():
    [first] = episodes.reference_episodes([np.arange(600)] * 64, 5, 5, 16, 1, seed=0)
    assert first.classes.tolist() == [45, 29, 43, 61, 34]
    assert first.support[0].tolist() == [277, 165, 467, 311, 432]


def test_impossible_episodes_are_refused():
    dataset = numbered(classes=4, images=10)
    episodes.check(dataset, 4, 5, 5)
    with pytest.raises(InputError, match=r"^--ways 5: numbered train has 4 classes; ask for fewer"):
        episodes.check(dataset, 5, 1, 1)
    words = r"^class class0 of numbered train: has 10 pictures, --train-shots 5 and --train-queries 6 take 11; "
    with pytest.raises(InputError, match=f"{words}give at most --train-queries 5, or add pictures"):
        load(dataset, 2, 5, 6)
    with pytest.raises(InputError, match=r"^--shots 0: an episode needs at least 1"):
        episodes.check(dataset, 2, 0, 5)
    short = [np.arange(10), np.arange(3)]
    episodes.draw(short[:1], 1, 2, 2, 0, 0)
    with pytest.raises(
        InputError, match=r"^class 1 of the data set: has 3 pictures, .* give at most --queries 1"
    ):
        episodes.draw(short, 2, 2, 2, 0, 0)
    with pytest.raises(InputError, match=r"^class 1 of the data set: has 3 pictures"):
        episodes.check(short, 2, 2, 2)
    with pytest.raises(InputError, match=r"^--seed -1"):
        episodes.draw(dataset, 2, 1, 1, -1, 0)
    with pytest.raises(
        InputError, match=r"^3 episodes a step cannot be divided among 2 processes: use a multiple"
    ):
        load(dataset, tasks=3, world=2)
    with pytest.raises(InputError, match=r"^5 images a step"):
        batches(dataset, batch_size=5, steps=1, world=2)


def test_loaded_episodes_hold_what_was_drawn():
    dataset = numbered()
    for step, episode in enumerate(load(dataset, ways=3, shots=2, queries=4, tasks=2)):
        assert episode.indices == [2 * step, 2 * step + 1]
        assert (
            episode.support.shape == (2, 6, 3, SIZE, SIZE)
            and episode.support.dtype == torch.float32
        )
        assert episode.query.shape == (2, 12, 3, SIZE, SIZE)
        assert episode.support_labels.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
        assert episode.query_labels.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 2
        for i, index in enumerate(episode.indices):
            classes, support, query = episodes.draw(dataset, 3, 2, 4, 0, index)
            assert episode.classes[i].tolist() == classes.tolist()
            assert shown(episode.support[i]).tolist() == support.ravel().tolist()
            assert shown(episode.query[i]).tolist() == query.ravel().tolist()


@pytest.mark.parametrize("augment", [False, True])
def test_a_resumed_stream_goes_on_as_the_straight_one(augment):
    dataset = numbered(augment=augment)
    straight = load(dataset, steps=5)
    assert len(straight) == 5 and not torch.equal(straight[3].query, straight[4].query)
    assert all(
        same(a, b) for a, b in zip(straight[3:], load(dataset, start=3, steps=5), strict=True)
    )


def test_processes_share_a_step_and_change_nothing():
    dataset = numbered(augment=True)
    whole = load(dataset, tasks=4, steps=2)
    shares = [load(dataset, tasks=4, steps=2, rank=rank, world=2) for rank in range(2)]
    for step in range(2):
        for rank in range(2):
            for name, mine in vars(shares[rank][step]).items():
                theirs = getattr(whole[step], name)[rank::2]
                if name == "indices":
                    assert mine == theirs
                else:
                    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_workers_change_nothing_and_the_global_streams_stay_untouched():
    dataset = numbered(augment=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    here, there = load(dataset), load(dataset, workers=2)
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named_in_one_line(tmp_path, workers):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    dataset = numbered(classes=3, images=6, source=Numbered(str(broken), at=4))
    with pytest.raises(InputError) as caught:
        load(dataset, workers=workers)
    assert str(caught.value).startswith(f"{broken}: not readable") and "\n" not in str(caught.value)


def test_supervised_batches_are_endless_permutations():
    dataset = numbered(
        classes=5, images=4
    )  # 20 images in batches of 8: two epochs are five batches
    drawn = batches(dataset, batch_size=8, steps=5)
    indices = torch.cat([shown(images) for images, _, _ in drawn])
    for epoch in indices.split(20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert indices[:20].tolist() != indices[20:].tolist()
    assert [number for _, _, numbers in drawn for number in numbers] == indices.tolist()
    assert (
        torch.cat([labels for _, labels, _ in drawn]).tolist() == dataset.labels[indices].tolist()
    )


def test_supervised_batches_resume_and_divide():
    dataset = numbered(classes=5, images=4, augment=True)
    straight = batches(dataset, batch_size=8, steps=5)
    resumed = batches(dataset, batch_size=8, start=2, steps=5, workers=1)
    for (images, labels, _), (again, same_labels, _) in zip(straight[2:], resumed, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, same_labels)
    for rank in range(2):
        share = batches(dataset, batch_size=8, steps=5, rank=rank, world=2)
        for (images, labels, _), (mine, my_labels, _) in zip(straight, share, strict=True):
            torch.testing.assert_close(mine, images[rank::2], atol=1e-4, rtol=0)
            assert torch.equal(my_labels, labels[rank::2])


def test_image_loader_keeps_the_order_and_the_rest():
    dataset = numbered()
    transform, wanted = transforms.test_transform(dataset), [9, 200, 3, 3, 77, 0]
    drawn = list(episodes.image_loader(dataset, wanted, Feed(), transform, batch_size=4))
    assert [len(images) for images, _ in drawn] == [4, 2]
    assert torch.cat([shown(images) for images, _ in drawn]).tolist() == wanted
    assert [index for _, indices in drawn for index in indices] == wanted
    assert list(episodes.image_loader(dataset, [], Feed(), transform, batch_size=4)) == []
    with pytest.raises(ValueError, match="test transform"):
        episodes.image_loader(
            dataset, wanted, Feed(), transforms.TrainAugment(8, transforms.IMAGENET)
        )
