import itertools
import json
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_cpna import Axes, BudgetReport, Graph, LayerReport, Masks, SparseLinear, Sparsity, SparsityReport, trace
from lightning_cpna.graph import Layer
from lightning_cpna.report import effective_masks, feeds_something, live_mask, live_units, sparsity_report
from lightning_cpna.targets import Target, all_targets

# 1 lives. Units are rows, features columns.
FIRST = [  # 4 features, 5 units
    [1, 1, 0, 0],
    [0, 0, 0, 0],
    [0, 1, 0, 0],
    [1, 0, 0, 0],
    [0, 1, 0, 0],
]
LAST = [  # 5 units, 2 outputs
    [1, 1, 0, 0, 1],
    [0, 0, 0, 0, 1],
]


WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def masked(net: nn.Module, live: dict[str, list[list[int]]]) -> Masks:
    masks, parameters = Masks(), dict(net.named_parameters())
    for name, rows in live.items():
        masks.add(name, parameters[name])
        masks[name].remove_(torch.tensor(rows).view(parameters[name].shape) == 0)
    return masks


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def traced() -> tuple[nn.Sequential, Graph]:
    net = mlp()
    return net, trace(net, torch.randn(3, 4))


def test_counts_equal_those_of_a_hand_drawn_network() -> None:
    net, graph = traced()
    budgets = [BudgetReport("2.weight", "connection", 4, 4), BudgetReport("*.weight", "unit", 5, 5)]
    report = sparsity_report(masked(net, {"0.weight": FIRST, "2.weight": LAST}), all_targets(net), graph, budgets)
    # Units 0 and 4 have both sides; unit 1 has no input, units 2 and 3 no output.
    assert report.layers == (
        LayerReport("0.weight", 5, 20, None, live_units=2, units=5, live_features=2, features=4, effective=3),
        LayerReport("2.weight", 4, 10, 4, live_units=2, units=2, live_features=3, features=5, effective=3),
    )
    assert [layer.density for layer in report.layers] == [5 / 20, 4 / 10]
    assert (report.connections, report.size, report.density) == (9, 30, 9 / 30)


def test_the_report_says_what_should_remain_of_every_budget() -> None:
    net = mlp()
    sparsity = Sparsity(net)
    sparsity.add_budgets(net, {"2.weight": 4})
    sparsity.add_budgets(net, {"0.weight": 2}, "feature")
    sparsity.add_budgets(net, {"*.weight": 0.3}, scope="shared")
    report = sparsity.report()
    assert [layer.target for layer in report.layers] == [4, None]
    assert report.as_dict()["budgets"] == [
        {"label": "2.weight", "granularity": "connection", "remaining": 10, "target": 4},
        {"label": "0.weight", "granularity": "feature", "remaining": 4, "target": 2},
        {"label": "*.weight", "granularity": "connection", "remaining": 30, "target": 9},
    ]
    assert "0.weight: 4 features, target 2" in str(report)
    assert "*.weight: 30 connections, target 9" in str(report)
    assert "2.weight: " not in str(report)


def test_the_report_names_budgets_as_they_are_and_forgets_those_of_other_masks() -> None:
    net = mlp()
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"[02].weight": 4}, scope="shared")
    assert "[02].weight: 30 connections, target 4" in str(sparsity.report())
    sparsity.masks = masked(net, {"2.weight": LAST})
    assert sparsity.report().budgets == ()
    assert sparsity.n_remaining(budget) == 20 + 4


def test_the_report_names_layers_as_they_are() -> None:
    net = nn.ModuleDict({"[bold]": nn.Linear(2, 1, bias=False)})
    sparsity = Sparsity(net)
    sparsity.add_budgets(net, {"*.weight": 1})
    assert "[bold].weight" in str(sparsity.report())


def test_scales_of_normalisations_can_share_a_budget_but_not_with_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.BatchNorm1d(3))
    (budget,) = Sparsity(net).add_budgets(net, {"[13].weight": 4}, scope="shared")
    assert budget.names == ("1.weight", "3.weight")
    with pytest.raises(ValueError, match=r"targets: '\*.weight' matches '1.weight' too, which is no weight of a layer"):
        Sparsity(net).add_budgets(net, {"*.weight": 4})


def test_without_a_trace_units_live_by_their_inputs_alone() -> None:
    net = mlp()
    first, last = sparsity_report(masked(net, {"0.weight": FIRST, "2.weight": LAST}), all_targets(net)).layers
    assert (first.live_units, last.live_units) == (4, 2)


