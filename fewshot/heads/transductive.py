"""Classifying all queries of a task together, all tasks at once: what queries are like tells what
the classes are like.

Methods take features, supports (tasks, ways * shots, D), all shots of class 0 first, and queries
(tasks, m, D) in any order, and give probabilities (tasks, m, ways), or scores where they say so.
How features are prepared decides more than the method does:

    SimpleShot, BD-CSPN, LaplacianShot    unit(x - mean of the base classes' features), known as CL2N
    TIM, alpha-TIM                        unit(x), known as L2N
    PT-MAP                                power(support, query)

Prototypes that stay in the span of a task's features (TIM-ADM, PT-MAP) are known by their
coefficients, w = sum_i b_i x_i, so that a step costs products with the Gram matrix K_ij = x_i x_j,
however long features are: x_i w = (K b)_i and |w|² = b K b. Adam's steps leave the span: TIM-GD and
alpha-TIM work on the features, which should stay in a processor's cache: of 100 x 640, 64 tasks at
once were faster than 32, by a seventh, and than 128.

Inside, classes come before samples, (tasks, ways, samples), for then sums over classes go along
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot import InputError
from fewshot.heads.metric import Head, class_means, cosines, prototype, squared_distances


class TrainingFree(Head):
    """A method that trains nothing, as a head.

    Args:
        infer: (support, query, ways, **options) -> scores, of this module or of `logistic`, of
            prepared features.
        prepare: (support, query) -> the same, prepared; by default brought to unit length.
        tasks_at_once: how many tasks it is best given.
    """

    def __init__(
        self,
        infer: Callable[..., Tensor],
        prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        tasks_at_once: int | None = None,
        **options: Any,
    ):
        super().__init__()
        self.infer, self.prepare, self.options = infer, prepare, options
        self.tasks_at_once = tasks_at_once

    def forward(self, support: Tensor, query: Tensor, ways: int) -> Tensor:
        """Features (tasks, ways * shots, D) and (tasks, m, D) -> scores (tasks, m, ways)."""
        if self.prepare is None:
            support, query = unit(support), unit(query)
        else:
            support, query = self.prepare(support, query)
        return self.infer(support, query, ways, **self.options)


def unit(features: Tensor) -> Tensor:
    """Features (..., D) over their length; zeros stay zeros."""
    return F.normalize(features, dim=-1)


def power(
    support: Tensor, query: Tensor, *, clamp: bool = False, centre: bool = True
) -> tuple[Tensor, Tensor]:
    """PT-MAP's transform of a task's features (tasks, n, D) and (tasks, m, D): Hu et al., 2020,
    section 3.1.

    (x + 1e-6)^½ to unit length, less the mean, to unit length again. Supports and queries have each
    their own mean.

    Args:
        clamp: take features below 0 as 0, as easyfsl does.
        centre: False leaves out the means, as easyfsl does.

    Raises:
        InputError: features are below 0 or not numbers, and have no root. Backbones that do not end
            with a ReLU (ResNet-12 with leaky ones, ViT, ConvNeXt) make such.
    """

    def transformed(x: Tensor) -> Tensor:
        if clamp:
            x = x.clamp(min=0)
        if not (x >= 0).all():
            raise InputError(
                "the power transform takes roots, but features are below 0: clamp them or leave it out"
            )
        x = unit((x + 1e-6).sqrt())
        return unit(x - x.mean(1, keepdim=True)) if centre else x

    return transformed(support), transformed(query)


def _exact(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method without autograd and in float32 at least, also under autocast."""

    @wraps(method)
    @torch.no_grad()
    def exact(support: Tensor, query: Tensor, ways: int, **options) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(support.dtype, query.dtype), torch.float32)
        with torch.autocast(support.device.type, enabled=False):
            return method(support.to(dtype), query.to(dtype), ways, **options)

    return exact


@_exact
def simple_shot(
    support: Tensor,
    query: Tensor,
    ways: int,
    *,
    metric: Literal["euclidean", "cosine"] = "euclidean",
) -> Tensor:
    """SimpleShot (Wang et al., 2019, https://arxiv.org/abs/1911.04623, section 3): the nearest
    class mean, inductive.

    The mean is not brought to unit length again, so that "cosine", which easyfsl has, ranks
    otherwise but for 1 shot.

    Returns:
        Minus Euclidean distances, or cosines.
    """
    if metric == "cosine":
        return cosines(query, class_means(support, ways))
    if metric != "euclidean":
        raise InputError(f"no metric is called {metric!r}: choose euclidean or cosine")
    return prototype(support, query, ways, "euclidean")


