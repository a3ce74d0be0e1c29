from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_cpna import Axes, Target
from lightning_cpna.targets import all_targets, axes_of, canonical_name, n_keep, resolve


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def names(targets: list[Target]) -> list[str]:
    return [target.name for target in targets]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))


# Each layout: the axes, the shape, and the index of (member, unit, input, *kernel) written out by hand.
LAYOUTS: dict[str, tuple[Axes, tuple[int, ...], tuple[int, ...], Callable[..., tuple[int, ...]]]] = {
    "linear": (Axes(), (3, 4), (1, 3, 4), lambda m, u, i: (u, i)),
    "conv": (Axes(), (3, 4, 2, 5), (1, 3, 4, 2, 5), lambda m, u, i, a, b: (u, i, a, b)),
    "transposed conv": (Axes(unit=1, input=0), (4, 3, 2), (1, 3, 4, 2), lambda m, u, i, a: (i, u, a)),
    "bias": (Axes(unit=0, input=None), (3,), (1, 3, 1), lambda m, u, i: (u,)),
    "stacked": (Axes(member=0, unit=1, input=2), (2, 3, 4), (2, 3, 4), lambda m, u, i: (m, u, i)),
    "stacked, inputs first": (Axes(member=0, unit=2, input=1), (2, 4, 3), (2, 3, 4), lambda m, u, i: (m, i, u)),
    "stacked, members between": (Axes(member=1, unit=2, input=0), (4, 2, 3), (2, 3, 4), lambda m, u, i: (i, m, u)),
    "stacked, members last": (Axes(member=2, unit=0, input=1), (3, 4, 2), (2, 3, 4), lambda m, u, i: (u, i, m)),
    "stacked conv": (
        Axes(member=0, unit=1, input=2),
        (2, 3, 4, 5),
        (2, 3, 4, 5),
        lambda m, u, i, a: (m, u, i, a),
    ),
    "stacked bias": (Axes(member=0, unit=1, input=None), (2, 3), (2, 3, 1), lambda m, u, i: (m, u)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_view_equals_indexing_by_hand(layout: str) -> None:
    axes, shape, viewed_shape, index = LAYOUTS[layout]
    tensor = numbered(*shape)
    view = axes.view(tensor)
    assert view.shape == viewed_shape
    for position in product(*map(range, viewed_shape)):
        assert view[position] == tensor[index(*position)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_to_the_view_writes_to_the_tensor_at_the_index_by_hand(layout: str) -> None:
    axes, shape, viewed_shape, index = LAYOUTS[layout]
    tensor = torch.zeros(shape)
    last = tuple(size - 1 for size in viewed_shape)
    axes.view(tensor)[last] = 7.0
    assert tensor[index(*last)] == 7.0
    assert int((tensor != 0).sum()) == 1


@pytest.mark.parametrize(
    ("axes", "bias", "expected"),
    [
        (Axes(), [1, 2, 3], [[1, 2, 3]]),
        (Axes(unit=1, input=0), [1, 2, 3], [[1, 2, 3]]),
        (Axes(member=0, unit=1, input=2), [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
        (Axes(member=0, unit=2, input=1), [[[1, 2, 3]], [[4, 5, 6]]], [[1, 2, 3], [4, 5, 6]]),
        (Axes(member=1, unit=2, input=0), [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),
        (Axes(member=2, unit=0, input=1), [[1, 4], [2, 5], [3, 6]], [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_view_of_a_bias_equals_a_literal_and_writes_through(
    axes: Axes, bias: list[object], expected: list[list[int]]
) -> None:
    tensor = torch.tensor(bias)
    assert axes.view_bias(tensor).tolist() == expected
    axes.view_bias(tensor)[-1, -1] = 99
    assert int((tensor == 99).sum()) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net.0.weight", "net.0.weight"),
        ("_orig_mod.net.0.weight", "net.0.weight"),
        ("net._orig_mod.0._checkpoint_wrapped_module.weight", "net.0.weight"),
        ("_fsdp_wrapped_module.weight", "weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_canonical_names_are_literal(name: str, expected: str) -> None:
    assert canonical_name(name) == expected


def test_names_through_wrapped_submodules_are_those_of_the_plain_module() -> None:
    wrapped, nested = nn.Module(), nn.Module()
    wrapped.add_module("_orig_mod", mlp())
    nested.add_module("_checkpoint_wrapped_module", nn.Linear(1, 1))
    net = nn.ModuleDict({"body": wrapped, "head": nested})
    plain = nn.ModuleDict({"body": mlp(), "head": nn.Linear(1, 1)})
    assert list(all_targets(net)) == list(all_targets(plain)) == [name for name, _ in plain.named_parameters()]


def test_targets_of_a_compiled_submodule_are_its_own_parameters() -> None:
    inner = nn.Linear(2, 3)
    compiled: Any = torch.compile(inner, backend="eager")
    net = nn.Sequential(compiled, nn.ReLU(), nn.Linear(3, 1))
    found = resolve(net, ["0.weight"])["0.weight"]
    assert names(found) == ["0.weight"]
    assert found[0].parameter is inner.weight


def test_a_shared_parameter_appears_once_under_its_first_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    first, last = net[0], net[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    last.weight = first.weight
    assert list(all_targets(net)) == ["0.weight", "0.bias", "2.bias"]
    twice = nn.ModuleList([first, first])
    assert list(all_targets(twice)) == ["0.weight", "0.bias"]


def test_buffers_are_no_targets() -> None:
    assert list(all_targets(nn.BatchNorm1d(3))) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        (nn.Linear(2, 3), "weight", Axes(unit=0, input=1)),
        (nn.Linear(2, 3), "bias", Axes(unit=0, input=None)),
        (nn.Conv2d(2, 3, 1), "weight", Axes(unit=0, input=1)),
        (nn.ConvTranspose1d(2, 3, 1), "weight", Axes(unit=1, input=0)),
        (nn.ConvTranspose2d(2, 3, 1), "weight", Axes(unit=1, input=0)),
        (nn.ConvTranspose3d(2, 3, 1), "weight", Axes(unit=1, input=0)),
        (nn.ConvTranspose2d(2, 3, 1), "bias", Axes(unit=0, input=None)),
        (nn.LSTM(2, 3), "weight_ih_l0", Axes(unit=0, input=1)),
        (nn.BatchNorm1d(3), "weight", Axes(unit=0, input=None)),
    ],
)
def test_axes_of_known_modules_are_literal(module: nn.Module, name: str, expected: Axes) -> None:
    assert axes_of(module, name) == all_targets(module)[name].axes == expected


class Stacked(nn.Module):
    parameter_axes = {"weight": Axes(member=0, unit=2, input=1), "bias": Axes(member=0, unit=1, input=None)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, 3))  # (member, in, out)
        self.bias = nn.Parameter(torch.zeros(2, 3))
        self.other = nn.Parameter(torch.zeros(5, 4))


def test_declared_axes_win_over_the_type() -> None:
    targets = all_targets(nn.ModuleDict({"net": Stacked()}))
    assert targets["net.weight"].axes == Stacked.parameter_axes["weight"]
    assert targets["net.bias"].axes == Stacked.parameter_axes["bias"]
    assert targets["net.other"].axes == Axes()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.weight"], [["0.weight", "2.weight", "4.weight"]]),
        (["4.weight", "0.weight"], [["4.weight"], ["0.weight"]]),
        (["[02].weight", "?.bias"], [["0.weight", "2.weight"], ["0.bias", "2.bias", "4.bias"]]),
        (["2.*"], [["2.weight", "2.bias"]]),
        ([], []),
    ],
)
def test_patterns_find_the_literal_names_in_the_modules_order(patterns: list[str], expected: list[list[str]]) -> None:
    net = mlp()
    found = resolve(net, patterns)
    assert list(found) == patterns
    assert [names(targets) for targets in found.values()] == expected
    parameters = dict(net.named_parameters())
    assert all(t.parameter is parameters[t.name] for targets in found.values() for t in targets)


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(ValueError, match=r"'\*\.Weight' matches no parameter"):
        resolve(mlp(), ["*.Weight"])


def test_an_unmatched_pattern_raises_with_the_close_names_and_no_others() -> None:
    net = nn.ModuleDict({"encoder": nn.Linear(2, 3), "z": nn.Conv1d(1, 1, 1)})
    with pytest.raises(ValueError, match=r"targets: 'encodr\.weight' matches no parameter") as error:
        resolve(net, ["encodr.weight"])
    assert "encoder.weight" in str(error.value)
    assert "z.bias" not in str(error.value)


def test_a_pattern_close_to_nothing_raises_with_the_first_names() -> None:
    with pytest.raises(
        ValueError, match=r"'qqqqqqqqqqqq' matches no parameter; there are 0\.weight, 0\.bias, 2\.weight"
    ):
        resolve(mlp(), ["qqqqqqqqqqqq"])
    with pytest.raises(ValueError, match="there are none"):
        resolve(nn.ReLU(), ["weight"])


def test_two_patterns_on_one_parameter_raise_with_both() -> None:
    with pytest.raises(ValueError, match=r"'2\.weight' is matched by both '\*\.weight' and '2\.\*'"):
        resolve(mlp(), ["*.weight", "2.*"])


def test_a_lazy_parameter_raises_by_name_only_if_it_is_a_target() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    assert names(resolve(net, ["1.weight"])["1.weight"]) == ["1.weight"]
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        resolve(net, ["*.weight"])
    net(torch.zeros(1, 2))
    assert names(resolve(net, ["*.weight"])["*.weight"]) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("wanted", "n", "expected"),
    [(0.25, 8, 2), (0.25, 10, 3), (0.5, 5, 3), (0.1, 5, 1), (0.001, 10, 1), (0.999, 10, 10), (1, 10, 1), (10, 10, 10)],
)
def test_what_should_remain_is_literal(wanted: int | float, n: int, expected: int) -> None:
    kept = n_keep(wanted, n, "w")
    assert kept == expected
    assert isinstance(kept, int)


@given(
    density=st.floats(0, 1, exclude_min=True, exclude_max=True, allow_subnormal=False),
    n=st.integers(1, 10**6),
)
def test_a_density_keeps_the_nearest_count_but_at_least_one(density: float, n: int) -> None:
    kept = n_keep(density, n, "w")
    assert 1 <= kept <= n
    assert abs(kept - density * n) <= 0.5 + 1e-9 or (kept == 1 and density * n < 1)


@pytest.mark.parametrize("density", [0.0, 1.0, 1.5, -0.2, float("nan")])
def test_a_density_out_of_range_raises_with_name_value_and_range(density: float) -> None:
    with pytest.raises(ValueError, match=rf"'net\.w' is {density}; allowed is a float in \(0, 1\)"):
        n_keep(density, 10, "net.w")


@pytest.mark.parametrize("count", [0, -3, 11])
def test_a_count_out_of_range_raises_with_name_value_and_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} should remain of 'net\.w', which has 10; allowed is 1 to 10"):
        n_keep(count, 10, "net.w")


def test_the_second_name_of_a_tied_weight_is_refused_with_the_first() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"targets: '1\.weight' is tied to '0\.weight'; use that name"):
        resolve(net, ["1.weight"])
