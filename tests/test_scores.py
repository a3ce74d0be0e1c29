import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import Axes, Graph, Score, ScoreInputs, trace
from lightning_cpna.graph import Layer
from lightning_cpna.scores import Granularity, ScoreKind
from lightning_cpna.targets import all_targets

Cells = list[list[list[float]]]  # (unit, input, kernel cell)


@dataclass(frozen=True)
class Case:
    """A network, and by hand: each weight as members of nested lists, and for each layer who reads which of its units."""

    net: nn.Module
    graph: Graph
    cells: dict[str, list[Cells]]  # a list of members each
    readers: dict[str, list[tuple[str, list[int | None]]]]  # (reader, for each of its inputs the unit that feeds it)

    def inputs(self, name: str) -> ScoreInputs:
        targets = all_targets(self.net)
        tensors = {n: target.parameter for n, target in targets.items()}
        return ScoreInputs(targets[name], tensors, self.graph, torch.Generator().manual_seed(3))


def cells_of(weight: Tensor) -> Cells:
    listed: Cells = weight.detach().reshape(weight.shape[0], weight.shape[1], -1).tolist()
    return listed


def weights_of(net: nn.Module) -> dict[str, list[Cells]]:
    return {name: [cells_of(p)] for name, p in net.named_parameters() if name.endswith("weight")}


def linear_case() -> Case:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    readers: dict[str, list[tuple[str, list[int | None]]]] = {
        "0.weight": [("2.weight", [0, 1, 2, 3])],
        "2.weight": [("4.weight", [0, 1, 2, 3, 4])],
        "4.weight": [],
    }
    return Case(net, trace(net, torch.randn(6, 3)), weights_of(net), readers)


