"""FSDetView (Xiao and Marlet, 2020, https://arxiv.org/abs/2007.12107)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.trunks import C4
from fewshot.detectors.meta_rcnn import MetaRCNN

# in testing: so few stay in a CPU's cache, so many keep a GPU busy
CLASSES_AT_ONCE = {"cpu": 2, "cuda": 20}


class Aggregator(nn.Module):
    """A layer with batch norm and ReLU. In training it normalises by the RoIs of one image and one
    class at a time.
    """

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
        """Weight (out, in) and bias (out,) of the layer with its batch norm's running statistics
        folded in.
        """
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return self.fc.weight * scale[:, None], (
            self.fc.bias - self.norm.running_mean
        ) * scale + self.norm.bias


class FSDetView(MetaRCNN):
    """Meta R-CNN whose RoIs are classified by their product with a class's vector, their difference
    from it, and as they are (section 3.2, equation 4).

    See `MetaRCNN` for the arguments. The two aggregators halve the channels.
    """

    def __init__(self, trunk: C4, classes: int, **more):
        channels = trunk.stage4_channels
        super().__init__(trunk, classes, head_channels=2 * (channels // 2) + channels, **more)
        self.product, self.difference = (Aggregator(channels, channels // 2) for _ in range(2))

    def aggregate(self, queries: Tensor, vector: Tensor) -> Tensor:
        """RoI vectors (n, D) in the light of a class's support vector (D,): (n, 2D)."""
        return torch.cat(
            [self.product(queries * vector), self.difference(queries - vector), queries], 1
        )

    def classify_known(self, queries: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """As `MetaRCNN.classify_known`; class by class only where a subclass aggregates otherwise."""
        own = getattr(self.aggregate, "__func__", None) is FSDetView.aggregate
        return (
            self.classify_chunks(queries, known) if own else super().classify_known(queries, known)
        )

    def classify_chunks(self, queries: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """`classify_known`, of which what is linear folds, some classes at once.

        The difference's layer sees W (q - s) = W q - W s, whose first term all classes share, as
        they do what the last layers make of q itself. Of the last layers each class needs its own
        rows and the background's alone.
        """
        (weight1, bias1), (weight2, bias2) = self.product.folded(), self.difference.folded()
        prototypes = self.prototypes[known]  # (k, D)

        def rows(cls: Tensor, reg: Tensor) -> Tensor:
            """Those of the last layers (classes + 1, c) and (4 classes, c) for every known class,
            (k, 6, c).
            """
            background = cls[-1:].expand(len(known), 1, -1)
            return torch.cat(
                [cls[known, None], background, reg.view(self.classes, 4, -1)[known]], 1
            )

        last = rows(self.cls.weight, self.reg.weight)
        of_product, of_difference, of_query = last.split(
            [len(weight1), len(weight2), queries.shape[1]], 2
        )
        # (n, D / 2), (k, D / 2)
        shifted, shift = F.linear(queries, weight2, bias2), F.linear(prototypes, weight2)
        outputs, many = [], CLASSES_AT_ONCE.get(queries.device.type, 2)
        for part in (slice(i, i + many) for i in range(0, len(known), many)):
            # (k, n, D / 2)
            product = F.relu(F.linear(queries * prototypes[part, None], weight1, bias1))
            difference = F.relu(shifted - shift[part, None])
            # (k, 6, n)
            outputs.append(of_product[part] @ product.mT + of_difference[part] @ difference.mT)
        alone = F.linear(of_query.flatten(0, 1), queries).view(len(known), 6, -1)
        found = torch.cat(outputs) + alone + rows(self.cls.bias[:, None], self.reg.bias[:, None])

        logits = found.new_zeros(len(queries), self.classes + 1)
        deltas = found.new_zeros(len(queries), self.classes, 4)
        logits[:, known], deltas[:, known] = found[:, 0].mT, found[:, 2:].permute(2, 0, 1)
        logits[:, -1] = found[:, 1].mean(0)
        return logits, deltas
