"""Trained models in use: one file in, a few supports of each class, then any pictures.

    model = fewshot.load("runs/proto_net/glyphs")
    model.support(images, labels)
    for guess in model.predict(others): print(guess.name, guess.probability)

`load` gives a `Classifier` or a `Detector`. Pictures are paths, PIL images, arrays (H, W, 3) or tensors (3, H, W) of
bytes in RGB; one alone, or a list of them. They are resized as in the method's tests, or with `size="keep"` not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

from fewshot import InputError, backbones, heads, run, show, task_heads, trunks, weights
from fewshot.data.detection import Pipeline, collate_images
from fewshot.data.query_aware import support_crop
from fewshot.data.support import support_image
from fewshot.data.transforms import Normalisation, TestCrop, Whole
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.detectors.mpsr import MPSR
from fewshot.detectors.tfa import TFA
from fewshot.export import PrototypeNetwork, RoIHead
from fewshot.fold import folded
from fewshot.fpn import fpn
from fewshot.hub import FILE, HubModel, download, find
from fewshot.maml import MAML

Picture = str | Path | Image.Image | np.ndarray | Tensor
Size = Literal["keep"] | None  # None: as in the method's tests


class Guess(NamedTuple):
    """What a picture shows: the likeliest class, its probability, and every class's."""

    name: str
    probability: float
    probabilities: dict[str, float]


class Found(NamedTuple):
    """What was found on a picture, best first: boxes (n, 4) xyxy in its own pixels, scores (n,), n class names."""

    boxes: Tensor
    scores: Tensor
    names: list[str]


def load(source: str | Path, device: str | torch.device = "cpu") -> Classifier | Detector:
    """The model in a file or a run's folder, or on the Hugging Face hub under this id, ready to be used.

    Raises:
        InputError: there is no such file or model, it is not of this project, is of a newer format, or the hub cannot
            be reached.
    """
    path = find(source)
    state, about = weights.load(path)
    method = about.get("method")
    if method in CLASSIFIERS:
        return Classifier(state, about, source=path, device=device)
    if method in DETECTORS:
        return Detector(state, about, source=path, device=device)
    known = ", ".join([*CLASSIFIERS, *DETECTORS])
    raise InputError(f"{path} is a model of {method!r}: this can use {known}; build others with fewshot.weights.load")


def decoded(picture: Picture) -> Tensor:
    """A picture as uint8 RGB (3, H, W).

    Raises:
        InputError: naming the file that cannot be decoded, or what is wrong with the array.
    """
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture) as file:
                picture = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{picture}: not a readable picture ({error}); replace it or take it out") from None
    if isinstance(picture, Image.Image):
        return T.pil_to_tensor(picture.convert("RGB"))
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(picture)
        picture = picture.permute(2, 0, 1) if picture.ndim == 3 else picture
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        what = f"{tuple(picture.shape)} of {str(picture.dtype).removeprefix('torch.')}"
        raise InputError(f"a picture is {what}: give bytes in RGB, as an array (H, W, 3) or a tensor (3, H, W)")
    return picture.contiguous()


def listed(pictures: Picture | Sequence[Picture]) -> tuple[list[Tensor], bool]:
    """The pictures as tensors, and whether it was one alone."""
    alone = isinstance(pictures, (str, Path, Image.Image)) or getattr(pictures, "ndim", 0) == 3
    return [decoded(picture) for picture in ([pictures] if alone else pictures)], alone


def check_size(size: Size) -> None:
    if size not in (None, "keep"):
        raise InputError(f"size {size!r}: leave it out to resize as in the method's tests, or say keep")


class Model(HubModel):
    """What classifiers and detectors have in common: the hub."""

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Classifier | Detector:
        if Path(model_id).is_dir():
            return load(Path(model_id) / FILE)
        known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        return load(download(model_id, **{key: options[key] for key in known}))


