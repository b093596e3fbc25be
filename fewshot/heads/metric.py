"""Few-shot classifiers: a backbone, and a head that compares queries with supports.

Heads take support features (tasks, ways * shots, D), all shots of class 0 first, and query
features (tasks, queries, D), and give logits (tasks, queries, ways), for many tasks at once.
Distances and cosines are computed in float32 at least, also under autocast: multiplied by a
temperature or squared, bfloat16's three digits would not do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot import InputError

Groups = Sequence[Sequence[int]]  # the rows of each class's supports
Fitted = Callable[[Tensor], Tensor]  # queries (m, ...) -> logits (m, ways)


class FewShotClassifier(nn.Module):
    """A backbone under a head: what is trained, tested and used.

    Args:
        backbone: images (n, 3, H, W) -> features (n, ...).
        head: (support, query, ways) -> logits, see the module; a `Head`, or any module.
        centred: take the mean of the base classes' features, the buffer `mean`, off all features.
        together: supports and queries of a step are one batch of the backbone, so that batch norms
            have the statistics of both: those of one support of each class are poor.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        centred: bool = False,
        together: bool = False,
    ):
        super().__init__()
        self.features, self.head = backbone, head
        self.register_buffer("mean", torch.zeros(backbone.out_features) if centred else None)
        self.together = together
        # how many tasks `classify` is best given, and how names of tensors begin that a model's
        # file has for training alone
        self.tasks_at_once = getattr(head, "tasks_at_once", None)
        self.unused = getattr(head, "unused", ())

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of images (tasks, n, 3, H, W) and (tasks, m, 3, H, W)."""
        return self.classify(*self.embed(support, query), ways)

    def embed(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Features (tasks, n, ...) and (tasks, m, ...) of images (tasks, n or m, 3, H, W)."""
        if not self.together:
            return self._embed(support), self._embed(query)
        features = self._embed(torch.cat([support, query], 1))
        return features.split((support.shape[1], query.shape[1]), 1)

    def _embed(self, images: Tensor) -> Tensor:
        return self.features(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of features (tasks, n, ...) and (tasks, m, ...)."""
        return self.head(self._centred(support), self._centred(query), ways)

    def fit(self, support: Tensor, groups: Groups) -> Fitted:
        """A classifier of features (m, ...), by supports (n, ...) of as many as each class has."""
        fit = getattr(self.head, "fit", None)
        support = self._centred(support)
        fitted = fit(support, groups) if fit else fit_repeated(self.head, support, groups)
        return lambda query: fitted(self._centred(query))

    def _centred(self, features: Tensor) -> Tensor:
        return features if self.mean is None else features - self.mean


class SupervisedClassifier(nn.Module):
    """A backbone that learns to tell the training classes apart, and then meets tasks.

    Args:
        head: features (n, D), and labels if it wants them -> logits of the training classes.
        few_shot: the head of `FewShotClassifier` in tests; it learns nothing in training.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, few_shot: nn.Module):
        super().__init__()
        self.features, self.head, self.few_shot = backbone, head, few_shot
        self.tasks_at_once = getattr(few_shot, "tasks_at_once", None)

    def forward(self, images: Tensor, *labels: Tensor) -> Tensor:
        """Logits (b, classes) of the training classes for images (b, 3, H, W)."""
        return self.head(self.features(images), *labels)

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of features (tasks, n, D) and (tasks, m, D)."""
        return self.few_shot(support, query, ways)


class Head(nn.Module):
    """A head whose classes, in use, may have different numbers of supports."""

    def fit(self, support: Tensor, groups: Groups) -> Fitted:
        """A classifier of features (m, ...), by supports (n, ...) of which `groups` has the rows of
        each class. Here, classes of fewer supports show some of theirs again.
        """
        return fit_repeated(self, support, groups)


class ByMeans(Head):
    """A head that looks at no more than the mean of each class's supports."""

    def fit(self, support: Tensor, groups: Groups) -> Fitted:
        means = group_means(support, groups)[None]
        return lambda query: self(means, query[None], len(groups))[0]


def fit_repeated(compare: Callable, support: Tensor, groups: Groups) -> Fitted:
    """What `compare`, as a head's forward, makes of supports (n, ...), as `equal_rows` repeats them."""
    repeated = support[equal_rows(groups)][None]
    return lambda query: compare(repeated, query[None], len(groups))[0]


def equal_rows(groups: Groups) -> list[int]:
    """As many rows of every class as the largest has, class by class; smaller ones begin again."""
    most = max(map(len, groups))
    return [rows[i % len(rows)] for rows in groups for i in range(most)]


def group_means(support: Tensor, groups: Groups) -> Tensor:
    """Means (ways, ...) of features (n, ...), of which `groups` has the rows of each class."""
    return torch.stack([support[rows].mean(0) for rows in groups])


