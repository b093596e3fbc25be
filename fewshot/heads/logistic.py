"""Meta-test by logistic regression: the optimum on every task's supports, all tasks at once.

L2-regularised multinomial logistic regression on frozen features, as scikit-learn's
LogisticRegression defines it: of the weights w_c and biases b_c of logits z_ic = w_c x_i + b_c, the
minimum of

    sum_i cross-entropy(z_i) + 1 / (2 C) sum_c |w_c|²

C stands beside a sum, so that the penalty weakens with more shots; biases are not penalised. The
weights are in the span of the supports, w_c = sum_i a_ic x_i, so that Newton's method can do with
the coefficients a and the Gram matrix K_ij = x_i x_j, however long features are. Its direction (v,
u) solves, with p the probabilities, y the labels as one-hot rows, and H_i = diag(p_i) - p_i p_i',

    H (K v + u) + v / C = y - p - a / C        sum_i H_i (K v + u)_i = sum_i (y - p)_i

by conjugate gradients in the metric of the weights, <a, a'> = a K a': a step is one product with K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewshot import InputError
from fewshot.heads.transductive import float64, one_hot

STEPS = 100  # Newton's: a handful does, but for a C so large that hardly a penalty is left


@torch.no_grad()
def logistic(support: Tensor, query: Tensor, ways: int, *, C: float = 1.0) -> Tensor:
    """Logits (tasks, queries, ways) of features (tasks, queries, D) by `fit_logistic` on the
    supports.
    """
    weight, bias = fit_logistic(support, ways, C=C)
    with torch.autocast(query.device.type, enabled=False):
        return query.to(weight) @ weight.mT + bias[:, None]


@torch.no_grad()
def fit_logistic(support: Tensor, ways: int, *, C: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights (tasks, ways, D) and biases (tasks, ways) of the optimum for each task, found in
    float64.

    Give some hundred tasks at once: fewer take hardly less time.

    Args:
        support: features (tasks, ways * shots, D), all shots of class 0 first; usually of unit
            length.
        C: inverse strength of the penalty.

    Raises:
        InputError: there is no such C, features are not finite, or the optimum is not found.
    """
    if not 0 < C <= 1e10:  # beyond, rounding errors would pass for an optimum
        raise InputError(f"logistic regression needs a C above 0 and up to 1e10, not {C:g}")
    if not support.isfinite().all():
        raise InputError(
            "features are infinite or not numbers: what does the backbone make of its pictures?"
        )
    with torch.autocast(support.device.type, enabled=False):
        x, y = float64(support), float64(one_hot(support, ways))
        gram = x @ x.mT
        # of rounding, in squared gradients
        noise = 1e-28 * (gram.diagonal(dim1=1, dim2=2) + 1).sum(1)[:, None, None]

        def loss(a: Tensor, products: Tensor, bias: Tensor) -> Tensor:
            logits = products + bias
            fit = logits.logsumexp(1).sum(1) - (y * logits).sum((1, 2))
            return (fit + (a * products).sum((1, 2)) / (2 * C))[:, None, None]

        # coefficients (tasks, ways, n), their products with the Gram matrix, biases (tasks, ways,
        # 1)
        zeros = torch.zeros_like(y.expand(len(x), -1, -1))
        state = [zeros, zeros, zeros[..., :1]]
        now, runs = loss(*state), torch.ones_like(noise, dtype=torch.bool)
        for _ in range(STEPS):
            a, products, bias = state
            p = (products + bias).softmax(1)
            residual = y - p - a / C, (y - p).sum(2, keepdim=True)
            direction = _newton(gram, p, *residual, C, noise)
            share = torch.ones_like(now)
            for _ in range(STEPS):  # halve the step until the loss falls
                trial = [value + share * change for value, change in zip(state, direction)]
                then = loss(*trial)
                worse = then > now + 1e-12 * now.abs()
                if not worse.any():
                    break
                share = torch.where(worse, share / 2, share)
            state = [torch.where(runs, after, before) for after, before in zip(trial, state)]
            now = torch.where(runs, then, now)
            # twice what a quadratic loss would have fallen by; after one so small a step, nothing
            # is left to gain
            runs = runs & ~(
                _inner(residual[0], direction[1]) + _inner(residual[1], direction[2]) < 1e-12
            )
            if not runs.any():
                return (state[0] @ x).to(support), state[2][..., 0].to(support)
    raise InputError(
        f"logistic regression found no optimum in {STEPS} steps: lower C, or take features of unit length"
    )


def _newton(
    gram: Tensor,
    p: Tensor,
    r: Tensor,
    r_bias: Tensor,
    C: float,
    noise: Tensor,
    accuracy: float = 1e-2,
) -> tuple[Tensor, Tensor, Tensor]:
    """The module's direction (v, K v, u) to a relative `accuracy`, from the right sides r and
    r_bias, or to `noise`.
    """
    r_products = r @ gram
    found = [torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r_bias)]
    along = [r, r_products, r_bias]
    square = _inner(r, r_products) + _inner(r_bias, r_bias)
    enough = torch.maximum(accuracy**2 * square, noise)
    for _ in range(2 * r[0].numel()):
        runs = square > enough
        if not runs.any():
            break
        seen = along[1] + along[2]
        curved = p * (seen - (p * seen).sum(1, keepdim=True))
        curved, curved_bias = curved + along[0] / C, curved.sum(2, keepdim=True)
        curvature = _inner(along[1], curved) + _inner(along[2], curved_bias)
        share = torch.where(runs, square / curvature, 0)
        found = [value + share * change for value, change in zip(found, along)]
        r, r_bias = r - share * curved, r_bias - share * curved_bias
        r_products = r @ gram
        before, square = square, _inner(r, r_products) + _inner(r_bias, r_bias)
        turn = torch.where(runs, square / before, 0)
        along = [value + turn * change for value, change in zip((r, r_products, r_bias), along)]
    return tuple(found)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (tasks, 1, 1) of (tasks, ways, n)."""
    return (a * b).sum((1, 2), keepdim=True)