def test_a_layer_without_a_mask_is_alive_and_not_reported() -> None:
    net, graph = traced()
    report = sparsity_report(masked(net, {"0.weight": FIRST}), all_targets(net), graph)
    assert [(layer.name, layer.live_units) for layer in report.layers] == [("0.weight", 4)]
    report = sparsity_report(masked(net, {"2.weight": LAST}), all_targets(net), graph)
    assert [(layer.name, layer.live_units) for layer in report.layers] == [("2.weight", 2)]
    assert bool(live_mask(Masks(), all_targets(net)["0.weight"]).all())


def test_live_is_the_masks_bit_and_not_a_value_other_than_zero() -> None:
    net, graph = traced()
    masks = masked(net, {"0.weight": FIRST, "2.weight": LAST})
    expected = sparsity_report(masks, all_targets(net), graph)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert sparsity_report(masks, all_targets(net), graph) == expected


def test_which_units_live_is_literal() -> None:
    net, graph = traced()
    masks, targets = masked(net, {"0.weight": FIRST, "2.weight": LAST}), all_targets(net)
    assert live_units(masks, graph, targets, "0.weight").tolist() == [[True, False, False, False, True]]
    assert feeds_something(masks, graph, targets, "0.weight").tolist() == [[True, True, False, False, True]]
    assert live_units(masks, graph, targets, "2.weight").tolist() == [[True, True]]
    assert feeds_something(masks, graph, targets, "2.weight").tolist() == [[True, True]]


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.6), st.sampled_from([None, *WEIGHTS]))
def test_effective_connections_are_those_of_all_paths_by_brute_force(
    seed: int, density: float, whole: str | None
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(seed)
    live = {name: torch.rand(net.get_parameter(name).shape, generator=generator) < density for name in WEIGHTS}
    if whole is not None:  # it has no mask
        live[whole][:] = True
    a, b, c = live.values()
    on_a_path = {name: torch.zeros_like(mask) for name, mask in live.items()}
    for i, j, k, m in itertools.product(range(3), range(4), range(3), range(2)):
        if a[j, i] and b[k, j] and c[m, k]:
            on_a_path["0.weight"][j, i] = on_a_path["2.weight"][k, j] = on_a_path["4.weight"][m, k] = True
    masks = masked(net, {name: mask.int().tolist() for name, mask in live.items() if name != whole})
    found = effective_masks(masks, trace(net, torch.rand(5, 3)), all_targets(net))
    assert set(found) == set(masks)
    for name, mask in found.items():
        assert torch.equal(mask, on_a_path[name]), name


@pytest.mark.parametrize(("dead", "other"), [("0.weight", "4.weight"), ("4.weight", "0.weight")])
def test_nothing_is_effective_where_no_path_passes_a_layer_without_a_mask(dead: str, other: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    live = {dead: torch.zeros_like(net.get_parameter(dead)), other: torch.ones_like(net.get_parameter(other))}
    masks = masked(net, {name: mask.int().tolist() for name, mask in live.items()})
    found = effective_masks(masks, trace(net, torch.rand(5, 3)), all_targets(net))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {dead: 0, other: 0}


def test_a_sparse_layer_without_a_mask_counts_as_the_masked_dense_one() -> None:
    live = torch.zeros(3, 4, dtype=torch.bool)
    live[0, 1] = live[2, 1] = True
    first, middle, last = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 1)
    dense = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
    sparse = nn.Sequential(first, nn.ReLU(), SparseLinear.from_dense(middle, live), nn.ReLU(), last)
    found = []
    for net in (dense, sparse):
        whole = {name: torch.ones_like(net.get_parameter(name)).int().tolist() for name in ("0.weight", "4.weight")}
        masks = masked(net, whole | ({"2.weight": live.int().tolist()} if net is dense else {}))
        found.append(effective_masks(masks, trace(net, torch.rand(5, 2)), all_targets(net)))
    assert set(found[1]) == {"0.weight", "4.weight"}
    for name, n in {"0.weight": 2, "4.weight": 2}.items():
        assert torch.equal(found[0][name], found[1][name])
        assert int(found[0][name].sum()) == n


def test_what_a_layer_feeds_counts_as_read_where_the_trace_does_not_know_it() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    masks = masked(net, {"0.weight": [[1, 1, 0]] * 4, "2.weight": [[0] * 4] * 2})
    graph = trace(net, torch.rand(5, 3))
    assert graph["0.weight"].lost is not None
    found = effective_masks(masks, graph, all_targets(net))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {"0.weight": 8, "2.weight": 0}


class Joined(nn.Module):
    """Two branches that are joined, and a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 5), nn.Linear(4, 3), nn.Linear(8, 2), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        second = self.b(x).relu()
        return torch.cat([self.c(torch.cat([self.a(x).relu(), second], dim=1)), self.d(second)], dim=1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (
            lambda: nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 3, 2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(27, 2),
            ),
            (2, 8, 8),
        ),
        (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)), (4, 8)),
        (Joined, (4,)),
    ],
)
def test_effective_connections_are_those_with_a_gradient_where_all_is_positive(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    for dense in range(12):  # one of the layers has no mask
        net = make()
        weights = {name: parameter for name, parameter in net.named_parameters() if parameter.ndim > 1}
        whole = list(weights)[dense % len(weights)]
        live = {name: (torch.rand(weight.shape) < 0.25) | (name == whole) for name, weight in weights.items()}
        graph = trace(net, torch.rand(3, *shape))
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(live[name] * (parameter.abs() + 0.1) if name in live else torch.zeros_like(parameter))
        net(torch.rand(3, *shape) + 0.5).sum().backward()
        masks = masked(net, {name: mask.int().flatten(1).tolist() for name, mask in live.items() if name != whole})
        found = effective_masks(masks, graph, all_targets(net))
        assert set(found) == set(masks) == set(weights) - {whole}
        for name, mask in found.items():
            gradient = weights[name].grad
            assert gradient is not None
            assert torch.equal(mask, live[name] & (gradient > 0)), name


class TwoReaders(nn.Module):
    def __init__(self, answers_hidden: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)
        self.answers_hidden = answers_hidden

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.a(x).relu()
        return [self.b(h), self.c(h), *([h] if self.answers_hidden else [])]


@pytest.mark.parametrize(("answers_hidden", "expected"), [(False, 2), (True, 3)])
def test_a_unit_lives_by_any_reader_or_as_an_output(answers_hidden: bool, expected: int) -> None:
    net = TwoReaders(answers_hidden)
    masks = masked(net, {"a.weight": [[1, 1]] * 3, "b.weight": [[1, 0, 0]], "c.weight": [[0, 1, 0]]})
    report = sparsity_report(masks, all_targets(net), trace(net, torch.randn(5, 2)))
    assert report.layers[0].live_units == expected


def test_convolution_units_and_features_are_channels_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1))
    conv = [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]  # (out, in * 2 * 2)
    last = [[0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0]]  # reads one cell of channel 0, none of 1, two of 2
    report = sparsity_report(
        masked(net, {"0.weight": conv, "3.weight": last}), all_targets(net), trace(net, torch.randn(2, 2, 3, 3))
    )
    assert report.layers == (
        LayerReport("0.weight", 6, 24, None, live_units=2, units=3, live_features=2, features=2, effective=5),
        LayerReport("3.weight", 3, 12, None, live_units=1, units=1, live_features=3, features=12, effective=3),
    )


def test_units_that_the_trace_loses_live_by_their_inputs() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    masks = masked(net, {"0.weight": [[1, 0], [0, 0], [0, 1]], "2.weight": [[0, 0, 1]]})
    first, last = sparsity_report(masks, all_targets(net), trace(net, torch.randn(5, 2))).layers
    assert (first.live_units, last.live_features) == (2, 1)


class PartlyLost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.b(h) + self.c(self.norm(h))
        return out


def test_units_with_one_known_reader_and_one_lost_live_by_their_inputs() -> None:
    net = PartlyLost()
    masks = masked(net, {"a.weight": [[1, 0], [0, 0], [0, 1]], "b.weight": [[0, 0, 1]]})
    graph = trace(net, torch.randn(5, 2))
    assert [layer.weight for layer in graph.fed_by("a.weight")] == ["b.weight"]
    assert live_units(masks, graph, all_targets(net), "a.weight").tolist() == [[True, False, True]]


def test_members_of_a_stacked_network_are_counted_together() -> None:
    axes = Axes(member=0, unit=1, input=2)
    parameters = {"first": nn.Parameter(torch.ones(2, 3, 2)), "last": nn.Parameter(torch.ones(2, 1, 3))}
    targets = {name: Target(name, parameter, axes) for name, parameter in parameters.items()}
    graph = Graph(
        [
            Layer("first", None, axes, range(3), torch.full((2,), -1)),
            Layer("last", None, axes, range(3, 4), torch.arange(3), is_output=True),
        ]
    )
    masks = Masks()
    live = {
        "first": torch.tensor([[[1, 0], [1, 0], [0, 0]], [[1, 1], [0, 0], [1, 0]]]),
        "last": torch.tensor([[[0, 1, 1]], [[1, 0, 1]]]),
    }
    for name, parameter in parameters.items():
        masks.add(name, parameter)
        masks[name].remove_(live[name] == 0)
    assert live_units(masks, graph, targets, "first").tolist() == [[False, True, False], [True, False, True]]
    first, last = sparsity_report(masks, targets, graph).layers
    assert first == LayerReport("first", 5, 12, None, live_units=3, units=6, live_features=3, features=4, effective=4)
    assert last == LayerReport("last", 4, 6, None, live_units=2, units=2, live_features=4, features=6, effective=3)


def test_a_masked_bias_has_units_and_one_feature() -> None:
    net = nn.Linear(2, 3)
    report = sparsity_report(masked(net, {"bias": [[1, 0, 1]]}), all_targets(net))
    assert report.layers == (LayerReport("bias", 2, 3, None, live_units=2, units=3, live_features=1, features=1),)


REPORT = SparsityReport(
    (
        LayerReport(
            "net.0.weight", 1234, 98765, 1200, live_units=17, units=64, live_features=42, features=1543, effective=1000
        ),
        LayerReport("net.2.weight", 31, 128, None, live_units=1, units=2, live_features=29, features=64),
    )
)


def test_the_report_as_primitives_is_literal_and_json() -> None:
    assert REPORT.as_dict() == {
        "layers": {
            "net.0.weight": {
                "name": "net.0.weight",
                "connections": 1234,
                "size": 98765,
                "target": 1200,
                "live_units": 17,
                "units": 64,
                "live_features": 42,
                "features": 1543,
                "effective": 1000,
                "density": 1234 / 98765,
            },
            "net.2.weight": {
                "name": "net.2.weight",
                "connections": 31,
                "size": 128,
                "target": None,
                "live_units": 1,
                "units": 2,
                "live_features": 29,
                "features": 64,
                "effective": None,
                "density": 31 / 128,
            },
        },
        "budgets": [],
        "totals": {"connections": 1265, "size": 98893, "density": 1265 / 98893},
    }
    assert json.loads(json.dumps(REPORT.as_dict())) == REPORT.as_dict()


def test_the_printed_report_has_a_line_a_layer_with_its_numbers() -> None:
    lines = str(REPORT).splitlines()
    wanted = {
        "net.0.weight": "1,234 / 98,765 1,000 1,200 0.01249 17 / 64 42 / 1,543",
        "net.2.weight": "31 / 128 0.2422 1 / 2 29 / 64",
        "total": "1,265 / 98,893 0.01279",
    }
    for name, numbers in wanted.items():
        [line] = [line for line in lines if name in line]
        assert " ".join(re.sub(r"[^\w.,/ ]", " ", line).split()) == f"{name} {numbers}"


def test_an_empty_report_is_dense() -> None:
    report = sparsity_report(Masks(), {})
    assert (report.layers, report.connections, report.size, report.density) == ((), 0, 0, 1.0)
    assert "total" in str(report)


def test_a_grouped_convolution_has_as_many_features_as_channels() -> None:
    net = nn.Conv2d(6, 4, 3, groups=2)  # units 0 and 1 read channels 0 to 2, units 2 and 3 channels 3 to 5
    masks = Masks()
    masks.add("weight", net.weight)
    dead = torch.ones_like(net.weight, dtype=torch.bool)
    dead[0, 1, 2, 2] = dead[1, 1, 0, 0] = dead[3, 1, 0, 0] = False  # channels 1, 1 and 4
    masks["weight"].remove_(dead)
    layer = sparsity_report(masks, all_targets(net)).layers[0]
    assert (layer.live_features, layer.features, layer.live_units, layer.units) == (2, 6, 3, 4)


def test_a_report_without_masks_says_how_to_get_them() -> None:
    assert "infer_masks reads them off its zeros" in " ".join(str(sparsity_report(Masks(), {})).split())