def conv_case() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    ).double()
    readers: dict[str, list[tuple[str, list[int | None]]]] = {
        "0.weight": [("2.weight", [0, 1, 2])],
        "2.weight": [("5.weight", [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])],  # 2 x 2 cells a channel
        "5.weight": [],
    }
    return Case(net, trace(net, torch.randn(2, 2, 4, 4)), weights_of(net), readers)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 1)
        self.c, self.d = nn.Linear(6, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.a(x).relu(), self.b(x).relu()
        return self.c(torch.cat([b, x, a], dim=1)), self.d(a)


def branching_case() -> Case:
    net = Branches().double()
    readers: dict[str, list[tuple[str, list[int | None]]]] = {
        "a.weight": [("c.weight", [None, None, None, None, 0, 1]), ("d.weight", [0, 1])],
        "b.weight": [("c.weight", [0, None, None, None, None, None])],
        "c.weight": [],
        "d.weight": [],
    }
    return Case(net, trace(net, torch.randn(6, 3)), weights_of(net), readers)


class Stack(nn.Module):
    def __init__(self, axes: Axes, layout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.parameter_axes = {"first": axes, "last": axes}
        self.first = nn.Parameter(layout(torch.randn(3, 4, 2)).clone())
        self.last = nn.Parameter(layout(torch.randn(3, 2, 4)).clone())


def stacked_case(axes: Axes, layout: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]) -> Case:
    net = Stack(axes, layout).double()
    graph = Graph(
        [
            Layer("first", None, axes, range(4), torch.tensor([-1, -1])),
            Layer("last", None, axes, range(4, 6), torch.arange(4), is_output=True),
        ]
    )
    cells = {name: [cells_of(member) for member in undo(p.detach())] for name, p in net.named_parameters()}
    return Case(net, graph, cells, {"first": [("last", [0, 1, 2, 3])], "last": []})


CASES: dict[str, Callable[[], Case]] = {
    "linear": linear_case,
    "conv": conv_case,
    "branches": branching_case,
    "stacked": lambda: stacked_case(Axes(member=0, unit=1, input=2), lambda w: w, lambda w: w),
    "stacked, permuted": lambda: stacked_case(
        Axes(member=1, unit=2, input=0), lambda w: w.permute(2, 0, 1), lambda w: w.permute(1, 2, 0)
    ),
}
LAYERS = [
    *[("linear", f"{i}.weight") for i in (0, 2, 4)],
    *[("conv", f"{i}.weight") for i in (0, 2, 5)],
    *[("branches", f"{name}.weight") for name in "abcd"],
    *[(stack, name) for stack in ("stacked", "stacked, permuted") for name in ("first", "last")],
]
on_every_layer = pytest.mark.parametrize(("case_name", "name"), LAYERS)


def norm(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def brute_outgoing(case: Case, name: str, member: int) -> list[float]:
    units = range(len(case.cells[name][member]))
    if not case.readers[name]:
        return [1.0 for _ in units]
    return [
        norm(
            [
                value
                for reader, owner in case.readers[name]
                for row in case.cells[reader][member]
                for i, cells in enumerate(row)
                if owner[i] == unit
                for value in cells
            ]
        )
        for unit in units
    ]


def brute_feeding(case: Case, name: str, member: int) -> list[float]:
    norms = [1.0] * len(case.cells[name][member][0])
    for producer, readers in case.readers.items():
        for owner in [owner for reader, owner in readers if reader == name]:
            for i, unit in enumerate(owner):
                if unit is not None:
                    norms[i] = norm([value for cells in case.cells[producer][member][unit] for value in cells])
    return norms


def brute_paths(case: Case, name: str, member: int, exponent: float) -> Cells:
    w, v = case.cells[name][member], brute_outgoing(case, name, member)
    c = [norm([x * v[j] for j in range(len(w)) for x in w[j][i]]) for i in range(len(w[0]))]
    return [
        [[abs(x * v[j]) * (c[i] / max(c)) ** exponent for x in cells] for i, cells in enumerate(row)]
        for j, row in enumerate(w)
    ]


def same(scores: Tensor, expected: list[Cells]) -> None:
    values = torch.tensor(expected, dtype=torch.float64)  # (member, unit, input, kernel cell)
    assert scores.shape[:3] == values.shape[:3]
    torch.testing.assert_close(scores.reshape(values.shape), values, rtol=1e-12, atol=0)


@on_every_layer
def test_magnitude_equals_absolute_values_in_loops(case_name: str, name: str) -> None:
    case = CASES[case_name]()
    expected = [[[[abs(x) for x in cells] for cells in row] for row in w] for w in case.cells[name]]
    same(Score("magnitude")(case.inputs(name)), expected)


@on_every_layer
@pytest.mark.parametrize("exponent", [0, 1, 2.5, 12])
def test_path_equals_its_formula_in_loops(case_name: str, name: str, exponent: float) -> None:
    case = CASES[case_name]()
    expected = [brute_paths(case, name, m, exponent) for m in range(len(case.cells[name]))]
    same(Score("path", exponent=exponent)(case.inputs(name)), expected)


@on_every_layer
def test_normalized_equals_weight_times_feeding_norm_in_loops(case_name: str, name: str) -> None:
    case = CASES[case_name]()
    expected = []
    for m, w in enumerate(case.cells[name]):
        norms = brute_feeding(case, name, m)
        expected.append([[[abs(x) * norms[i] for x in cells] for i, cells in enumerate(row)] for row in w])
    same(Score("normalized")(case.inputs(name)), expected)


@on_every_layer
def test_gradient_equals_weight_times_gradient_elementwise(case_name: str, name: str) -> None:
    case = CASES[case_name]()
    inputs = case.inputs(name)
    parameter = inputs.target.parameter
    parameter.grad = torch.randn_like(parameter)
    scores = Score("gradient")(inputs)
    in_place = torch.empty_like(parameter)
    inputs.target.axes.view(in_place).copy_(scores)
    assert torch.equal(in_place, (parameter.detach() * parameter.grad).abs())


def test_normalized_is_the_magnitude_after_equation_3_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    weights = {"0.weight": torch.tensor([[3.0, 4.0], [0.0, 0.5]]), "2.weight": torch.tensor([[1.0, -2.0]])}
    net.load_state_dict({**net.state_dict(), **weights})
    case = Case(net, trace(net, torch.randn(4, 2)), {}, {})
    assert Score("normalized")(case.inputs("2.weight")).tolist() == [[[5.0, 1.0]]]
    assert Score("normalized")(case.inputs("0.weight")).tolist() == [[[3.0, 4.0], [0.0, 0.5]]]
    assert Score("path")(case.inputs("0.weight")).tolist() == [[[3.0, 4.0], [0.0, 1.0]]]
    scores = Score("path", exponent=2)(case.inputs("0.weight"))  # c = (3, sqrt(17))
    torch.testing.assert_close(scores, torch.tensor([[[3 * 9 / 17, 4.0], [0.0, 1.0]]]))


class AlsoOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        return h, self.b(h)


def test_a_unit_that_is_an_output_and_feeds_on_counts_both_by_hand() -> None:
    net = AlsoOutput()
    net.load_state_dict(
        {**net.state_dict(), "a.weight": torch.tensor([[2.0]]), "b.weight": torch.tensor([[2.0], [2.0]])}
    )
    case = Case(net, trace(net, torch.randn(4, 1)), {}, {})
    assert Score("path")(case.inputs("a.weight")).item() == 2 * math.sqrt(1 + 4 + 4)


def test_random_equals_torch_rand_of_the_generator() -> None:
    inputs = linear_case().inputs("0.weight")
    expected = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(3))
    first, second = Score("random")(inputs), Score("random")(inputs)
    torch.testing.assert_close(first, expected.double())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["magnitude", "normalized", "path"])
