import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_cpna import SparseLinear, pattern
from lightning_cpna.draws import draw_cells, free_cells
from lightning_cpna.pattern import Pattern, sampled_matmul, sparse_matmul
from tests.helpers import on_every_device, p_of_uniform

BATCHES = [0, 1, 2, 7, 8, 9, 33]
SHAPES = [(9, 14, 0.3), (14, 9, 0.9), (6, 5, 0.0), (1, 1, 1.0), (40, 3, 0.05)]
DTYPES = [torch.float64, torch.float32]

on_every_shape = pytest.mark.parametrize(("n_out", "n_in", "density"), SHAPES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def matrix_of(n_out: int, n_in: int, density: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw a matrix; its first unit and its last input have nothing, where there are more."""
    matrix = torch.randn(n_out, n_in, dtype=dtype) * (torch.rand(n_out, n_in) < density)
    if n_out > 1:
        matrix[0], matrix[:, -1] = 0, 0
    return matrix


def pattern_of(matrix: Tensor, device: str = "cpu") -> tuple[Tensor, Pattern]:
    """Return values and connections by way of SciPy."""
    csr = scipy.sparse.csr_array(matrix.numpy())
    csc = csr.tocsc()
    order = scipy.sparse.csr_array((np.arange(csr.nnz) + 1, csr.indices, csr.indptr), csr.shape).tocsc().data - 1
    arrays = (csr.indptr, csr.indices, csc.indptr, csc.indices, order)
    indices = [torch.from_numpy(np.asarray(array, dtype=np.int32)).to(device) for array in arrays]
    return torch.from_numpy(csr.data).to(device), Pattern(*indices)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-12 if actual.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.cpu(), expected.to(actual.dtype).cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("by_input", [pattern._counted_by_input, pattern._sorted_by_input])
@on_every_shape
def test_connections_by_input_are_those_of_the_transposed_dense_matrix(
    n_out: int, n_in: int, density: float, by_input: Any
) -> None:
    matrix = matrix_of(n_out, n_in, density)
    csr = matrix.to_sparse_csr()
    ccol_indices, row_indices, order = by_input(csr.crow_indices().int(), csr.col_indices().int(), n_in)
    inputs, units = matrix.t().nonzero().unbind(1)
    assert {part.dtype for part in (ccol_indices, row_indices, order)} == {torch.int32}
    assert ccol_indices.tolist() == [0, *torch.bincount(inputs, minlength=n_in).cumsum(0).tolist()]
    assert torch.equal(row_indices, units.int())
    assert torch.equal(csr.values()[order], matrix.t()[inputs, units])


@on_every_device
@in_every_dtype
@on_every_shape
def test_products_equal_scipy_and_dense_float64(
    n_out: int, n_in: int, density: float, dtype: torch.dtype, device: str
) -> None:
    matrix = matrix_of(n_out, n_in, density, dtype)
    values, connections = pattern_of(matrix, device)
    csr = scipy.sparse.csr_array(matrix.double().numpy())
    for batch in BATCHES:
        x, g = torch.randn(n_in, batch, dtype=dtype), torch.randn(n_out, batch, dtype=dtype)
        close(sparse_matmul(values, x.to(device), *connections), torch.from_numpy(csr @ x.double().numpy()))
        close(sparse_matmul(values, g.to(device), *connections, True), torch.from_numpy(csr.T @ g.double().numpy()))
        sampled = sampled_matmul(g.to(device), x.to(device), *connections)
        close(sampled, (g.double() @ x.double().t())[matrix != 0])
        assert sampled.dtype == dtype


@on_every_device
@in_every_dtype
@on_every_shape
def test_what_every_device_computes_equals_the_kernels(
    n_out: int, n_in: int, density: float, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, connections = pattern_of(matrix_of(n_out, n_in, density, dtype), device)
    crow, col, *_ = connections
    for batch in BATCHES:
        x, g = (torch.randn(n, batch, dtype=dtype, device=device) for n in (n_in, n_out))

        def products(x: Tensor = x, g: Tensor = g) -> list[Tensor]:
            return [
                sparse_matmul(values, x, *connections),
                sparse_matmul(values, g, *connections, True),
                sampled_matmul(g, x, *connections),
            ]

        expected = products()
        for chunk in (1, 20, 2**22):
            with monkeypatch.context() as patch:
                patch.setattr(pattern, "_CHUNK", chunk)
                close(pattern._gathered_matmul(values, x, crow, col), expected[0])
                close(pattern._gathered_products(g, x, crow, col), expected[2])
                patch.setattr(pattern, "_KERNELS", ())
                for actual, wanted in zip(products(), expected, strict=True):
                    assert actual.shape == wanted.shape
                    close(actual, wanted)


def test_the_fallback_gathers_no_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    values, connections = pattern_of(matrix_of(20, 30, 0.5))
    sizes: list[int] = []
    index_select = Tensor.index_select

    def spy(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
        taken = index_select(tensor, dim, index)
        sizes.append(taken.numel())
        return taken

    monkeypatch.setattr(pattern, "_CHUNK", 64)
    monkeypatch.setattr(Tensor, "index_select", spy)
    pattern._gathered_matmul(values, torch.randn(30, 8, dtype=torch.float64), *connections[:2])
    pattern._gathered_products(torch.randn(20, 8), torch.randn(30, 8), *connections[:2])
    assert max(sizes) == 64
    assert sum(sizes) == 3 * 8 * len(values)


@pytest.mark.parametrize("kernels", [("cpu",), ()])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_both_products_are_differentiable_twice(
    batch: int, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern, "_KERNELS", kernels)
    values, connections = pattern_of(matrix_of(4, 5, 0.4))
    x, g = torch.randn(5, batch, dtype=torch.float64), torch.randn(4, batch, dtype=torch.float64)
    for tensor in (values, x, g):
        tensor.requires_grad_()

    for function, inputs in (
        (lambda v, x: sparse_matmul(v, x, *connections), (values, x)),
        (lambda v, g: sparse_matmul(v, g, *connections, True), (values, g)),
        (lambda g, x: sampled_matmul(g, x, *connections), (g, x)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@on_every_device
@pytest.mark.parametrize(
    ("density", "batch", "dtype"),
    [(0.4, 3, torch.float32), (0.4, 8, torch.float64), (0.4, 0, torch.float32), (0.0, 3, torch.float32)],
)
def test_both_products_keep_what_torch_asks_of_an_operator(
    density: float, batch: int, dtype: torch.dtype, device: str
) -> None:
    values, connections = pattern_of(matrix_of(5, 6, density, dtype), device)
    x, g = (torch.randn(n, batch, dtype=dtype, device=device, requires_grad=True) for n in (6, 5))
    values.requires_grad_()
    torch.library.opcheck(sparse_matmul, (values, x, *connections))
    torch.library.opcheck(sparse_matmul, (values, g, *connections, True))
    torch.library.opcheck(sampled_matmul, (g, x, *connections))


@on_every_shape
def test_a_layer_lists_its_connections_as_scipy_does_by_unit_and_by_input(
    n_out: int, n_in: int, density: float
) -> None:
    matrix = matrix_of(n_out, n_in, density)
    values, connections = pattern_of(matrix)
    layer = SparseLinear.from_cells(matrix.flatten().nonzero().flatten(), values, None, n_in, n_out)
    for name, indices, expected in zip(Pattern._fields, layer.pattern, connections, strict=True):
        assert indices.dtype == torch.int32, name
        assert torch.equal(indices, expected), name


# Drawing


@st.composite
def cells(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Draw occupied cells, the number of cells, and how many are wanted."""
    n_cells = draw(st.integers(1, 60))
    occupied = sorted(draw(st.sets(st.integers(0, n_cells - 1), max_size=n_cells)))
    return occupied, n_cells, draw(st.integers(0, n_cells - len(occupied)))


@given(case=cells(), seed=st.integers(0, 2**31))
def test_cells_drawn_are_free_different_ascending_and_exactly_as_many(
    case: tuple[list[int], int, int], seed: int
) -> None:
    occupied, n_cells, n = case
    taken = torch.tensor(occupied, dtype=torch.int64)
    drawn = draw_cells(taken, n_cells, n, torch.Generator().manual_seed(seed)).cells
    assert drawn.dtype == torch.int64
    assert len(drawn) == n
    assert drawn.tolist() == sorted(set(drawn.tolist()) - set(occupied))
    assert all(0 <= cell < n_cells for cell in drawn.tolist())
    assert torch.equal(drawn, draw_cells(taken, n_cells, n, torch.Generator().manual_seed(seed)).cells)


@given(case=cells(), data=st.data())
def test_free_cells_equal_a_loop_over_all_cells(case: tuple[list[int], int, int], data: st.DataObject) -> None:
    occupied, n_cells, _ = case
    free = [cell for cell in range(n_cells) if cell not in occupied]
    ranks = data.draw(st.lists(st.integers(0, max(0, len(free) - 1)), max_size=10 if free else 0).map(sorted))
    found = free_cells(torch.tensor(occupied, dtype=torch.int64), torch.tensor(ranks, dtype=torch.int64))
    assert found.cells.tolist() == [free[rank] for rank in ranks]
    assert found.n_before.tolist() == [sum(other < free[rank] for other in occupied) for rank in ranks]


@pytest.mark.parametrize(("n", "allowed"), [(3, 2), (-1, 2)])
def test_more_cells_than_are_free_raise(n: int, allowed: int) -> None:
    with pytest.raises(ValueError, match=rf"n is {n}; allowed is 0 to {allowed}, the number of free cells"):
        draw_cells(torch.tensor([0, 2, 3]), 5, n)


def test_a_grid_of_more_than_2_to_the_31_cells_is_drawn_from_end_to_end() -> None:
    n_cells = 10**12
    occupied = draw_cells(torch.empty(0, dtype=torch.int64), n_cells, 10_000).cells
    drawn = draw_cells(occupied, n_cells, 10_000).cells
    assert not set(drawn.tolist()) & set(occupied.tolist())
    for found in (occupied, drawn):
        assert scipy.stats.kstest(found.numpy() / n_cells, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("n_cells", "n_occupied", "n"),
    [(200, 20, 10), (200, 150, 12), (60, 20, 15), (60, 20, 30), (40, 0, 9), (40, 0, 10), (40, 35, 3)],
)
def test_every_free_cell_is_drawn_as_often(n_cells: int, n_occupied: int, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    occupied = torch.randperm(n_cells, generator=generator)[:n_occupied].sort().values
    counts = torch.zeros(n_cells)
    for _ in range(3000):
        counts[draw_cells(occupied, n_cells, n, generator).cells] += 1
    free = torch.ones(n_cells, dtype=torch.bool)
    free[occupied] = False
    assert int(counts[occupied].sum()) == 0
    assert p_of_uniform(counts[free], n, 3000) > 1e-3


@pytest.mark.parametrize(("n_free", "n"), [(9, 2), (13, 3), (5, 2), (6, 3), (8, 2)])
def test_every_set_of_free_cells_is_drawn_as_often(n_free: int, n: int) -> None:
    generator = torch.Generator().manual_seed(2)
    occupied = torch.arange(1, 2 * n_free, 2)[: n_free // 2]
    n_cells = n_free + len(occupied)
    counts: dict[Any, int] = {}
    for _ in range(20 * math.comb(n_free, n)):
        drawn = tuple(draw_cells(occupied, n_cells, n, generator).cells.tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    free = sorted(set(range(n_cells)) - set(occupied.tolist()))
    observed = [counts.pop(subset, 0) for subset in itertools.combinations(free, n)]
    assert not counts
    assert scipy.stats.chisquare(observed).pvalue > 1e-3
