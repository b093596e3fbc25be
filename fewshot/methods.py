"""The table of methods: how the model of each is built from what its file says of itself.

Classifiers and detectors are those that the recipes train.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
from fewshot.heads import FewShotClassifier, FineTuned, TrainingFree, frn, transductive
from fewshot.heads.feat import FEAT
from fewshot.heads.logistic import logistic
from fewshot.heads.maml import MAML
from fewshot.heads.pmf import PMF

About = dict[str, Any]  # what a model's file says of itself


def _backbone(about: About, **options: Any) -> nn.Module:
    return backbones.build(_setting(about, "backbone"), about["size"], **options)


def _setting(about: About, name: str) -> Any:
    """What a recipe worked out, or else its flag. Raises InputError for a file that has neither."""
    value = about.get(name) or about["args"][name]
    if value is None:
        raise InputError(f"a model that does not say its {name!r}: save it anew")
    return value


def _by(head: Callable[[About], nn.Module], **options: Any) -> Callable[[About], nn.Module]:
    """A classifier whose head needs to know the file's flags alone."""
    return lambda about: FewShotClassifier(_backbone(about), head(about), **options)


def _training_free(
    infer: Callable[..., Tensor], *flags: str, centred: bool = False
) -> Callable[[About], FewShotClassifier]:
    """A method that trains nothing, whose options are `flags` of its recipe."""

    def head(about: About) -> TrainingFree:
        return TrainingFree(infer, **{flag: about["args"][flag] for flag in flags})

    return _by(head, centred=centred)


def _relation_net(about: About) -> FewShotClassifier:
    backbone = _backbone(about, pooled=False)
    return FewShotClassifier(backbone, heads.RelationHead(backbone.out_channels, backbone.map_size))


def _feat(about: About) -> FewShotClassifier:
    backbone = _backbone(about)
    return FewShotClassifier(backbone, FEAT(backbone.out_features, about["temperature"]))


def _frn(about: About) -> FewShotClassifier:
    pooled = _setting(about, "backbone") == "conv4"
    return FewShotClassifier(*frn.parts(_backbone(about, pooled=pooled)))


def _maml(about: About) -> MAML:
    return MAML(
        _backbone(about),
        _setting(about, "ways"),
        test_steps=_setting(about, "test_steps"),
        lr=_setting(about, "inner_lr"),
    )


def _pmf(about: About) -> PMF:
    args = about["args"]
    return PMF(_backbone(about), steps=args["test_steps"], lr=args["test_lr"])


def _fine_tuned(kind: str) -> Callable[[About], FewShotClassifier]:
    return _by(lambda about: FineTuned(kind, _setting(about, "test_temperature")))


def _tim(about: About) -> TrainingFree:
    args = about["args"]
    options = {name: args[name] for name in ("version", "steps", "temperature")}
    return TrainingFree(transductive.tim, weights=args["loss_weights"], **options)


def _alpha_tim(about: About) -> TrainingFree:
    args = about["args"]
    options = {name: args[name] for name in ("alpha", "steps", "temperature")}
    return TrainingFree(transductive.alpha_tim, weights=args["loss_weights"], **options)


def _pt_map(about: About) -> TrainingFree:
    args = about["args"]
    prepare = partial(transductive.power, clamp=args["clamp"])
    options = {name: args[name] for name in ("steps", "rate", "lam")}
    return TrainingFree(transductive.pt_map, prepare, **options)


CLASSIFIERS: dict[str, Callable[[About], nn.Module]] = {
    "baseline": _by(lambda about: FineTuned("linear")),
    "baseline_plus": _fine_tuned("cosine"),
    "neg_margin": _fine_tuned("normalised"),
    "proto_net": _by(lambda about: heads.Prototype(about["args"]["distance"])),
    "matching_net": _by(lambda about: heads.Matching(about["args"]["temperature"])),
    "relation_net": _relation_net,
    "meta_baseline": _by(lambda about: heads.MetaBaseline()),
    "maml": _maml,
    "feat": _feat,
    "frn": _frn,
    "pmf": _pmf,
    "simple_shot": _training_free(transductive.simple_shot, "metric", centred=True),
    "bd_cspn": _training_free(transductive.bd_cspn, "version", centred=True),
    "laplacian_shot": _training_free(
        transductive.laplacian_shot, "lam", "neighbours", "rectify", "shift", centred=True
    ),
    "tim": _by(_tim),
    "alpha_tim": _by(_alpha_tim),
    "pt_map": _by(_pt_map),
    "logistic": _training_free(logistic, "C"),
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
    """How the names of tensors begin that a model's file has for training alone."""
    return getattr(model, "unused", ())