def test_half_precision_weights_score_like_their_values_in_float32(kind: ScoreKind) -> None:
    case = linear_case()
    half, single = case.net.bfloat16(), linear_case().net
    single.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    scores = Score(kind)(replace(case, net=half).inputs("2.weight"))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, Score(kind)(replace(case, net=single.float()).inputs("2.weight")))


STACK = Axes(unit=1, input=2, member=0)


def group_norms(scores: Tensor, granularity: Granularity) -> Tensor:
    return (STACK.sum_of_units if granularity == "unit" else STACK.sum_of_inputs)(scores.square()).sqrt()


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 3, 4), (1, 3, 4, 2, 2), (2, 3, 4, 2)])
@pytest.mark.parametrize("granularity", ["feature", "unit"])
def test_group_scores_equal_norms_in_loops(shape: tuple[int, ...], granularity: Granularity) -> None:
    scores = torch.randn(shape, dtype=torch.float64)
    grouped = group_norms(scores, granularity)
    cells = scores.flatten(3) if scores.ndim > 3 else scores.unsqueeze(3)
    for m, member in enumerate(cells.tolist()):
        units, features = range(shape[1]), range(shape[2])
        expected = (
            [norm([x for j in units for x in member[j][i]]) for i in features]
            if granularity == "feature"
            else [norm([x for i in features for x in member[j][i]]) for j in units]
        )
        assert grouped[m].tolist() == pytest.approx(expected, rel=1e-12)


@on_every_layer
@pytest.mark.parametrize("granularity", ["feature", "unit"])
def test_group_scores_of_every_layer_equal_norms_in_loops(case_name: str, name: str, granularity: Granularity) -> None:
    case = CASES[case_name]()
    grouped = group_norms(Score("path", exponent=3)(case.inputs(name)), granularity)  # (member, group)
    for m in range(len(case.cells[name])):
        paths = brute_paths(case, name, m, 3)
        columns = [[x for row in paths for x in row[i]] for i in range(len(paths[0]))]
        rows = [[x for cells in row for x in cells] for row in paths]
        expected = [norm(values) for values in (columns if granularity == "feature" else rows)]
        assert grouped[m].tolist() == pytest.approx(expected, rel=1e-12)


