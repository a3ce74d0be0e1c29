import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_cpna import Masks, infer_masks, keep_top
from lightning_cpna.selection import MANY, SAMPLE, keep_top_rows, nth_of

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def brute_force(scores: list[float], n: int) -> list[bool]:
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]
    return [i in best for i in range(len(scores))]


@st.composite
def tied_scores(draw: st.DrawFn) -> Tensor:
    shape = draw(SHAPES)
    size = math.prod(shape)
    values = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=size, max_size=size))
    scores = torch.tensor(values).view(shape)
    return scores.movedim(0, -1) if draw(st.booleans()) else scores


@given(scores=tied_scores(), data=st.data())
def test_keep_top_equals_sorting_by_score_and_index(scores: Tensor, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, scores.numel()))
    keep = keep_top(scores, n)
    assert keep.dtype == torch.bool
    assert keep.shape == scores.shape
    assert int(keep.sum()) == n
    assert keep.flatten().tolist() == brute_force(scores.flatten().tolist(), n)


@given(scores=tied_scores(), data=st.data())
def test_keep_top_equals_sorting_each_member_alone(scores: Tensor, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-scores.ndim, scores.ndim - 1))
    n = data.draw(st.integers(0, scores.numel() // scores.shape[axis]))
    keep = keep_top(scores, n, member_axis=axis)
    for member in range(scores.shape[axis]):
        kept = keep.select(axis, member)
        assert int(kept.sum()) == n
        assert kept.flatten().tolist() == brute_force(scores.select(axis, member).flatten().tolist(), n)


@given(scores=tied_scores(), data=st.data())
def test_keep_top_never_keeps_minus_infinity_and_raises_when_it_would_have_to(
    scores: Tensor, data: st.DataObject
) -> None:
    size = scores.numel()
    gone = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(scores.shape)
    scores = scores.masked_fill(gone, -torch.inf)
    left = size - int(gone.sum())
    assert not bool((keep_top(scores, left) & gone).any())
    if left < size:
        with pytest.raises(ValueError, match=f"n is {left + 1}; allowed is the number of scores above -inf"):
            keep_top(scores, left + 1)


@pytest.mark.parametrize("n", [0, 1, 17, 5000, 9999, 10_000])
def test_keep_top_equals_a_stable_torch_sort_of_many_scores(n: int) -> None:
    scores = torch.randint(0, 50, (100, 100)).double()
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    expected = torch.zeros(10_000, dtype=torch.bool)
    expected[order[:n]] = True
    assert torch.equal(keep_top(scores, n).flatten(), expected)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999, 1.0])
@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).standard_normal(70_000, dtype=np.float32),
        np.random.default_rng(1).integers(0, 3, 70_000).astype(np.float64),
        np.sort(np.random.default_rng(2).random(70_000)),
        np.where(np.arange(70_000) % (70_000 // SAMPLE | 1) == 0, 0.0, np.random.default_rng(3).random(70_000)),
        np.where(np.arange(70_000) % 3 == 0, np.nan, np.random.default_rng(4).random(70_000)),
        np.full(70_000, -np.inf),
    ],
    ids=["normal", "tied", "sorted", "a sample that misleads", "NaN", "all alike"],
)
def test_the_value_at_a_place_of_many_equals_that_of_a_full_sort(values: NDArray[Any], share: float) -> None:
    place = round(share * (len(values) - 1))
    assert len(values) >= MANY
    rows = np.stack([values, values[::-1]])
    np.testing.assert_equal(nth_of(torch.from_numpy(rows), place).numpy(), np.sort(rows, axis=1)[:, [place]])


@pytest.mark.parametrize("n_removed", [0, 1, 2, 30, 60, 4000])
@pytest.mark.parametrize("levels", [2, 10**6])
@pytest.mark.parametrize("members", [1, 3])
def test_one_more_round_among_many_dead_equals_a_stable_torch_sort(members: int, levels: int, n_removed: int) -> None:
    scores = torch.randint(0, levels, (members, 9000)).double()
    dead = torch.stack([torch.randperm(9000) < 2000 for _ in range(members)])
    scores = scores.masked_fill(dead, -torch.inf)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : 7000 - n_removed]
    expected = torch.zeros_like(dead).scatter_(1, order, True)
    keep, lowest = keep_top_rows(scores, 7000 - n_removed)
    assert torch.equal(keep, expected)
    assert torch.equal(keep_top(scores, 7000 - n_removed, member_axis=0), expected)
    assert lowest == float(scores[expected].min())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_keep_top_is_literal_in_every_dtype(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3, 1, 3], [3, 2, 0]], dtype=dtype)
    assert keep_top(scores, 2).tolist() == [[True, False, True], [False, False, False]]
    assert keep_top(scores, 2, member_axis=0).tolist() == [[True, False, True], [True, True, False]]
    assert keep_top(scores, 1, member_axis=1).tolist() == [[True, False, True], [False, True, False]]


