"""Meta-test by fine-tuning: a new classifier for every task, trained on its support features, all
tasks at once.

Baseline and Baseline++ (Chen et al., 2019, https://arxiv.org/abs/1904.04232, section 3) and
Negative Margin (Liu et al., 2020, https://arxiv.org/abs/2003.12060) meet a task with a classifier
initialised at random, which SGD then trains on batches of the support features. `LinearHeads` and
`CosineHeads` compute what torch.optim.SGD would make of `nn.Linear`, `heads.CosineLinear` and
`heads.NegMargin`, up to rounding, but put the weights together only once, at the end. That is exact
because SGD never leaves the span of the initial weights and the support features:

Let w be the weight vector of one class (its bias is the weight of a feature that is always 1), w_0
its initial value and x_1 ... x_n the supports' features. The loss sees w only through the products
z_i = w x_i, so that a step is

    q = sum_batch h_i x_i + d w        h_i: derivative of the batch's loss by z_i; d: weight decay
    u = momentum u + damp q            damp: 1 in the first step, as in PyTorch, then 1 - dampening
    w = w - lr u

and w = a w_0 + sum_i b_i x_i at any time. The products z_j, the coefficients b_j and the share a
are linear in w, hence follow the same three lines, each with its own part of q, which the Gram
matrix K_ij = x_i x_j provides:

    of w    z_j                           b_j                             a
    of q    sum_batch h_i K_ij + d z_j    h_j (0 out of batch) + d b_j    d a

A step costs n * batch * ways multiplications, however long the features are.

A cosine classifier has logits t g w x / |w| of features x of length 1, with a temperature t and a
gain g that is learnt or 1. With p_i, the gradient of the batch's loss by logit i (softmax minus
target, over the batch's size),

    h_i = p_i t g / |w|        d = weight decay - sum_batch h_i z_i / |w|²
    gradient by g = sum_batch p_i z_i t / |w| + weight decay g
    |w|² = a² |w_0|² + sum_i b_i (z_i + a w_0 x_i)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewshot.heads.metric import Fitted, Groups, Head, equal_rows


class FineTuned(Head):
    """A new classifier for every task, trained on its supports, all of them at once.

    SGD takes 150 steps on one support per class, else 600, each on a batch of 4. What is random,
    first the initial weights and then the batches, comes from torch's global generator on the CPU.
    Give some hundred tasks at once: fewer take hardly less time.

    Args:
        kind: "linear" as of Baseline, "cosine" as of Baseline++, "normalised" as of Negative Margin.
        temperature: of the last two, multiplies the cosines.
    """

    tasks_at_once = 512  # classifiers that are trained side by side
    unused = ("head.",)  # the classifier of the training classes, which a model's file has

    def __init__(
        self,
        kind: Literal["linear", "cosine", "normalised"] = "linear",
        temperature: float | None = None,
    ):
        super().__init__()
        self.kind, self.temperature = kind, temperature

    @torch.no_grad()
    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Features (tasks, ways * shots, D), class-major, and (tasks, m, D) -> logits (tasks, m,
        ways).
        """
        return self.trained(support, ways).logits(query)

    @torch.no_grad()
    def fit(self, support: Tensor, groups: Groups) -> Fitted:
        """One classifier for all queries to come; smaller classes show some supports again."""
        trained = self.trained(support[equal_rows(groups)][None], len(groups))
        return lambda query: trained.logits(query[None])[0]

    def trained(self, support: Tensor, ways: int) -> LinearHeads | CosineHeads:
        """The classifiers of supports (tasks, ways * shots, D), class-major."""
        if self.kind == "linear":
            heads = start_linear(support, ways)
        elif self.kind == "cosine":
            heads = start_cosine(support, ways, self.temperature)
        else:
            heads = start_normalised(support, ways, self.temperature)

        steps = 150 if support.shape[1] == ways else 600
        drop_last = self.kind != "normalised"
        return train(heads, random_batches(support, steps, batch_size=4, drop_last=drop_last))


def start_linear(support: Tensor, ways: int, sgd: SGD | None = None) -> LinearHeads:
    """Linear classifiers with bias as PyTorch initialises them, one for each task: Baseline's.

    Args:
        support: features (tasks, ways * shots, D), all shots of class 0 first.
    """
    weight = _uniform(support, ways, support.shape[2])
    bias = _uniform(support, ways)
    return LinearHeads(support, weight, bias, sgd or SGD())


def start_cosine(
    support: Tensor, ways: int, temperature: float, sgd: SGD | None = None
) -> CosineHeads:
    """Weight-normalised cosine classifiers with learnt gains, one for each task: Baseline++'s."""
    weight = _uniform(support, ways, support.shape[2])
    gain = weight.norm(dim=2)
    return CosineHeads(support, weight, gain, sgd or SGD(), temperature, eps=1e-5)