class Classifier(Model):
    """A classifier of pictures into the classes of its supports.

    Args:
        state, about: what `weights.load` gave.
        source: where from, for errors.

    Attributes:
        method: the recipe's name. about: all that the file says of itself. classes: of the supports.
        features: the backbone.
    """

    def __init__(self, state: dict[str, Tensor], about: dict[str, Any], source: str | Path, device: Any = "cpu"):
        super().__init__(state, about)
        self.device, self.classes = torch.device(device), []
        options = {"pooled": False} if self.method == "relation_net" else {}
        self.features = backbones.build(about["args"]["backbone"], about["size"], **options)
        self.head: nn.Module | None = None
        if self.method == "relation_net":
            self.head = heads.RelationHead(self.features.out_channels, self.features.map_size)
        elif self.method == "meta_baseline":
            self.head = heads.MetaBaseline()
        elif self.method == "maml":
            ways, steps, lr = (about.get(k) or about["args"][k] for k in ("ways", "test_steps", "inner_lr"))
            self.head = MAML(self.features, ways, test_steps=steps, lr=lr)  # it holds the backbone
        if self.method == "maml":
            weights.fill(self.head, state, source)
        else:
            # what Baseline and its kin learnt to tell the training classes apart with is of no use to new ones
            needed = {k: v for k, v in state.items() if k.startswith("features.") or self.head is not None}
            modules = {"features": self.features} | ({"head": self.head} if self.head is not None else {})
            weights.fill(nn.ModuleDict(modules), needed, source)
        for module in (self.features, self.head):
            if module is not None:
                module.eval().requires_grad_(False).to(self.device)
        self._logits: Callable[[Tensor], Tensor] | None = None  # of features; of images for MAML

    @torch.no_grad()
    def support(
        self, images: Picture | Sequence[Picture], labels: str | Sequence[str], *, size: Size = None, seed: int = 0
    ) -> None:
        """Learn classes from supports, instead of those learnt before.

        Methods that fine-tune do it here, with what is random in it drawn from `seed`; MAML adapts at every
        prediction, since its batch norms see supports and queries together. Where these need as many supports of every
        class, classes of fewer show some of theirs again.

        Args:
            images: one or more of every class. labels: the class of each.

        Raises:
            InputError: no support, as many labels as images, or more or fewer classes than MAML was trained for.
        """
        check_size(size)
        pictures, _ = listed(images)
        labels = [labels] if isinstance(labels, str) else list(labels)
        if not pictures:
            raise InputError("no supports: give one or more pictures of every class")
        if len(labels) != len(pictures):
            raise InputError(f"{len(pictures)} pictures and {len(labels)} labels: give one label for each picture")
        names = list(dict.fromkeys(labels))
        if self.method == "maml" and len(names) != self.head.ways:
            raise InputError(f"{len(names)} classes of supports: this MAML was trained for {self.head.ways}")
        x = self.transformed(pictures, size)
        groups = [[i for i, label in enumerate(labels) if label == name] for name in names]
        if self.method == "maml":
            repeated = x[_equal(groups)][None]
            self._logits = lambda query: self.head.predict(repeated, query[None], len(names))[0]
        else:
            self.adapt(self.extracted(x), groups, seed)
        self.classes = names

    def adapt(self, features: Tensor, groups: Sequence[Sequence[int]], seed: int = 0) -> None:
        """Learn classes from features (n, ...) of supports; `groups` has the rows of each class."""
        ways, args = len(groups), self.about["args"]
        means = torch.stack([features[list(group)].mean(0) for group in groups])[None]  # (1, ways, ...)
        if self.method == "proto_net":
            self._logits = lambda query: heads.prototype(means, query[None], ways, args["distance"])[0]
        elif self.method == "matching_net":
            self._logits = partial(_attention, features, groups, args["temperature"])
        elif self.method in ("relation_net", "meta_baseline"):
            self._logits = lambda query: self.head(means, query[None], ways)[0]
        else:
            trained = self._fine_tuned(features[_equal(groups)][None], ways, seed)
            self._logits = lambda query: trained.logits(query[None])[0]
        self._means = means[0]

    def _fine_tuned(self, support: Tensor, ways: int, seed: int) -> task_heads.LinearHeads | task_heads.CosineHeads:
        """A classifier trained on features (1, ways * shots, D), class by class, as in the method's tests."""
        steps = {"steps": 150 if support.shape[1] == ways else 600, "batch_size": min(4, support.shape[1])}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.mix(seed, *support.shape[1:]))
            if self.method == "baseline":
                return task_heads.fit_linear(support, ways, **steps)
            fit = task_heads.fit_cosine if self.method == "baseline_plus" else task_heads.fit_normalised
            temperature = self.about.get("test_temperature") or self.about["args"]["test_temperature"]
            return fit(support, ways, temperature=temperature, **steps)

    @torch.no_grad()
    def predict(self, images: Picture | Sequence[Picture], *, size: Size = None) -> list[Guess] | Guess:
        """The class of each picture; of one alone if it is not a list.

        Raises:
            InputError: there are no supports yet, or a picture cannot be read.
        """
        check_size(size)
        pictures, alone = listed(images)
        guesses = []
        for row in self.probabilities(self.transformed(pictures, size)).cpu() if pictures else []:
            best = int(row.argmax())
            table = dict(zip(self.classes, row.tolist()))
            guesses.append(Guess(self.classes[best], table[self.classes[best]], table))
        return guesses[0] if alone else guesses

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Probabilities (n, classes) of normalised images (n, 3, H, W)."""
        return self.classify(x if self.method == "maml" else self.extracted(x)).softmax(1)

    def classify(self, query: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, ...), for MAML of normalised images.

        Raises:
            InputError: there are no supports yet.
        """
        if self._logits is None:
            raise InputError("no supports yet: call support with a few pictures of every class first")
        return self._logits(query).float()

    def extracted(self, x: Tensor) -> Tensor:
        """Features (n, ...) of normalised images (n, 3, H, W), some at a time."""
        return torch.cat([self.features(part).float() for part in x.split(64)])

    def transformed(self, pictures: Sequence[Tensor], size: Size) -> Tensor:
        """Normalised images (n, 3, H, W) as the method's tests have them."""
        normalisation = Normalisation.from_dict(self.about["normalisation"])
        if size == "keep":
            if len({picture.shape for picture in pictures}) > 1:
                raise InputError("pictures of several sizes cannot be kept as they are: leave size out to resize them")
            return normalisation(torch.stack(list(pictures)).to(self.device))
        stored, aspects = self.about.get("stored", 256), [p.shape[2] / p.shape[1] for p in pictures]
        squares = []
        for picture in pictures:  # squashed as the data sets store them
            image = T.to_pil_image(picture).resize((stored, stored), Image.Resampling.BILINEAR)
            squares.append(T.pil_to_tensor(image))
        transform = (TestCrop if self.about["augment"] else Whole)(self.about["size"], normalisation)
        return transform(torch.stack(squares).to(self.device), torch.tensor(aspects, device=self.device))

    def show(self, images: Picture | Sequence[Picture], *, size: Size = None) -> Figure:
        """A matplotlib figure of the pictures with their classes' probabilities."""
        pictures, _ = listed(images)
        return show.guesses(pictures, [guess.probabilities for guess in self.predict(pictures, size=size)])

    def exportable(self) -> nn.Module:
        """A module that takes normalised images (n, 3, size, size) to the logits of the supports' classes (n, classes).

        Raises:
            InputError: there are no supports yet, or the method does not classify by prototypes.
        """
        if self.method not in ("proto_net", "meta_baseline"):
            raise InputError(f"{self.method} does not classify by prototypes: only proto_net and meta_baseline export")
        if self._logits is None:
            raise InputError("no supports yet: call support with a few pictures of every class first")
        scale = self.head.temperature if self.head is not None else None
        return PrototypeNetwork(self.features, self._means, self.about["args"].get("distance"), scale)


