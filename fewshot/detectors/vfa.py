"""VFA (Han et al., 2023, https://arxiv.org/abs/2301.13411)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.backbones.trunks import C4
from fewshot.detectors import faster_rcnn
from fewshot.detectors.meta_rcnn import MetaRCNN

KL_WEIGHT = 0.00025  # of the divergence, beside the squared error of what is reconstructed


class SupportVAE(nn.Module):
    """A variational autoencoder of support vectors (n, D), all of whose layers have D channels.

    In training its batch norms take the statistics of the supports of one step. These differ so
    little from class to class, by a hundredth, that it computes in float32 even under autocast.
    """

    def __init__(self, channels: int):
        super().__init__()

        def layer() -> nn.Linear:
            return nn.Linear(channels, channels)

        self.encoder = nn.Sequential(layer(), nn.BatchNorm1d(channels), nn.LeakyReLU())
        self.mean, self.log_variance = layer(), layer()
        self.decoder = nn.Sequential(layer(), layer(), nn.BatchNorm1d(channels), nn.Sigmoid())

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (n, D) of the normal distribution that stands for each vector (n,
        D).
        """
        with torch.autocast(vectors.device.type, enabled=False):
            hidden = self.encoder(vectors)
            return self.mean(hidden), self.log_variance(hidden)

    def decode(self, latent: Tensor) -> Tensor:
        """Support vectors (n, D) that drawn vectors (n, D) stand for."""
        with torch.autocast(latent.device.type, enabled=False):
            return self.decoder(latent)


class VFA(MetaRCNN):
    """Meta R-CNN that re-weights RoI vectors by a class's distribution rather than by its support
    vector.

    An autoencoder makes a normal distribution of a support vector; sigmoid(mean + deviation) of it,
    its `scales`, re-weights the RoI vectors that are classified ("Variational Feature Aggregation"
    in the paper). Boxes come from the RoI vectors as they are ("Classification-Regression
    Decoupling"). In training images are re-weighted by any class, shown or not ("Class-Agnostic
    Aggregation"), and the RPN's losses do not reach the trunk.

    See `MetaDetector` for the arguments, and for `prototypes`, which here are the scales of the mean
    support vectors.
    """

    rpn_trains_trunk = False

    def __init__(self, trunk: C4, classes: int, **more):
        super().__init__(trunk, classes, **more)
        self.vae = SupportVAE(trunk.stage4_channels)

    def scales(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """What RoI vectors are multiplied by (n, D), given the distributions of n classes."""
        return (mean + (log_variance / 2).exp()).sigmoid()

    def outputs(self, queries: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """As `MetaRCNN.outputs`, with the deltas of RoI vectors that are not re-weighted."""
        logits = self.cls(self.aggregate(queries, vector))
        return logits, self.reg(queries).view(-1, self.classes, 4)

    @torch.compiler.disable
    def drawn(self, labels: Sequence[Tensor], support_labels: Tensor) -> Tensor:
        """The class by which each image is re-weighted (images,): that of a random support,
        whatever it shows.
        """
        return super().drawn([support_labels] * len(labels), support_labels)

    @torch.compiler.disable
    def head_losses(
        self,
        queries: Sequence[Tensor],
        rois: Sequence[faster_rcnn.RoIs],
        drawn: Tensor,
        vectors: Tensor,
        support_labels: Tensor,
    ) -> dict[str, Tensor]:
        """As `MetaRCNN.head_losses`, and `vae`: squared error of the reconstruction, and divergence
        from N(0, 1).

        The meta loss is that of the reconstructed vectors.
        """
        mean, log_variance = self.vae.encode(vectors)
        decoded = self.vae.decode(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        scales = self.scales(mean, log_variance)
        return self.conditioned_losses(queries, rois, drawn, scales, support_labels) | {
            "meta": self.meta_loss(decoded, support_labels),
            "vae": F.mse_loss(decoded, vectors) + KL_WEIGHT * divergence,
        }

    @torch.no_grad()
    def set_prototypes(self, vectors: Tensor, labels: Tensor) -> None:
        """As `MetaRCNN.set_prototypes`. The autoencoder's norms take their running statistics, so
        call `eval` first.
        """
        if self.training:
            raise RuntimeError("prototypes need the norms' running statistics: call eval() first")
        super().set_prototypes(vectors, labels)
        self.prototypes[self.known] = self.scales(*self.vae.encode(self.prototypes[self.known]))

    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `MetaRCNN.folded`, but for the deltas, which do not depend on prototypes."""
        cls, cls_bias, _, _ = super().folded()
        known = self.known.repeat_interleave(4)  # (4 classes,)
        return cls, cls_bias, self.reg.weight * known[:, None], self.reg.bias * known