def start_normalised(
    support: Tensor, ways: int, temperature: float, margin: float = 0.0, sgd: SGD | None = None
) -> CosineHeads:
    """Cosine classifiers without gain, one for each task: Negative Margin's.

    `margin` is subtracted from the true class's cosine while training.
    """
    weight = _uniform(support, ways, support.shape[2])
    # added to the norm, 1e-12 does what F.normalize's lower bound of 1e-12 does: it matters to
    # features of 0 alone
    return CosineHeads(support, weight, None, sgd or SGD(), temperature, eps=1e-12, margin=margin)


def train(heads: LinearHeads | CosineHeads, batches: Iterable[Tensor]) -> LinearHeads | CosineHeads:
    """The same heads after a step on each of the batches, indices (tasks, size) of supports."""
    for batch in batches:
        heads.step(batch)
    return heads


def random_batches(
    support: Tensor, steps: int, batch_size: int, drop_last: bool
) -> Iterator[Tensor]:
    """`steps` batches, indices (tasks, size) into supports (tasks, n, ...).

    Every pass over a task's supports takes them in a new random order. Fewer supports than
    `batch_size` are one batch.

    Args:
        drop_last: whether to leave out the last batch of a pass if it is smaller.
    """
    tasks, n = support.shape[:2]
    batch_size = min(batch_size, n)
    per_pass = n // batch_size if drop_last else math.ceil(n / batch_size)
    # all passes move to the device at once: a copy between steps would wait for the device
    orders = (
        torch.rand(math.ceil(steps / per_pass), tasks, n)
        .argsort(2)
        .mT.contiguous()
        .to(support.device)
    )
    for step in range(steps):
        order = orders[step // per_pass]  # (n, tasks)
        first = step % per_pass * batch_size
        yield order[first : first + batch_size].mT


def _uniform(support: Tensor, *shape: int) -> Tensor:
    """Weights or biases (tasks, *shape) as PyTorch initialises those of a linear layer on the
    supports' features.
    """
    bound = support.shape[2] ** -0.5
    return torch.empty(len(support), *shape).uniform_(-bound, bound).to(support.device)


@dataclass(frozen=True)
class SGD:
    """Arguments of torch.optim.SGD, by default as published."""

    lr: float = 0.01
    momentum: float = 0.9
    dampening: float = 0.9
    weight_decay: float = 1e-3


class GramWeights:
    """The weight vectors of every task and class under SGD, known only by what the module's
    recursion follows.

    Tasks are the last dimension of all tensors: the only long one, so that elementwise operations
    have long rows.

    Args:
        gram: K, inner products (tasks, n, n) of the supports' features.
        products: of the supports' features and the initial weights, (tasks, n, ways).

    Attributes:
        products: z, (n, ways, tasks).
        coefficients: b, (n, ways, tasks).
        share: a, (ways, tasks).
        damp: the factor of the next step's gradient.
    """

    def __init__(self, gram: Tensor, products: Tensor, sgd: SGD):
        tasks, n = gram.shape[:2]
        self.sgd = sgd
        self.gram = gram.flatten(0, 1)  # (tasks * n, n)
        self.first_row = n * torch.arange(tasks, device=gram.device)
        products = products.permute(1, 2, 0)
        self.state = torch.cat(
            [products, torch.zeros_like(products), torch.ones_like(products[:1])]
        )
        self.velocity = torch.zeros_like(self.state)  # u, (2 n + 1, ways, tasks)
        self.products, self.coefficients, self.share = (
            self.state[:n],
            self.state[n : 2 * n],
            self.state[2 * n],
        )
        self.damp = 1.0

    def products_of(self, batch: Tensor) -> Tensor:
        """The products (size, ways, tasks) of supports `batch` (size, tasks)."""
        return self.products.gather(0, batch[:, None].expand(-1, self.products.shape[1], -1))

    def step(self, batch: Tensor, gradient: Tensor, decay: Tensor) -> None:
        """One step of SGD.

        Args:
            batch: indices of supports (size, tasks).
            gradient: h of these supports (size, ways, tasks).
            decay: d, broadcast to (ways, tasks).
        """
        n = len(self.products)
        rows = self.gram.index_select(0, (batch + self.first_row).flatten())
        rows = rows.view(*batch.shape, n).mT.contiguous()  # (size, n, tasks)
        gradient = gradient * self.damp
        self.velocity.mul_(self.sgd.momentum)
        for row, h in zip(rows, gradient):
            self.velocity[:n].addcmul_(row[:, None], h)
        self.velocity.scatter_add_(0, (batch + n)[:, None].expand_as(gradient), gradient)
        self.velocity.addcmul_(self.state, decay, value=self.damp)
        self.state.add_(self.velocity, alpha=-self.sgd.lr)
        # torch.optim.SGD has no dampening without momentum
        self.damp = 1 - self.sgd.dampening if self.sgd.momentum else 1.0


class LinearHeads:
    """A linear classifier for each task, trained on `support` (tasks, ways * shots, D),
    class-major.

    Args:
        weight, bias: initial, (tasks, ways, D) and (tasks, ways).
    """

    def __init__(self, support: Tensor, weight: Tensor, bias: Tensor, sgd: SGD):
        self.support, self.weight, self.bias = support, weight, bias
        self.shots = support.shape[1] // weight.shape[1]
        # + 1 and + bias: the feature that is always 1
        self.weights = GramWeights(
            _inner(support, support) + 1, _inner(support, weight) + bias[:, None], sgd
        )
        self.decay = bias.new_full((1, 1), sgd.weight_decay)

    def step(self, batch: Tensor) -> Tensor:
        """One step on supports `batch` (tasks, size). Returns their logits (tasks, size, ways)
        before it.
        """
        batch = batch.mT
        logits = self.weights.products_of(batch)
        self.weights.step(batch, _loss_gradient(logits, batch // self.shots), self.decay)
        return logits.permute(2, 0, 1)

    def trained(self) -> tuple[Tensor, Tensor]:
        """Weights (tasks, ways, D) and biases (tasks, ways) by now."""
        share, coefficients = self.weights.share.mT, self.weights.coefficients.permute(2, 1, 0)
        weight = share[..., None] * self.weight + _inner(coefficients, self.support.mT)
        return weight, share * self.bias + coefficients.sum(2)

    def logits(self, query: Tensor) -> Tensor:
        """Logits (tasks, queries, ways) of features (tasks, queries, D)."""
        weight, bias = self.trained()
        return _inner(query, weight) + bias[:, None]


class CosineHeads:
    """A cosine classifier for each task, trained on `support` (tasks, ways * shots, D),
    class-major.

    Args:
        weight: initial, (tasks, ways, D).
        gain: initial, (tasks, ways); or None for gains that stay 1.
        temperature: multiplies the cosines.
        eps: added to the norm of features.
        margin: subtracted from the true class's cosine while training.
    """

    def __init__(
        self,
        support: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        sgd: SGD,
        temperature: float,
        eps: float,
        margin: float = 0.0,
    ):
        self.support, self.weight, self.sgd = support, weight, sgd
        self.temperature, self.eps, self.margin = temperature, eps, margin
        self.shots = support.shape[1] // weight.shape[1]
        self.norms = self._norms(support)
        gram = _inner(support, support) / (self.norms * self.norms.mT)
        self.weights = GramWeights(gram, _inner(support, weight) / self.norms, sgd)
        self.initial_products = self.weights.products.clone()
        self.initial_square = weight.norm(dim=2).square().mT.contiguous()  # (ways, tasks)
        self.learns_gain = gain is not None
        self.gain = torch.ones_like(self.initial_square)
        if self.learns_gain:
            self.gain.copy_(gain.mT)
        self.gain_velocity = torch.zeros_like(self.gain)

    def step(self, batch: Tensor) -> Tensor:
        """One step on supports `batch` (tasks, size). Returns their logits (tasks, size, ways)
        before it.
        """
        batch = batch.mT
        labels = batch // self.shots
        products = self.weights.products_of(batch)  # (size, ways, tasks)
        square = self._squares()
        unit = self.temperature * square.rsqrt()
        scale = unit * self.gain
        logits = products * scale
        if self.margin:
            logits.scatter_(1, labels[:, None], -self.temperature * self.margin, reduce="add")
        gradient = _loss_gradient(logits, labels)
        slope = (gradient * products).sum(0)  # (ways, tasks)
        damp, decay = self.weights.damp, self.sgd.weight_decay
        self.weights.step(batch, gradient * scale, decay - slope * scale / square)
        if self.learns_gain:
            self.gain_velocity.mul_(self.sgd.momentum).add_(
                slope * unit + decay * self.gain, alpha=damp
            )
            self.gain.add_(self.gain_velocity, alpha=-self.sgd.lr)
        return logits.permute(2, 0, 1)

    def trained(self) -> tuple[Tensor, Tensor]:
        """Weights (tasks, ways, D) and gains (tasks, ways) by now."""
        coefficients = self.weights.coefficients.permute(2, 1, 0) / self.norms.mT
        weight = self.weights.share.mT[..., None] * self.weight + _inner(
            coefficients, self.support.mT
        )
        return weight, self.gain.mT

    def logits(self, query: Tensor) -> Tensor:
        """Logits (tasks, queries, ways) of features (tasks, queries, D), without margin."""
        weight, gain = self.trained()
        scale = self.temperature * gain / weight.norm(dim=2)
        return _inner(query, weight) * scale[:, None] / self._norms(query)

    def _norms(self, features: Tensor) -> Tensor:
        """(tasks, m, 1) of features (tasks, m, D)."""
        return features.float().norm(dim=2, keepdim=True) + self.eps

    def _squares(self) -> Tensor:
        """Squared norms (ways, tasks) of the weights."""
        w = self.weights
        cross = w.coefficients * torch.addcmul(w.products, w.share, self.initial_products)
        return cross.sum(0) + w.share.square() * self.initial_square


def _loss_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each task's mean cross-entropy by its logits (size, ways, tasks), for labels
    (size, tasks).
    """
    return logits.softmax(1).scatter_(1, labels[:, None], -1, reduce="add").div_(len(logits))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (tasks, n, m) of rows of (tasks, n, D) and (tasks, m, D), in float32 also
    under autocast.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().mT
