"""Weight saliencies against the dense gradient and Hessian in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import weight_saliencies


def loss(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def case() -> tuple[nn.Module, list[Any], Tensor, Tensor, Tensor]:
    """Return a network, batches, all its weights in a row, and the gradient and Hessian of the loss there."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 3).double(), torch.randint(0, 3, (8,))

    def flat(w: Tensor) -> Tensor:
        state = {"0.weight": w[:12].view(4, 3), "2.weight": w[12:].view(3, 4)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, state, x), y)

    w = torch.cat([net.get_parameter(name).detach().flatten() for name in ("0.weight", "2.weight")])
    hessian = torch.autograd.functional.hessian(flat, w)
    return (
        net,
        [(x[:4], y[:4]), (x[4:], y[4:])],
        w,
        torch.autograd.functional.jacobian(flat, w),
        torch.as_tensor(hessian),
    )


def found(net: nn.Module, batches: list[Any], kind: Any, **options: Any) -> Tensor:
    scores = weight_saliencies(net, ["*.weight"], batches, loss, kind, **options)
    assert list(scores) == ["0.weight", "2.weight"]
    return torch.cat([scores[name].flatten() for name in scores])


@pytest.mark.parametrize("kind", ["first_order", "second_order", "hessian"])
def test_saliencies_equal_the_dense_gradient_and_hessian(kind: str) -> None:
    net, batches, w, g, h = case()
    expected = {"first_order": w * g, "second_order": w * (g - h @ w), "hessian": w * (h @ w)}[kind].abs()
    torch.testing.assert_close(found(net, batches, kind), expected, rtol=1e-9, atol=1e-12)


def test_the_estimated_diagonal_approaches_the_dense_one() -> None:
    net, batches, w, _, h = case()
    expected = w.square() * h.diagonal().abs() / 2
    errors = [
        float((found(net, batches, "hessian_diagonal", probes=probes) - expected).norm() / expected.norm())
        for probes in (4, 4000)
    ]
    assert errors[1] < 0.15  # it falls as the root of the number of probes
    assert errors[1] < errors[0] / 8


def test_a_quadratics_diagonal_is_exact_with_one_probe() -> None:
    net = nn.Linear(4, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    scores = weight_saliencies(net, ["weight"], [x], lambda net, x: net(x).square().sum(), "hessian_diagonal", probes=1)
    torch.testing.assert_close(scores["weight"], net.weight.detach().square() * x.diagonal().square())


def test_weights_gradients_and_mode_are_left_as_they_are() -> None:
    net, batches, w, _, _ = case()
    net.train()
    found(net, batches, "second_order")
    assert torch.equal(w, torch.cat([net.get_parameter(name).flatten() for name in ("0.weight", "2.weight")]))
    assert all(p.grad is None for p in net.parameters())
    assert net.training


def test_an_unknown_kind_is_refused_with_what_is_allowed() -> None:
    net, batches, *_ = case()
    with pytest.raises(ValueError, match="kind is 'third_order'; allowed is one of first_order, second_order"):
        found(net, batches, "third_order")


def test_bad_input_is_refused_by_name_and_unused_or_linear_weights_score_zero() -> None:
    net, batches, *_ = case()
    with pytest.raises(ValueError, match="batches is empty"):
        weight_saliencies(net, ["*.weight"], [], loss, "first_order")
    with pytest.raises(ValueError, match="probes is 0; allowed is an int >= 1"):
        weight_saliencies(net, ["*.weight"], batches, loss, "hessian_diagonal", probes=0)
    linear = nn.Linear(3, 1).double()
    scores = weight_saliencies(linear, ["weight"], [torch.ones(2, 3).double()], lambda m, x: m(x).sum(), "hessian")
    assert not scores["weight"].any()
    net.get_parameter("0.weight").requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0\.weight' is frozen"):
        weight_saliencies(net, ["*.weight"], batches, loss, "first_order")