def _equal(groups: Sequence[Sequence[int]]) -> list[int]:
    """As many rows of every group as the largest has, group by group; smaller ones begin again."""
    most = max(map(len, groups))
    return [group[i % len(group)] for group in groups for i in range(most)]


def _attention(support: Tensor, groups: Sequence[Sequence[int]], temperature: float, query: Tensor) -> Tensor:
    """`heads.matching` where classes have different numbers of supports: logarithms (m, classes), features (m, D)."""
    attention = (temperature * heads.cosines(query, support)).log_softmax(1)  # (m, n)
    columns = [attention[:, list(group)].logsumexp(1) - float(np.log(len(group))) for group in groups]
    return torch.stack(columns, 1)


class Detector(Model):
    """A detector of objects.

    Args:
        state, about: what `weights.load` gave.
        source: where from, for errors.

    Attributes:
        method: the recipe's name. about: all that the file says of itself. classes: that it looks for.
        network: the detector of `fewshot.detectors`.
    """

    def __init__(self, state: dict[str, Tensor], about: dict[str, Any], source: str | Path, device: Any = "cpu"):
        super().__init__(state, about)
        self.device, self.classes = torch.device(device), list(about["classes"])
        build = fpn if self.method in ("tfa", "fsce", "mpsr") else trunks.c4
        trunk = build(**about["architecture"])
        options = {key: about[key] for key in ("cosine", "dimensions") if key in about}
        options |= {"above": 0.0} if self.method == "fsce" else {}  # of a loss
        network = DETECTORS[self.method](trunk, len(self.classes), **options, **about["sizes"])
        weights.fill(network, state, source)
        self.network = folded(network.eval().requires_grad_(False)).to(self.device)
        self.pipeline = Pipeline(**about.get("pictures", {}))
        self.normalisation = Normalisation.from_dict(about["normalisation"])

    @torch.no_grad()
    def support(
        self,
        images: Picture | Sequence[Picture],
        boxes: Sequence[Sequence[float]] | Tensor | None = None,
        labels: str | Sequence[str] = (),
        *,
        size: Size = None,
    ) -> None:
        """Learn classes from supports, instead of those known before; for methods that have supports.

        Attention-RPN takes any classes; Meta R-CNN and FSDetView those that their last layers were trained for, and
        look only for the ones that have supports.

        Args:
            images: one or more of every class.
            boxes: of each picture's object, xyxy in its pixels; by default the whole picture.
            labels: the class of each.

        Raises:
            InputError: the method has no supports, there are none, a box is not inside its picture, or a class is not
                one that the model can look for.
        """
        check_size(size)
        if not isinstance(self.network, (MetaRCNN, AttentionRPN)):
            raise InputError(
                f"{self.method} has no supports: fine-tune it on new classes with recipes/{self.method}.py"
            )
        pictures, _ = listed(images)
        labels = [labels] if isinstance(labels, str) else list(labels)
        if not pictures:
            raise InputError("no supports: give one or more pictures of every class")
        if boxes is None:
            boxes = [(0, 0, picture.shape[2], picture.shape[1]) for picture in pictures]
        boxes = [torch.as_tensor(box, dtype=torch.float32) for box in boxes]
        if not len(labels) == len(boxes) == len(pictures):
            counts = f"{len(pictures)} pictures, {len(boxes)} boxes and {len(labels)} labels"
            raise InputError(f"{counts}: give a box and a label for each picture")
        for i, (picture, box) in enumerate(zip(pictures, boxes)):
            _check_box(i, box, *picture.shape[1:])
        if isinstance(self.network, AttentionRPN):
            self.classes = list(dict.fromkeys(labels))
            self.network.forget(len(self.classes))
        elif unknown := sorted(set(labels) - set(self.classes)):
            known = ", ".join(self.classes)
            raise InputError(
                f"this {self.method} was not trained for {unknown[0]!r} but for {known}: fine-tune it with "
                f"recipes/{self.method}.py, or take a model of attention_rpn, which looks for any class"
            )
        numbers = torch.tensor([self.classes.index(label) for label in labels], device=self.device)
        vectors = [self._support_vectors(p, box, size) for p, box in zip(pictures, boxes)]
        if isinstance(self.network, AttentionRPN):
            self.network.set_prototypes((*vector, number[None]) for vector, number in zip(vectors, numbers))
        else:
            self.network.set_prototypes(torch.cat(vectors), numbers)

    def _support_vectors(self, picture: Tensor, box: Tensor, size: Size) -> Any:
        """What the network makes of one support."""
        keep = size == "keep"
        if isinstance(self.network, AttentionRPN):
            if not keep:
                picture, box = support_crop(picture, box, self.about["support_size"], self.about["context"])
            x = self.normalisation(picture[None].to(self.device))
            return self.network.support_features(x, box[None].to(self.device))
        stack = support_image(picture, box, None if keep else self.about["support_size"])
        x = torch.cat([self.normalisation(stack[:3].to(self.device)), stack[3:].to(self.device).float()])
        return self.network.support_vectors(x[None])

    @torch.no_grad()
    def predict(
        self,
        images: Picture | Sequence[Picture],
        *,
        size: Size = None,
        score_above: float = 0.05,
        share_proposals: bool = False,
    ) -> list[Found] | Found:
        """What is on each picture; on one alone if it is not a list.

        Args:
            score_above: leave out what is less sure; the networks do not report below 0.05.
            share_proposals: for Attention-RPN with many classes: quicker, not quite the same (`AttentionRPN.detect`).

        Raises:
            InputError: the method needs supports and has none yet, or a picture cannot be read.
        """
        check_size(size)
        if "known" in dict(self.network.named_buffers()) and not self.network.known.any():
            raise InputError("no supports yet: call support with a few pictures of every class first")
        options = {"share": True} if share_proposals else {}
        if share_proposals and not isinstance(self.network, AttentionRPN):
            raise InputError(f"{self.method} has one set of proposals anyway: share_proposals is for attention_rpn")
        pictures, alone = listed(images)
        found = []
        for picture in pictures:  # one by one, since padding would change what is found
            image, scale = (
                (picture, torch.ones(2)) if size == "keep" else self.pipeline.resize(picture, self.pipeline.short)
            )
            height, width = image.shape[1:]
            x = self.normalisation(collate_images([image], self.pipeline.multiple).to(self.device))
            x[..., height:, :], x[..., width:] = 0, 0
            ((boxes, scores, labels),) = self.network.detect(x, [(height, width)], **options)
            sure = scores >= score_above
            names = [self.classes[i] for i in labels[sure].tolist()]
            found.append(Found(boxes[sure].cpu() / scale.repeat(2), scores[sure].cpu(), names))
        return found[0] if alone else found

    def show(self, images: Picture | Sequence[Picture], *, size: Size = None, score_above: float = 0.3) -> Figure:
        """A matplotlib figure of the pictures with what was found on them."""
        pictures, _ = listed(images)
        return show.found(pictures, self.predict(pictures, size=size, score_above=score_above), self.about["novel"])

    def exportable(self) -> nn.Module:
        """Meta R-CNN's box head with the prototypes folded in: RoI vectors (n, D) to logits and deltas.

        Raises:
            InputError: the method is another one.
        """
        if self.method != "meta_rcnn":
            raise InputError(f"{self.method} has no box head that prototypes fold into: only meta_rcnn exports")
        return RoIHead(self.network)


def _check_box(number: int, box: Tensor, height: int, width: int) -> None:
    if box.shape != (4,):
        raise InputError(f"box {number} has {tuple(box.shape)} numbers: give x1, y1, x2, y2")
    x1, y1, x2, y2 = box.tolist()
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        text = f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
        raise InputError(f"box {text} of support {number} is not inside its picture of {width} x {height}; correct it")


CLASSIFIERS = (
    *("baseline", "baseline_plus", "neg_margin", "proto_net", "matching_net", "relation_net", "meta_baseline"),
    "maml",
)
DETECTORS = {
    "tfa": TFA,
    "fsce": FSCE,
    "mpsr": MPSR,
    "attention_rpn": AttentionRPN,
    "meta_rcnn": MetaRCNN,
    "fsdetview": FSDetView,
}
