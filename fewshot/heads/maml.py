"""Model-Agnostic Meta-Learning (Finn et al., 2017, https://arxiv.org/abs/1703.03400): weights made
to be adapted.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fewshot import InputError


class BatchStatistics(nn.BatchNorm2d):
    """A batch norm that normalises by the current batch in training and in tests, made from an
    ordinary one.

    Running statistics keep their names and values in the state dict, but are neither used nor
    updated.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps)
        self.load_state_dict(norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w), normalised."""
        # Scaled outside: under vmap, PyTorch's gradient of the scale takes the statistics for
        # constants when it is differentiated again, which is what second-order MAML does.
        normal = F.batch_norm(x, None, None, training=True, eps=self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


def batch_statistics(network: nn.Module) -> None:
    """Replace every batch norm inside `network` by a `BatchStatistics`."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, BatchStatistics(child))


def inner_loop(
    network: nn.Module,
    parameters: Mapping[str, Tensor],
    support: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    first_order: bool = False,
) -> Mapping[str, Tensor]:
    """Parameters adapted to a task: steps θ ← θ - lr ∇L(θ), L the supports' mean cross-entropy
    (algorithm 2, line 7).

    Args:
        network: images (n, 3, H, W) -> logits (n, ways).
        parameters: the θ to start from, by the names that they have in `network`.
        support, labels: images (n, 3, H, W) and their classes (n,).
        first_order: the result, as a function of `parameters`, takes each ∇L for a constant
            (section 5.2).
    """

    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(network, parameters, (support,)), labels)

    for _ in range(steps):
        # grad computes the same under no_grad, but leaves no graph of its own computation
        with torch.set_grad_enabled(torch.is_grad_enabled() and not first_order):
            gradients = grad(loss)(parameters)
        parameters = {name: value - lr * gradients[name] for name, value in parameters.items()}
    return parameters


class MAML(nn.Module):
    """A backbone and a linear head, all of whose parameters adapt to a task by a few steps of
    gradient descent.

    Batch norms use the statistics of the images at hand, supports or queries, in training and in
    tests: the logits of a query depend on the queries beside it.

    Args:
        backbone: images (n, 3, H, W) -> features (n, backbone.out_features).
        ways: classes of every task, as the head has one output for each.
        steps: of the inner loop in training.
        lr: of the inner loop.
        test_steps: of the inner loop in tests.
        first_order: leave second derivatives out of the gradient of `forward`.
        at_once: tasks computed at once: fewer take less memory. By default 4, but 1 on a CPU, where
            convolutions with weights of their own for each task are slower than one after another.
    """

    def __init__(
        self,
        backbone: nn.Module,
        ways: int,
        *,
        steps: int = 2,
        lr: float = 0.01,
        test_steps: int = 5,
        first_order: bool = False,
        at_once: int | None = None,
    ):
        super().__init__()
        self.features, self.head = backbone, nn.Linear(backbone.out_features, ways)
        self.ways, self.steps, self.lr, self.test_steps = ways, steps, lr, test_steps
        self.first_order, self.at_once = first_order, at_once
        batch_statistics(self)
        backbone.channels_last = False

    def forward(
        self, support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor
    ) -> Tensor:
        """The meta-objective: mean cross-entropy of the queries after adaptation to the supports
        (section 2.2).

        Its gradient is computed here too, `at_once` tasks at a time: the graphs of a batch of
        tasks, each through all its inner steps, would take many gigabytes. What is returned has
        that value, and that gradient for autograd. All of this is inside forward, so that
        DistributedDataParallel averages the gradient over processes.

        Args:
            support, labels: images (tasks, n, 3, H, W) and their classes (tasks, n) in [0, ways).
            query, query_labels: (tasks, m, 3, H, W) and (tasks, m).
        """
        parameters = list(self.parameters())
        gradients = [torch.zeros_like(p) for p in parameters]
        value = torch.zeros((), device=query.device)
        for *tasks, targets in self._chunks(support, labels, query, query_labels):
            with torch.enable_grad():
                logits = self._solve(*tasks, self.steps)
                loss = (
                    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                    / query_labels.numel()
                )
            for total, gradient in zip(gradients, torch.autograd.grad(loss, parameters)):
                total += gradient
            value += loss.detach()
        # p - p.detach() is 0, with gradient 1
        return value + sum(
            ((p - p.detach()) * gradient).sum() for p, gradient in zip(parameters, gradients)
        )

    @torch.no_grad()
    def predict(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (tasks, m, ways) of query images (tasks, m, 3, H, W), after `test_steps` on the
        supports.

        Args:
            support: images (tasks, ways * shots, 3, H, W), class by class.

        Raises:
            InputError: the head has another number of ways.
        """
        if ways != self.ways:
            raise InputError(
                f"{ways}-way tasks: this MAML is made for {self.ways} ways; train one for {ways}"
            )
        labels = torch.arange(ways, device=support.device).repeat_interleave(
            support.shape[1] // ways
        )
        chunks = self._chunks(support, labels.expand(len(support), -1), query)
        return torch.cat([self._solve(*chunk, self.test_steps) for chunk in chunks])

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        at_once = self.at_once or (1 if tensors[0].device.type == "cpu" else 4)
        return zip(*(tensor.split(at_once) for tensor in tensors))

    def _solve(self, support: Tensor, labels: Tensor, query: Tensor, steps: int) -> Tensor:
        """Logits (tasks, m, ways) of queries after so many steps on the supports; see `forward` for
        the arguments.
        """
        # of parameters named as ours
        network = nn.Sequential(OrderedDict(features=self.features, head=self.head))
        theta = dict(self.named_parameters())

        def solve(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
            adapted = inner_loop(
                network,
                theta,
                support,
                labels,
                steps=steps,
                lr=self.lr,
                first_order=self.first_order,
            )
            return functional_call(network, adapted, (query,))

        if len(support) > 1:
            return vmap(solve, randomness="different")(support, labels, query)
        support, query = support[0], query[0]
        if support.device.type == "cpu" and not torch.is_grad_enabled():
            # nearly twice as fast; second derivatives would be slower
            support, query = (
                x.contiguous(memory_format=torch.channels_last) for x in (support, query)
            )
        return solve(support, labels[0], query)[None]