def test_infinite_scores_are_kept_first() -> None:
    assert keep_top(torch.tensor([1.0, torch.inf, 2.0, torch.inf]), 3).tolist() == [False, True, True, True]


def test_nan_raises_with_how_many() -> None:
    with pytest.raises(ValueError, match="2 of 4 are NaN"):
        keep_top(torch.tensor([math.nan, 1.0, math.nan, 2.0]), 1)


@pytest.mark.parametrize("n", [0, 2, 4])
def test_nan_raises_also_where_ties_make_up_for_it(n: int) -> None:
    with pytest.raises(ValueError, match="1 of 4 are NaN"):
        keep_top(torch.tensor([math.nan, 2.0, 2.0, 1.0]), n)
    with pytest.raises(ValueError, match="1 of 8 are NaN"):
        keep_top(torch.tensor([[math.nan, 3.0, 1.0, 0.0], [2.0, 2.0, 2.0, 1.0]]), n, member_axis=0)


@pytest.mark.parametrize("n", [-1, 7])
@pytest.mark.parametrize("member_axis", [None, 0])
def test_more_or_less_than_there_are_raises(n: int, member_axis: int | None) -> None:
    scores = torch.rand(1, 6)
    with pytest.raises(ValueError, match=f"n is {n}; allowed is 0 to 6"):
        keep_top(scores, n, member_axis)


def test_one_member_with_too_few_scores_raises() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, -torch.inf, -torch.inf]])
    assert keep_top(scores, 1, member_axis=0).tolist() == [[False, False, True], [True, False, False]]
    with pytest.raises(ValueError, match="above -inf"):
        keep_top(scores, 2, member_axis=0)


def test_the_lowest_score_that_stays_is_that_of_all_rows_together() -> None:
    keep, lowest = keep_top_rows(torch.tensor([[5.0, 7.0, 6.0], [1.0, 3.0, 2.0]]), 2)
    assert keep.tolist() == [[False, True, True], [False, True, True]]
    assert lowest == 2.0


def test_a_row_with_fewer_than_are_wanted_keeps_what_it_has() -> None:
    rows = torch.tensor([[5.0, -torch.inf, -torch.inf], [1.0, 3.0, 2.0], [7.0, -torch.inf, 7.0]])
    assert keep_top_rows(rows, 2)[0].tolist() == [[True, False, False], [False, True, True], [True, False, True]]


def test_a_mask_applies_to_tensors_of_any_float_type_and_follows_later_removals() -> None:
    masks = Masks()
    masks.add("w", torch.rand(3))
    for dtype in [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float16]:
        tensor = torch.ones(3, dtype=dtype)
        masks["w"].apply_(tensor)
        assert tensor.tolist() == masks["w"].live.tolist()
        masks["w"].remove_(torch.tensor([dtype == torch.float32, dtype == torch.float16, False]))
    assert masks["w"].live.tolist() == [False, False, True]


