"""Minima: equal up to the order and the scale of units, sorted by their loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna.landscape import find_minima, plot_minima
from tests.landscape.problems import blobs, cross_entropy, error, trained


def relu_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def same(module: nn.Module, seed: int) -> nn.Module:
    """Return a module that computes the same: its hidden units in another order, and scaled."""
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(6, generator=generator)
    scale = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    weights = dict(module.named_parameters())
    with torch.no_grad():
        twin.get_parameter("0.weight").copy_(weights["0.weight"][order] * scale[:, None])
        twin.get_parameter("0.bias").copy_(weights["0.bias"][order] * scale)
        twin.get_parameter("2.weight").copy_(weights["2.weight"][:, order] / scale)
    return twin


def test_networks_that_compute_the_same_are_one_minimum() -> None:
    batch = blobs()
    torch.manual_seed(1)
    three = [trained(relu_net(), batch, steps=50) for _ in range(3)]
    fits = [*three, *(same(module, seed) for seed, module in enumerate(three))]

    def accuracy(module: nn.Module) -> float:
        return 1 - float(error(module, batch))

    found = find_minima(fits.__getitem__, range(6), [batch], cross_entropy, others={"accuracy": accuracy})
    losses = [float(cross_entropy(module, batch)) for module in fits]
    assert found.n_distinct == 3
    assert found.losses.tolist() == pytest.approx(sorted(losses), abs=1e-13)
    assert [losses[seed] for seed in found.seeds] == pytest.approx(found.losses.tolist(), abs=1e-13)
    assert found.kinds.tolist() == [0, 0, 1, 1, 2, 2]
    assert {seed % 3 for seed in found.seeds[:2]} == {found.seeds[0] % 3}
    assert found.others["accuracy"].tolist() == [accuracy(fits[seed]) for seed in found.seeds]
    assert found.modules[0] is fits[found.seeds[0]]
    cross_entropy(three[0], batch).backward()
    norm = torch.cat([p.grad.flatten() for p in three[0].parameters() if p.grad is not None]).norm()
    assert float(found.gradient_norms[found.seeds.index(0)]) == pytest.approx(float(norm), abs=1e-12)


def test_the_tolerance_and_the_outputs_decide_what_is_the_same() -> None:
    def fit(seed: int) -> nn.Module:
        net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(net.weight, 1 + 0.1 * seed)
        return net

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = net(batch)
        return out.square().mean()

    def outputs(net: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = net(batch)
        return out

    batches = [torch.ones(3, 1), torch.ones(2, 1)]
    for tolerance, kinds in ((0.0, [0, 1, 2]), (0.1, [0, 0, 1]), (1.0, [0, 0, 0])):
        found = find_minima(fit, range(3), batches, loss, outputs=outputs, tolerance=tolerance)
        assert found.kinds.tolist() == kinds
    found = find_minima(fit, range(3), batches, loss, outputs=lambda net, batch: net(batch).sign())
    assert found.n_distinct == 1


def test_minima_are_drawn_in_their_order() -> None:
    batch = blobs()
    found = find_minima(lambda seed: relu_net(), range(4), [batch], cross_entropy, others={"rank": lambda module: 3.0})
    axes = plot_minima(found).axes[0]
    assert axes.get_title() == "4 distinct of 4; one colour: they compute the same"
    assert plot_minima(found, "rank").axes[0].get_ylabel() == "rank"


def test_other_measures_are_made_in_eval_mode() -> None:
    def fit(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).double().train()

    found = find_minima(fit, [0], [blobs()], cross_entropy, others={"training": lambda module: float(module.training)})
    assert float(found.others["training"]) == 0
    assert found.modules[0].training


def test_what_is_not_a_number_comes_last() -> None:
    losses = [9.0, float("nan"), 1.0, 4.0]

    def fit(seed: int) -> nn.Module:
        net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(net.weight, losses[seed])
        return net

    found = find_minima(fit, range(4), [(torch.ones(1, 1),)], lambda net, batch: net(batch[0]).sum())
    assert found.seeds == (2, 3, 0, 1)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="seeds is empty"):
        find_minima(lambda seed: relu_net(), [], [blobs()], cross_entropy)
    with pytest.raises(ValueError, match="tolerance is -1"):
        find_minima(lambda seed: relu_net(), [0], [blobs()], cross_entropy, tolerance=-1)
    with pytest.raises(ValueError, match="outputs is None, and a batch is a tensor"):
        find_minima(lambda seed: relu_net(), [0], [blobs()[0]], lambda net, x: net(x).square().mean())
