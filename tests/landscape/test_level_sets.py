"""Walks of constant loss: against circles and spheres, on which the way and the end are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import Score, sparsity_of
from lightning_cpna.landscape import LossSurface, plot_level_set, walk_level_set
from tests.helpers import on_every_device
from tests.landscape.problems import blobs, cross_entropy, error, net, surface, trained


def circle(dtype: torch.dtype = torch.float64) -> LossSurface:
    """Return ``|w - (2, 0)|^2``: level 1 is a circle from (1, 0), the nearest to the origin, to (3, 0)."""
    module = nn.Linear(2, 1, bias=False).to(dtype)
    centre = torch.tensor([2.0, 0.0], dtype=dtype)
    return LossSurface(module, [torch.ones(1, 2)], lambda net, x: (net.weight[0] - centre).square().sum())


FAR = torch.tensor([2.6, 0.8], dtype=torch.float64)


def test_on_a_circle_the_walk_ends_at_the_point_nearest_to_the_origin() -> None:
    path = walk_level_set(circle(), FAR, tolerance=1e-10, max_steps=200)
    assert torch.allclose(path.points[-1], torch.tensor([1.0, 0.0]).double(), atol=2e-3)
    assert path.deviation <= 1e-10
    assert path.stopped in ("stuck", "stationary")
    assert float(path.angles[-1]) > 179.5
    assert path.distance == pytest.approx(math.pi - math.atan2(0.8, 0.6), rel=2e-2)
    assert bool((path.objective.diff() < 0).all())
    assert torch.allclose(path.objective, path.norms.square() / 2, rtol=0, atol=1e-12)


def test_any_function_can_be_lowered() -> None:
    path = walk_level_set(circle(), FAR, lambda w: -w[1])
    assert torch.allclose(path.points[-1], torch.tensor([2.0, 1.0]).double(), atol=2e-2)
    assert torch.equal(path.objective, -path.points[:, 1])


def test_a_walk_can_begin_beside_its_level() -> None:
    path = walk_level_set(circle(), FAR, level=0.25)
    assert float((path.points[0] - torch.tensor([2.0, 0.0])).norm()) == pytest.approx(0.5, rel=1e-4)
    assert float(path.points[-1][0]) == pytest.approx(1.5, abs=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_loss_stays_within_the_tolerance(dtype: torch.dtype, tolerance: float, activation: type[nn.Module]) -> None:
    batch = blobs(dtype=dtype)
    module = nn.Sequential(nn.Linear(5, 12), activation(), nn.Linear(12, 3)).to(dtype)
    found = surface(trained(module, batch, steps=600), batch)
    others = {"error": LossSurface(module, [batch], error), "again": found}
    path = walk_level_set(found, tolerance=tolerance, max_evaluations=800, others=others)
    assert path.deviation <= tolerance
    assert path.others["again"].tolist() == [found.loss(point) for point in path.points]
    assert float(path.others["again"].sub(path.level).abs().max()) <= 2 * tolerance * path.level
    assert float(path.norms[-1]) < 0.95 * float(path.norms[0])
    assert int(path.steps[-1]) >= 100 or path.stopped == "evaluations"


@pytest.mark.parametrize("objective", ["random", "brownian"])
def test_walks_without_an_objective_go_far_at_the_same_loss(objective: str) -> None:
    batch = blobs()
    found = surface(trained(net(), batch, steps=600), batch)
    path = walk_level_set(found, objective=objective, max_steps=100, seed=3)  # type: ignore[arg-type]
    assert path.deviation <= 1e-4
    assert bool(path.objective.isnan().all())
    assert bool(path.angles.isnan().all())
    assert path.distance == pytest.approx(100 * 0.05, rel=0.2)
    again = walk_level_set(found, objective=objective, max_steps=100, seed=3)  # type: ignore[arg-type]
    other = walk_level_set(found, objective=objective, max_steps=100, seed=4)  # type: ignore[arg-type]
    assert torch.equal(path.points, again.points)
    assert not torch.equal(path.points, other.points)
    moved = float((path.points[-1] - path.points[0]).norm())
    assert moved > 0.5 * path.distance if objective == "random" else moved < 0.5 * path.distance


def test_of_a_sparse_network_only_live_weights_move() -> None:
    module, batch = net(), blobs()
    sparsity = sparsity_of(module)
    [budget] = sparsity.add_budgets(module, {"0.weight": 12})
    sparsity.prune_(budget, 12, Score("magnitude"))
    found = surface(module, batch)
    path = walk_level_set(found, max_steps=20)
    weight = found.weights(path.points[-1])["0.weight"]
    assert torch.equal(weight != 0, sparsity.masks["0.weight"].live)
    assert path.points.shape == (3, found.n)


def test_the_work_is_bounded_by_gradients() -> None:
    evaluations = 0

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return cross_entropy(net, batch)

    found = LossSurface(net(), [blobs()], loss)
    evaluations = 0
    path = walk_level_set(found, max_evaluations=50)
    assert path.stopped == "evaluations"
    assert path.evaluations == evaluations <= 50


def test_pictures_and_principal_components_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="the extra 'analysis' is not installed")
    batch = blobs()
    found = surface(trained(net(), batch), batch)
    path = walk_level_set(found, max_steps=50, others={"error": LossSurface(found.module, [batch], error)})
    places, shares = path.pca()
    pca = decomposition.PCA(2).fit(path.points.numpy())
    assert torch.allclose(places.abs(), torch.from_numpy(pca.transform(path.points.numpy())).abs(), atol=1e-9)
    assert torch.allclose(shares, torch.from_numpy(pca.explained_variance_ratio_))
    standard, _ = path.pca(standardize=True)
    assert not torch.allclose(standard, places)
    titles = [axes.get_xlabel() for axes in plot_level_set(path).axes]
    assert titles[:3] == ["step", "step", "first principal component"]
    with pytest.raises(ValueError, match="components is 7; allowed is an int from 1 to 6"):
        path.pca(7)


def test_bad_arguments_are_named() -> None:
    found = circle()
    for options, message in (
        ({"objective": "l1"}, "objective is 'l1'"),
        ({"objective": lambda w: 3.0}, "objective returned 3.0"),
        ({"objective": lambda w: w}, "objective returned tensor"),
        ({"step": 0.0}, "step is 0.0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"level": 0.0}, "level is 0.0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"record_every": 1.5}, "record_every is 1.5"),
        ({"others": {"test": surface()}}, "others: 'test' has other coordinates"),
        ({"start": torch.zeros(3)}, r"point has shape \(3,\)"),
        ({"start": torch.tensor([2.0, 0.0]).double()}, "start has the loss 0; allowed is a level > 0"),
        ({"start": torch.tensor([2.0, 0.0]).double(), "level": 1.0}, "could not be brought to it"),
    ):
        with pytest.raises(ValueError, match=message):
            walk_level_set(found, **options)


@on_every_device
def test_walks_are_made_on_every_device(device: str) -> None:
    module, (x, y) = net(dtype=torch.float32).to(device), blobs(dtype=torch.float32)
    path = walk_level_set(surface(module, (x, y)), max_steps=5, objective="brownian")
    assert path.points.device.type == device
