import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_cpna import Masks
from lightning_cpna.cells import (
    cells_of,
    count_true,
    distinct,
    fill_cells_,
    n_up_to,
    others,
    pack,
    pick,
    together,
    unpack,
)


@given(bits=st.lists(st.booleans(), max_size=70))
def test_counting_listing_and_picking_equal_torch_indexing(bits: list[bool]) -> None:
    where = torch.tensor(bits, dtype=torch.bool)
    for shaped in (where, where.view(-1, 1), where.repeat(2, 1).T):
        assert count_true(shaped) == int(shaped.sum())
        assert torch.equal(cells_of(shaped), shaped.flatten().nonzero().flatten())
    values = torch.arange(len(bits))
    assert torch.equal(pick(values, where), values[where])


@given(n=st.integers(0, 40), cells=st.sets(st.integers(0, 39)))
def test_other_cells_equal_the_difference_of_sets(n: int, cells: set[int]) -> None:
    cells = {cell for cell in cells if cell < n}
    assert others(n, torch.tensor(list(cells), dtype=torch.int64)).tolist() == sorted({*range(n)} - cells)


@given(cells=st.lists(st.integers(0, 9) | st.integers(0, 2**62)))
def test_distinct_cells_equal_a_sorted_set(cells: list[int]) -> None:
    assert distinct(torch.tensor(cells, dtype=torch.int64)).tolist() == sorted(set(cells))


@given(first=st.sets(st.integers(0, 99)).map(sorted), second=st.sets(st.integers(0, 99)).map(sorted))
def test_cells_together_equal_the_union_of_sets(first: list[int], second: list[int]) -> None:
    both = together(torch.tensor(first, dtype=torch.int64), torch.tensor(second, dtype=torch.int64))
    assert both.tolist() == sorted({*first, *second})


@given(cells=st.lists(st.integers(0, 20)).map(sorted), values=st.lists(st.integers(-1, 21)).map(sorted))
def test_counts_up_to_values_equal_counting_by_brute_force(cells: list[int], values: list[int]) -> None:
    counts = n_up_to(torch.tensor(cells, dtype=torch.int64), torch.tensor(values, dtype=torch.int64))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [sum(cell <= value for cell in cells) for value in values]


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SPECIAL = [1.5, -2.0, 0.0, -0.0, math.inf, -math.inf, math.nan, 3.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["cells", "mask"])
def test_zeroing_in_place_equals_torch_where(dtype: torch.dtype, transposed: bool, way: str) -> None:
    special = torch.tensor(SPECIAL, dtype=dtype)
    for seed in range(8):
        torch.manual_seed(seed)
        where = torch.rand(4, 2) < 0.5
        tensor = nn.Parameter(special.view(2, 4).T if transposed else special.view(4, 2).clone())
        expected = torch.where(where, 0, tensor.detach())
        address = tensor.data_ptr()
        with torch.no_grad():
            if way == "cells":
                fill_cells_(tensor, cells_of(where), 0)
            else:
                masks = Masks()
                masks.add("w", tensor)
                masks["w"].remove_(where)
                masks["w"].apply_(tensor)
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=0, equal_nan=True)
        assert tensor.data_ptr() == address


@given(bits=st.lists(st.booleans(), max_size=70))
def test_packing_equals_numpy_packbits_and_unpacking_undoes_it(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(np.array(bits, dtype=bool), bitorder="little").tolist()
    assert torch.equal(unpack(packed, mask.shape), mask)


@given(shape=st.lists(st.integers(0, 4), max_size=4))
def test_unpacking_restores_every_shape(shape: list[int]) -> None:
    mask = torch.rand(shape) < 0.5
    assert torch.equal(unpack(pack(mask), shape), mask)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


def test_packing_follows_the_logical_order_of_a_transposed_mask() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert pack(mask.T).tolist() == [0b001011]
    assert torch.equal(unpack(pack(mask.T), [3, 2]), mask.T)
