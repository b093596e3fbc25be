"""FRN's head against LibFewShot's numbers and ridge regression."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naming_rule import array, close, golden

from fewshot import backbones
from fewshot.heads.frn import FRN, parts, reconstructed

GOLDENS = golden("cls_frn")


@pytest.mark.parametrize("name", GOLDENS)
def test_equals_libfewshot(name):
    case = GOLDENS[name]
    tag, ways, d, side = case["tag"], case["ways"], case["channels"], case["side"]
    centres = (
        np.float32(case["separation"]) * array(f"{tag}/centre", (ways, d, side, side))[:, None]
    )

    def maps(part: str, n: int) -> torch.Tensor:
        drawn = np.maximum(centres + array(f"{tag}/{part}", (ways, n, d, side, side)), 0)
        close(drawn, case[part], 1e-6)
        return torch.from_numpy(drawn.reshape(1, ways * n, d, side, side)).requires_grad_()

    support, query = maps("support", case["shots"]), maps("query", case["queries_per_class"])
    head = FRN()
    alpha, beta = case["r"]
    state = {"alpha": alpha, "beta": beta, "gamma": case["scale"]}
    head.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    close(-head.distances(support, query, ways)[0], case["negative_distance"], 1e-5)
    log_p = head(support, query, ways)[0].log_softmax(1)
    close(log_p, case["log_prob"], 3e-5)
    loss = F.nll_loss(log_p, torch.arange(ways).repeat_interleave(case["queries_per_class"]))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    loss.backward()
    assert support.grad.norm().item() == pytest.approx(case["grad_norm_support"], rel=1e-3)
    assert query.grad.norm().item() == pytest.approx(case["grad_norm_query"], rel=1e-3)
    assert head.gamma.grad.item() == pytest.approx(case["grad_scale"], rel=1e-3)
    assert [head.alpha.grad.item(), head.beta.grad.item()] == pytest.approx(
        case["grad_r"], rel=1e-3, abs=1e-4
    )  # of sums that nearly cancel


@pytest.mark.parametrize("n", [6, 40])
def test_both_forms_are_the_least_penalised_squares(n):
    r = torch.Generator().manual_seed(n)
    query, pool = (torch.randn(2, 3, m, 16, generator=r, dtype=torch.float64) for m in (7, n))
    ours = reconstructed(query, pool, torch.tensor(0.3))
    # as least squares: rows of sqrt(penalty) stand for the penalty
    stacked = torch.cat(
        [pool.mT, 0.3**0.5 * torch.eye(n, dtype=torch.float64).expand(2, 3, -1, -1)], 2
    )
    wanted = torch.cat([query.mT, torch.zeros(2, 3, n, 7, dtype=torch.float64)], 2)
    weights = torch.linalg.lstsq(stacked, wanted).solution  # (2, 3, n, 7)
    assert torch.allclose(ours, weights.mT @ pool, atol=1e-10)


def test_a_query_that_is_a_support_is_reconstructed():
    torch.manual_seed(0)
    head = FRN()
    with torch.no_grad():
        head.alpha.fill_(-12.0)
    support = torch.randn(2, 5, 32, 3, 3)
    distances = head.distances(support, support, 5)
    own = distances.diagonal(dim1=1, dim2=2)
    assert own.max() < 1e-4 * distances.max() and (distances.argmin(2) == torch.arange(5)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.distances(support, support, 5), distances)
    assert torch.allclose(
        head(support[1:], support[1:], 5), head(support, support, 5)[1:], atol=1e-4
    )


def test_maps_are_the_vectors_before_they_are_vectors():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 84, 84)
    network, head = parts(backbones.build("conv4", 84))
    vectors = backbones.build("conv4", 84)
    vectors.load_state_dict(network.state_dict())  # so that a trained baseline's fit
    assert network.eval()(images).shape == (2, 64, 5, 5) and head.divisor == 1
    assert torch.equal(network(images).flatten(1), vectors.eval()(images))


def test_maps_of_resnet12_are_divided():
    torch.manual_seed(0)
    network, head = parts(backbones.build("resnet12", 32, pooled=False))
    support, query = torch.randn(2, 5, 640, 2, 2), torch.randn(2, 3, 640, 2, 2)
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 640, 2, 2)
    assert torch.allclose(
        head(support, query, 5), FRN()(support / 640**0.5, query / 640**0.5, 5), rtol=1e-5
    )
    assert not torch.allclose(head(support, query, 5), FRN()(support, query, 5), rtol=0.1)
