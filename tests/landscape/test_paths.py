"""Paths: against closed forms on quadratics, and Bernstein's definition of a Bézier curve."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_cpna import Score, sparsity_of
from lightning_cpna.landscape import Curve, LossSurface, Path, barrier, fit_curve, follow, line, plot_paths
from tests.helpers import on_every_device
from tests.landscape.problems import blobs, cross_entropy, error, net, surface, trained


def bowl(scale: float = 1.0) -> LossSurface:
    """Return the surface ``scale * |w|^2`` of three weights."""
    module = nn.Linear(3, 1, bias=False).double()
    return LossSurface(module, [torch.eye(3).double()], lambda net, x: scale * net(x).square().sum())


def double_well() -> LossSurface:
    """Return a surface with minima of loss 0 at (-1, 0) and (1, 0), a straight line of height 1, and a ring of height 0."""
    module = nn.Linear(2, 1, bias=False).double()
    return LossSurface(module, [torch.ones(1, 2)], lambda net, x: (net.weight.square().sum() - 1).square())


POINTS = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)


@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 1000))
def test_a_curve_is_the_sum_of_bernsteins_polynomials(degree: int, t: float, seed: int) -> None:
    points = torch.randn(degree + 1, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    curve = Curve(points)
    expected = sum(math.comb(degree, i) * t**i * (1 - t) ** (degree - i) * point for i, point in enumerate(points))
    assert torch.allclose(curve(t), torch.as_tensor(expected), rtol=0, atol=1e-12)
    assert torch.allclose(torch.tensor(curve.shares(t), dtype=torch.float64) @ points, curve(t), rtol=0, atol=1e-12)
    assert torch.equal(curve(0), points[0])
    assert torch.equal(curve(1), points[-1])


def test_a_line_over_a_quadratic_has_the_closed_form() -> None:
    start, end = torch.tensor([1.0, 0.0, 2.0]).double(), torch.tensor([-1.0, 1.0, 0.0]).double()
    path = follow(bowl(), line(start, end), places=11)
    expected = torch.stack([((1 - t) * start + t * end).square().sum() for t in path.t])
    assert torch.allclose(path.losses, expected, rtol=0, atol=1e-13)
    assert path.arc_length == pytest.approx(3.0)
    assert path.gradient_norms == pytest.approx((2 * 5**0.5, 2 * 2**0.5))
    steps = (expected[:-1] + expected[1:]) / 2
    assert path.mean_loss == pytest.approx(float(steps.mean()))
    assert path.barrier_above_worse_end == 0
    assert path.barrier == pytest.approx(5 - 3.5)
    assert not path.is_monotone  # its lowest place is inside
    assert follow(bowl(), line(start, torch.zeros(3).double())).is_monotone


def test_both_barriers_are_those_of_their_definitions() -> None:
    assert barrier(torch.tensor([1.0, 4.0, 2.0])) == 2.5
    path = Path(
        line(torch.zeros(1), torch.ones(1)), torch.arange(3.0), torch.tensor([1.0, 4.0, 2.0]), {}, torch.ones(2), (0, 0)
    )
    assert (path.barrier, path.barrier_above_worse_end) == (2.5, 2.0)


def test_from_a_point_to_itself_there_is_no_barrier_at_all() -> None:
    module, batch = net(dtype=torch.float32), blobs(dtype=torch.float32)
    found = surface(trained(module, batch), batch)
    point = found.point()
    path = follow(found, line(point, point))
    assert path.barrier == path.barrier_above_worse_end == path.arc_length == 0
    assert path.losses.unique().numel() == 1
    assert path.mean_loss == path.losses[0]
    for degree in (2, 3):
        assert follow(found, fit_curve(found, point, point, degree, steps=100)).barrier_above_worse_end <= 1e-6


def test_a_curve_of_degree_one_is_the_line() -> None:
    found = double_well()
    curve = fit_curve(found, POINTS[0], POINTS[1], degree=1)
    assert torch.equal(curve.points, POINTS)
    assert torch.equal(follow(found, curve).losses, follow(found, line(*POINTS)).losses)


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_a_curve_goes_around_a_hill(degree: int) -> None:
    start, end = torch.tensor([-1.0, 0.0]).double(), torch.tensor([0.6, 0.8]).double()
    found = double_well()
    straight = follow(found, line(start, end))
    assert straight.barrier == pytest.approx((1 - 0.2) ** 2, abs=1e-3)  # half way the squared norm is 0.2
    curve = fit_curve(found, start, end, degree)
    assert follow(found, curve).barrier < 0.02
    assert curve.degree == degree
    assert torch.equal(curve.points[0], start)
    assert torch.equal(curve.points[-1], end)


def test_a_curve_is_drawn_by_its_seed_alone() -> None:
    module, (x, y) = net(), blobs()
    found = LossSurface(module, [(x[:32], y[:32]), (x[32:], y[32:])], cross_entropy)
    start, end = found.point(), found.point() + 1
    curves = [fit_curve(found, start, end, steps=7, seed=seed).points for seed in (0, 0, 1)]
    assert torch.equal(curves[0], curves[1])
    assert not torch.equal(curves[0], curves[2])


def test_a_curve_between_sparse_networks_stays_in_their_mask() -> None:
    module, batch = net(), blobs()
    sparsity = sparsity_of(module)
    [budget] = sparsity.add_budgets(module, {"0.weight": 12})
    sparsity.prune_(budget, 12, Score("magnitude"))
    dead = ~sparsity.masks["0.weight"].live
    sparse, dense = surface(module, batch), surface(module, batch, masks={})
    start, end = sparse.weights(sparse.point()), sparse.weights(sparse.point() * -1.5)
    inside = fit_curve(sparse, sparse.point(start), sparse.point(end), steps=20)
    assert bool((sparse.weights(inside(0.5))["0.weight"][dead] == 0).all())
    outside = fit_curve(dense, dense.point(start), dense.point(end), steps=20)
    assert bool((dense.weights(outside(0.5))["0.weight"][dead] != 0).any())


def test_batch_norm_is_looked_at_with_the_statistics_of_each_place() -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=0.3), nn.ReLU(), nn.Linear(8, 3)).double()
    batch = blobs()
    found = surface(module, batch)
    start = found.point()
    end = start * 1.7 + 0.1
    path = follow(found, line(start, end), places=5, others={"error": LossSurface(module, [batch], error)})
    for place, t in enumerate(path.t):
        other: Any = copy.deepcopy(module)
        other.load_state_dict(found.weights(line(start, end)(float(t))), strict=False)
        other[1].momentum = 1.0
        other.train()(batch[0])
        other.eval()
        with torch.no_grad():
            assert float(path.losses[place]) == pytest.approx(float(cross_entropy(other, batch)), abs=1e-12)
            assert float(path.others["error"][place]) == pytest.approx(float(error(other, batch)), abs=1e-12)
    curve = fit_curve(found, start, end, steps=60)
    assert follow(found, curve).mean_loss < path.mean_loss


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_curve_follows_the_gradient_of_the_mean_loss_over_it(weight_decay: float) -> None:
    module: Any = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    x, y = blobs()
    batches = [(x[:32], y[:32]), (x[32:64], y[32:64]), (x[64:], y[64:])]
    found = LossSurface(module, batches, cross_entropy)
    start = found.point()
    end = start * 1.5 + 0.3
    curve = fit_curve(found, start, end, 3, steps=7, per_step=2, lr=0.02, weight_decay=weight_decay, seed=5)

    inner = [torch.lerp(start, end, i / 3).requires_grad_() for i in (1, 2)]
    optimizer = torch.optim.Adam(inner, lr=0.02)
    generator, order = torch.Generator().manual_seed(5), list[int]()
    for step in range(7):
        order = order or torch.randperm(3, generator=generator).tolist()
        batch = batches[order.pop()]
        optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / 7)) / 2
        optimizer.zero_grad()
        for part, t in enumerate(torch.rand(2, generator=generator).tolist()):
            t = (part + t) / 2
            points = [start, *inner, end]
            at = sum(math.comb(3, i) * t**i * (1 - t) ** (3 - i) * point for i, point in enumerate(points))
            assert isinstance(at, Tensor)
            twin = copy.deepcopy(module).train()
            loss = cross_entropy(partial(torch.func.functional_call, twin, found.weights(at)), batch)
            ((loss + weight_decay / 2 * at.square().sum()) / 2).backward()
        optimizer.step()
    assert torch.allclose(curve.points[1:3], torch.stack(inner).detach(), rtol=0, atol=1e-6)


def test_weight_decay_pulls_a_curve_towards_zero() -> None:
    start, end = torch.tensor([-1.0, 3.0, 0.0]).double(), torch.tensor([1.0, 3.0, 0.0]).double()
    flat = LossSurface(nn.Linear(3, 1, bias=False).double(), [torch.eye(3).double()], lambda net, x: 0 * net(x).sum())
    free, pulled = (fit_curve(flat, start, end, weight_decay=decay) for decay in (0.0, 0.1))
    assert torch.equal(free(0.5), line(start, end)(0.5))
    assert float(pulled(0.5)[1]) < 2.5


def test_bad_arguments_are_named() -> None:
    found = double_well()
    for call, message in (
        (lambda: follow(found, line(*POINTS), places=1), "places is 1"),
        (lambda: follow(found, line(*POINTS), start=1, end=0), "start is 1 and end is 0"),
        (lambda: follow(bowl(), line(*POINTS)), r"point has shape \(2,\)"),
        (lambda: follow(found, line(*POINTS), others={"test": bowl()}), "'test' has other coordinates"),
        (lambda: line(POINTS[0], torch.zeros(3)), "allowed is"),
        (lambda: fit_curve(found, POINTS[0], POINTS[1], degree=0), "degree is 0"),
        (lambda: fit_curve(found, *POINTS, lr=0), "lr is 0"),
        (lambda: fit_curve(found, *POINTS, weight_decay=-1), "weight_decay is -1"),
        (lambda: fit_curve(bowl(), *POINTS), r"point has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@on_every_device
def test_paths_are_followed_and_drawn_on_every_device(device: str) -> None:
    module, (x, y) = net(dtype=torch.float32).to(device), blobs(dtype=torch.float32)
    found = surface(module, (x, y))
    ends: tuple[Tensor, Tensor] = (found.point(), -found.point())
    paths = {
        "line": follow(found, line(*ends), start=-0.2, end=1.2, places=7),
        "curve": follow(found, fit_curve(found, *ends, steps=3), places=5),
    }
    axes = plot_paths(paths).axes[0]
    assert [line.get_label() for line in axes.lines] == ["line", "curve"]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(-0.2)  # type: ignore[index]
