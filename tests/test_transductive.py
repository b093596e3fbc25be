"""Transductive methods against the numbers of their official implementations, plain versions, and
what must hold.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming_rule import array, close, golden
from torch import Tensor

from fewshot import InputError, heads
from fewshot.data import episodes
from fewshot.heads import transductive as tr

GOLDENS = golden("cls_transductive")
DIRICHLET = GOLDENS.pop("dirichlet")
GOLDENS |= golden("cls_transductive_640")
# of one shape, so that they are tasks of one call
GROUPS = {
    "1shot_64": ("tr_1shot_64", "tr_1shot_64_imbalanced"),
    "5shot_64": ("tr_5shot_64",),
    "1shot_640": ("tr_1shot_640",),
    "5shot_640": ("tr_5shot_640", "tr_5shot_640_imbalanced"),
}
WAYS = 5


def golden_task(case: dict, transform: str) -> tuple[Tensor, Tensor]:
    """A case's supports (ways * shots, D) and queries (m, D), float64, as its method takes them."""
    tag, d = case["tag"], case["dim"]
    centres = np.float32(case["separation"]) * array(f"{tag}/centre", (WAYS, d))[:, None]
    support = np.maximum(centres + array(f"{tag}/support", (WAYS, case["shots"], d)), 0).reshape(
        -1, d
    )
    drawn = np.maximum(centres + array(f"{tag}/query", (WAYS, max(case["counts"]), d)), 0)
    query = np.concatenate([rows[:n] for rows, n in zip(drawn, case["counts"])])
    mean = np.float32(0.4) + np.float32(0.05) * array(f"{tag}/base_mean", (d,))
    support, query, mean = (torch.from_numpy(x).double() for x in (support, query, mean))
    for ours, name in ((support, "support"), (query, "query"), (mean, "base_mean")):
        close(ours, case[name], 1e-6)
    if transform == "PT":
        support, query = tr.power(support[None], query[None])
        return support[0], query[0]
    if transform == "CL2N":
        support, query = support - mean, query - mean
    return tr.unit(support), tr.unit(query)


def golden_tasks(
    group: str, transform: str, dtype: torch.dtype
) -> tuple[list[dict], Tensor, Tensor]:
    """The cases of a group, their supports (tasks, ways * shots, D) and queries (tasks, m, D)."""
    cases = [GOLDENS[name] for name in GROUPS[group]]
    tasks = [golden_task(case, transform) for case in cases]
    return cases, *(torch.stack(part).to(dtype) for part in zip(*tasks))


def off(actual: Tensor, expected: list) -> float:
    """The largest difference."""
    return (actual.double() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()


def accuracy(scores: Tensor, case: dict) -> float:
    labels = torch.arange(WAYS).repeat_interleave(torch.tensor(case["counts"]))
    return (scores.argmax(1) == labels).double().mean().item()


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)
EACH = pytest.mark.parametrize("group", GROUPS)


@DTYPES
@EACH
def test_simple_shot_and_bd_cspn_equal_the_official_ones(group, dtype):
    cases, *task = golden_tasks(group, "CL2N", dtype)
    scores = {
        "simpleshot": tr.simple_shot(*task, WAYS),
        "bdcspn": tr.bd_cspn(*task, WAYS),
        "bdcspn_shifted": tr.bd_cspn(*task, WAYS, version="shifted"),
        "bdcspn_easyfsl": tr.bd_cspn(*task, WAYS, version="easyfsl"),
    }
    prototypes = {
        "bdcspn": tr.rectified(*task, WAYS),
        "bdcspn_easyfsl": tr.rectified(*task, WAYS, easyfsl=True),
    }
    for i, case in enumerate(cases):
        for name, ours in scores.items():
            cosines = name == "bdcspn_easyfsl"
            assert (
                off(
                    ours[i] if cosines else -ours[i],
                    case[name]["cosine" if cosines else "distance"],
                )
                < 1e-6
            )
            assert accuracy(ours[i], case) == pytest.approx(case[name]["accuracy"], abs=1e-6)
        for name, ours in prototypes.items():
            close(ours[i], case[name]["prototypes"], 2e-6)


