"""A trained detector in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fewshot import InputError, show, weights
from fewshot.data.pipeline import Pipeline, collate_images
from fewshot.data.query_aware import support_crop
from fewshot.data.support import support_image
from fewshot.detectors import calibrate
from fewshot.inference.export import RoIHead
from fewshot.inference.model import NO_SUPPORTS, Model, Picture, Size, check_size, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Found(NamedTuple):
    """What was found on a picture, best first: boxes (n, 4) xyxy in its own pixels, scores (n,), n
    class names.
    """

    boxes: Tensor
    scores: Tensor
    names: list[str]


class Detector(Model):
    """A detector of objects; see `Model`."""

    def __init__(
        self,
        network: nn.Module,
        state: dict[str, Tensor],
        about: dict[str, Any],
        device: Any = "cpu",
    ):
        super().__init__(network, state, about, device)
        self.classes = list(about["classes"])
        with weights.naming(about):
            self.pipeline = Pipeline(**about.get("pictures", {}))
            self.pipeline.resized(1, 1)  # stops at what are no numbers
        self.calibration: calibrate.Calibration | None = None

    def calibrate(self, backbone: str | None = None) -> None:
        """From now on scores of novel classes are half cosines with their shots
        (`detectors.calibrate`), best first.

        They do not compare with the scores of other classes, which stay as they are.

        Args:
            backbone: torchvision's name, or NAME=FILE; by default what the model was fine-tuned
                with.

        Raises:
            InputError: the model was fine-tuned without --calibrate, or the backbone is not there
                or another one.
        """
        calibration = calibrate.restored(self.about, f"this {self.method}", backbone, self.device)
        with self.lock:
            self.calibration = calibration

    @torch.no_grad()
    def support(
        self,
        images: Picture | Sequence[Picture],
        boxes: Sequence[Sequence[float]] | Tensor | None = None,
        labels: str | Sequence[str] = (),
        *,
        size: Size = None,
        add: bool = False,
    ) -> None:
        """Learn classes from supports, instead of those known before; for methods that have
        supports.

        Attention-RPN and the prototype detector take any classes; Meta R-CNN and FSDetView those
        that their last layers were trained for, and look only for the ones that have supports. A
        model of your own counts as one of these by
        what it has: `support_features`, `set_prototypes` and `forget` as Attention-RPN,
            `support_features`,
        `add_supports` and `make_room` as the prototype detector, or `support_vectors` and
        `set_prototypes` as Meta R-CNN. What a prototype detector learnt is saved with it.

        Args:
            images: one or more of every class.
            boxes: of each picture's object, xyxy in its pixels; by default the whole picture. A
                picture with several objects is given once for each.
            labels: the class of each.
            add: go on looking for the classes known before, of which these may be more supports;
                prototype detector.

        Raises:
            InputError: the method has no supports, or none to be added, there are none, a box is
                not inside its picture, or a class is not one that the model can look for.
        """
        check_size(size)
        if not (hasattr(self.network, "set_prototypes") or self.compares_regions):
            raise InputError(
                f"{self.method} has no supports: fine-tune it on new classes with recipes/{self.method}.py"
            )
        if add and not self.compares_regions:
            raise InputError(
                f"{self.method} adds no class to those that it knows: give all classes' supports together"
            )
        pictures, _ = listed(images)
        labels = [labels] if isinstance(labels, str) else list(labels)
        if not pictures:
            raise InputError("no supports: give one or more pictures of every class")
        if boxes is None:
            boxes = [(0, 0, picture.shape[2], picture.shape[1]) for picture in pictures]
        boxes = [torch.as_tensor(box, dtype=torch.float32, device="cpu") for box in boxes]
        if not len(labels) == len(boxes) == len(pictures):
            counts = f"{len(pictures)} pictures, {len(boxes)} boxes and {len(labels)} labels"
            raise InputError(f"{counts}: give a box and a label for each picture")
        for i, (picture, box) in enumerate(zip(pictures, boxes)):
            _check_box(i, box, *picture.shape[1:])
        if self.compares_regions:
            with self.lock:
                self._compare_with(pictures, boxes, labels, size, add)
            return
        if not self.any_class and (unknown := sorted(set(labels) - set(self.classes))):
            known = ", ".join(self.classes)
            raise InputError(
                f"this {self.method} was not trained for {unknown[0]!r} but for {known}: fine-tune it with "
                f"recipes/{self.method}.py, or take a model of attention_rpn, which looks for any class"
            )
        vectors = [self._support_vectors(p, box, size) for p, box in zip(pictures, boxes)]
        with self.lock:
            if self.any_class:
                self.classes = list(dict.fromkeys(labels))
                self.network.forget(len(self.classes))
            numbers = torch.tensor(
                [self.classes.index(label) for label in labels], device=self.device
            )
            if self.any_class:
                self.network.set_prototypes(
                    (*vector, number[None]) for vector, number in zip(vectors, numbers)
                )
            else:
                self.network.set_prototypes(torch.cat(vectors), numbers)

    @property
    def any_class(self) -> bool:
        """Whether it looks for the classes of its supports, whatever they are."""
        return hasattr(self.network, "forget")

    @property
    def compares_regions(self) -> bool:
        """Whether it looks for any classes too, by their regions on whole pictures."""
        return hasattr(self.network, "add_supports")

    def _compare_with(
        self, pictures: list[Tensor], boxes: list[Tensor], labels: list[str], size: Size, add: bool
    ) -> None:
        """Learn from regions. One picture's are looked at together, so that none is taken for
        another's background.
        """
        classes = list(dict.fromkeys([*(self.classes if add else ()), *labels]))
        together: dict[tuple[torch.Size, bytes], list[int]] = {}
        for i, picture in enumerate(pictures):
            together.setdefault((picture.shape, picture.numpy().tobytes()), []).append(i)
        supports = []
        for rows in together.values():
            image, scale = self._resized(pictures[rows[0]], size)
            regions = (torch.stack([boxes[i] for i in rows]) * scale.repeat(2)).to(self.device)
            features = self.network.support_features(*self._batch([image]), [regions])
            supports.append(
                (
                    *features,
                    torch.tensor([classes.index(labels[i]) for i in rows], device=self.device),
                )
            )
        self.network.make_room(len(classes), keep=add)
        self.network.add_supports(supports)
        self.classes = classes
        base = [name for name in self.about["base"] if name in classes]
        self.about |= {
            "classes": classes,
            "base": base,
            "novel": [name for name in classes if name not in base],
        }
        self.about.pop("results", None)  # were those of other prototypes
        self.state |= {
            name: buffer.cpu() for name, buffer in self.network.named_buffers(recurse=False)
        }

    def _support_vectors(self, picture: Tensor, box: Tensor, size: Size) -> Any:
        """What the network makes of one support, a picture and a box on the CPU."""
        keep = size == "keep"
        if self.any_class:
            if not keep:
                picture, box = support_crop(
                    picture, box, self.about["support_size"], self.about["context"]
                )
            x = self.normalisation(picture[None].to(self.device))
            return self.network.support_features(x, box[None].to(self.device))
        stack = support_image(picture, box, None if keep else self.about["support_size"]).to(
            self.device
        )
        x = torch.cat([self.normalisation(stack[:3]), stack[3:].float()])
        return self.network.support_vectors(x[None])

    @torch.no_grad()
    def predict(
        self,
        images: Picture | Sequence[Picture],
        *,
        size: Size = None,
        score_above: float = 0.05,
        share_proposals: bool = False,
        test_proposals: int | None = None,
        at_once: int = 8,
    ) -> list[Found] | Found:
        """What is on each picture; on one alone if it is not a list.

        Args:
            score_above: leave out what is less sure; the networks do not report below 0.05.
            share_proposals: for Attention-RPN with many classes: quicker, not quite the same
                (`AttentionRPN.detect`).
            test_proposals: how many places of a picture are looked at: fewer are quicker. By
                default the model's own.
            at_once: most pictures of one size that go through the network together.

        Raises:
            InputError: the method needs supports and has none yet, or a picture cannot be read.
        """
        check_size(size)
        options = {"share": True} if share_proposals else {}
        if share_proposals and not self.any_class:
            raise InputError(
                f"{self.method} has one set of proposals anyway: share_proposals is for attention_rpn"
            )
        pictures, alone = listed(images)
        inputs = [self._resized(picture, size) for picture in pictures]
        found: list[Found | None] = [None] * len(inputs)
        with self.lock, self._proposing(test_proposals):
            if (known := getattr(self.network, "known", None)) is not None and not known.any():
                raise InputError(NO_SUPPORTS)
            for group in _of_one_size([image for image, _ in inputs], at_once):
                results = self.network.detect(
                    *self._batch([inputs[i][0] for i in group]), **options
                )
                for i, (boxes, scores, labels) in zip(group, results, strict=True):
                    names = [self.classes[label] for label in labels.tolist()]
                    boxes = boxes / inputs[i][1].repeat(2).to(boxes.device)
                    if self.calibration is not None:
                        scores = self.calibration(pictures[i].to(self.device), boxes, scores, names)
                    order = scores.argsort(descending=True, stable=True)
                    order = order[scores[order] >= score_above]
                    names = [names[n] for n in order.tolist()]
                    found[i] = Found(boxes[order].cpu(), scores[order].cpu(), names)
        return found[0] if alone else found

    @contextmanager
    def _proposing(self, number: int | None) -> Iterator[None]:
        """For a while, so many proposals of a picture are looked at instead of the model's own
        number.
        """
        if number is None:
            yield
            return
        if number < 1:
            raise InputError(f"test_proposals is {number}: must be one or more")
        before, after = self.network.rpn.test_proposals
        self.network.rpn.test_proposals = (max(before, number), number)
        try:
            yield
        finally:
            self.network.rpn.test_proposals = (before, after)

    def _resized(self, picture: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """The picture as the method's tests have it, and by which factors (2,) its x and y were
        changed.
        """
        if size == "keep":
            return picture, torch.ones(2)
        return self.pipeline.resize(picture, self.pipeline.short)

    def _batch(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Images of one size, normalised and padded, and their (height, width)."""
        height, width = images[0].shape[1:]
        x = self.normalisation(collate_images(images, self.pipeline.multiple).to(self.device))
        x[..., height:, :], x[..., width:] = 0, 0
        return x, [(height, width)] * len(images)

    def show(
        self, images: Picture | Sequence[Picture], *, size: Size = None, score_above: float = 0.3
    ) -> Figure:
        """A matplotlib figure of the pictures with what was found on them."""
        pictures, _ = listed(images)
        return show.found(
            pictures,
            self.predict(pictures, size=size, score_above=score_above),
            self.about["novel"],
        )

    def exportable(self) -> nn.Module:
        """Meta R-CNN's box head with the prototypes folded in: RoI vectors (n, D) to logits and
        deltas.

        Raises:
            InputError: the model is another one.
        """
        return RoIHead(self.network)


def _of_one_size(images: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """Positions of images that have the same size, up to `most` together; padding would change what
    is found.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    for group in groups.values():
        yield from (group[first : first + most] for first in range(0, len(group), most))


def _check_box(number: int, box: Tensor, height: int, width: int) -> None:
    if box.shape != (4,):
        raise InputError(f"box {number} has {tuple(box.shape)} numbers: give x1, y1, x2, y2")
    x1, y1, x2, y2 = box.tolist()
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        text = f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
        raise InputError(
            f"box {text} of support {number} is not inside its picture of {width} x {height}; correct it"
        )
