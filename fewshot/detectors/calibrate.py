"""Prototypical calibration (Qiao et al., 2021, https://arxiv.org/abs/2108.09017, section 4.3), for
any detector.

A network that never saw the detector compares what was found with the shots: half of a detection's
new score is its old one, half the cosine of its box's vector and the mean vector of the shots of
its class. Nothing is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision import ops

from fewshot import InputError, weights
from fewshot.backbones import pretrained
from fewshot.data.detection import DetectionSet
from fewshot.data.transforms import Normalisation

# torchvision's networks that are a map, then a mean over it, then layers that take its vector
WITH_MAP = ("resnet", "resnext", "wide_resnet", "regnet", "mobilenet", "efficientnet")


class Regions(nn.Module):
    """Vectors of boxes, from a network that is not trained.

    Args:
        network: normalised images (b, 3, H, W) -> maps (b, C, h, w) or, without `stride`, vectors
            (b, D).
        normalisation: of its images.
        stride: input pixels per cell of the maps, on which boxes are averaged. Without, boxes are
            cut out of the picture, resized to `crop` pixels a side, and each goes through the
            network.
        head: what the network has behind the mean over a map, vectors (n, C) -> (n, D).
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        normalisation: Normalisation,
        *,
        stride: int | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        crop: int = 224,
    ):
        super().__init__()
        self.network, self.head, self.normalisation = network, head, normalisation
        self.stride, self.crop = stride, crop

    @torch.no_grad()
    def forward(self, picture: Tensor, boxes: Tensor) -> Tensor:
        """Vectors (n, D) of boxes (n, 4) xyxy in pixels of a picture, uint8 RGB (3, H, W) of any
        size.
        """
        image = self.normalisation(picture[None])
        if self.stride is None:
            crops = ops.roi_align(image, [boxes], self.crop, sampling_ratio=-1, aligned=True)
            return torch.cat([self.network(part).float() for part in crops.split(16)])
        maps, scale = self.network(image).float(), 1 / self.stride
        means = ops.roi_align(maps, [boxes], 1, scale, sampling_ratio=-1, aligned=True)
        vectors = means.flatten(1)
        return vectors if self.head is None else self.head(vectors)

    def fingerprint(self) -> str:
        """Tells whether another network is this one: vectors of different ones do not compare."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if tensor.is_floating_point():
                digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def backbone(choice: str) -> Regions:
    """A classifier of torchvision's, or a network of timm's (timm/NAME), as `Regions`, in eval
    mode.

    A classifier's vectors are the logits, or of a file that lacks the layers behind the map the
    means over the map. A network of timm's gets boxes cut out of the picture, and its vectors are
    those that its authors pool.

    Args:
        choice: a name, for the published weights, which are downloaded once; or NAME=FILE.

    Raises:
        InputError: there is no such network or no such weights, or they do not fit.
    """
    name, _, file = choice.partition("=")
    if name.startswith("timm/"):
        size, normalisation = pretrained.inputs(name)
        net = pretrained.network(name, size, source=file or "pretrained")
        return Regions(net.eval().requires_grad_(False), normalisation, crop=size)

    if name not in tv.list_models(module=tv):
        raise InputError(
            f"--calibrate {choice}: torchvision has no classifier {name!r}; resnet101 is what was published"
        )
    published = getattr(tv.get_model_weights(name), "IMAGENET1K_V1", None)
    if published is None:
        raise InputError(
            f"--calibrate {choice}: {name} was not trained on ImageNet alone; take resnet101"
        )
    if file:
        state = weights.read_state(Path(file))
    else:
        state = weights.downloaded(published, name, f"give {name}=FILE")
    source = file or "ImageNet's weights"
    preset = published.transforms()
    normalisation = pretrained.normalisation(preset.mean, preset.std)

    net = tv.get_model(name).eval().requires_grad_(False)
    if not name.startswith(WITH_MAP):
        weights.fill(net, state, source)
        return Regions(net, normalisation, crop=preset.crop_size[0])
    maps, after = pretrained.cut_at_map(net)
    headless = not any(key.startswith(tuple(after)) for key in state)
    weights.fill(net, state, source, fresh=tuple(after) if headless else ())
    head = None if headless else list(after.values())[-1]
    return Regions(nn.Sequential(maps), normalisation, stride=32, head=head)


class Calibration:
    """New scores by the prototypes of classes.

    Args:
        regions: of which the prototypes are vectors.
        prototypes: (D,) of each class; detections of other classes keep their score.
        alpha: share of the old score in the new one.
        lower, upper: scores from above the one up to the other are calibrated.
    """

    def __init__(
        self,
        regions: Regions,
        prototypes: Mapping[str, Tensor],
        *,
        alpha: float = 0.5,
        lower: float = 0.05,
        upper: float = 1.0,
    ):
        self.regions, self.prototypes = regions, dict(prototypes)
        self.alpha, self.lower, self.upper = alpha, lower, upper

    def __call__(
        self, picture: Tensor, boxes: Tensor, scores: Tensor, names: Sequence[str]
    ) -> Tensor:
        """Scores (n,) in place of a picture's `scores` (n,), of boxes (n, 4) xyxy in its pixels and
        n classes.

        A cosine may be negative, and so may a score be. All tensors and the network are on one
        device.
        """
        known = torch.tensor([name in self.prototypes for name in names], device=scores.device)
        inside = (scores > self.lower) & (scores <= self.upper)
        chosen = (known.bool() & inside).nonzero()[:, 0]
        if not len(chosen):
            return scores

        prototypes = torch.stack([self.prototypes[names[i]] for i in chosen.tolist()])
        vectors = self.regions(picture, boxes[chosen])
        cosines = F.cosine_similarity(vectors, prototypes.to(scores.device))
        new = self.alpha * scores[chosen] + (1 - self.alpha) * cosines
        return scores.index_copy(0, chosen, new)

    def describe(self, choice: str) -> dict[str, Any]:
        """What a model's file keeps of it, for json and `restored`; `choice` made its `Regions`."""
        vectors = {name: vector.tolist() for name, vector in self.prototypes.items()}
        fingerprint = self.regions.fingerprint()
        return {"backbone": choice, "fingerprint": fingerprint, "prototypes": vectors}