@given(shape=SHAPES, seed=st.integers(0, 99), rounds=st.integers(0, 4))
def test_live_cells_are_those_that_no_round_of_removal_took(shape: list[int], seed: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = Masks()
    masks.add("w", torch.rand(shape).movedim(0, -1))
    mask, gone = masks["w"], torch.zeros(masks["w"].dead.shape, dtype=torch.bool)
    for step in range(rounds):
        if step % 2:
            where = torch.rand(gone.shape, generator=generator) < 0.3
            assert mask.remove_(where) == int((where & ~gone).sum())
            gone |= where
        else:
            keep = torch.rand(mask.n_live, generator=generator) < 0.7
            cells = gone.flatten().logical_not().nonzero().flatten()[~keep]
            assert torch.equal(mask.keep_(keep), cells)
            gone.view(-1)[cells] = True
        assert torch.equal(mask.dead, gone)
        assert torch.equal(mask.removed, gone)
        assert mask.live_cells.tolist() == (~gone).flatten().nonzero().flatten().tolist()
        assert mask.n_live == int((~gone).sum())


def test_a_mask_of_another_shape_is_refused() -> None:
    masks = Masks()
    masks.add("w", torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"where has shape \(3, 2\); allowed is the parameter's, \(2, 3\)"):
        masks["w"].remove_(torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keep has shape \(5,\); allowed is \(6,\), one for each live cell"):
        masks["w"].keep_(torch.zeros(5, dtype=torch.bool))


def test_a_mask_that_was_applied_on_another_device_can_still_change() -> None:
    masks = Masks()
    masks.add("w", torch.rand(2, 3))
    masks["w"].apply_(torch.rand(2, 3, device="meta"))
    masks["w"].remove_(torch.tensor([[True, False, False], [False, False, True]]))
    tensor = torch.ones(2, 3)
    masks["w"].apply_(tensor)
    assert tensor.tolist() == [[0, 1, 1], [1, 1, 0]]


def test_removal_counts_are_those_of_sets() -> None:
    masks = Masks()
    masks.add("w", torch.rand(4, 5))
    gone: set[int] = set()
    for _ in range(5):
        where = torch.rand(4, 5) < 0.3
        new = set(where.flatten().nonzero().flatten().tolist())
        assert masks["w"].remove_(where) == len(new - gone)
        gone |= new
        assert masks["w"].n_live == 20 - len(gone)
        assert set(masks["w"].dead.flatten().nonzero().flatten().tolist()) == gone
        assert torch.equal(masks["w"].live, ~masks["w"].dead)
        assert torch.equal(masks["w"].removed, masks["w"].dead)


def test_dead_and_removed_for_good_are_two_facts() -> None:
    masks = Masks()
    masks.add("w", torch.rand(3))
    masks["w"].dead[0] = True
    masks["w"].n_live = 2
    assert masks["w"].remove_(torch.tensor([True, True, False])) == 1
    assert masks["w"].removed.tolist() == [True, True, False]
    assert masks["w"].n_live == 1


def test_adding_a_parameter_again_keeps_its_mask() -> None:
    net = nn.Linear(2, 1)
    masks = Masks()
    masks.add("weight", net.weight)
    masks["weight"].remove_(torch.tensor([[True, False]]))
    masks.add("weight", net.weight)
    assert masks["weight"].dead.tolist() == [[True, False]]
    assert list(masks) == ["weight"]
    assert len(masks) == 1


def test_a_mask_of_another_shape_raises_with_both_shapes() -> None:
    masks = Masks()
    masks.add("w", torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"mask of 'w' has shape \(2, 3\), the parameter \(3, 2\)"):
        masks.add("w", torch.rand(3, 2))


def test_applying_zeroes_exactly_the_dead_cells_of_leaf_parameters() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    masks = Masks()
    masks.add("weight", net.weight)
    where = torch.tensor([[True, False, False], [False, True, True]])
    masks["weight"].remove_(where)
    address, bias = net.weight.data_ptr(), net.bias.detach().clone()
    masks.apply_(dict(net.named_parameters()))
    assert torch.equal(net.weight.detach(), before * ~where)
    assert torch.equal(net.bias.detach(), bias)
    assert net.weight.data_ptr() == address
    assert net.weight.is_leaf


def masks_of_two() -> Masks:
    masks = Masks()
    masks.add("a", torch.rand(3, 5))
    masks.add("b.c", torch.rand(2, 2, 3))
    masks["a"].remove_(torch.rand(3, 5) < 0.4)
    masks["b.c"].dead |= torch.rand(2, 2, 3) < 0.5  # not live, but not removed for good
    masks["b.c"].n_live = int(masks["b.c"].live.sum())
    return masks


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_state_saved_and_loaded_with_weights_only_is_the_same() -> None:
    masks, restored = masks_of_two(), Masks()
    restored.add("stale", torch.rand(1))
    restored.load_state_dict(through_a_file(masks.state_dict()))
    assert list(restored) == list(masks) == ["a", "b.c"]
    for name, mask in masks.items():
        assert torch.equal(restored[name].dead, mask.dead)
        assert torch.equal(restored[name].removed, mask.removed)
        assert restored[name].n_live == mask.n_live == int((~mask.dead).sum())


def test_a_state_takes_a_bit_a_cell_and_fact() -> None:
    state = masks_of_two().state_dict()
    assert state["version"] == 1
    assert state["masks"]["a"]["shape"] == [3, 5]
    assert [len(state["masks"][name][fact]) for name in ("a", "b.c") for fact in ("dead", "removed")] == [2] * 4


def test_a_state_does_not_change_with_the_masks() -> None:
    masks = masks_of_two()
    state = masks.state_dict()
    kept = through_a_file(state)
    masks["a"].remove_(torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(state["masks"]["a"]["dead"], kept["masks"]["a"]["dead"])


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version_raises_and_changes_nothing(version: object) -> None:
    masks, other = masks_of_two(), Masks()
    state = {**other.state_dict(), "version": version}
    with pytest.raises(ValueError, match=rf"version {version!r}; this release reads 1"):
        masks.load_state_dict(state)
    assert list(masks) == ["a", "b.c"]


def test_inferred_masks_are_the_zeros_of_literal_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    weights = {"0.weight": torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, -0.0]]), "2.weight": torch.tensor([[0.0, 1e-30]])}
    net.load_state_dict({**net.state_dict(), **weights})
    masks = infer_masks(net, ["*.weight"])
    assert {name: mask.live.tolist() for name, mask in masks.items()} == {
        "0.weight": [[True, False, True], [False, False, False]],
        "2.weight": [[False, True]],
    }
    assert [mask.n_live for mask in masks.values()] == [2, 1]
    assert all(torch.equal(mask.removed, mask.dead) for mask in masks.values())


def test_inferring_from_an_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match="'w' matches no parameter"):
        infer_masks(nn.Linear(2, 2), ["w"])
