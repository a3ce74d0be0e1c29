"""Hessian spectra: against closed forms, dense `torch.func.hessian` in float64, curvlinops, and Sagun et al.'s counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.data import digits
from examples.landscape.sagun import minimum
from lightning_cpna import Score, sparsity_of
from lightning_cpna.landscape import (
    LossSurface,
    Spectrum,
    hessian,
    hessian_spectrum,
    lanczos,
    n_outliers,
    plot_spectrum,
    top_eigenvalues,
)
from tests.helpers import on_every_device
from tests.landscape.problems import blobs, cross_entropy, net, squares, surface, trained


def dense_hessian(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the Hessian by forward over reverse mode, with weights of the module's own order."""
    names = [name for name, _ in module.named_parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]

    def loss(point: Tensor) -> Tensor:
        parts = point.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module, weights, (batch[0],)), batch[1])

    found: Tensor = torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in module.parameters()]))
    return found


@pytest.fixture(scope="module")
def digits_problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    train = digits(0).train
    batch = (train.x.double(), train.y)
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    return trained(module, batch, steps=150), batch


def test_least_squares_have_the_hessian_of_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    found = LossSurface(nn.Linear(6, 1, bias=False).double(), [(x, y)], squares)
    expected = 2 * x.T @ x / 40
    assert torch.allclose(hessian(found), expected, rtol=0, atol=1e-13)
    values = torch.linalg.eigvalsh(expected)
    assert torch.allclose(hessian_spectrum(found, exact=True).nodes[0], values, rtol=0, atol=1e-12)
    assert torch.allclose(hessian_spectrum(found, probes=1).nodes[0], values, rtol=0, atol=1e-12)
    assert torch.allclose(top_eigenvalues(found, k=5), values.flip(0)[:5], rtol=0, atol=1e-10)


def test_a_hessian_is_that_of_torch_func() -> None:
    module, batch = net(), blobs()
    assert torch.allclose(hessian(surface(module, batch)), dense_hessian(module, batch), rtol=0, atol=1e-13)


def test_quadrature_finds_the_largest_eigenvalue_and_the_measure_of_digits(digits_problem: Any) -> None:
    module, batch = digits_problem
    expected = torch.linalg.eigvalsh(dense_hessian(module, batch))
    exact = Spectrum(expected[None], torch.full_like(expected, 1 / len(expected))[None], len(expected), 0.0, True)
    found = hessian_spectrum(LossSurface(module, [batch], cross_entropy))
    assert found.lambda_max == pytest.approx(float(expected[-1]), rel=1e-10)
    assert found.distance(exact) <= 5e-4 * float(expected[-1] - expected[0])
    assert abs(found.trace - float(expected.sum())) <= 4 * found.trace_error
    assert torch.allclose(
        top_eigenvalues(LossSurface(module, [batch], cross_entropy)), expected.flip(0)[:17], rtol=1e-9
    )


def test_float32_finds_the_largest_eigenvalue_to_rounding(digits_problem: Any) -> None:
    module, (x, y) = digits_problem
    expected = hessian_spectrum(LossSurface(module, [(x, y)], cross_entropy)).lambda_max
    single = LossSurface(_copy(module).float(), [(x.float(), y)], cross_entropy)
    assert hessian_spectrum(single).lambda_max == pytest.approx(expected, rel=1e-5)
    assert float(top_eigenvalues(single, k=3)[0]) == pytest.approx(expected, rel=1e-5)


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