Rectification = Literal["unshifted", "shifted", "easyfsl"]


@_exact
def bd_cspn(
    support: Tensor, query: Tensor, ways: int, *, version: Rectification = "unshifted"
) -> Tensor:
    """BD-CSPN (Liu et al., 2020, https://arxiv.org/abs/1911.10713): class means rectified by all
    queries, in one step.

    There is no official code. `version` says whose is meant: "unshifted" (Veilleux et al., 2021,
    whose numbers are published) and "shifted" (Ziko et al., 2020) differ in which queries are
    compared with the prototypes. A class of uncertain members has a short prototype in both, and
    short ones are near.

    Returns:
        Minus Euclidean distances; cosines if `version` is "easyfsl".

    Raises:
        InputError: there is no such version.
    """
    if version not in get_args(Rectification):
        raise InputError(
            f"no version is called {version!r}: choose one of {', '.join(get_args(Rectification))}"
        )
    prototypes = rectified(support, query, ways, easyfsl=version == "easyfsl")
    if version == "easyfsl":
        return cosines(query, prototypes)
    if version == "shifted":
        prototypes = prototypes - _shift(support, query)
    return prototype(prototypes, query, ways, "euclidean")


def _shift(support: Tensor, query: Tensor) -> Tensor:
    """What moves the queries' mean to the supports', (tasks, 1, D), or a prototype the other way if
    subtracted.
    """
    return support.mean(1, keepdim=True) - query.mean(1, keepdim=True)


@_exact
def rectified(support: Tensor, query: Tensor, ways: int, *, easyfsl: bool = False) -> Tensor:
    """BD-CSPN's prototypes (tasks, ways, D), from the supports, the queries moved by `_shift`, and
    the class means mu.

    Each of them, x, belongs to the class c of the largest cosine with mu_c. The prototype is (1 /
    |X_c|) sum w(x) x over the X_c that belong to it, w being the softmax over classes of 10
    cosines. A class without any keeps its mean.

    Args:
        easyfsl: supports belong to their own class, and w is exp(cosine), divided by its sum over
            X_c.
    """
    means = class_means(support, ways)
    x = torch.cat([support, query + _shift(support, query)], 1)
    cosines = unit(means) @ x.mT / x.norm(dim=2).clamp(min=1e-12)[:, None]  # (tasks, ways, n + m)
    belongs = F.one_hot(cosines.argmax(1), ways).mT.to(x.dtype)
    if easyfsl:
        belongs[..., : support.shape[1]] = one_hot(support, ways)
        weights = cosines.exp() * belongs
        return weights / weights.sum(2, keepdim=True) @ x
    weights, members = (10 * cosines).softmax(1) * belongs, belongs.sum(2, keepdim=True)
    return torch.where(members > 0, weights @ x / members.clamp(min=1), means)


def one_hot(support: Tensor, ways: int) -> Tensor:
    """Labels (ways, n) of supports (tasks, n, D)."""
    return torch.eye(ways, dtype=support.dtype, device=support.device).repeat_interleave(
        support.shape[1] // ways, 1
    )


