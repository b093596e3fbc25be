"""The methods, for use: how the model of each is built from what its file says.

A recipe has its own model in full view, with losses. The classifiers here are the part of it that
tests a task, under the same names of parameters and with the interface that `meta_test` asks for;
the detectors are the recipes' own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewshot import InputError, backbones, heads, weights
from fewshot.detectors import build, prototype
from fewshot.detectors.attention_rpn import AttentionRPN
from fewshot.detectors.defrcn import DeFRCN
from fewshot.detectors.fsce import FSCE
from fewshot.detectors.fsdetview import FSDetView
from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.detectors.mpsr import MPSR
from fewshot.detectors.prototype import PrototypeDetector
from fewshot.detectors.tfa import TFA
from fewshot.detectors.vfa import VFA
from fewshot.heads import feat, fine_tuned, frn, logistic, transductive
from fewshot.heads.maml import MAML
from fewshot.heads.pmf import PMF

About = dict[str, Any]  # what a model's file says of itself
Groups = Sequence[Sequence[int]]  # the rows of every class's supports
Adapted = Callable[[Tensor], Tensor]  # queries (m, ...) -> logits (m, ways)


class FeatureClassifier(nn.Module, ABC):
    """A backbone, and a classifier of its features by those of a task's supports."""

    unused: tuple[str, ...] = ()  # how names of tensors begin that a file has for training alone

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.features = backbone

    @abstractmethod
    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of features (tasks, m, ...), supports (tasks, ways * shots, ...)
        class by class.
        """

    @abstractmethod
    def adapt(self, support: Tensor, groups: Groups) -> Adapted:
        """A classifier of features (m, ...), by supports (n, ...) of which `groups` has the rows of
        each class.
        """


class ByMeans(FeatureClassifier):
    """Compares queries with the mean of each class's supports, of which classes may thus have
    different numbers.

    Args:
        head: of `heads`, a function or a module: (support, query, ways) -> logits, as `classify`.
    """

    def __init__(self, backbone: nn.Module, head: Callable[[Tensor, Tensor, int], Tensor]):
        super().__init__(backbone)
        self.head = head

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return self.head(support, query, ways)

    def adapt(self, support: Tensor, groups: Groups) -> Adapted:
        means = class_means(support, groups)[None]
        return lambda query: self.classify(means, query[None], len(groups))[0]


class MatchingNet(FeatureClassifier):
    def __init__(self, backbone: nn.Module, temperature: float):
        super().__init__(backbone)
        self.temperature = temperature

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return heads.matching(support, query, ways, self.temperature)

    def adapt(self, support: Tensor, groups: Groups) -> Adapted:
        """A class has the mean attention of its supports, however many these are."""

        def logits(query: Tensor) -> Tensor:
            attention = (self.temperature * heads.cosines(query, support)).log_softmax(1)  # (m, n)
            return torch.stack(
                [attention[:, rows].logsumexp(1) - math.log(len(rows)) for rows in groups], 1
            )

        return logits


class Reconstructing(FeatureClassifier):
    """FRN, whose classes are pools of all their supports' places."""

    def __init__(self, backbone: nn.Module, head: frn.FRN):
        super().__init__(backbone)
        self.head = head

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return self.head(support, query, ways)

    def adapt(self, support: Tensor, groups: Groups) -> Adapted:
        """A class reconstructs from its own supports, however many these are."""
        pools = [support[rows][None] for rows in groups]
        return lambda query: torch.cat(
            [self.classify(pool, query[None], 1)[0] for pool in pools], 1
        )