@DTYPES
@EACH
def test_laplacian_shot_equals_the_official_one(group, dtype):
    cases, support, query = golden_tasks(group, "CL2N", dtype)
    for i, case in enumerate(cases):
        for name, options in {
            "laplacianshot": {"shift": False},
            "laplacianshot_no_rect": {"rectify": False, "shift": False},
            "laplacianshot_shifted": {},
        }.items():
            stored = case[name]
            y = tr.laplacian_shot(support, query, WAYS, lam=stored["lmd"], **options)[i]
            assert off(y, stored["prob"]) < 2e-6
            assert accuracy(y, case) == pytest.approx(stored["accuracy"], abs=1e-6)


@EACH
def test_laplacian_shot_goes_the_official_way(group):
    """Neighbours, start, energies and number of updates; in float32 the last depends on how sums
    are rounded.
    """
    cases, support, query = golden_tasks(group, "CL2N", torch.float64)
    for i, case in enumerate(cases):
        near = (
            torch.cdist(query[i], query[i]).fill_diagonal_(torch.inf).topk(2, largest=False).indices
        )
        assert near.sort(1).values.tolist() == case["laplacianshot"]["neighbours"]
        for name, rectify in (("laplacianshot", True), ("laplacianshot_no_rect", False)):
            stored, n = case[name], case[name]["updates"]
            task, options = (
                (support[i, None], query[i, None], WAYS),
                {"lam": stored["lmd"], "rectify": rectify},
            )
            way = [
                tr.laplacian_shot(*task, **options, shift=False, updates=k)[0] for k in range(n + 1)
            ]
            close(way[0], stored["prob_start"], 1e-6)
            assert torch.equal(way[n], tr.laplacian_shot(*task, **options, shift=False)[0])
            assert not torch.equal(way[n], way[n - 1])
            means = tr.rectified(*task) if rectify else heads.class_means(support[i, None], WAYS)
            unary = torch.cdist(query[i], means[0]).square()
            energies = [
                (y * (y.log() + unary - stored["lmd"] * y[near].sum(1))).sum().item()
                for y in way[1:]
            ]
            assert energies == pytest.approx(stored["energy"], rel=1e-6, abs=1e-5)


TIM = {  # golden -> what makes the prototypes and the probabilities, options, steps on the way, tolerances
    "tim_gd": (tr.tim_prototypes, tr.tim_gd, {}, 1e-5),
    "tim_gd_equal_weights": (tr.tim_prototypes, tr.tim_gd, {"weights": (1.0, 1.0, 1.0)}, 1e-5),
    "alpha_tim": (tr.tim_prototypes, tr.alpha_tim, {"weights": (1.0, 1.0, 1.0)}, 5e-5),
    "tim_adm": (tr.adm_prototypes, tr.tim_adm, {}, 1e-6),
}


@pytest.mark.parametrize("name", TIM)
@EACH
def test_tim_equals_the_official_one(group, name):
    prototypes, method, options, tolerance = TIM[name]
    cases, *task = golden_tasks(group, "L2N", torch.float64)
    if name == "alpha_tim":
        options = options | {"alpha": cases[0][name]["alpha"]}
    for steps in cases[0][name]["mutual_info"]:
        w = prototypes(*task, WAYS, **options, steps=int(steps))
        p = (-7.5 * torch.cdist(task[1], w).square()).softmax(2)
        for i, case in enumerate(cases):
            stored = case[name]
            close(w[i], stored["prototypes"][steps], tolerance)
            assert mutual_information(p[i]) == pytest.approx(
                stored["mutual_info"][steps], abs=tolerance
            )
    for i, case in enumerate(cases):  # `p` is by the last step
        assert off(p[i], case[name]["prob"]) < tolerance
        assert accuracy(p[i], case) == pytest.approx(case[name]["accuracy"], abs=1e-6)
    # its own choice of weights and alpha
    options = options if name == "tim_gd_equal_weights" else {}
    assert torch.allclose(
        method(*task, WAYS, **options, steps=2), probabilities(prototypes, *task, name, cases, 2)
    )


