"""FSDetView (Xiao and Marlet, 2020, https://arxiv.org/abs/2007.12107)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.trunks import C4
from fewshot.detectors.faster_rcnn import init_normal
from fewshot.detectors.meta_rcnn import MetaDetector

# in testing: so few stay in a CPU's cache, so many keep a GPU busy
CLASSES_AT_ONCE = {"cpu": 2, "cuda": 20}


class Aggregator(nn.Module):
    """A layer with batch norm and ReLU. In training it normalises by the RoIs of one image and one
    class at a time.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.fc, self.norm = nn.Linear(in_features, out_features), nn.BatchNorm1d(out_features)
        init_normal(0.001, self.fc)
        nn.init.normal_(self.norm.weight, mean=1.0, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_features) -> (n, out_features)."""
        return F.relu(self.norm(self.fc(x)))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) of the layer with its batch norm's running statistics
        folded in.
        """
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        bias = (self.fc.bias - self.norm.running_mean) * scale + self.norm.bias
        return self.fc.weight * scale[:, None], bias


class FSDetView(MetaDetector):
    """Meta R-CNN whose RoIs are classified by their product with a class's vector, their difference
    from it, and as they are (section 3.2, equation 4).

    See `MetaDetector` for the arguments. The two aggregators halve the channels.
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

    @torch.compiler.disable
    def classify(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """As `MetaDetector.classify`, some classes at once: what is linear folds.

        The difference's layer sees W (q - s) = W q - W s, whose first term all classes share, as
        they do what the last layers make of q itself. Of the last layers each class needs its own
        rows and the background's alone.
        """
        known = self.known_classes()
        prototypes = self.prototypes[known]  # (k, D)
        product_weight, product_bias = self.product.folded()
        difference_weight, difference_bias = self.difference.folded()

        last = self.rows(self.cls.weight, self.reg.weight, known)  # (k, 6, 2D)
        widths = [len(product_weight), len(difference_weight), queries.shape[1]]
        of_product, of_difference, of_query = last.split(widths, 2)
        # (n, D / 2), (k, D / 2)
        shifted = F.linear(queries, difference_weight, difference_bias)
        shift = F.linear(prototypes, difference_weight)

        outputs = []
        many = CLASSES_AT_ONCE.get(queries.device.type, 2)
        for start in range(0, len(known), many):
            part = slice(start, start + many)
            # (k, n, D / 2)
            scaled = queries * prototypes[part, None]
            product = F.relu(F.linear(scaled, product_weight, product_bias))
            difference = F.relu(shifted - shift[part, None])
            # (k, 6, n)
            outputs.append(of_product[part] @ product.mT + of_difference[part] @ difference.mT)

        alone = F.linear(of_query.flatten(0, 1), queries).view(len(known), 6, -1)
        bias = self.rows(self.cls.bias[:, None], self.reg.bias[:, None], known)
        found = torch.cat(outputs) + alone + bias

        logits = found.new_zeros(len(queries), self.classes + 1)
        deltas = found.new_zeros(len(queries), self.classes, 4)
        logits[:, known] = found[:, 0].mT
        logits[:, -1] = found[:, 1].mean(0)
        deltas[:, known] = found[:, 2:].permute(2, 0, 1)
        return logits, deltas

    def rows(self, cls: Tensor, reg: Tensor, known: Tensor) -> Tensor:
        """Rows (k, 6, c) of the last layers, `cls` (classes + 1, c) and `reg` (4 classes, c), for
        each known class (k,): its own, the background's, and the four of its box.
        """
        background = cls[-1:].expand(len(known), 1, -1)
        boxes = reg.view(self.classes, 4, -1)[known]
        return torch.cat([cls[known, None], background, boxes], 1)