@_exact
def laplacian_shot(
    support: Tensor,
    query: Tensor,
    ways: int,
    *,
    lam: float | None = None,
    neighbours: int = 2,
    rectify: bool = True,
    shift: bool = True,
    updates: int = 20,
) -> Tensor:
    """LaplacianShot (Ziko et al., 2020, https://arxiv.org/abs/2006.15486, algorithm 1): near
    queries, the same class.

    Y, at first softmax(-a), becomes softmax(-a + lam W Y), a being squared distances to prototypes
    and W_ij 1 for the nearest other queries j of i. A task stops when its energy, the sum of Y log
    Y + a Y - lam Y (W Y), changes by less than a millionth in the third update or a later one.

    Args:
        lam: lambda; by default the published value for ResNet-18 on mini-ImageNet, 0.7 for one shot
            and 0.3 for more.
        neighbours: ones in a row of W: one less than the published `knn` of 3, which counts the
            query itself.
        rectify: whether prototypes are `rectified` or class means, as in the realistic protocol of
            Veilleux et al.
        shift: whether queries are shifted as BD-CSPN does before they are compared with the
            prototypes; False is the version of Veilleux et al., 2021.
        updates: at most.

    Raises:
        InputError: a task has no more queries than neighbours.
    """
    if query.shape[1] <= neighbours:
        raise InputError(
            f"LaplacianShot compares a query with {neighbours} others: {query.shape[1]} are too few"
        )
    if lam is None:
        lam = 0.7 if support.shape[1] == ways else 0.3
    prototypes = rectified(support, query, ways) if rectify else class_means(support, ways)
    if shift:
        prototypes = prototypes - _shift(support, query)
    inner = query @ query.mT
    square = inner.diagonal(dim1=1, dim2=2)[:, None]  # (tasks, 1, m)
    # (tasks, ways, m)
    unary = prototypes.square().sum(2, keepdim=True) - 2 * prototypes @ query.mT + square
    nearness = 2 * inner - square  # minus squared distances, but for a row's own square
    nearness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    near = nearness.topk(neighbours, dim=2, sorted=False).indices.mT  # (tasks, neighbours, m)
    near = near.unsqueeze(1).expand(-1, ways, -1, -1).flatten(2)

    def pull(y: Tensor) -> Tensor:
        return lam * y.gather(2, near).unflatten(2, (neighbours, -1)).sum(2)

    y = (-unary).softmax(1)
    pulled, energy = pull(y), y.new_full((len(y), 1, 1), torch.inf)
    runs = torch.ones_like(energy, dtype=torch.bool)
    for update in range(updates):
        y = torch.where(runs, (pulled - unary).softmax(1), y)
        pulled, before = pull(y), energy
        energy = (y * (y.clamp(min=1e-20).log() + unary - pulled)).sum((1, 2), keepdim=True)
        if update > 1:
            # no more for a task that has stopped
            runs = (energy - before).abs() > 1e-6 * before.abs()
            if not runs.any():
                break
    return y.mT


def tim(
    support: Tensor,
    query: Tensor,
    ways: int,
    *,
    version: Literal["gd", "adm"] = "gd",
    steps: int | None = None,
    **options,
) -> Tensor:
    """TIM by gradient descent, `tim_gd`, or alternating directions, `tim_adm`; by default as many
    steps of them as published.
    """
    if version == "gd":
        return tim_gd(support, query, ways, steps=steps or 1000, **options)
    return tim_adm(support, query, ways, steps=steps or 150, **options)


@_exact
def tim_gd(
    support: Tensor, query: Tensor, ways: int, *, temperature: float = 15.0, **options
) -> Tensor:
    """TIM-GD (Boudiaf et al., 2020, https://arxiv.org/abs/2008.11297): mutual information of
    queries and classes.

    Probabilities are the softmax of -temperature / 2 |x - w_c|² by prototypes of `tim_prototypes`,
    with its options. The realistic protocol of Veilleux et al., 2021, has weights (1, 1, 1).
    """
    prototypes = tim_prototypes(support, query, ways, temperature=temperature, **options)
    return _probabilities(prototypes, query, temperature)


@_exact
def alpha_tim(
    support: Tensor,
    query: Tensor,
    ways: int,
    *,
    alpha: float | None = None,
    temperature: float = 15.0,
    **options,
) -> Tensor:
    """alpha-TIM (Veilleux et al., 2021, https://arxiv.org/abs/2204.11181, section 4): for classes
    of unequal shares.

    TIM-GD with Tsallis' entropies of order `alpha` of the queries, H(p) = (1 - sum_c p_c^alpha) /
    (alpha - 1), and weights (1, 1, 1). Its alpha was tuned: 2 for one shot, 7 for five and more, 5
    between, as here by default. With a large alpha and uncertain predictions entropies are flat,
    and it may fall below TIM.
    """
    if alpha is None:
        shots = support.shape[1] // ways
        alpha = 2.0 if shots == 1 else 5.0 if shots < 5 else 7.0
    options = {"weights": (1.0, 1.0, 1.0)} | options
    prototypes = tim_prototypes(
        support, query, ways, alpha=alpha, temperature=temperature, **options
    )
    return _probabilities(prototypes, query, temperature)


def _probabilities(prototypes: Tensor, query: Tensor, temperature: float) -> Tensor:
    return (-temperature / 2 * squared_distances(query, prototypes)).softmax(2)


