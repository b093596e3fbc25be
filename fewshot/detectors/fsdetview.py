"""FSDetView (Xiao and Marlet, 2020, https://arxiv.org/abs/2007.12107)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.detectors.meta_rcnn import MetaRCNN
from fewshot.trunks import C4

CLASSES_AT_ONCE = {"cpu": 2, "cuda": 20}  # in testing: so few stay in a CPU's cache, so many keep a GPU busy
# How far prototypes may be from their mean, relative to their size, for bfloat16 (9 bits) to multiply the differences:
# scores then change by less than 1e-4.
SPREAD = 0.055


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrices of bfloat16 multiply faster there than those of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


class Aggregator(nn.Module):
    """A layer with batch norm and ReLU. In training it normalises by the RoIs of one image and one class at a time."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.fc, self.norm = nn.Linear(in_features, out_features), nn.BatchNorm1d(out_features)
        nn.init.normal_(self.fc.weight, std=0.001)
        nn.init.zeros_(self.fc.bias)
        nn.init.normal_(self.norm.weight, mean=1.0, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_features) -> (n, out_features)."""
        return F.relu(self.norm(self.fc(x)))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) of the layer with its batch norm's running statistics folded in."""
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return self.fc.weight * scale[:, None], (self.fc.bias - self.norm.running_mean) * scale + self.norm.bias


class FSDetView(MetaRCNN):
    """Meta R-CNN whose RoIs are classified by their product with a class's vector, their difference from it, and as
    they are (section 3.2, equation 4).

    See `MetaRCNN` for the arguments. The two aggregators halve the channels.
    """

    def __init__(self, trunk: C4, classes: int, **more):
        channels = trunk.stage4_channels
        super().__init__(trunk, classes, head_channels=2 * (channels // 2) + channels, **more)
        self.product, self.difference = (Aggregator(channels, channels // 2) for _ in range(2))

    def aggregate(self, queries: Tensor, vector: Tensor) -> Tensor:
        """RoI vectors (n, D) in the light of a class's support vector (D,): (n, 2D)."""
        return torch.cat([self.product(queries * vector), self.difference(queries - vector), queries], 1)

    def classify(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes + 1) and deltas (n, classes, 4) of RoI vectors (n, D) with every prototype at once.

        As `MetaRCNN.classify`, but only what is linear folds. What the last layers make of q itself all classes share,
        and of the last layers each class needs its own rows and the background's alone. The difference's layer sees
        W (q - s) = W q - W s, whose first term all classes share. The product's sees, with the means m of the
        prototypes and c of the RoIs, W (q * s) = W (q * m) + W (c * (s - m)) + W ((q - c) * (s - m)). Only the last
        term is a matmul per class, and one of small numbers, for which bfloat16 will do.
        """
        if not self.known.any():
            raise RuntimeError("no class has a prototype yet: call set_prototypes with the vectors of some supports")
        (weight1, bias1), (weight2, bias2) = self.product.folded(), self.difference.folded()
        known = self.known.nonzero()[:, 0]
        prototypes = self.prototypes[known]  # (k, D)
        mean = prototypes.mean(0)
        apart = prototypes - mean
        dtype = torch.bfloat16 if self._close(mean, apart) else torch.float32
        middle = queries.mean(0)  # (D,)
        typical = F.linear(queries * mean, weight1, bias1)  # (n, D / 2)
        offset = F.linear(middle * apart, weight1)  # (k, D / 2)
        rest, apart, weight1 = (x.to(dtype) for x in (queries - middle, apart, weight1))
        shifted = F.linear(queries, weight2, bias2), F.linear(prototypes, weight2)  # (n, D / 2), (k, D / 2)

        reg = self.reg.weight.view(self.classes, 4, -1)[known]
        own = torch.cat([self.cls.weight[known][:, None], self.cls.weight[-1:].expand(len(known), 1, -1), reg], 1)
        bias = torch.cat([self.cls.bias[known, None], self.cls.bias[-1:].expand(len(known), 1)], 1)
        bias = torch.cat([bias, self.reg.bias.view(-1, 4)[known]], 1)  # (k, 6): class, background, deltas
        of_product, of_difference, of_query = own.split([len(weight1), len(weight2), queries.shape[1]], 2)
        outputs = []
        many = CLASSES_AT_ONCE.get(queries.device.type, 2)
        for part in (slice(i, i + many) for i in range(0, len(known), many)):
            product = F.linear(rest * apart[part, None], weight1)  # (k, n, D / 2)
            product = F.relu(typical + offset[part, None] + product)
            difference = F.relu(shifted[0] - shifted[1][part, None])
            outputs.append(of_product[part] @ product.mT + of_difference[part] @ difference.mT)  # (k, 6, n)
        alone = F.linear(of_query.flatten(0, 1), queries).view(len(known), 6, -1)
        found = torch.cat(outputs) + alone + bias[..., None]

        logits = found.new_zeros(len(queries), self.classes + 1)
        deltas = found.new_zeros(len(queries), self.classes, 4)
        logits[:, known], deltas[:, known] = found[:, 0].mT, found[:, 2:].permute(2, 0, 1)
        logits[:, -1] = found[:, 1].mean(0)
        return logits, deltas

    def _close(self, mean: Tensor, apart: Tensor) -> bool:
        """Whether bfloat16 may, and should, multiply what sets the prototypes apart from their mean."""
        near = apart.norm() < SPREAD * mean.norm() * len(apart) ** 0.5
        return multiplies_bfloat16(mean.device) and bool(near)