def test_features_with_a_live_connection_are_literal() -> None:
    live = torch.tensor([[[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]]).bool()  # (1, 3 units, 2 inputs, 2)
    assert (STACK.sum_of_inputs(live) > 0).tolist() == [[True, False]]
    assert (STACK.sum_of_units(live) > 0).tolist() == [[True, False, True]]


def test_values_along_connections_are_literal() -> None:
    like = torch.zeros(1, 2, 3)
    assert STACK.along_inputs(torch.tensor([[1, 0, 1]]), like).expand(1, 2, 3).tolist() == [[[1, 0, 1], [1, 0, 1]]]
    assert STACK.along_units(torch.tensor([[1, 0]]), like).expand(1, 2, 3).tolist() == [[[1, 1, 1], [0, 0, 0]]]
    like = torch.zeros(2, 1, 1, 2)
    assert STACK.along_units(torch.tensor([[1], [0]]), like).expand(2, 1, 1, 2).tolist() == [[[[1, 1]]], [[[0, 0]]]]


def test_an_input_group_of_no_weight_scores_zero_and_a_whole_layer_of_none_no_nan() -> None:
    case = linear_case()
    inputs = case.inputs("2.weight")
    with torch.no_grad():
        inputs.target.parameter[:, 1] = 0
        assert Score("path", exponent=2)(inputs)[0, :, 1].tolist() == [0.0] * 5
        inputs.tensors["4.weight"].zero_()
    assert Score("path", exponent=2)(inputs).tolist() == [[[0.0] * 4] * 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "l1"}, "score is 'l1'; allowed is one of magnitude, normalized, path, gradient, random"),
        ({"kind": "magnitude", "exponent": 2}, "exponent is 2 with kind='magnitude'; allowed is 0, or kind='path'"),
    ],
)
def test_a_bad_argument_raises_with_its_name_and_value(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Score(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["path", "normalized"])
def test_a_score_of_neighbours_without_a_trace_raises_with_the_way_out(kind: ScoreKind) -> None:
    inputs = replace(linear_case().inputs("2.weight"), graph=None)
    with pytest.raises(ValueError, match=rf"'{kind}' .* '2\.weight', which was not traced; use score='magnitude'"):
        Score(kind)(inputs)
    with pytest.raises(ValueError, match=r"'2\.weight', which is no Linear or Conv weight that the trace saw"):
        Score(kind)(replace(inputs, graph=Graph([])))


def test_path_scores_of_units_that_the_trace_loses_raise_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    case = Case(net, trace(net, torch.randn(5, 3)), {}, {})
    with pytest.raises(ValueError, match=r"what the units of '0\.weight' feed, but LayerNorm '1'.*score='magnitude'"):
        Score("path")(case.inputs("0.weight"))
    assert Score("path")(case.inputs("2.weight")).shape == (1, 2, 4)


def test_normalized_scores_of_inputs_from_an_unknown_source_raise_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    case = Case(net, trace(net, torch.randn(5, 3)), {}, {})
    with pytest.raises(ValueError, match=r"'2\.weight'.*LayerNorm '1'"):
        Score("normalized")(case.inputs("2.weight"))
    assert Score("normalized")(case.inputs("0.weight")).shape == (1, 4, 3)


def test_a_missing_gradient_raises_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"'2\.weight' has no gradient.*zero_grad\(\) before the backward"):
        Score("gradient")(linear_case().inputs("2.weight"))


def test_a_function_can_be_a_score_and_sees_the_same_numbers() -> None:
    case = linear_case()
    inputs = case.inputs("2.weight")
    assert torch.equal(inputs.weight[0], inputs.target.parameter.detach())
    assert inputs.outgoing_norm.tolist()[0] == pytest.approx(brute_outgoing(case, "2.weight", 0))
    assert inputs.feeding_norm.tolist()[0] == pytest.approx(brute_feeding(case, "2.weight", 0))


def test_the_group_aware_exponent_of_a_grouped_convolution_is_refused() -> None:
    net = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    graph = trace(net, torch.zeros(2, 4, 3))
    inputs = ScoreInputs(all_targets(net)["0.weight"], {}, graph, torch.Generator())
    Score("path").check(inputs)
    with pytest.raises(ValueError, match=r"exponent is 2\.0, but '0\.weight' is grouped"):
        Score("path", exponent=2.0).check(inputs)


@pytest.mark.parametrize(("case_name", "name"), [layer for layer in LAYERS if not layer[0].startswith("stacked")])
@pytest.mark.parametrize(
    "score",
    [Score("magnitude"), Score("normalized"), Score("path"), Score("path", exponent=3.0), Score("gradient")],
    ids=lambda score: f"{score.kind}-{score.exponent:.0f}",
)
def test_scores_of_listed_connections_are_those_of_all_where_the_others_are_zero(
    case_name: str, name: str, score: Score
) -> None:
    case = CASES[case_name]()
    inputs = case.inputs(name)
    weight = inputs.target.parameter
    dead = torch.rand(weight.shape) < 0.4
    weight.data.masked_fill_(dead, 0.0)
    weight.grad = torch.randn_like(weight)
    cells = (~dead).flatten().nonzero().flatten()
    listed = score(replace(inputs, cells=cells))
    assert listed.shape == cells.shape
    torch.testing.assert_close(listed, score(inputs).flatten()[cells], rtol=1e-12, atol=0)