@_exact
def tim_prototypes(
    support: Tensor,
    query: Tensor,
    ways: int,
    *,
    weights: tuple[float, float, float] = (0.1, 1.0, 0.1),
    alpha: float = 1.0,
    steps: int = 1000,
    lr: float = 1e-4,
    temperature: float = 15.0,
) -> Tensor:
    """Prototypes w (tasks, ways, D) after Adam's steps from the class means: equations 1 to 3 of TIM.

    The gradient is written out, which is several times as fast as autograd's of

        log_p = (-temperature / 2 * squared_distances(x, w)).log_softmax(2)  # of supports, queries
        p = log_p.exp()
        ce = -(labels * log_p[:, :n]).sum(2).mean(1)
        h = lambda p: -(p * p.log()).sum(-1)  # alpha 1; else (1 - (p**alpha).sum(-1)) / (alpha - 1)
        loss = l_0 * ce - l_1 * h(p[:, n:].mean(1)) + l_2 * h(p[:, n:]).mean(1)

    Args:
        weights: l of the loss l_0 CE(supports) - l_1 H(mean of queries' p) + l_2 mean of H(queries'
            p).
        alpha: order of the entropies H, 1 for Shannon's.
        steps, lr: Adam moves a coordinate by up to `lr` in a step, so that these two belong
            together.
    """
    n, m = support.shape[1], query.shape[1]
    x, labels = torch.cat([support, query], 1), one_hot(support, ways)[:-1]
    # the derivative of a logit by w_c is temperature * (x - w_c)
    on_supports, on_mean, on_each = (
        temperature * weight / size for weight, size in zip(weights, (n, m, m))
    )
    w = class_means(support, ways)
    adam = torch.optim.Adam([w], lr=lr, fused=True)
    # of the loss by the logits, times the temperature. A sample's sum to 0, as its logits matter by
    # their differences alone, so that the last class is left out of products with features
    slope = x.new_empty(len(x), ways - 1, n + m)
    for _ in range(steps):
        square = temperature / 2 * w.square().sum(2, keepdim=True)
        others = square[:, -1:] - square[:, :-1], w[:, :-1] - w[:, -1:]
        log_p = F.pad(
            torch.baddbmm(others[0], others[1], x.mT, alpha=temperature), (0, 0, 0, 1)
        ).log_softmax(1)
        p = log_p.exp()
        torch.sub(p[:, :-1, :n], labels, out=slope[..., :n]).mul_(on_supports)
        p, log_p = p[..., n:], log_p[..., n:]
        mean = p.mean(2, keepdim=True)
        if alpha == 1:  # derivatives by p, less what is the same for all classes
            by_p = on_mean * mean.clamp(min=torch.finfo(p.dtype).tiny).log() - on_each * log_p
        else:
            by_p = on_mean * mean ** (alpha - 1) - on_each * (log_p * (alpha - 1)).exp()
            by_p *= alpha / (alpha - 1)
        torch.mul(p[:, :-1], by_p[:, :-1] - (p * by_p).sum(1, keepdim=True), out=slope[..., n:])
        w.grad = _with_last(slope @ x).addcmul_(_with_last(slope.sum(2, keepdim=True)), w, value=-1)
        adam.step()
    return w


def _with_last(x: Tensor) -> Tensor:
    """What sums to 0 over classes, (tasks, ways, ...), from all but the last class."""
    return torch.cat([x, -x.sum(1, keepdim=True)], 1)


@_exact
def tim_adm(
    support: Tensor, query: Tensor, ways: int, *, temperature: float = 15.0, **options
) -> Tensor:
    """TIM-ADM (Boudiaf et al., 2020, section 3 and appendix): TIM's loss by alternating
    minimisation.

    Probabilities as in `tim_gd`, by prototypes of `adm_prototypes`, with its options.
    """
    prototypes = adm_prototypes(support, query, ways, temperature=temperature, **options)
    return _probabilities(prototypes, query, temperature)


@_exact
def adm_prototypes(
    support: Tensor,
    query: Tensor,
    ways: int,
    *,
    weights: tuple[float, float, float] = (0.1, 1.0, 0.1),
    steps: int = 150,
    temperature: float = 15.0,
) -> Tensor:
    """Prototypes (tasks, ways, D) after TIM-ADM's steps from the class means.

    A step takes, of all queries x_j with probabilities p_jc, and then of these and the supports s_i
    with labels y_ic,

        q_jc ∝ p_jc^(1 + l_2) / (sum_j p_jc^(1 + l_2))^(l_1 / (l_1 + 1)), so that they sum to 1 over
        classes w_c = [g sum_i (y_ic s_i + p_ic (w_c - s_i)) + h sum_j (q_jc x_j + p_jc (w_c -
        x_j))] / d_c

    with d_c = g sum_i y_ic + h sum_j q_jc, g = l_0 / (1 + l_2) and h = supports / queries. Where a
    class has no queries, rounding errors may grow a millionfold on the way; hence float64.

    Args:
        weights: l, as in `tim_prototypes`.
    """
    n, m = support.shape[1], query.shape[1]
    x, labels = float64(torch.cat([support, query], 1)), float64(one_hot(support, ways))
    gram, g, h = x @ x.mT, weights[0] / (1 + weights[2]), n / m
    b = F.pad(labels / labels.sum(1, keepdim=True), (0, m)).expand(len(x), -1, -1)
    moved = torch.empty_like(b)  # what a step adds to the coefficients, times the denominator
    for _ in range(steps):
        products = b @ gram  # (tasks, ways, n + m)
        log_p = _gram_logits(b, products, temperature).log_softmax(1)
        p = log_p.exp()
        q = (log_p[..., n:] * (1 + weights[2])).exp_()
        q *= q.sum(2, keepdim=True) ** (-weights[1] / (weights[1] + 1))
        q /= q.sum(1, keepdim=True)
        torch.sub(labels, p[..., :n], out=moved[..., :n]).mul_(g)
        torch.sub(q, p[..., n:], out=moved[..., n:]).mul_(h)
        total = g * n / ways + h * q.sum(2, keepdim=True)
        b = (moved + (total - moved.sum(2, keepdim=True)) * b) / total
    return (b @ x).to(support)


