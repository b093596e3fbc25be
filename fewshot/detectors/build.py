"""Detectors made anew from what they say of themselves, which saved models keep."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from fewshot.backbones.fpn import fpn
from fewshot.backbones.trunks import c4
from fewshot.data.transforms import Normalisation
from fewshot.described import NESTED, check_known


def rebuilt(detector: type[nn.Module], about: Mapping[str, Any], classes: int | None = None, **changes) -> nn.Module:
    """The detector that its `describe` described, with fresh weights.

    Args:
        detector: its class, or another that takes the same trunk and sizes.
        about: what `describe` gave, or the metadata of a saved model; sizes that it lacks are the class's defaults.
        classes: how many the new one is for; by default as many as the metadata name.
        changes: arguments of `detector` that are to differ; those that are None are as described.

    Raises:
        InputError: a file's metadata have arguments that trunk or detector have not, or should not take from a file.
    """
    taken = {name for kind in detector.__mro__ for name in signature(kind.__init__).parameters}
    check_known(about, "sizes", taken)
    check_known(about, "architecture", NESTED["architecture"])  # weights would be a file or a download
    build = fpn if "channels" in about["architecture"] else c4
    trunk = build(**{"name": about["architecture"]["name"], **about["architecture"]})
    trunk.normalisation = Normalisation.from_dict(about["normalisation"])
    options = {key: about[key] for key in getattr(detector, "OPTIONS", ()) if key in about}
    options |= {key: value for key, value in changes.items() if value is not None}
    return detector(trunk, len(about["classes"]) if classes is None else classes, **{**about["sizes"], **options})