def probabilities(
    prototypes, support: Tensor, query: Tensor, name: str, cases: list[dict], steps: int
) -> Tensor:
    """(tasks, m, ways) with the golden's loss weights and alpha."""
    stored = cases[0][name]
    more = {"alpha": stored["alpha"]} if "alpha" in stored else {}
    w = prototypes(support, query, WAYS, weights=tuple(stored["loss_weights"]), **more, steps=steps)
    return (-7.5 * torch.cdist(query, w).square()).softmax(2)


def mutual_information(p: Tensor) -> float:
    """H(mean p) - mean H(p) of probabilities (m, ways)."""
    mean = p.mean(0)
    return ((p * (p + 1e-12).log()).sum(1).mean() - (mean * (mean + 1e-12).log()).sum()).item()


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("tim_gd", 1e-5), ("tim_gd_equal_weights", 1e-5), ("alpha_tim", 1e-4), ("tim_adm", 1e-3)],
)
@EACH
def test_tim_in_float32(group, name, tolerance):
    """TIM-ADM is official in float64; features' rounding grows in the case of a class without
    queries.
    """
    cases, *task = golden_tasks(group, "L2N", torch.float32)
    p = TIM[name][1](
        *task, WAYS, **({"weights": (1.0, 1.0, 1.0)} if name == "tim_gd_equal_weights" else {})
    )
    assert p.dtype == torch.float32
    for i, case in enumerate(cases):
        unstable = name == "tim_adm" and 0 in case["counts"]
        assert off(p[i], case[name]["prob"]) < (0.1 if unstable else tolerance)


