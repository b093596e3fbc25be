"""Trained models in use: one file in, a few supports of each class, then any pictures.

    model = fewshot.load("runs/proto_net/glyphs")
    model.support(images, labels)
    for guess in model.predict(others): print(guess.name, guess.probability)

`load` gives a `Classifier` or a `Detector`. Pictures are paths, PIL images, arrays (H, W, 3) or tensors (3, H, W) of
bytes in RGB; one alone, or a list of them. They are resized as in the method's tests, or with `size="keep"` not at all.

Several threads may share a model: what one learns or predicts, the others wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

from fewshot import InputError, calibrate, heads, methods, show, weights
from fewshot.data import pictures as files
from fewshot.data.pipeline import Pipeline, collate_images
from fewshot.data.query_aware import support_crop
from fewshot.data.support import support_image
from fewshot.data.transforms import Normalisation, TestCrop, Whole
from fewshot.export import PrototypeNetwork, RoIHead
from fewshot.fold import folded
from fewshot.hub import FILE, HubModel, download, find

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = str | Path | Image.Image | np.ndarray | Tensor
Size = Literal["keep"] | None  # None: as in the method's tests
NO_SUPPORTS = "no supports yet: call support with a few pictures of every class first"
REJECT, NONE = 0.95, "none of these"  # share of the classes' own pictures that are kept; what the others are called
drawing = RLock()  # whoever draws from a seed has torch's global stream to itself, whichever model it is for


class Guess(NamedTuple):
    """What a picture shows: the likeliest class, its probability, and every class's.

    After `Classifier.calibrate` also how far it is from the nearest class, and whether that is beyond the threshold:
    then it is `rejected`, as none of the classes, whichever is likeliest among them.
    """

    name: str
    probability: float
    probabilities: dict[str, float]
    rejected: bool = False
    distance: float | None = None


class Found(NamedTuple):
    """What was found on a picture, best first: boxes (n, 4) xyxy in its own pixels, scores (n,), n class names."""

    boxes: Tensor
    scores: Tensor
    names: list[str]


def load(
    source: str | Path, device: str | torch.device = "cpu", *, model: nn.Module | None = None
) -> Classifier | Detector:
    """The model in a file or a run's folder, or on the Hugging Face hub under this id, ready to be used.

    Args:
        model: of a recipe of your own, built as there and with any weights, which those of the file replace. It has
            `features` and `classify`, or `predict`, as `meta_test` asks for (a classifier), or
            `detect(images, sizes)` (a detector). By default one of `fewshot.methods`, by the name in the file.

    Raises:
        InputError: there is no such file or model, it is not of this project, is of a newer format, or the hub cannot
            be reached; or the weights do not fit `model`, or it is no model of the file's task.
    """
    path = find(source)
    state, about = weights.load(path)
    if model is None:
        model = methods.built(about)
        methods.fill(model, state, path)
        model = folded(model)  # only our own: what somebody else's network does with its norms is not known
    else:
        _check_task(model, about, path)
        weights.fill(model, state, path)
    return (Detector if hasattr(model, "detect") else Classifier)(model, state, about, device)


def _check_task(model: nn.Module, about: dict[str, Any], path: Path) -> None:
    name, detects = type(model).__name__, hasattr(model, "detect")
    if not (detects or hasattr(model, "predict") or (hasattr(model, "features") and hasattr(model, "classify"))):
        raise InputError(f"{name} has neither features and classify, nor predict, nor detect: give a recipe's model")
    if detects != ("architecture" in about):
        theirs, ours = ("classifier", "detector")[:: 1 if detects else -1]
        raise InputError(f"{path} is a {theirs}, and {name} is a {ours}: give the model that the file was saved from")


def decoded(picture: Picture) -> Tensor:
    """A picture as uint8 RGB (3, H, W), on the CPU.

    Raises:
        InputError: naming the file that cannot be decoded, or what is wrong with the array.
    """
    if isinstance(picture, (str, Path)):
        return files.tensor(picture)
    if isinstance(picture, Image.Image):
        return T.pil_to_tensor(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(picture)
        picture = picture.permute(2, 0, 1) if picture.ndim == 3 else picture
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        what = f"{tuple(picture.shape)} of {str(picture.dtype).removeprefix('torch.')}"
        raise InputError(f"a picture is {what}: give bytes in RGB, as an array (H, W, 3) or a tensor (3, H, W)")
    return picture.cpu().contiguous()


def listed(pictures: Picture | Sequence[Picture]) -> tuple[list[Tensor], bool]:
    """The pictures as tensors, and whether it was one alone."""
    alone = isinstance(pictures, (str, Path, Image.Image)) or getattr(pictures, "ndim", 0) == 3
    return [decoded(picture) for picture in ([pictures] if alone else pictures)], alone


def check_size(size: Size) -> None:
    if size not in (None, "keep"):
        raise InputError(f"size {size!r}: leave it out to resize as in the method's tests, or say keep")


class Model(HubModel):
    """What classifiers and detectors have in common.

    Args:
        network: with its weights. state, about: what `weights.load` gave.

    Attributes:
        method: the recipe's name. about: all that the file says of itself. classes: that it looks for.
        network: the model itself, in eval mode. lock: held by the thread that uses or changes what supports taught.
    """

    def __init__(self, network: nn.Module, state: dict[str, Tensor], about: dict[str, Any], device: Any = "cpu"):
        super().__init__(state, about)
        self.device = torch.device(device)
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.normalisation = Normalisation.from_dict(about["normalisation"])
        self.classes: list[str] = []
        self.lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}  # which no copy shares

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update(kept, lock=RLock())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Classifier | Detector:
        if Path(model_id).is_dir():
            return load(Path(model_id) / FILE)
        known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        return load(download(model_id, **{key: options[key] for key in known}))


class Classifier(Model):
    """A classifier of pictures into the classes of its supports; see `Model`.

    Attributes:
        threshold: distance beyond which a picture is none of the classes; None before `calibrate`.
    """

    def __init__(self, network: nn.Module, state: dict[str, Tensor], about: dict[str, Any], device: Any = "cpu"):
        super().__init__(network, state, about, device)
        self.adapts = hasattr(network, "predict")  # all of itself: it has no features apart from a task
        self._supports: tuple[Tensor, methods.Groups] | None = None
        self._logits: methods.Adapted | None = None  # of features; of images where it adapts
        self.threshold: float | None = None

    @torch.no_grad()
    def support(
        self,
        images: Picture | Sequence[Picture],
        labels: str | Sequence[str],
        *,
        size: Size = None,
        seed: int = 0,
        reject: float | None = None,
    ) -> None:
        """Learn classes from supports, instead of those learnt before.

        Methods that fine-tune do it here, with what is random in it drawn from `seed`; MAML and P>M>F adapt at every
        prediction, MAML since its batch norms see supports and queries together. Where these, or the models of recipes
        of your own, need as many supports of every class, classes of fewer show some of theirs again.

        Args:
            images: one or more of every class. labels: the class of each.
            reject: also `calibrate` by this share.

        Raises:
            InputError: no support, not as many labels as images, or more or fewer classes than MAML was trained for.
        """
        check_size(size)
        pictures, _ = listed(images)
        labels = [labels] if isinstance(labels, str) else list(labels)
        if not pictures:
            raise InputError("no supports: give one or more pictures of every class")
        if len(labels) != len(pictures):
            raise InputError(f"{len(pictures)} pictures and {len(labels)} labels: give one label for each picture")
        names = list(dict.fromkeys(labels))
        if self.adapts and len(names) != (ways := getattr(self.network, "ways", len(names))):
            raise InputError(f"{len(names)} classes of supports: this {self.method} was trained for {ways}")
        x = self.transformed(pictures, size)
        support = x if self.adapts else self.extracted(x)
        groups = [[i for i, label in enumerate(labels) if label == name] for name in names]
        threshold = None if reject is None else self._threshold(support, groups, reject)
        with self.lock:
            self.adapt(support, groups, seed)
            self.classes, self.threshold = names, threshold

    def adapt(self, support: Tensor, groups: methods.Groups, seed: int = 0) -> None:
        """Learn classes from supports' features (n, ...), or images where it adapts; `groups` has each class's rows."""
        if isinstance(self.network, methods.FeatureClassifier):
            with self._drawing(seed):
                self._logits = self.network.adapt(support, groups)
        else:
            repeated = support[methods.equal(groups)][None]
            compare = self.network.predict if self.adapts else self.network.classify

            def logits(query: Tensor) -> Tensor:
                with self._drawing(seed):
                    return compare(repeated, query[None], len(groups))[0]

            self._logits = logits
        self._supports, self.threshold = (support, groups), None

    @torch.no_grad()
    def calibrate(self, reject: float = REJECT) -> float:
        """From now on tell apart what is none of the classes; returns the threshold.

        A picture's distance is 1 - cosine of its features to the nearest class mean, whatever the method compares. The
        threshold is the `reject` quantile of the supports' distances to the mean of their class's others, so that about
        this share of the classes' own pictures is kept. A class of one support has no others: the rest stand for it.

        Raises:
            InputError: there are no supports yet, no class has two, the share is not between 0 and 1, or the method
                has no features apart from a task (MAML).
        """
        with self.lock:
            if self._supports is None:
                raise InputError(NO_SUPPORTS)
            self.threshold = self._threshold(*self._supports, reject)
            return self.threshold

    def _threshold(self, support: Tensor, groups: methods.Groups, reject: float) -> float:
        if not 0 < reject <= 1:
            raise InputError(f"reject {reject}: give the share of the classes' own pictures to keep, say {REJECT}")
        if self.adapts:
            raise InputError(f"{self.method} adapts all of itself to a task: it has no features to reject pictures by")
        several = [support[rows] for rows in groups if len(rows) > 1]
        if not several:
            raise InputError("to tell apart what is none of the classes, one of them at least needs two supports")
        left_out = [_distances(x, (x.sum(0) - x) / (len(x) - 1)).diagonal() for x in several]
        return float(torch.cat(left_out).quantile(reject))

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        with drawing, torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @torch.no_grad()
    def predict(self, images: Picture | Sequence[Picture], *, size: Size = None) -> list[Guess] | Guess:
        """The class of each picture; of one alone if it is not a list.

        Raises:
            InputError: there are no supports yet, or a picture cannot be read.
        """
        check_size(size)
        pictures, alone = listed(images)
        guesses = []
        if not pictures:
            return guesses
        x = self.transformed(pictures, size)
        query = x if self.adapts else self.extracted(x)
        with self.lock:
            for row in self.classify(query).softmax(1).cpu():
                best = int(row.argmax())
                table = dict(zip(self.classes, row.tolist()))
                guesses.append(Guess(self.classes[best], table[self.classes[best]], table))
            if self.threshold is not None:
                far = _distances(query, methods.class_means(*self._supports)).amin(1).tolist()
                guesses = [g._replace(rejected=d > self.threshold, distance=d) for g, d in zip(guesses, far)]
        return guesses[0] if alone else guesses

    def classify(self, query: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, ...), of normalised images where it adapts.

        Raises:
            InputError: there are no supports yet.
        """
        if self._logits is None:
            raise InputError(NO_SUPPORTS)
        return self._logits(query).float()

    def extracted(self, x: Tensor) -> Tensor:
        """Features (n, ...) of normalised images (n, 3, H, W), some at a time."""
        return torch.cat([self.network.features(part).float() for part in x.split(64)])

    def transformed(self, pictures: Sequence[Tensor], size: Size) -> Tensor:
        """Normalised images (n, 3, H, W) as the method's tests have them."""
        if size == "keep":
            if len({picture.shape for picture in pictures}) > 1:
                raise InputError("pictures of several sizes cannot be kept as they are: leave size out to resize them")
            return self.normalisation(torch.stack(list(pictures)).to(self.device))
        stored, aspects = self.about.get("stored", 256), [p.shape[2] / p.shape[1] for p in pictures]
        squares = []
        for picture in pictures:  # squashed as the data sets store them
            image = T.to_pil_image(picture).resize((stored, stored), Image.Resampling.BILINEAR)
            squares.append(T.pil_to_tensor(image))
        transform = (TestCrop if self.about["augment"] else Whole)(self.about["size"], self.normalisation)
        return transform(torch.stack(squares).to(self.device), torch.tensor(aspects, device=self.device))

    def show(self, images: Picture | Sequence[Picture], *, size: Size = None) -> Figure:
        """A matplotlib figure of the pictures with their classes' probabilities, and which are none of these."""
        pictures, _ = listed(images)
        guesses = self.predict(pictures, size=size)
        figure = show.guesses(pictures, [guess.probabilities for guess in guesses])
        for axes, guess in zip(figure.axes[::2], guesses):
            axes.set_title(NONE if guess.rejected else "", fontsize=8)
        return figure

    def exportable(self) -> nn.Module:
        """A module that takes normalised images (n, 3, size, size) to the logits of the supports' classes (n, classes).

        Raises:
            InputError: there are no supports yet, or the method does not classify by their means.
        """
        if not isinstance(self.network, methods.ByMeans):
            names = "proto_net, relation_net, meta_baseline and feat"
            raise InputError(f"{self.method} does not classify by its supports' means: only {names} export")
        if self._supports is None:
            raise InputError(NO_SUPPORTS)
        return PrototypeNetwork(self.network, methods.class_means(*self._supports))


