"""Fine-tuning in Gram space against the reference's numbers and torch.optim.SGD on the classifiers
themselves.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming_rule import array, close, golden, weight
from runs import metrics, run_here
from torch import Tensor, nn

from fewshot import heads
from fewshot.heads import fine_tuned

WAYS = 5
SGD = {"lr": 0.01, "momentum": 0.9, "dampening": 0.9, "weight_decay": 1e-3}
GOLDENS = [
    f"{name}_5way_{shots}shot" for name in ("neg_margin", "neg_margin_train") for shots in (1, 5)
] + [
    f"{name}_5way_{shots}shot{drop}"
    for name in ("baseline", "baseline_plus")
    for shots in (1, 5)
    for drop in ("", "_droplast")
]


def stored_features(episode: str, part: str, n: int) -> Tensor:
    """Supports or queries (1, 5 * n, 128) of a golden episode, class-major."""
    noisy = 0.5 * array(f"{episode}/centre", (WAYS, 128))[:, None] + array(
        f"{episode}/{part}", (WAYS, n, 128)
    )
    return torch.from_numpy(np.maximum(noisy, 0).reshape(1, WAYS * n, 128))


def stored_start(case: dict) -> list[Tensor]:
    """The reference head's initial parameters, each with a dimension of one task."""
    return [
        torch.from_numpy(weight(f"meta_test_head.{key}", shape))[None]
        for key, shape in case["state"].items()
    ]


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_the_reference(name):
    case = golden("cls_finetune")[name]
    assert {key: value for key, value in case["optimizer"].items() if key != "type"} == SGD
    shots, cfg = int(case["episode"][-1]), case["cfg"]
    support, query = (
        stored_features(case["episode"], "support", shots),
        stored_features(case["episode"], "query", 3),
    )
    labels = torch.arange(WAYS).repeat_interleave(shots)
    batches = [torch.tensor(batch)[None] for batch in case["batches"]]
    sgd = fine_tuned.SGD(**SGD)
    if cfg["type"] == "LinearHead":
        trainee = fine_tuned.LinearHeads(support, *stored_start(case), sgd)
    elif cfg["type"] == "CosineDistanceHead":
        gain, vectors = stored_start(case)
        trainee = fine_tuned.CosineHeads(support, vectors, gain[..., 0], sgd, 2.0, eps=1e-5)
    else:
        (init,) = stored_start(case)
        more = {"temperature": cfg["temperature"], "margin": cfg["margin"]}
        trainee = fine_tuned.CosineHeads(support, init, None, sgd, eps=1e-12, **more)

    close(trainee.logits(query)[0].softmax(1), case["query_prob_start"], 1e-5)
    for batch, loss in zip(batches, case["loss_per_step"], strict=True):
        assert F.cross_entropy(trainee.step(batch)[0], labels[batch[0]]).item() == pytest.approx(
            loss, rel=1e-5
        )
    trained = dict(zip(("weight", "other"), trainee.trained()))
    for key, expected in case["params_end"].items():
        ours = trained["other" if key.endswith(("bias", "weight_g")) else "weight"][0]
        close(ours.view(expected["shape"]), expected, 1e-5)
    close(trainee.logits(query)[0].softmax(1), case["query_prob_end"], 1e-5)


@pytest.mark.parametrize("shots", [1, 5])
def test_negative_margin_with_the_softmax_metric_trains_as_the_reference(shots):
    """That head is for training alone: tests adapt the cosine one. Here it takes the reference's
    steps by itself.
    """
    case = golden("cls_finetune")[f"neg_margin_softmax_5way_{shots}shot"]
    cfg, (init,) = case["cfg"], stored_start(case)
    support, query = (
        stored_features(case["episode"], *part)[0] for part in (("support", shots), ("query", 3))
    )
    labels = torch.arange(WAYS).repeat_interleave(shots)
    head = heads.NegMargin(128, WAYS, cfg["margin"], cfg["temperature"], metric="softmax")
    head.load_state_dict({"weight": init[0]})
    close(head(query).softmax(1), case["query_prob_start"], 1e-5)
    sgd = torch.optim.SGD(head.parameters(), **SGD)
    for batch, expected in zip(case["batches"], case["loss_per_step"], strict=True):
        loss = F.cross_entropy(head(support[batch], labels[batch]), labels[batch])
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    close(head.weight, case["params_end"]["weight"], 1e-5)
    close(head(query).softmax(1), case["query_prob_end"], 1e-5)