@DTYPES
@EACH
def test_pt_map_equals_the_official_one(group, dtype):
    cases, *task = golden_tasks(group, "PT", dtype)
    start, final = tr.pt_map(*task, WAYS, steps=0), tr.pt_map(*task, WAYS)
    assert torch.allclose(
        final.sum(1), torch.tensor(15.0, dtype=dtype), rtol=1e-6
    )  # classes' shares, exactly
    assert (final.sum(2) - 1).abs().max() < 1e-5
    for i, case in enumerate(cases):
        stored = case["pt_map"]
        close(start[i], stored["prob_start"], 2e-6)
        assert off(final[i], stored["prob"]) < 5e-6
        assert accuracy(final[i], case) == pytest.approx(stored["accuracy"], abs=1e-6)
        for steps, expected in stored["prototype_distances"].items():
            w = tr.map_prototypes(*task, WAYS, steps=int(steps))[i]
            assert (
                off(torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist"), expected) < 1e-6
            )


def test_dirichlet_counts_are_the_official_ones():
    rng = np.random.RandomState(DIRICHLET["seed"])
    drawn = [
        episodes.dirichlet_queries(rng, DIRICHLET["ways"], DIRICHLET["total"])
        for _ in DIRICHLET["counts"]
    ]
    assert np.array_equal(drawn, DIRICHLET["counts"])
    for shares, counts in zip(DIRICHLET["proportions"], DIRICHLET["counts"]):
        assert episodes.rounded(np.array(shares), 75).tolist() == counts
    for case in DIRICHLET["by_hand"]:
        assert episodes.rounded(np.array(case["p"]), 75).tolist() == case["counts"]
    # any number of classes, and a smaller alpha is less balanced
    rng = np.random.default_rng(0)
    spread = []
    for alpha in (0.5, 2.0, 50.0):
        counts = np.stack([episodes.dirichlet_queries(rng, 20, 300, alpha) for _ in range(50)])
        assert (counts.sum(1) == 300).all() and counts.min() >= 0
        spread.append(counts.std())
    assert spread[0] > spread[1] > spread[2] > 0


COUNTS, IMBALANCED = (15, 15, 15, 15, 15), (30, 3, 24, 8, 10)


def mixture(
    shots: int, counts=COUNTS, tasks: int = 12, d: int = 64, separation: float = 0.7
) -> tuple[Tensor, ...]:
    """Supports (tasks, 5 * shots, d), queries (tasks, m, d) and their labels (m,): Gaussians cut at
    0.
    """
    r = torch.Generator().manual_seed(shots)
    centres = separation * torch.randn(tasks, WAYS, 1, d, generator=r)
    support = (centres + torch.randn(tasks, WAYS, shots, d, generator=r)).relu().flatten(1, 2)
    query = [
        (centres[:, c] + torch.randn(tasks, n, d, generator=r)).relu() for c, n in enumerate(counts)
    ]
    return support, torch.cat(query, 1), torch.arange(WAYS).repeat_interleave(torch.tensor(counts))


def prepared(support: Tensor, query: Tensor, transform: str) -> tuple[Tensor, Tensor]:
    if transform == "PT":
        return tr.power(support, query)
    mean = torch.full(support.shape[2:], 0.45) if transform == "CL2N" else 0.0
    return tr.unit(support - mean), tr.unit(query - mean)


METHODS = {  # name -> method, transform, options
    "simple_shot": (tr.simple_shot, "CL2N", {}),
    "bd_cspn": (tr.bd_cspn, "CL2N", {}),
    "bd_cspn_shifted": (tr.bd_cspn, "CL2N", {"version": "shifted"}),
    "bd_cspn_easyfsl": (tr.bd_cspn, "CL2N", {"version": "easyfsl"}),
    "laplacian_shot": (tr.laplacian_shot, "CL2N", {}),
    "laplacian_shot_plain": (tr.laplacian_shot, "CL2N", {"rectify": False, "shift": False}),
    "tim_gd": (tr.tim_gd, "L2N", {"steps": 300, "lr": 3e-4}),
    "tim_adm": (tr.tim_adm, "L2N", {}),
    "alpha_tim": (tr.alpha_tim, "L2N", {"steps": 300, "lr": 3e-4}),
    "pt_map": (tr.pt_map, "PT", {}),
}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "simple_shot"])
def test_other_queries_help(name):
    """More right answers than by class means on the same features, which is where each method
    starts.
    """
    method, transform, options = METHODS[name]
    support, query, labels = mixture(1)
    support, query = prepared(support, query, transform)
    right = (method(support, query, WAYS, **options).argmax(2) == labels).float().mean()
    start = (tr.simple_shot(support, query, WAYS).argmax(2) == labels).float().mean()
    assert right > start + 0.05
    # with hardly another query to learn from, nothing is won
    few = query[:, ::25]
    assert (
        method(support, few, WAYS, **options).argmax(2) == labels[::25]
    ).float().mean() < start + 0.1


def test_unequal_classes():
    """What assumes equal ones falls below class means, and alpha-TIM, made for unequal ones, is
    best of its kin.
    """
    support, query, labels = mixture(1, IMBALANCED)

    def right(name: str, **more) -> float:
        method, transform, options = METHODS[name]
        p = method(*prepared(support, query, transform), WAYS, **options | more)
        return (p.argmax(2) == labels).float().mean().item()

    assert right("pt_map") < right("simple_shot") - 0.03
    assert right("alpha_tim") > right("simple_shot") + 0.05 > right("tim_gd") + 0.1
    assert right("tim_gd", weights=(1.0, 1.0, 1.0)) > right("tim_gd") + 0.1


