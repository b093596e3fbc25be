"""FRN (Wertheimer et al., 2021, https://arxiv.org/abs/2012.01506): a query's class is what best
reconstructs it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewshot.backbones.networks import Backbone, ConvNet
from fewshot.heads.metric import Fitted, Groups, Head


def reconstructed(query: Tensor, pool: Tensor, penalty: Tensor) -> Tensor:
    """Ridge regression of a map's places (..., m, D) by those of a class's supports (..., n, D):
    equations 4 to 8.

    Q (S'S + penalty I)^-1 S'S, equal to Q S' (SS' + penalty I)^-1 S. Whichever of D and n is
    smaller is the side of the matrix that is inverted.
    """
    wide = pool.shape[-2] < pool.shape[-1]
    gram = pool @ pool.mT if wide else pool.mT @ pool
    root = torch.linalg.cholesky(
        gram + penalty * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    )
    if wide:
        return query @ pool.mT @ torch.cholesky_solve(pool, root)
    return query @ torch.cholesky_solve(gram, root)


class FRN(Head):
    """FRN's head on maps that no pooling has made vectors: minus the distance of a query to its
    reconstruction.

    Its three parameters are learnt: `alpha` and `beta` from 0, which set the penalty (K r / D)
    e^alpha for K shots of r places, and the length e^beta of reconstructions; and `gamma` from 1,
    which scales the logits. Everything is computed in float32 at least.

    Args:
        divisor: divides maps before all else.
    """

    def __init__(self, divisor: float = 1.0):
        super().__init__()
        self.divisor = divisor
        self.alpha, self.beta = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Maps (tasks, ways * shots, D, H, W), class-major, and (tasks, m, D, H, W) -> logits
        (tasks, m, ways).
        """
        return -self.gamma * self.distances(support, query, ways)

    def fit(self, support: Tensor, groups: Groups) -> Fitted:
        """A class reconstructs from its own supports, however many these are."""
        pools = [support[rows][None] for rows in groups]
        return lambda query: torch.cat([self(pool, query[None], 1)[0] for pool in pools], 1)

    def distances(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """(tasks, m, ways): squared, summed over channels, mean over a query's places: equations 9
        and 10.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            support, query = (x.to(dtype) / self.divisor for x in (support, query))
            support, query = (x.flatten(3).mT for x in (support, query))  # (tasks, maps, places, D)
            # (tasks, ways, shots * places, D)
            pool = support.unflatten(1, (ways, -1)).flatten(2, 3)
            # LibFewShot's 1e-6 keeps the matrix regular
            penalty = pool.shape[2] / pool.shape[3] * self.alpha.exp() + 1e-6
            places = query.flatten(1, 2)[:, None]  # (tasks, 1, m * places, D)
            apart = self.beta.exp() * reconstructed(places, pool, penalty) - places
            return apart.square().sum(3).unflatten(2, (-1, query.shape[2])).mean(3).mT


def parts(backbone: Backbone) -> tuple[Backbone, FRN]:
    """A backbone, from now on giving its last map (5 x 5 of 84 pixels with Conv4 and ResNet-12),
    and the head for it.

    Conv4's maps are taken as they are, others divided by D^½, as published for ResNet-12.
    """
    if isinstance(backbone, ConvNet):
        backbone.flatten = False
        return backbone, FRN()
    return backbone, FRN(divisor=backbone.out_channels**0.5)
