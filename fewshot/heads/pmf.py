"""P>M>F (Hu et al., 2022, https://arxiv.org/abs/2204.07305): pretrained, meta-trained, fine-tuned
for every task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fewshot import InputError
from fewshot.heads.metric import class_means, cosines

RATES = 0.01, 0.001, 0.0001  # that "auto" chooses from, besides 0
AUGMENTED = 0.9  # share of the steps of fine-tuning whose images are augmented
SHIFT = 0.125  # of the side, by which an image is moved at most


class PMF(nn.Module):
    """A backbone compared by cosines with class means, which is fine-tuned on a task's supports
    before it answers.

    It stays in eval mode in training too: norms keep their statistics, and nothing is dropped.

    Args:
        backbone: images (n, 3, H, W) -> features (n, D).
        steps: of Adam on a task's supports; 0 leaves the backbone as it is.
        lr: of these steps; "auto" finds it for every task as `choose_lr` does.

    Raises:
        InputError: steps or rate are below 0.
    """

    def __init__(
        self, backbone: nn.Module, *, steps: int = 50, lr: float | Literal["auto"] = "auto"
    ):
        super().__init__()
        if steps < 0 or (lr != "auto" and not 0 <= lr < math.inf):
            raise InputError(
                f"--test-steps {steps} and --test-lr {lr}: give numbers from 0 on, or the rate auto"
            )
        self.features, self.steps, self.lr = backbone, steps, lr
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(0.0))
        self.eval()

    def train(self, mode: bool = True) -> PMF:
        return super().train(False)

    def classify(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of features (tasks, m, D), the supports (tasks, ways * shots, D)
        class by class.
        """
        return self.scale * (cosines(query, class_means(support, ways)) + self.bias)

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """The same of images (tasks, n, 3, H, W), without fine-tuning: what is meta-trained."""
        support, query = (
            self.features(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query)
        )
        return self.classify(support, query, ways)

    @torch.no_grad()
    def predict(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of query images (tasks, m, 3, H, W), one task after another
        fine-tuned.

        Args:
            support: images (tasks, ways * shots, 3, H, W), class by class.
        """
        device = support.device.type
        # autocast would keep the lower-precision copies of weights that it made before the first
        # step
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
            return torch.stack([self._solve(*task, ways) for task in zip(support, query)])

    def _solve(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        lr = self.choose_lr(support, ways) if self.lr == "auto" else self.lr
        return self._logits(self.fine_tune(support, ways, lr), support, query, ways)

    def choose_lr(self, support: Tensor, ways: int) -> float:
        """Which of 0 and `RATES` suits supports (ways * shots, 3, H, W): ProtoNet_Auto_Finetune of
        the official code.

        Fine-tuned on the first support of each class, a rate has to classify more of the others
        than those before it. With one shot there are no others, and the rate is 0.
        """
        first, others = (
            x.flatten(0, 1) for x in support.unflatten(0, (ways, -1)).tensor_split((1,), 1)
        )
        labels = torch.arange(ways, device=support.device).repeat_interleave(len(others) // ways)
        best, most = 0.0, -1
        for lr in (0.0, *RATES):
            if most == len(labels):  # none can do better
                break
            logits = self._logits(self.fine_tune(first, ways, lr), first, others, ways)
            right = int((logits.argmax(1) == labels).sum())
            if right > most:
                best, most = lr, right
        return best

    def fine_tune(self, support: Tensor, ways: int, lr: float) -> Mapping[str, Tensor]:
        """The backbone's parameters after `steps` of Adam on supports (ways * shots, 3, H, W); it
        keeps its own.

        The loss is the cross-entropy of augmented supports, all of them at once, compared with the
        means of the clean ones. Scale and bias stay (the official code's ProtoNet_Finetune).
        """
        theta = {
            name: p.detach().clone().requires_grad_()
            for name, p in self.features.named_parameters()
        }
        optimizer = torch.optim.Adam(theta.values(), lr=lr)
        labels = torch.arange(ways, device=support.device).repeat_interleave(len(support) // ways)
        for _ in range(self.steps if lr else 0):
            with torch.enable_grad():
                loss = F.cross_entropy(self._logits(theta, support, augment(support), ways), labels)
            optimizer.zero_grad()
            loss.backward(inputs=list(theta.values()))
            optimizer.step()
        return theta

    def _logits(
        self, theta: Mapping[str, Tensor], support: Tensor, query: Tensor, ways: int
    ) -> Tensor:
        """Logits (m, ways) of images of one task by a backbone with the parameters `theta`."""
        features = functional_call(self.features, dict(theta), (torch.cat([support, query]),))
        return self.classify(*features[None].split((len(support), len(query)), 1), ways)[0]


def augment(images: Tensor) -> Tensor:
    """Normalised images (n, 3, H, W) as a step of fine-tuning sees them, by torch's generator of
    the CPU.

    One time in ten as they are; else flipped, all or none of them, with other colours and moved,
    each by itself.
    """
    used, flip = torch.rand(2).tolist()
    colours, sides = torch.rand(len(images), 3), torch.tensor(images.shape[-2:])
    most = (SHIFT * sides + 0.5).int()
    shifts = (torch.rand(len(images), 2) * (2 * most + 1)).int() - most
    if used >= AUGMENTED:
        return images
    images = images.flip(-1) if flip < 0.5 else images
    return translate(recolour(images, colours.to(images)), shifts.to(images.device))


def recolour(images: Tensor, uniforms: Tensor) -> Tensor:
    """Change brightness, saturation and contrast, in this order, of normalised images (n, 3, H, W).

    Args:
        uniforms: (n, 3) in [0, 1): brightness rises by u - 1/2, distances to a pixel's grey are
            multiplied by 2 u, and those to the image's mean by u + 1/2.
    """
    brightness, saturation, contrast = uniforms[:, :, None, None, None].unbind(1)
    images = images + (brightness - 0.5)
    images = torch.lerp(images.mean(1, keepdim=True), images, 2 * saturation)
    return torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast + 0.5)


def translate(images: Tensor, shifts: Tensor) -> Tensor:
    """Images (n, C, H, W) moved by whole pixels (n, 2): y, x is what was at y + shifts[:, 0], x +
    shifts[:, 1].

    What comes from beyond the border is 0, the mean colour.
    """
    height, width = images.shape[-2:]
    rows = shifts[:, :1] + torch.arange(height, device=images.device)  # (n, H)
    columns = shifts[:, 1:] + torch.arange(width, device=images.device)  # (n, W)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None
    ]

    number = torch.arange(len(images), device=images.device)[:, None, None]
    rows = rows.clamp(0, height - 1)[:, :, None]
    columns = columns.clamp(0, width - 1)[:, None]
    moved = images[number, :, rows, columns].permute(0, 3, 1, 2)  # (n, C, H, W)
    return moved * inside[:, None]