def _gram_logits(b: Tensor, products: Tensor, temperature: float) -> Tensor:
    """-temperature / 2 |x - w|² less a sample's own part, from coefficients and products (tasks,
    ways, n + m).
    """
    return temperature * (products - (b * products).sum(2, keepdim=True) / 2)


def float64(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU if it comes from Apple's MPS, which has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@_exact
def pt_map(support: Tensor, query: Tensor, ways: int, **options) -> Tensor:
    """PT-MAP (Hu et al., 2020, https://arxiv.org/abs/2006.03806, algorithm 1): optimal transport of
    queries to classes.

    Probabilities are the transport plan by the prototypes of `map_prototypes`, with its options;
    easyfsl has 10 steps. It gives every class m / ways queries: where they are distributed
    unequally, that is wrong and costs 17 points.
    """
    return _transported(support, query, ways, **options)[1].mT


@_exact
def map_prototypes(support: Tensor, query: Tensor, ways: int, **options) -> Tensor:
    """PT-MAP's prototypes (tasks, ways, D): `steps` times, class means move by `rate` to those of
    the transport plan.

    Args:
        options: rate, 0.2; steps, 20; and lam, 10: the plan is that of exp(-lam times squared
            distances).
    """
    return _transported(support, query, ways, **options)[0] @ torch.cat([support, query], 1)


def _transported(
    support: Tensor, query: Tensor, ways: int, lam: float = 10.0, rate: float = 0.2, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Coefficients of `map_prototypes` (tasks, ways, n + m) and their plan (tasks, ways, m)."""
    m = query.shape[1]
    x, labels = torch.cat([support, query], 1), one_hot(support, ways)
    gram, targets = x @ x.mT, labels.expand(len(x), -1, -1)
    b = F.pad(labels / labels.sum(1, keepdim=True), (0, m)).expand(len(x), -1, -1)
    plan = _transport(_gram_logits(b, b @ gram, 2 * lam)[..., -m:])
    for _ in range(steps):
        members = torch.cat([targets, plan], 2)
        b = torch.lerp(b, members / members.sum(2, keepdim=True), rate)
        plan = _transport(_gram_logits(b, b @ gram, 2 * lam)[..., -m:])
    return b, plan


def _transport(scores: Tensor, tolerance: float = 1e-6, rounds: int = 1000) -> Tensor:
    """Sinkhorn's plan (tasks, ways, m) from exp(scores): a query's shares sum to 1, a class's to m
    / ways.

    A task stops when its queries' sums change by at most `tolerance`, whatever other tasks do. The
    classes' sums are exact, the queries' approximate.
    """
    # a factor of a query's cancels in the first round
    plan = (scores - scores.amax(1, keepdim=True)).exp()
    share, tiny = plan.shape[2] / plan.shape[1], torch.finfo(plan.dtype).tiny
    rest, which = plan, torch.arange(len(plan), device=plan.device)  # the tasks that go on
    sums = rest.sum(1, keepdim=True)
    for _ in range(rounds):
        rest = rest / sums
        rest *= share / rest.sum(2, keepdim=True).clamp(min=tiny)
        before, sums = sums, rest.sum(1, keepdim=True)
        more = (sums - before).abs().amax((1, 2)) > tolerance
        if not more.all():
            plan[which] = rest
            rest, sums, which = rest[more], sums[more], which[more]
            if not len(which):
                break
    plan[which] = rest
    return plan