def _distances(x: Tensor, means: Tensor) -> Tensor:
    """1 - cosine (n, m) between features (n, ...) and class means (m, ...)."""
    return 1 - heads.cosines(x.flatten(1), means.flatten(1))


class Detector(Model):
    """A detector of objects; see `Model`."""

    def __init__(self, network: nn.Module, state: dict[str, Tensor], about: dict[str, Any], device: Any = "cpu"):
        super().__init__(network, state, about, device)
        self.classes = list(about["classes"])
        self.pipeline = Pipeline(**about.get("pictures", {}))
        self.calibration: calibrate.Calibration | None = None

    def calibrate(self, backbone: str | None = None) -> None:
        """From now on scores of novel classes are half cosines with their shots (`fewshot.calibrate`), best first.

        They do not compare with the scores of other classes, which stay as they are.

        Args:
            backbone: torchvision's name, or NAME=FILE; by default what the model was fine-tuned with.

        Raises:
            InputError: the model was fine-tuned without --calibrate, or the backbone is not there or another one.
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
        """Learn classes from supports, instead of those known before; for methods that have supports.

        Attention-RPN and the prototype detector take any classes; Meta R-CNN and FSDetView those that their last layers
        were trained for, and look only for the ones that have supports. A model of your own counts as one of these by
        what it has: `support_features`, `set_prototypes` and `forget` as Attention-RPN, `support_features`,
        `add_supports` and `make_room` as the prototype detector, or `support_vectors` and `set_prototypes` as Meta
        R-CNN. What a prototype detector learnt is saved with it.

        Args:
            images: one or more of every class.
            boxes: of each picture's object, xyxy in its pixels; by default the whole picture. A picture with several
                objects is given once for each.
            labels: the class of each.
            add: go on looking for the classes known before, of which these may be more supports; prototype detector.

        Raises:
            InputError: the method has no supports, or none to be added, there are none, a box is not inside its
                picture, or a class is not one that the model can look for.
        """
        check_size(size)
        if not (hasattr(self.network, "set_prototypes") or self.compares_regions):
            raise InputError(
                f"{self.method} has no supports: fine-tune it on new classes with recipes/{self.method}.py"
            )
        if add and not self.compares_regions:
            raise InputError(f"{self.method} adds no class to those that it knows: give all classes' supports together")
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
            numbers = torch.tensor([self.classes.index(label) for label in labels], device=self.device)
            if self.any_class:
                self.network.set_prototypes((*vector, number[None]) for vector, number in zip(vectors, numbers))
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
        """Learn from regions. One picture's are looked at together, so that none is taken for another's background."""
        classes = list(dict.fromkeys([*(self.classes if add else ()), *labels]))
        together: dict[tuple[torch.Size, bytes], list[int]] = {}
        for i, picture in enumerate(pictures):
            together.setdefault((picture.shape, picture.numpy().tobytes()), []).append(i)
        supports = []
        for rows in together.values():
            image, scale = self._resized(pictures[rows[0]], size)
            regions = (torch.stack([boxes[i] for i in rows]) * scale.repeat(2)).to(self.device)
            features = self.network.support_features(*self._batch([image]), [regions])
            supports.append((*features, torch.tensor([classes.index(labels[i]) for i in rows], device=self.device)))
        self.network.make_room(len(classes), keep=add)
        self.network.add_supports(supports)
        self.classes = classes
        base = [name for name in self.about["base"] if name in classes]
        self.about |= {"classes": classes, "base": base, "novel": [name for name in classes if name not in base]}
        self.about.pop("results", None)  # were those of other prototypes
        self.state |= {name: buffer.cpu() for name, buffer in self.network.named_buffers(recurse=False)}

    def _support_vectors(self, picture: Tensor, box: Tensor, size: Size) -> Any:
        """What the network makes of one support, a picture and a box on the CPU."""
        keep = size == "keep"
        if self.any_class:
            if not keep:
                picture, box = support_crop(picture, box, self.about["support_size"], self.about["context"])
            x = self.normalisation(picture[None].to(self.device))
            return self.network.support_features(x, box[None].to(self.device))
        stack = support_image(picture, box, None if keep else self.about["support_size"]).to(self.device)
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
            share_proposals: for Attention-RPN with many classes: quicker, not quite the same (`AttentionRPN.detect`).
            test_proposals: how many places of a picture are looked at: fewer are quicker. By default the model's own.
            at_once: most pictures of one size that go through the network together.

        Raises:
            InputError: the method needs supports and has none yet, or a picture cannot be read.
        """
        check_size(size)
        options = {"share": True} if share_proposals else {}
        if share_proposals and not self.any_class:
            raise InputError(f"{self.method} has one set of proposals anyway: share_proposals is for attention_rpn")
        pictures, alone = listed(images)
        inputs = [self._resized(picture, size) for picture in pictures]
        found: list[Found | None] = [None] * len(inputs)
        with self.lock, self._proposing(test_proposals):
            if (known := getattr(self.network, "known", None)) is not None and not known.any():
                raise InputError(NO_SUPPORTS)
            for group in _of_one_size([image for image, _ in inputs], at_once):
                results = self.network.detect(*self._batch([inputs[i][0] for i in group]), **options)
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
        """For a while, so many proposals of a picture are looked at instead of the model's own number."""
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
        """The picture as the method's tests have it, and by which factors (2,) its x and y were changed."""
        if size == "keep":
            return picture, torch.ones(2)
        return self.pipeline.resize(picture, self.pipeline.short)

    def _batch(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Images of one size, normalised and padded, and their (height, width)."""
        height, width = images[0].shape[1:]
        x = self.normalisation(collate_images(images, self.pipeline.multiple).to(self.device))
        x[..., height:, :], x[..., width:] = 0, 0
        return x, [(height, width)] * len(images)

    def show(self, images: Picture | Sequence[Picture], *, size: Size = None, score_above: float = 0.3) -> Figure:
        """A matplotlib figure of the pictures with what was found on them."""
        pictures, _ = listed(images)
        return show.found(pictures, self.predict(pictures, size=size, score_above=score_above), self.about["novel"])

    def exportable(self) -> nn.Module:
        """Meta R-CNN's box head with the prototypes folded in: RoI vectors (n, D) to logits and deltas.

        Raises:
            InputError: the model is another one.
        """
        return RoIHead(self.network)


def _of_one_size(images: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """Positions of images that have the same size, up to `most` together; padding would change what is found."""
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
        raise InputError(f"box {text} of support {number} is not inside its picture of {width} x {height}; correct it")