def from_shots(choice: str, shots: DetectionSet, device: torch.device | str = "cpu") -> Calibration:
    """A calibration of the novel classes by their shots: a class's prototype is the mean vector of
    its boxes.

    Raises:
        InputError: as `backbone`.
    """
    regions = backbone(choice).to(device)
    vectors = {name: [] for name in shots.novel}
    novel = [shots.classes.index(name) for name in shots.novel]
    for i, record in enumerate(shots.records):
        mine = record.select(np.isin(record.labels, novel))
        if not len(mine.labels):
            continue
        found = regions(shots.image(i).to(device), torch.from_numpy(mine.boxes).to(device))
        for label, vector in zip(mine.labels, found):
            vectors[shots.classes[label]].append(vector)
    prototypes = {name: torch.stack(found).mean(0) for name, found in vectors.items()}
    return Calibration(regions, prototypes)


def restored(
    about: Mapping[str, Any],
    source: str | Path,
    choice: str | None = None,
    device: torch.device | str = "cpu",
) -> Calibration:
    """The calibration whose prototypes a model's file has.

    Args:
        about: what the file says of itself. source: the file, for messages.
        choice: of `backbone`; by default the same as when the prototypes were made.

    Raises:
        InputError: the file has none, they are another network's, or as `backbone`.
    """
    kept = about.get("calibration")
    if kept is None:
        raise InputError(
            f"{source} has no supports to calibrate by: fine-tune with --calibrate {choice or 'resnet101'}"
        )
    regions = backbone(choice or str(kept["backbone"])).to(device)
    if regions.fingerprint() != kept["fingerprint"]:
        raise InputError(
            f"{source} has prototypes of {kept['backbone']}, and {choice or 'this one'} is another network"
        )

    blank = torch.zeros(3, 32, 32, dtype=torch.uint8, device=device)
    (wanted,) = regions(blank, torch.tensor([[0.0, 0, 32, 32]], device=device))
    with weights.naming(about):
        prototypes = {
            name: torch.tensor(vector, dtype=torch.float32, device=device)
            for name, vector in kept["prototypes"].items()
        }
    for name, vector in prototypes.items():
        if vector.shape != wanted.shape or not vector.isfinite().all():
            raise InputError(
                f"{source} has a prototype of {vector.numel()} numbers for {name!r:.60}, and its network's "
                f"vectors have {len(wanted)} finite ones: fine-tune again with --calibrate"
            )
    return Calibration(regions, prototypes)