def episodes(shots: int, tasks: int = 3, d: int = 160) -> tuple[Tensor, Tensor]:
    """Supports (tasks, 5 * shots, d) and queries (tasks, 15, d) that look like a backbone's
    features.
    """
    r = torch.Generator().manual_seed(shots)
    centres = torch.randn(tasks, WAYS, 1, d, generator=r)
    return tuple(
        (0.5 * centres + torch.randn(tasks, WAYS, n, d, generator=r)).relu().flatten(1, 2)
        for n in (shots, 3)
    )


def plain(
    make, support: Tensor, query: Tensor, batches: list[Tensor], **sgd: float
) -> tuple[list[nn.Module], Tensor]:
    """Modules by `make`, one a task, as they were initialised, and logits (tasks, queries, ways)
    after torch's SGD.
    """
    initial, logits = [], []
    labels = torch.arange(WAYS).repeat_interleave(support.shape[1] // WAYS)
    for task in range(len(support)):
        module = make(support.shape[2])
        initial.append({key: value.clone() for key, value in module.state_dict().items()})
        optimizer = torch.optim.SGD(module.parameters(), **sgd)
        for batch in batches:
            x, y = support[task, batch[task]], labels[batch[task]]
            loss = F.cross_entropy(
                module(x, y) if isinstance(module, heads.NegMargin) else module(x), y
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits.append(module(query[task]).detach())
    return initial, torch.stack(logits)


KINDS = {  # our classifiers, with what, the plain module, and the names of its initial parameters
    "linear": (fine_tuned.start_linear, {}, lambda d: nn.Linear(d, WAYS), ("weight", "bias")),
    "cosine": (
        fine_tuned.start_cosine,
        {"temperature": 5.0},
        lambda d: heads.CosineLinear(d, WAYS, 5.0),
        ("weight_v", "weight_g"),
    ),
    "normalised": (
        fine_tuned.start_normalised,
        {"temperature": 10.0, "margin": -0.02},
        lambda d: heads.NegMargin(d, WAYS, -0.02, 10.0),
        ("weight",),
    ),
}


def started(kind: str, support: Tensor, initial: list[dict], sgd: fine_tuned.SGD):
    """Our classifiers with the initial parameters of these modules, one a task."""
    _, more, _, names = KINDS[kind]
    start = [torch.stack([state[name] for state in initial]) for name in names]
    if kind == "linear":
        return fine_tuned.LinearHeads(support, *start, sgd)
    if kind == "cosine":
        return fine_tuned.CosineHeads(support, start[0], start[1][..., 0], sgd, eps=1e-5, **more)
    return fine_tuned.CosineHeads(support, start[0], None, sgd, eps=1e-12, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shots", "drop_last", "settings"),
    [
        (1, True, {}),
        (1, False, {}),
        (5, True, {}),
        (5, False, {}),
        (5, True, {"momentum": 0.0, "lr": 0.1}),  # of which torch takes no dampening
        (5, True, {"dampening": 0.0, "weight_decay": 0.1}),
    ],
)
def test_equals_torchs_sgd(kind, shots, drop_last, settings):
    torch.manual_seed(0)
    support, query = episodes(shots)
    batches = list(fine_tuned.random_batches(support, 150, 4, drop_last))
    initial, expected = plain(KINDS[kind][2], support, query, batches, **SGD | settings)

    ours = started(kind, support, initial, fine_tuned.SGD(**settings))
    assert (ours.logits(query) - expected).abs().max() > 0.1  # it has something to learn
    close(fine_tuned.train(ours, batches).logits(query), expected.tolist(), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_random_numbers_follow_from_torchs_seed(kind):
    support, query = episodes(5)
    head = heads.FineTuned(kind, temperature=5.0)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return head(support, query, WAYS)

    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2))


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize(("kind", "drop_last"), [("linear", 1), ("cosine", 1), ("normalised", 0)])
def test_the_head_takes_the_published_steps(kind, drop_last, shots):
    """150 or 600 of them, on batches of 4, after the initial weights are drawn."""
    support, query = episodes(shots)
    torch.manual_seed(0)
    found = heads.FineTuned(kind, temperature=5.0)(support, query, WAYS)
    torch.manual_seed(0)
    more = {} if kind == "linear" else {"temperature": 5.0}
    start = KINDS[kind][0](support, WAYS, **more)
    steps = 150 if shots == 1 else 600
    batches = fine_tuned.random_batches(support, steps, 4, bool(drop_last))
    assert torch.equal(found, fine_tuned.train(start, batches).logits(query))


def test_initial_weights_are_pytorchs():
    d, tasks = 64, 50
    support, query = (
        torch.zeros(tasks, WAYS, d),
        torch.cat([torch.zeros(1, d), torch.eye(d)]).expand(tasks, -1, -1),
    )

    def start(function, **more) -> Tensor:
        torch.manual_seed(0)
        return function(support, WAYS, **more).logits(query)

    biases, weights = start(fine_tuned.start_linear).split([1, d], dim=1)
    weights = weights - biases
    bound = d**-0.5
    for values in (biases, weights):
        assert values.abs().max() <= bound * (1 + 1e-5)
        quarters = values.flatten().quantile(torch.tensor([0.25, 0.5, 0.75])) / bound
        assert quarters.tolist() == pytest.approx(
            [-0.5, 0, 0.5], abs=0.15 if values is biases else 0.03
        )
    # the same draws, with the gain that leaves a weight as it is, and without
    cosines = start(fine_tuned.start_cosine, temperature=2.0)[:, 1:]
    assert torch.allclose(cosines, 2 * weights / (1 + 1e-5), atol=1e-6)
    normalised = start(fine_tuned.start_normalised, temperature=2.0)[:, 1:]
    assert torch.allclose(normalised, 2 * F.normalize(weights, dim=1), atol=1e-6)


def test_a_pass_takes_every_support_once_in_an_order_of_each_task():
    support = torch.zeros(7, 25, 1)
    batches = list(fine_tuned.random_batches(support, 15, 4, drop_last=False))
    assert [batch.shape[1] for batch in batches] == [4, 4, 4, 4, 4, 4, 1] * 2 + [4]
    first, second = torch.cat(batches[:7], 1), torch.cat(batches[7:14], 1)  # (tasks, 25)
    for orders in (first, second):
        assert (orders.sort(1).values == torch.arange(25)).all()
        assert len(orders.unique(dim=0)) == 7
    assert (first != second).any(1).all()

    batches = list(fine_tuned.random_batches(support, 13, 4, drop_last=True))
    assert [batch.shape[1] for batch in batches] == [4] * 13
    for orders in (torch.cat(batches[:6], 1), torch.cat(batches[6:12], 1)):
        assert all(len(order.unique()) == 24 for order in orders)
    left_out = torch.cat(
        [torch.cat(list(fine_tuned.random_batches(support, 1, 4, True)), 1) for _ in range(300)]
    )
    assert (torch.bincount(left_out.flatten(), minlength=25) / 2100).tolist() == pytest.approx(
        [4 / 25] * 25, abs=0.04
    )


@pytest.mark.parametrize("kind", KINDS)
def test_stays_in_float32_and_out_of_autograd(kind):
    support, query = episodes(5)
    head = heads.FineTuned(kind, temperature=5.0)

    def logits(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return head(x, query, WAYS)

    expected = logits(support)
    with torch.autocast("cpu", torch.bfloat16):
        assert (query @ query.mT).dtype == torch.bfloat16
        assert torch.equal(logits(support), expected)
    assert not logits(support.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", [2, 3])
def test_fewer_supports_than_a_batch_are_one_batch(kind, ways):
    """Two or three ways of one shot: all supports in every step."""
    support, query = episodes(1)
    support, query = support[:, :ways], query[:, : 3 * ways]
    batches = list(fine_tuned.random_batches(support, 2, 4, drop_last=True))
    assert [batch.sort(1).values.tolist() for batch in batches] == [[list(range(ways))] * 3] * 2
    logits = heads.FineTuned(kind, temperature=5.0)(support, query, ways)
    labels = torch.arange(ways).repeat_interleave(3)
    assert (logits.argmax(2) == labels).float().mean() > 0.6


@pytest.mark.parametrize(("recipe", "ways"), [("baseline", 3), ("baseline_plus", 2)])
def test_recipes_test_on_few_ways(recipe, ways, tmp_path):
    tasks = "--val-tasks 2 --tasks 2"
    run_here(recipe, f"--ways {ways} --iters 2 --batch-size 8 {tasks} --out {tmp_path}")
    result = metrics(tmp_path)
    assert result["ways"] == ways and set(result["shots"]) == {"1", "5"}
