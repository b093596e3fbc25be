"""A trained classifier in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

from fewshot import InputError, show
from fewshot.data.transforms import TestCrop, Whole
from fewshot.heads.metric import (
    ByMeans,
    FewShotClassifier,
    Fitted,
    Groups,
    cosines,
    fit_repeated,
    group_means,
)
from fewshot.inference.export import PrototypeNetwork
from fewshot.inference.model import NO_SUPPORTS, Model, Picture, Size, check_size, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# share of the classes' own pictures that are kept; what the others are called
REJECT, NONE = 0.95, "none of these"
# whoever draws from a seed has torch's global stream to itself, whichever model it is for
drawing = RLock()


class Guess(NamedTuple):
    """What a picture shows: the likeliest class, its probability, and every class's.

    After `Classifier.calibrate` also how far it is from the nearest class, and whether that is
    beyond the threshold: then it is `rejected`, as none of the classes, whichever is likeliest
    among them.
    """

    name: str
    probability: float
    probabilities: dict[str, float]
    rejected: bool = False
    distance: float | None = None


class Classifier(Model):
    """A classifier of pictures into the classes of its supports; see `Model`.

    Attributes:
        threshold: distance beyond which a picture is none of the classes; None before `calibrate`.
    """

    def __init__(
        self,
        network: nn.Module,
        state: dict[str, Tensor],
        about: dict[str, Any],
        device: Any = "cpu",
    ):
        super().__init__(network, state, about, device)
        # all of itself: it has no features apart from a task
        self.adapts = hasattr(network, "predict")
        self._supports: tuple[Tensor, Groups] | None = None
        self._logits: Fitted | None = None  # of features; of images where it adapts
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

        Methods that fine-tune do it here, with what is random in it drawn from `seed`; MAML and
        P>M>F adapt at every prediction, MAML since its batch norms see supports and queries
        together. Where these, or the models of recipes of your own, need as many supports of every
        class, classes of fewer show some of theirs again.

        Args:
            images: one or more of every class. labels: the class of each.
            reject: also `calibrate` by this share.

        Raises:
            InputError: no support, not as many labels as images, or more or fewer classes than MAML
                was trained for.
        """
        check_size(size)
        pictures, _ = listed(images)
        labels = [labels] if isinstance(labels, str) else list(labels)
        if not pictures:
            raise InputError("no supports: give one or more pictures of every class")
        if len(labels) != len(pictures):
            raise InputError(
                f"{len(pictures)} pictures and {len(labels)} labels: give one label for each picture"
            )
        names = list(dict.fromkeys(labels))
        if self.adapts and len(names) != (ways := getattr(self.network, "ways", len(names))):
            raise InputError(
                f"{len(names)} classes of supports: this {self.method} was trained for {ways}"
            )
        x = self.transformed(pictures, size)
        support = x if self.adapts else self.extracted(x)
        groups = [[i for i, label in enumerate(labels) if label == name] for name in names]
        threshold = None if reject is None else self._threshold(support, groups, reject)
        with self.lock:
            self.adapt(support, groups, seed)
            self.classes, self.threshold = names, threshold

    def adapt(self, support: Tensor, groups: Groups, seed: int = 0) -> None:
        """Learn classes from supports' features (n, ...), or images where it adapts; `groups` has
        each class's rows.
        """
        if isinstance(self.network, FewShotClassifier):
            with self._drawing(seed):
                self._logits = self.network.fit(support, groups)
        else:
            compare = self.network.predict if self.adapts else self.network.classify
            fitted = fit_repeated(compare, support, groups)

            def logits(query: Tensor) -> Tensor:
                with self._drawing(seed):
                    return fitted(query)

            self._logits = logits
        self._supports, self.threshold = (support, groups), None

    @torch.no_grad()
    def calibrate(self, reject: float = REJECT) -> float:
        """From now on tell apart what is none of the classes; returns the threshold.

        A picture's distance is 1 - cosine of its features to the nearest class mean, whatever the
        method compares. The threshold is the `reject` quantile of the supports' distances to the
        mean of their class's others, so that about this share of the classes' own pictures is kept.
        A class of one support has no others: the rest stand for it.

        Raises:
            InputError: there are no supports yet, no class has two, the share is not between 0 and
                1, or the method has no features apart from a task (MAML).
        """
        with self.lock:
            if self._supports is None:
                raise InputError(NO_SUPPORTS)
            self.threshold = self._threshold(*self._supports, reject)
            return self.threshold

    def _threshold(self, support: Tensor, groups: Groups, reject: float) -> float:
        if not 0 < reject <= 1:
            raise InputError(
                f"reject {reject}: give the share of the classes' own pictures to keep, say {REJECT}"
            )
        if self.adapts:
            raise InputError(
                f"{self.method} adapts all of itself to a task: it has no features to reject pictures by"
            )
        several = [support[rows] for rows in groups if len(rows) > 1]
        if not several:
            raise InputError(
                "to tell apart what is none of the classes, one of them at least needs two supports"
            )
        left_out = [_distances(x, (x.sum(0) - x) / (len(x) - 1)).diagonal() for x in several]
        return float(torch.cat(left_out).quantile(reject))

    @contextmanager
    def _drawing(self, seed: int) -> Iterator[None]:
        with drawing, torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @torch.no_grad()
    def predict(
        self, images: Picture | Sequence[Picture], *, size: Size = None
    ) -> list[Guess] | Guess:
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
                far = _distances(query, group_means(*self._supports)).amin(1).tolist()
                guesses = [
                    g._replace(rejected=d > self.threshold, distance=d)
                    for g, d in zip(guesses, far)
                ]
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
                raise InputError(
                    "pictures of several sizes cannot be kept as they are: leave size out to resize them"
                )
            return self.normalisation(torch.stack(list(pictures)).to(self.device))
        stored, aspects = self.about.get("stored", 256), [p.shape[2] / p.shape[1] for p in pictures]
        squares = []
        for picture in pictures:  # squashed as the data sets store them
            image = T.to_pil_image(picture).resize((stored, stored), Image.Resampling.BILINEAR)
            squares.append(T.pil_to_tensor(image))
        transform = (TestCrop if self.about["augment"] else Whole)(
            self.about["size"], self.normalisation
        )
        return transform(
            torch.stack(squares).to(self.device), torch.tensor(aspects, device=self.device)
        )

    def show(self, images: Picture | Sequence[Picture], *, size: Size = None) -> Figure:
        """A matplotlib figure of the pictures with their classes' probabilities, and which are none
        of these.
        """
        pictures, _ = listed(images)
        guesses = self.predict(pictures, size=size)
        figure = show.guesses(pictures, [guess.probabilities for guess in guesses])
        for axes, guess in zip(figure.axes[::2], guesses):
            axes.set_title(NONE if guess.rejected else "", fontsize=8)
        return figure

    def exportable(self) -> nn.Module:
        """A module that takes normalised images (n, 3, size, size) to the logits of the supports'
        classes (n, classes).

        Raises:
            InputError: there are no supports yet, or the method does not classify by their means.
        """
        if not isinstance(getattr(self.network, "head", None), ByMeans):
            names = "proto_net, relation_net, meta_baseline and feat"
            raise InputError(
                f"{self.method} does not classify by its supports' means: only {names} export"
            )
        if self._supports is None:
            raise InputError(NO_SUPPORTS)
        return PrototypeNetwork(self.network, group_means(*self._supports))


def _distances(x: Tensor, means: Tensor) -> Tensor:
    """1 - cosine (n, m) between features (n, ...) and class means (m, ...)."""
    return 1 - cosines(x.flatten(1), means.flatten(1))