@pytest.mark.parametrize("name", METHODS)
def test_does_not_depend_on_order_and_other_tasks(name):
    method, transform, options = METHODS[name]
    if "steps" in options:
        options = {"steps": 20}
    support, query = (x.double() for x in prepared(*mixture(5, IMBALANCED, tasks=4)[:2], transform))
    scores = method(support, query, WAYS, **options)
    assert scores.shape == (4, 75, WAYS) and scores.isfinite().all()
    alone = torch.cat([method(s[None], q[None], WAYS, **options) for s, q in zip(support, query)])
    assert torch.allclose(alone, scores, rtol=0, atol=1e-9)
    tasks, order = (
        torch.tensor([2, 0, 3, 1]),
        torch.randperm(75, generator=torch.Generator().manual_seed(0)),
    )
    assert torch.allclose(
        method(support[tasks], query[tasks], WAYS, **options), scores[tasks], rtol=0, atol=1e-9
    )
    assert torch.allclose(
        method(support, query[:, order], WAYS, **options), scores[:, order], rtol=0, atol=1e-9
    )
    classes = torch.tensor([3, 1, 4, 0, 2])
    renamed = support.unflatten(1, (WAYS, 5))[:, classes].flatten(1, 2)
    assert torch.allclose(
        method(renamed, query, WAYS, **options), scores[..., classes], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", METHODS)
def test_stays_in_float32_and_out_of_autograd(name):
    method, transform, options = METHODS[name]
    if "steps" in options:
        options = {"steps": 20}
    support, query = prepared(*mixture(1, tasks=2)[:2], transform)
    expected = method(support, query, WAYS, **options)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert (query @ query.mT).dtype == torch.bfloat16
        assert torch.equal(method(support, query, WAYS, **options), expected)
    assert not method(support.clone().requires_grad_(), query, WAYS, **options).requires_grad


def plain_tim(
    support: Tensor, query: Tensor, ways: int, weights, alpha: float, steps: int, lr: float
) -> Tensor:
    """Prototypes (ways, D) of one task by autograd and torch's Adam."""
    labels = torch.arange(ways).repeat_interleave(len(support) // ways)
    w = support.unflatten(0, (ways, -1)).mean(1).requires_grad_()
    adam = torch.optim.Adam([w], lr=lr)

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(-1) if alpha == 1 else (1 - p.pow(alpha).sum(-1)) / (alpha - 1)

    for _ in range(steps):
        logits, p = (-4 * torch.cdist(x, w).square() for x in (support, query))
        p = p.softmax(1)
        loss = weights[0] * F.cross_entropy(logits, labels) - weights[1] * entropy(p.mean(0))
        adam.zero_grad()
        (loss + weights[2] * entropy(p).mean()).backward()
        adam.step()
    return w.detach()


@pytest.mark.parametrize("alpha", [1.0, 1.5, 7.0])
def test_tim_descends_by_its_loss(alpha):
    """Numbers of ways, shots and queries and a temperature that no golden has."""
    r = torch.Generator().manual_seed(0)
    support, query = (torch.rand(3, n, 10, generator=r, dtype=torch.float64) for n in (3 * 2, 11))
    options = {"weights": (0.3, 0.7, 0.2), "alpha": alpha, "steps": 60, "lr": 1e-2}
    ours = tr.tim_prototypes(support, query, 3, **options, temperature=8.0)
    plain = torch.stack([plain_tim(s, q, 3, **options) for s, q in zip(support, query)])
    assert (ours - heads.class_means(support, 3)).abs().max() > 0.1
    assert torch.allclose(ours, plain, rtol=0, atol=1e-7)


def test_tim_without_its_terms_of_queries_is_inductive():
    support, query = prepared(*mixture(5, tasks=2)[:2], "L2N")
    options = {"weights": (1.0, 0.0, 0.0), "steps": 50}
    w = tr.tim_prototypes(support, query, WAYS, **options)
    assert torch.allclose(
        w, tr.tim_prototypes(support, query.flip(2)[:, :20], WAYS, **options), atol=1e-6
    )
    assert not torch.allclose(w, heads.class_means(support, WAYS), atol=1e-3)


def test_laplacian_shot_without_neighbours_influence_is_the_nearest_prototype():
    support, query = prepared(*mixture(5, tasks=2)[:2], "CL2N")
    y = tr.laplacian_shot(support, query, WAYS, lam=0.0, rectify=False, shift=False)
    distances = torch.cdist(query, heads.class_means(support, WAYS))
    assert torch.allclose(y, (-distances.square()).softmax(2), atol=1e-6)
    assert torch.allclose(tr.simple_shot(support, query, WAYS), -distances, atol=1e-5)
    # published lambdas: one shot, and more
    one = prepared(*mixture(1, tasks=2)[:2], "CL2N")
    assert torch.equal(tr.laplacian_shot(*one, WAYS), tr.laplacian_shot(*one, WAYS, lam=0.7))
    assert torch.equal(
        tr.laplacian_shot(support, query, WAYS), tr.laplacian_shot(support, query, WAYS, lam=0.3)
    )


def test_a_class_to_which_nothing_belongs_keeps_its_mean():
    """Of two equal classes, the first gets all: so it is with two classes of the same pictures."""
    support, query, _ = mixture(5, tasks=1)
    support = support.unflatten(1, (WAYS, 5))[:, [0, 1, 1, 2, 3]].flatten(1, 2)
    prototypes, means = tr.rectified(support, query, WAYS), heads.class_means(support, WAYS)
    assert torch.equal(prototypes[0, 2], means[0, 2])
    assert (prototypes - means).abs().amax(2)[0, [0, 1, 3, 4]].min() > 0.1


def test_cosine_and_euclidean_simple_shot_rank_alike_in_one_shot_alone():
    for shots, alike in ((1, True), (5, False)):
        support, query = prepared(*mixture(shots, separation=0.4)[:2], "CL2N")
        ranks = [
            tr.simple_shot(support, query, WAYS, metric=m).argsort(2)
            for m in ("euclidean", "cosine")
        ]
        assert torch.equal(*ranks) == alike


def test_power_transform():
    support, query, _ = mixture(5, tasks=3)
    for x, ours in zip((support, query), tr.power(support, query)):
        root = (x + 1e-6).sqrt()
        root = root / root.norm(dim=2, keepdim=True)
        root = root - root.mean(1, keepdim=True)
        assert torch.allclose(ours, root / root.norm(dim=2, keepdim=True), atol=1e-6)
    uncentred = tr.power(support, query, centre=False)[1]
    assert torch.allclose(uncentred, tr.unit((query + 1e-6).sqrt())) and (uncentred >= 0).all()
    below = query.clone()
    below[1, 3, 5] = -0.01
    with pytest.raises(InputError, match="features are below 0"):
        tr.power(support, below)
    with pytest.raises(InputError, match="features are below 0"):
        tr.power(below, query)
    assert torch.equal(
        tr.power(support, below, clamp=True)[1], tr.power(support, below.clamp(min=0))[1]
    )
    with pytest.raises(InputError, match="features are below 0"):
        tr.power(support, query * torch.nan, clamp=True)


@pytest.mark.parametrize("name", METHODS)
def test_extreme_features_give_numbers(name):
    """Features that are far from unit length, all alike, or 0."""
    method, _, options = METHODS[name]
    support, query, _ = mixture(5, tasks=2)
    for scale in (1e3, 0.0):
        assert method(scale * support, scale * query, WAYS, **options).isfinite().all()


def test_what_cannot_be():
    support, query, _ = mixture(1, tasks=1)
    with pytest.raises(InputError, match="no metric is called 'manhattan'"):
        tr.simple_shot(support, query, WAYS, metric="manhattan")
    with pytest.raises(InputError, match="no version is called 'mine'"):
        tr.bd_cspn(support, query, WAYS, version="mine")
    with pytest.raises(InputError, match="a query with 2 others: 2 are too few"):
        tr.laplacian_shot(support, query[:, :2], WAYS)
    with pytest.raises(TypeError, match="temprature"):
        tr.tim_gd(support, query, WAYS, temprature=3.0)