def class_means(support: Tensor, ways: int) -> Tensor:
    """Prototypes (tasks, ways, ...): the mean over each class's shots of (tasks, ways * shots,
    ...).
    """
    return support.unflatten(1, (ways, -1)).mean(2)


Distance = Literal["scaled", "squared", "euclidean"]


def prototype(support: Tensor, query: Tensor, ways: int, distance: Distance = "squared") -> Tensor:
    """Minus the distance to each class mean: Prototypical Networks (Snell et al., 2017, equations 1
    and 2).

    Args:
        support, query, ways: see the module.
        distance: "squared" Euclidean as in the paper; "scaled", that over the root of the number of
            features, which changes their unit but lets training begin with small logits, not
            hundreds; or mmfewshot's "euclidean".

    Raises:
        InputError: there is no such distance.
    """
    check_distance(distance)
    squares = squared_distances(query, class_means(support, ways))
    if distance == "euclidean":
        return -squares.clamp(min=1e-12).sqrt()  # sqrt has no gradient at 0
    return -squares if distance == "squared" else -squares / query.shape[-1] ** 0.5


def check_distance(distance: str) -> None:
    if distance not in get_args(Distance):
        raise InputError(
            f"no distance is called {distance!r}: choose one of {', '.join(get_args(Distance))}"
        )


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (tasks, n, m) between rows of (tasks, n, D) and (tasks, m, D), as
    one matmul.

    |a - b|² = |a|² - 2 ab + |b|² cancels badly when the rows have much in common, so that is
    subtracted first: a shift of both leaves the distances alone.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = _at_least_float32(a), _at_least_float32(b)
        shift = b.mean(1, keepdim=True)
        a, b = a - shift, b - shift
        squares = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None]  # (tasks, n, m)
        return (squares - 2 * a @ b.mT).clamp(min=0)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (..., n, m) between rows of (..., n, D) and (..., m, D)."""
    with torch.autocast(a.device.type, enabled=False):
        return (
            F.normalize(_at_least_float32(a), dim=-1) @ F.normalize(_at_least_float32(b), dim=-1).mT
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Prototype(ByMeans):
    """`prototype` as a head."""

    def __init__(self, distance: Distance = "squared"):
        super().__init__()
        check_distance(distance)
        self.distance = distance

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return prototype(support, query, ways, self.distance)


class Matching(Head):
    """`matching` as a head."""

    def __init__(self, temperature: float = 100.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return matching(support, query, ways, self.temperature)

    def fit(self, support: Tensor, groups: Groups) -> Fitted:
        """A class has the mean attention of its supports, however many these are."""

        def log_probabilities(query: Tensor) -> Tensor:
            attention = (self.temperature * cosines(query, support)).log_softmax(1)  # (m, n)
            of_classes = [attention[:, rows].logsumexp(1) - math.log(len(rows)) for rows in groups]
            return torch.stack(of_classes, 1)

        return log_probabilities


def matching(support: Tensor, query: Tensor, ways: int, temperature: float = 100.0) -> Tensor:
    """Log-probabilities of Matching Networks (Vinyals et al., 2016, section 2.1.1), without full
    context embeddings.

    A query attends to all supports by the softmax of `temperature` times the cosine; a class has
    the mean attention of its shots. The probabilities of a query thus sum to 1 / shots: train with
    `F.nll_loss`. Attention that underflows has a finite logarithm here, which the logarithm of
    summed probabilities would not.
    """
    # (tasks, queries, ways * shots)
    attention = (temperature * cosines(query, support)).log_softmax(2)
    attention = attention.unflatten(2, (ways, -1))
    return attention.logsumexp(3) - math.log(attention.shape[3])


class MetaBaseline(ByMeans):
    """A learnt temperature times the cosine with each class mean (Chen et al., 2021,
    https://arxiv.org/abs/2003.04390).
    """

    def __init__(self, temperature: float = 10.0):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, queries, ways); see the module for the arguments."""
        return self.temperature * cosines(query, class_means(support, ways))


class RelationHead(ByMeans):
    """A small network that scores pairs of a query's and a class's map (Sung et al., 2018, section
    3).

    Args:
        channels: of the maps.
        map_size: side of the maps.
        hidden: width of the hidden linear layer.
        momentum: of the batch norms. With 1, the value of mmfewshot and of the published models, a
            test uses the statistics of the last training batch alone; PyTorch's 0.1 averages over
            some ten batches.

    Raises:
        InputError: the maps are too small for the two poolings.
    """

    def __init__(self, channels: int, map_size: int, hidden: int = 8, momentum: float = 1.0):
        super().__init__()
        padding = 1 if map_size < 10 else 0
        side = map_size
        for _ in range(2):
            side = (side - 2 + 2 * padding) // 2
        if side < 1:
            raise InputError(
                f"maps of {map_size} x {map_size} are too small for RelationHead: it needs at least 4 x 4"
            )
        self.conv1 = nn.Conv2d(2 * channels, channels, 3, padding=padding)
        self.norm1 = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=padding)
        self.norm2 = nn.BatchNorm2d(channels, momentum=momentum)
        self.fc1 = nn.Linear(channels * side**2, hidden)
        self.fc2 = nn.Linear(hidden, 1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.ones_(linear.bias)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Relation scores (tasks, queries, ways), before any sigmoid or softmax.

        Args:
            support: maps (tasks, ways * shots, channels, map_size, map_size); a class is the mean
                of its shots.
            query: maps (tasks, queries, channels, map_size, map_size).
        """
        prototypes = class_means(support, ways)
        tasks, queries, channels = query.shape[:3]
        # The first convolution of a concatenated pair is the sum of two convolutions, of the query
        # and of the class: these are queries + ways maps to convolve, not queries * ways of twice
        # the channels.
        weight, padding = self.conv1.weight, self.conv1.padding
        ours = F.conv2d(query.flatten(0, 1), weight[:, :channels], self.conv1.bias, padding=padding)
        theirs = F.conv2d(prototypes.flatten(0, 1), weight[:, channels:], padding=padding)
        pairs = (
            ours.unflatten(0, (tasks, queries))[:, :, None]
            + theirs.unflatten(0, (tasks, ways))[:, None]
        )
        x = pairs.flatten(0, 2)  # (tasks * queries * ways, channels, s, s)
        x = F.max_pool2d(F.relu(self.norm1(x)), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        scores = self.fc2(F.relu(self.fc1(x.flatten(1))))  # (tasks * queries * ways, 1)
        return scores.view(tasks, queries, ways)


def relation_mse(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean square of sigmoid(score) minus "same class" over all pairs (Sung et al., 2018, equation
    2).

    Args:
        scores: (..., ways). labels: (...), the queries' classes. The mean is the paper's sum over
            the number of pairs.
    """
    return F.mse_loss(scores.sigmoid(), F.one_hot(labels, scores.shape[-1]).to(scores.dtype))


class CosineLinear(nn.Module):
    """`temperature` times the cosine with each class's weight, times that class's learnt gain.

    The classifier of Baseline++ (Chen et al., 2019, https://arxiv.org/abs/1904.04232, section 3.2),
    weight-normalised: row c of the weight is weight_g[c] * weight_v[c] / |weight_v[c]|.

    Args:
        temperature: 2 for up to 200 classes and 10 for more, by default.
        eps: added to the features' norm.
    """

    def __init__(
        self, in_features: int, classes: int, temperature: float | None = None, eps: float = 1e-5
    ):
        super().__init__()
        default = 2.0 if classes <= 200 else 10.0
        self.temperature, self.eps = default if temperature is None else temperature, eps
        weight = nn.Linear(in_features, classes, bias=False).weight.detach()
        self.weight_g = nn.Parameter(weight.norm(dim=1, keepdim=True))  # (classes, 1)
        self.weight_v = nn.Parameter(weight)  # (classes, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., in_features) -> logits (..., classes)."""
        with torch.autocast(x.device.type, enabled=False):
            x = _at_least_float32(x)
            x = x / (x.norm(dim=-1, keepdim=True) + self.eps)
            weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
            return self.temperature * F.linear(x, weight)


class NegMargin(nn.Module):
    """A linear classifier with a margin on the true class (Liu et al., 2020,
    https://arxiv.org/abs/2003.12060).

    A negative margin raises the true class's logit in training, so that classes may stay closer to
    each other, which serves classes not yet seen.

    Args:
        margin: subtracted from the true class's similarity.
        temperature: multiplies the similarities.
        metric: the similarity: "cosine", or "softmax", the inner product less the least of the row.

    Raises:
        InputError: there is no such metric.
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        margin: float = 0.0,
        temperature: float = 10.0,
        metric: Literal["cosine", "softmax"] = "cosine",
    ):
        super().__init__()
        if metric not in ("cosine", "softmax"):
            raise InputError(f"no metric is called {metric!r}: choose cosine or softmax")
        self.margin, self.temperature, self.metric = margin, temperature, metric
        self.weight = nn.Parameter(nn.Linear(in_features, classes, bias=False).weight.detach())

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features (n, in_features) -> logits (n, classes), with the margin where `labels` (n,) are
        given.
        """
        if self.metric == "cosine":
            similarity = cosines(x, self.weight)
        else:
            similarity = F.linear(x, self.weight)
            similarity = similarity - similarity.min(dim=-1, keepdim=True).values
        if labels is not None:
            similarity = similarity - self.margin * F.one_hot(labels, similarity.shape[-1])
        return self.temperature * similarity
