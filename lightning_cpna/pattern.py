"""Sparse patterns, and the products with a sparse matrix, out of stock operators."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

_KERNELS = ("cpu", "cuda")  # where torch has all operators that are used
_CHUNK = 2**22  # chosen: numbers that the fallback gathers at a time
_NARROW = 8  # sampled_addmm takes eight columns faster than two to seven


class Pattern(NamedTuple):
    """The connections of a sparse layer, by unit (CSR) and by input (CSC), all int32.

    Attributes:
        crow_indices: Where each unit's connections begin, ``(unit + 1,)``.
        col_indices: The input of each connection, ``(connection,)``.
        ccol_indices: Where each input's connections begin in the order by input, ``(input + 1,)``.
        row_indices: The unit of each connection in the order by input, ``(connection,)``.
        order: Which connection each one in the order by input is, ``(connection,)``.
    """

    crow_indices: Tensor
    col_indices: Tensor
    ccol_indices: Tensor
    row_indices: Tensor
    order: Tensor


def pattern_of(crow_indices: Tensor, col_indices: Tensor, in_features: int) -> Pattern:
    """Return a pattern that is given by unit by input, too.

    Examples:
        >>> crow_indices, col_indices = torch.tensor([0, 2, 3]).int(), torch.tensor([0, 1, 0]).int()
        >>> pattern_of(crow_indices, col_indices, 2).order.tolist()
        [0, 2, 1]
    """
    by_input = _counted_by_input if col_indices.is_cpu else _sorted_by_input
    return Pattern(crow_indices, col_indices, *by_input(crow_indices, col_indices, in_features))


def _counted_by_input(crow_indices: Tensor, col_indices: Tensor, in_features: int) -> tuple[Tensor, ...]:
    """Turn CSR into CSC by SciPy, which counts."""
    places = np.arange(len(col_indices), dtype=np.int32)
    shape = (len(crow_indices) - 1, in_features)
    matrix = csr_array((places, col_indices.numpy(), crow_indices.numpy()), shape=shape).tocsc()
    return tuple(torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))


def _sorted_by_input(crow_indices: Tensor, col_indices: Tensor, in_features: int) -> tuple[Tensor, ...]:
    """Do the same out of operators that every device has."""
    order = torch.argsort(col_indices, stable=True).int()
    rows = rows_of(crow_indices, len(col_indices)).index_select(0, order)
    return starts(torch.bincount(col_indices, minlength=in_features)), rows, order


@torch.library.custom_op("lightning_cpna::sparse_matmul", mutates_args=())
def sparse_matmul(
    values: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    order: Tensor,
    transpose: bool = False,
) -> Tensor:
    """Return ``A x``, or ``A' x``, for a sparse matrix ``A``, ``(unit, input)``.

    Args:
        values: The values of its connections, ``(connection,)``, float32 or float64.
        x: Contiguous ``(input, batch)``, or ``(unit, batch)``.
        crow_indices: See ``Pattern``, as for the following.
        col_indices: See there.
        ccol_indices: See there.
        row_indices: See there.
        order: See there.
        transpose: Whether it is the transposed matrix.

    Returns:
        ``(unit, batch)``, or ``(input, batch)``.
    """
    starts, indices = (ccol_indices, row_indices) if transpose else (crow_indices, col_indices)
    values = values.index_select(0, order) if transpose else values
    if x.device.type not in _KERNELS:
        return _gathered_matmul(values, x, starts, indices)
    if not len(values) or not x.shape[1]:
        return x.new_zeros(len(starts) - 1, x.shape[1])
    if x.is_cpu and x.dtype == torch.float64:  # where embedding_bag is slow
        matrix = _csr(starts, indices, values, len(x))
        product: Tensor = torch.sparse.mm(matrix, x, "sum")
        return product
    return torch.nn.functional.embedding_bag(
        indices, x, starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


@torch.library.custom_op("lightning_cpna::sampled_matmul", mutates_args=())
def sampled_matmul(
    left: Tensor,
    right: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    order: Tensor,
) -> Tensor:
    """Return ``left right'`` at the connections of a pattern only.

    Args:
        left: Contiguous ``(unit, batch)``, float32 or float64.
        right: Contiguous ``(input, batch)``.
        crow_indices: See ``Pattern``, as for the following.
        col_indices: See there.
        ccol_indices: See there.
        row_indices: See there.
        order: See there.

    Returns:
        ``(connection,)``.
    """
    if left.device.type not in _KERNELS:
        return _gathered_products(left, right, crow_indices, col_indices)
    if not len(col_indices) or not left.shape[1]:
        return left.new_zeros(len(col_indices))
    if 1 < left.shape[1] < _NARROW:
        left, right = (torch.nn.functional.pad(x, (0, _NARROW - x.shape[1])) for x in (left, right))
    products = left.new_zeros(len(col_indices))  # beta=0 still reads them
    matrix = _csr(crow_indices, col_indices, products, len(right))
    torch.sparse.sampled_addmm(matrix, left, right.t(), beta=0.0, out=matrix)  # in place: nothing is copied
    return products


def _csr(starts: Tensor, indices: Tensor, values: Tensor, width: int) -> Tensor:
    return torch.sparse_csr_tensor(starts, indices, values, (len(starts) - 1, width), check_invariants=False)


with warnings.catch_warnings():  # torch says once that CSR is in beta
    warnings.simplefilter("ignore")
    _csr(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), 1)


def _gathered_matmul(values: Tensor, x: Tensor, starts: Tensor, indices: Tensor) -> Tensor:
    """Compute ``sparse_matmul`` out of operators that every device has."""
    product = x.new_zeros(len(starts) - 1, x.shape[1])
    rows = rows_of(starts, len(indices))
    for part in _parts(len(indices), x):
        product.index_add_(0, rows[part], values[part, None] * x.index_select(0, indices[part]))
    return product


def _gathered_products(left: Tensor, right: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """Compute ``sampled_matmul`` out of operators that every device has."""
    rows = rows_of(crow_indices, len(col_indices))
    products = [
        (left.index_select(0, rows[part]) * right.index_select(0, col_indices[part])).sum(1)
        for part in _parts(len(col_indices), left)
    ]
    return torch.cat(products)


def _parts(n: int, x: Tensor) -> tuple[Tensor, ...]:
    """Split ``n`` connections so that few numbers are gathered at a time."""
    return torch.split(torch.arange(n, device=x.device), max(1, _CHUNK // max(1, x.shape[1])))


def starts(counts: Tensor) -> Tensor:
    """Turn counts into where each begins, and the end, int32.

    Examples:
        >>> starts(torch.tensor([2, 0, 1]))
        tensor([0, 2, 2, 3], dtype=torch.int32)
    """
    starts = counts.new_zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    return starts


def rows_of(starts: Tensor, n: int) -> Tensor:
    """Return which row each of ``n`` connections is in, int32 ``(n,)``, given where each row's begin.

    Examples:
        >>> rows_of(torch.tensor([0, 2, 2, 3]), 3)
        tensor([0, 0, 2], dtype=torch.int32)
    """
    return of_rows(torch.arange(len(starts) - 1, dtype=torch.int32, device=starts.device), starts, n)


def of_rows(values: Tensor, starts: Tensor, n: int) -> Tensor:
    """Return the value of the row that each of ``n`` connections is in, given one for each row, ints.

    Examples:
        >>> of_rows(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 2, 3]), 3)
        tensor([5, 5, 7])
    """
    counts = starts.diff()
    if values.is_cpu:
        return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))
    return torch.repeat_interleave(values, counts, output_size=n)


@sparse_matmul.register_fake
def _(
    values: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    ccol: Tensor,
    row: Tensor,
    order: Tensor,
    transpose: bool = False,
) -> Tensor:
    return x.new_empty(len(ccol if transpose else crow) - 1, x.shape[1])


@sampled_matmul.register_fake
def _(left: Tensor, right: Tensor, crow: Tensor, col: Tensor, ccol: Tensor, row: Tensor, order: Tensor) -> Tensor:
    return left.new_empty(len(col))


def _keep_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transpose = inputs
    ctx.save_for_backward(*tensors)


def _matmul_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    values, x, *pattern = ctx.saved_tensors
    gradient = gradient.contiguous()
    left, right = (x, gradient) if ctx.transpose else (gradient, x)
    of_values = sampled_matmul(left, right, *pattern) if ctx.needs_input_grad[0] else None
    of_x = sparse_matmul(values, gradient, *pattern, not ctx.transpose) if ctx.needs_input_grad[1] else None
    return of_values, of_x, *[None] * 6


def _keep_sampled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sampled_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    left, right, *pattern = ctx.saved_tensors
    of_left = sparse_matmul(gradient, right, *pattern, False) if ctx.needs_input_grad[0] else None
    of_right = sparse_matmul(gradient, left, *pattern, True) if ctx.needs_input_grad[1] else None
    return of_left, of_right, *[None] * 5


sparse_matmul.register_autograd(_matmul_backward, setup_context=_keep_matmul)
sampled_matmul.register_autograd(_sampled_backward, setup_context=_keep_sampled)