def test_curvlinops_multiplies_alike(digits_problem: Any) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    module, batch = digits_problem
    other = curvlinops.HessianLinearOperator(module, nn.CrossEntropyLoss(), list(module.parameters()), [batch])
    found = LossSurface(module, [batch], cross_entropy)
    vector = torch.randn(found.n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = other @ vector
    assert torch.allclose(found.hessian_product(found.point())(vector), expected, rtol=0, atol=1e-12)


def test_only_live_weights_count() -> None:
    module, batch = net(), blobs()
    sparsity = sparsity_of(module)
    [budget] = sparsity.add_budgets(module, {"0.weight": 9})
    sparsity.prune_(budget, 9, Score("magnitude"))
    found = surface(module, batch)
    assert len(hessian_spectrum(found, exact=True).nodes[0]) == found.n == 9 + 8 + 24 + 3
    assert hessian_spectrum(found).lambda_max == pytest.approx(
        hessian_spectrum(found, exact=True).lambda_max, rel=1e-12
    )
    assert hessian_spectrum(surface(module, batch, masks={})).n == 75


@given(st.integers(2, 12), st.integers(0, 10**6))
def test_lanczos_of_full_length_has_the_matrix_eigenvalues(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    start = torch.randn(n, generator=generator, dtype=torch.float64)
    diagonal, off = lanczos(lambda v: matrix @ v, start, n)
    found = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    assert len(diagonal) == n
    assert torch.allclose(found, torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-10)


def test_lanczos_stops_in_an_invariant_subspace() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    diagonal, off = lanczos(lambda v: values * v, torch.ones(5, dtype=torch.float64), 5)
    assert len(diagonal) == 2
    assert len(off) == 1
    found = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    assert torch.allclose(found, torch.tensor([1.0, 5.0], dtype=torch.float64))


def test_a_loss_without_curvature_has_the_spectrum_zero() -> None:
    module = nn.Linear(3, 1).double()
    found = hessian_spectrum(LossSurface(module, [torch.ones(4, 3).double()], lambda net, x: net(x).mean()), probes=2)
    assert found.lambda_max == found.lambda_min == 0
    assert found.weights.sum(1).tolist() == [1.0, 1.0]


def test_measures_shares_and_traces_are_those_of_the_definition() -> None:
    nodes = torch.tensor([[-0.5, 0.0, 0.001, 2.0]], dtype=torch.float64)
    spectrum = Spectrum(nodes, torch.full((1, 4), 0.25, dtype=torch.float64), 4, 0.1, True)
    assert spectrum.trace == pytest.approx(1.501)
    assert spectrum.trace_error == 0
    assert spectrum.share_below(0.01) == 0.5
    assert spectrum.bulk_share == 0.5  # below 2e-3
    places = torch.linspace(-4, 6, 20001, dtype=torch.float64)
    assert float(torch.trapezoid(spectrum.density(places, 0.2), places)) == pytest.approx(1, abs=1e-9)
    moved = Spectrum(nodes + 0.3, spectrum.weights, 4, 0.1, True)
    assert spectrum.distance(moved) == pytest.approx(0.3)
    other = Spectrum(torch.randn(3, 7).double(), torch.rand(3, 7).double().softmax(1), 4, 0.1, False)
    weights = (other.weights / 3).flatten()
    expected = scipy.stats.wasserstein_distance(nodes[0], other.nodes.flatten(), None, weights)
    assert spectrum.distance(other) == pytest.approx(expected, rel=1e-12)
    one = hessian_spectrum(surface(), probes=1)
    assert math.isnan(one.trace_error)


@pytest.mark.parametrize(("classes", "width"), [(2, 16), (5, 16), (10, 8)])
def test_as_many_eigenvalues_stand_out_as_there_are_classes_less_one(classes: int, width: int) -> None:
    module, batch = minimum(classes, width, seed=0)
    assert n_outliers(top_eigenvalues(LossSurface(module, [batch], cross_entropy))) == classes - 1


@pytest.mark.parametrize(
    ("values", "n"),
    [([9, 5, 1e-17], 2), ([9, 5, -1e-17], 2), ([9, 5, 0], 2), ([9, -1], 1), ([0, 0], 0), ([3, 2.9, 1], 2)],
)
def test_outliers_come_before_the_largest_ratio(values: list[float], n: int) -> None:
    assert n_outliers(torch.tensor(values, dtype=torch.float64)) == n


@pytest.mark.parametrize(("probes", "repeats"), [(10, 24), (40, 6)])
def test_the_error_of_the_trace_is_that_of_quadratic_forms_on_the_sphere(probes: int, repeats: int) -> None:
    """A form ``v' H v`` of a random unit vector has variance ``2 |H - mean|^2 / (n (n + 2))``."""
    found = surface(net(hidden=2))
    values = torch.linalg.eigvalsh(hessian(found))
    n = len(values)
    variance = n**2 * 2 * float((values - values.mean()).square().sum()) / (n * (n + 2))
    spectra = [hessian_spectrum(found, probes=probes, seed=seed) for seed in range(repeats)]
    errors = torch.tensor([spectrum.trace_error for spectrum in spectra])
    assert float(errors.square().mean()) == pytest.approx(variance / probes, rel=0.3)
    mean = sum(spectrum.trace for spectrum in spectra) / repeats
    assert abs(mean - float(values.sum())) < 3 * math.sqrt(variance / (probes * repeats))


def test_the_largest_are_the_highest_and_not_the_farthest_from_zero() -> None:
    module = nn.Linear(4, 1, bias=False).double()
    scales = torch.tensor([1.0, 2.0, -9.0, -8.0]).double()
    found = LossSurface(module, [torch.eye(4).double()], lambda net, x: (scales * net(x)[:, 0].square()).sum() / 2)
    assert torch.allclose(top_eigenvalues(found, k=2), torch.tensor([2.0, 1.0]).double())


def test_attention_has_a_hessian() -> None:
    module = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 4)
    found = LossSurface(module, [x], lambda net, x: net(x)[..., :2].square().mean(), names="self_attn.*")
    assert hessian_spectrum(found, probes=1, steps=5).lambda_max > 0


def test_a_loss_that_is_linear_in_the_coordinates_has_no_curvature() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    found = LossSurface(module, [torch.randn(6, 3)], lambda net, x: net(x).mean(), names="1.*")
    assert not bool(hessian(found).any())


def test_bad_arguments_are_named() -> None:
    found = surface()
    for options, message in (
        ({"steps": 0}, "steps is 0"),
        ({"probes": 1.5}, "probes is 1.5"),
        ({"point": torch.zeros(2)}, r"point has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            hessian_spectrum(found, **options)
    with pytest.raises(ValueError, match="k is 75; allowed is an int from 1 to 74"):
        top_eigenvalues(found, k=75)
    with pytest.raises(ValueError, match="allowed are two or more, the largest first"):
        n_outliers(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="sigma is 0"):
        hessian_spectrum(found).density(torch.zeros(1), 0)
    large = LossSurface(nn.Linear(5001, 1, bias=False), [torch.ones(1, 5001)], lambda net, x: net(x).square().mean())
    with pytest.raises(ValueError, match="5001 coordinates; allowed for the whole Hessian are 5000"):
        hessian_spectrum(large, exact=True)


@on_every_device
def test_spectra_are_drawn_and_computed_on_every_device(device: str) -> None:
    module, (x, y) = net(dtype=torch.float32).to(device), blobs(dtype=torch.float32)
    found = surface(module, (x, y))
    spectrum = hessian_spectrum(found, probes=2)
    assert spectrum.nodes.device.type == "cpu"
    axes = plot_spectrum(spectrum, top_eigenvalues(found, k=2)).axes[0]
    assert axes.get_title() == f"Hessian of 75 weights, loss {spectrum.loss:.3g} (2 probes)"
    assert len(axes.lines) == 2