class FineTuned(FeatureClassifier):
    """Baseline and its kin: a new head for every task, trained on its supports by `fit`, of
    `task_heads`.
    """

    unused = ("head.",)  # what told the training classes apart is of no use to others

    def __init__(
        self,
        backbone: nn.Module,
        fit: Callable[..., fine_tuned.LinearHeads | fine_tuned.CosineHeads],
    ):
        super().__init__(backbone)
        self.fit = fit

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        return self._fitted(support, ways).logits(query)

    def adapt(self, support: Tensor, groups: Groups) -> Adapted:
        """Classes of fewer supports show some of theirs again."""
        trained = self._fitted(support[equal(groups)][None], len(groups))
        return lambda query: trained.logits(query[None])[0]

    def _fitted(
        self, support: Tensor, ways: int
    ) -> fine_tuned.LinearHeads | fine_tuned.CosineHeads:
        n = support.shape[1]
        return self.fit(support, ways, steps=150 if n == ways else 600, batch_size=min(4, n))


class TrainingFree(FeatureClassifier):
    """Features of a backbone that is left as it is, prepared, and classified by `infer`, of
    `transductive` say.

    Args:
        infer: (support, query, ways) -> scores, as `classify`, of prepared features.
        prepare: (support, query) -> the same prepared; by default brought to unit length.
        centred: whether the base classes' mean, a buffer, is taken off first.
    """

    def __init__(
        self,
        backbone: nn.Module,
        infer: Callable,
        prepare: Callable | None = None,
        centred: bool = False,
    ):
        super().__init__(backbone)
        self.infer, self.prepare, self.centred = infer, prepare, centred
        if centred:
            self.register_buffer("mean", torch.zeros(backbone.out_features))

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        if self.prepare is not None:
            return self.infer(*self.prepare(support, query), ways)
        if self.centred:
            support, query = (transductive.centred(x, self.mean) for x in (support, query))
        return self.infer(transductive.unit(support), transductive.unit(query), ways)

    def adapt(self, support: Tensor, groups: Groups) -> Adapted:
        """Queries are classified together if the method is transductive. Smaller classes show some
        supports again.
        """
        repeated = support[equal(groups)][None]
        return lambda query: self.classify(repeated, query[None], len(groups))[0]


def class_means(support: Tensor, groups: Groups) -> Tensor:
    """Means (ways, ...) of features (n, ...), of which `groups` has the rows of each class."""
    return torch.stack([support[rows].mean(0) for rows in groups])


def equal(groups: Groups) -> list[int]:
    """As many rows of every class as the largest has, class by class; smaller ones begin again."""
    most = max(map(len, groups))
    return [rows[i % len(rows)] for rows in groups for i in range(most)]


def _backbone(about: About, **options: Any) -> nn.Module:
    return backbones.build(_setting(about, "backbone"), about["size"], **options)


def _setting(about: About, name: str) -> Any:
    """What a recipe worked out, or else its flag. Raises InputError for a file that has neither."""
    if (value := about.get(name) or about["args"][name]) is None:
        raise InputError(f"a model that does not say its {name!r}: save it anew")
    return value


def _relation_net(about: About) -> ByMeans:
    backbone = _backbone(about, pooled=False)
    return ByMeans(backbone, heads.RelationHead(backbone.out_channels, backbone.map_size))


def _feat(about: About) -> ByMeans:
    backbone = _backbone(about)
    return ByMeans(backbone, feat.FEAT(backbone.out_features, about["temperature"]))


def _maml(about: About) -> MAML:
    ways, steps, lr = (_setting(about, name) for name in ("ways", "test_steps", "inner_lr"))
    return MAML(_backbone(about), ways, test_steps=steps, lr=lr)


def _frn(about: About) -> Reconstructing:
    return Reconstructing(
        *frn.parts(_backbone(about, pooled=_setting(about, "backbone") == "conv4"))
    )


def _fine_tuned(fit: Callable, about: About) -> FineTuned:
    return FineTuned(
        _backbone(about), partial(fit, temperature=_setting(about, "test_temperature"))
    )


def _training_free(infer: Callable, *flags: str, **more: Any) -> Callable[[About], TrainingFree]:
    """The builder of a method whose options are `flags` of its recipe."""
    return lambda about: TrainingFree(
        _backbone(about), partial(infer, **{flag: about["args"][flag] for flag in flags}), **more
    )


def _tim(about: About) -> TrainingFree:
    args = about["args"]
    infer = transductive.tim_adm if args.get("version") == "adm" else transductive.tim_gd
    if about["method"] == "alpha_tim":
        infer = partial(transductive.alpha_tim, alpha=args["alpha"])
    options = {"weights": tuple(args["loss_weights"]), "temperature": args["temperature"]}
    options |= {"steps": args["steps"]} if args["steps"] else {}
    return TrainingFree(_backbone(about), partial(infer, **options))


def _pt_map(about: About) -> TrainingFree:
    prepare = partial(transductive.power, clamp=about["args"]["clamp"])
    return _training_free(transductive.pt_map, "steps", "rate", "lam", prepare=prepare)(about)


CLASSIFIERS: dict[str, Callable[[About], nn.Module]] = {
    "baseline": lambda about: FineTuned(_backbone(about), fine_tuned.fit_linear),
    "baseline_plus": partial(_fine_tuned, fine_tuned.fit_cosine),
    "neg_margin": partial(_fine_tuned, fine_tuned.fit_normalised),
    "proto_net": lambda about: ByMeans(
        _backbone(about), partial(heads.prototype, distance=about["args"]["distance"])
    ),
    "matching_net": lambda about: MatchingNet(_backbone(about), about["args"]["temperature"]),
    "relation_net": _relation_net,
    "meta_baseline": lambda about: ByMeans(_backbone(about), heads.MetaBaseline()),
    "maml": _maml,
    "feat": _feat,
    "frn": _frn,
    "pmf": lambda about: PMF(
        _backbone(about), steps=about["args"]["test_steps"], lr=about["args"]["test_lr"]
    ),
    "simple_shot": _training_free(transductive.simple_shot, "metric", centred=True),
    "bd_cspn": _training_free(transductive.bd_cspn, "version", centred=True),
    "laplacian_shot": _training_free(
        transductive.laplacian_shot, "lam", "neighbours", "rectify", "shift", centred=True
    ),
    "tim": _tim,
    "alpha_tim": _tim,
    "pt_map": _pt_map,
    "logistic": _training_free(logistic.logistic, "C"),
}
DETECTORS: dict[str, type[nn.Module]] = {
    "tfa": TFA,
    "fsce": FSCE,
    "mpsr": MPSR,
    "attention_rpn": AttentionRPN,
    "meta_rcnn": MetaRCNN,
    "fsdetview": FSDetView,
    "vfa": VFA,
    "defrcn": DeFRCN,
    "prototype_detector": PrototypeDetector,
}


def built(about: About) -> nn.Module:
    """The model that a file describes, before its weights are filled in.

    A model that `weights.load` described is first built on the meta device, where it takes no
    memory, and its shapes are compared with the file's.

    Raises:
        InputError: its method is none of these, or it is not what its tensors are of.
    """
    if isinstance(about, weights.Metadata):
        model = weights.on_meta(about, partial(_made, about))
        weights.check_fit(model, about.shapes, about.source, unused(model))
    return _made(about)


def _made(about: About) -> nn.Module:
    method = about.get("method")
    if "first_stage" in about:  # stands on another detector
        return prototype.rebuilt(_made(about["first_stage"]), about)
    if method in DETECTORS:
        return build.described(DETECTORS[method], about)
    if method in CLASSIFIERS:
        return CLASSIFIERS[method](about)
    known = ", ".join([*CLASSIFIERS, *DETECTORS])
    what = f"a model of {method!r:.60}, which is none of {known}"
    raise InputError(f"{what}: give the model of its recipe, fewshot.load(..., model=MyModel(...))")


def fill(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Give a model of `built` its file's weights: `weights.fill`, but for what the file has for
    training alone.
    """
    weights.fill(model, state, source, unused(model))


def unused(model: nn.Module) -> tuple[str, ...]:
    return model.unused if isinstance(model, FeatureClassifier) else ()
