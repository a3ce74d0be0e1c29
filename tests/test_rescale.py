import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cpna import Axes, Graph, Score, ScoreInputs, rescale_, trace
from lightning_cpna.graph import Layer
from lightning_cpna.rescale import rescalable, verify_rescaling
from lightning_cpna.targets import all_targets
from tests.helpers import Net


@dataclass(frozen=True)
class Case:
    net: nn.Module
    shape: tuple[int, ...]
    targets: list[str]
    producers: list[str]


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def with_dead_units() -> nn.Module:
    net = mlp(4, 5, 3)
    with torch.no_grad():
        net.get_parameter("0.weight")[1] = 0  # feeds on nothing, its bias still does
        net.get_parameter("0.weight")[3] = 0
        net.get_parameter("0.bias")[3] = 0
    return net


def functional(net: Any, x: Tensor) -> dict[str, Tensor]:
    h = F.relu(F.linear(x, net.a.weight, net.a.bias))
    return {"logits": net.b(F.leaky_relu(h, 0.1)), "scaled": net.c(h / 3)}


CASES: dict[str, Callable[[], Case]] = {
    "one hidden layer": lambda: Case(mlp(4, 5, 3), (6, 4), ["2.weight"], ["0.weight"]),
    "three hidden layers": lambda: Case(
        mlp(4, 6, 5, 7, 2), (6, 4), ["2.weight", "4.weight", "6.weight"], ["0.weight", "2.weight", "4.weight"]
    ),
    "only the middle of three": lambda: Case(mlp(4, 6, 5, 7, 2), (6, 4), ["4.weight"], ["2.weight"]),
    "no biases": lambda: Case(mlp(4, 6, 5, bias=False), (6, 4), ["2.weight"], ["0.weight"]),
    "dead units": lambda: Case(with_dead_units(), (6, 4), ["2.weight"], ["0.weight"]),
    "leaky, parametric, dropped": lambda: Case(
        nn.Sequential(
            *[nn.Linear(4, 5), nn.LeakyReLU(0.3), nn.Linear(5, 6), nn.PReLU(6), nn.Dropout(), nn.Linear(6, 2)]
        ),
        (6, 4),
        ["2.weight", "5.weight"],
        ["0.weight", "2.weight"],
    ),
    "conv, pooled, flattened": lambda: Case(
        nn.Sequential(
            *[nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten()],
            nn.Linear(12, 2),
        ),
        (3, 2, 8, 8),
        ["3.weight", "6.weight"],
        ["0.weight", "3.weight"],
    ),
    "conv1d, averaged": lambda: Case(
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 2)),
        (3, 2, 9),
        ["4.weight"],
        ["0.weight"],
    ),
    "conv3d": lambda: Case(
        nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(3, 2, 1)),
        (2, 1, 5, 5, 5),
        ["3.weight"],
        ["0.weight"],
    ),
    "strided and padded conv": lambda: Case(
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, dilation=2, padding=2)),
        (2, 2, 7, 7),
        ["2.weight"],
        ["0.weight"],
    ),
    "depthwise conv as the first layer": lambda: Case(
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        (2, 3, 5, 5),
        ["2.weight"],
        ["0.weight"],
    ),
    "two readers of one layer": lambda: Case(
        Net(lambda s, x: (s.b(h := s.a(x).relu()), s.c(h)), a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(5, 3)),
        (6, 4),
        ["b.weight"],
        ["a.weight"],
    ),
    "two branches beside the input": lambda: Case(
        Net(
            lambda s, x: s.c(torch.cat([s.a(x).relu(), x, s.b(x).relu()], dim=1)),
            a=nn.Linear(4, 5),
            b=nn.Linear(4, 3),
            c=nn.Linear(12, 2),
        ),
        (6, 4),
        ["c.weight"],
        ["a.weight", "b.weight"],
    ),
    "functional, answering a dict": lambda: Case(
        Net(functional, a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(5, 3)),
        (6, 4),
        ["b.weight", "c.weight"],
        ["a.weight"],
    ),
    "permuted and viewed": lambda: Case(
        Net(
            lambda s, x: s.b(F.relu(s.a(x)).permute(0, 2, 3, 1).reshape(len(x), -1)),
            a=nn.Conv2d(1, 3, 2),
            b=nn.Linear(12, 2),
        ),
        (4, 1, 3, 3),
        ["b.weight"],
        ["a.weight"],
    ),
    "a unit read twice": lambda: Case(
        Net(lambda s, x: s.b(torch.cat([h := s.a(x).relu(), h[:, :2]], dim=1)), a=nn.Linear(4, 3), b=nn.Linear(5, 2)),
        (6, 4),
        ["b.weight"],
        ["a.weight"],
    ),
    "sequences": lambda: Case(mlp(4, 5, 3), (2, 7, 4), ["2.weight"], ["0.weight"]),
}


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(net(x)) if isinstance(leaf, Tensor)]


def prepared(name: str) -> tuple[Case, Tensor, Graph]:
    case = CASES[name]()
    case.net.double().eval()
    x = torch.randn(case.shape, dtype=torch.float64)
    return case, x, trace(case.net, x)


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_to_float64_precision_and_unit_norms_become_one(name: str) -> None:
    case, x, graph = prepared(name)
    producers = rescalable(graph, case.targets)
    assert producers == case.producers
    before, old = outputs(case.net, x), copy.deepcopy(case.net.state_dict())
    rescale_(dict(case.net.named_parameters()), graph, producers)
    for expected, actual in zip(before, outputs(case.net, x), strict=True):
        assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-9
    for producer in producers:
        dead = old[producer].flatten(1).count_nonzero(dim=1) == 0
        norms = case.net.get_parameter(producer).detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, (~dead).double(), rtol=1e-12, atol=0)
        assert not torch.equal(case.net.get_parameter(producer), old[producer])


@pytest.mark.parametrize("name", CASES)
def test_verifying_passes_and_leaves_the_module_as_it_is(name: str) -> None:
    case, x, graph = prepared(name)
    case.net.float().train()
    before = copy.deepcopy(case.net.state_dict())
    verify_rescaling(case.net, [("", ((x.float(),), {}))], graph, case.producers)
    assert all(torch.equal(value, before[key]) for key, value in case.net.state_dict().items())
    assert case.net.training


@pytest.mark.parametrize("order", [[0, 2, 4], [4, 2, 0], [2, 0, 4]])
def test_every_unit_norm_is_one_in_whatever_order_the_layers_are_named(order: list[int]) -> None:
    net = mlp(4, 6, 5, 7, 2).double()
    rescale_(dict(net.named_parameters()), trace(net, torch.randn(6, 4)), [f"{i}.weight" for i in order])
    for i in order:
        norms = net.get_parameter(f"{i}.weight").detach().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


def test_equation_3_by_hand() -> None:
    net = mlp(2, 3, 2).double()
    weights = {
        "0.weight": [[3.0, 4.0], [0.0, 0.0], [0.0, -0.5]],
        "0.bias": [10.0, 7.0, 1.0],
        "2.weight": [[1.0, 2.0, 4.0], [-2.0, 3.0, 0.0]],
        "2.bias": [0.25, 0.5],
    }
    net.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    rescale_(dict(net.named_parameters()), trace(net, torch.randn(3, 2)), ["0.weight"])
    expected = {
        "0.weight": [[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]],
        "0.bias": [2.0, 7.0, 2.0],  # the unit that feeds on nothing keeps its bias
        "2.weight": [[5.0, 2.0, 2.0], [-10.0, 3.0, 0.0]],
        "2.bias": [0.25, 0.5],
    }
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, torch.tensor(expected[name]).double(), rtol=1e-7, atol=0)


def test_rescaling_twice_is_rescaling_once() -> None:
    case, _, graph = prepared("conv, pooled, flattened")
    tensors = dict(case.net.named_parameters())
    rescale_(tensors, graph, case.producers)
    once = copy.deepcopy(case.net.state_dict())
    rescale_(tensors, graph, case.producers)
    for name, value in case.net.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-14, atol=0)


def test_zeros_stay_zero_and_parameters_stay_the_same_leaves() -> None:
    case, _, graph = prepared("three hidden layers")
    tensors = dict(case.net.named_parameters())
    dead = {name: torch.rand_like(p) < 0.3 for name, p in tensors.items()}
    for name, p in tensors.items():
        p.data.masked_fill_(dead[name], 0)
    addresses = [p.data_ptr() for p in tensors.values()]
    rescale_(tensors, graph, case.producers)
    assert all(int(p[dead[name]].count_nonzero()) == 0 for name, p in tensors.items())
    assert all(p.is_leaf and p.requires_grad for p in tensors.values())
    assert [p.data_ptr() for p in tensors.values()] == addresses


def test_no_producers_change_nothing() -> None:
    case, _, graph = prepared("one hidden layer")
    before = copy.deepcopy(case.net.state_dict())
    rescale_(dict(case.net.named_parameters()), graph, [])
    assert all(torch.equal(value, before[name]) for name, value in case.net.state_dict().items())


# Weights of stacked networks, and how a layout is made from (member, unit, input) and (member, unit).
LAYOUTS: dict[str, tuple[Axes, tuple[int, int, int], tuple[int, int]]] = {
    "member, unit, input": (Axes(member=0, unit=1, input=2), (0, 1, 2), (0, 1)),
    "member, input, unit": (Axes(member=0, unit=2, input=1), (0, 2, 1), (0, 1)),
    "input, member, unit": (Axes(member=1, unit=2, input=0), (2, 0, 1), (0, 1)),
    "unit, input, member": (Axes(member=2, unit=0, input=1), (1, 2, 0), (1, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stacked_network_rescales_like_each_member_alone(layout: str) -> None:
    axes, order, bias_order = LAYOUTS[layout]
    members = [mlp(3, 4, 2).double() for _ in range(3)]
    members[1].get_parameter("0.weight").data[2] = 0
    graph = Graph(
        [
            Layer("first", "bias", axes, range(4), torch.full((3,), -1)),
            Layer("last", "last_bias", axes, range(4, 6), torch.arange(4), is_output=True),
        ]
    )
    names = {"first": "0.weight", "bias": "0.bias", "last": "2.weight", "last_bias": "2.bias"}

    def stack() -> dict[str, Tensor]:
        stacked = {
            k: torch.stack([member.get_parameter(name).detach() for member in members]) for k, name in names.items()
        }
        return {k: v.permute(order if v.ndim == 3 else bias_order).contiguous() for k, v in stacked.items()}

    tensors = {name: nn.Parameter(value) for name, value in stack().items()}
    optimizer = torch.optim.SGD(tensors.values(), lr=0.0, momentum=0.9)
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    before = stack()
    rescale_(tensors, graph, ["first"], optimizers=[optimizer], moments="transform")

    x = torch.randn(5, 3)
    for member in members:
        rescale_(dict(member.named_parameters()), trace(member, x), ["0.weight"])
    for name, expected in stack().items():
        torch.testing.assert_close(tensors[name].detach(), expected, rtol=1e-14, atol=0)
        ones = optimizer.state[tensors[name]]["momentum_buffer"]
        gone = before[name] == 0
        scale = torch.where(gone, 1.0, expected / torch.where(gone, 1.0, before[name]))
        torch.testing.assert_close(ones[~gone], (1 / scale)[~gone], rtol=1e-12, atol=0)


def attend(net: Any, x: Tensor) -> Any:
    h = net.a(x)
    return net.b(net.attention(h, h, h)[0])


def residual(net: Any, x: Tensor) -> Any:
    h = net.a(x).relu()
    return net.b(h + net.c(h).relu())


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str, list[str]]] = {
    "batch norm": (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)),
        (6, 4),
        "3.weight",
        ["'0.weight'", "BatchNorm1d '1'"],
    ),
    "batch norm in 2d": (
        nn.Sequential(nn.Conv2d(1, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)),
        (6, 1, 4, 4),
        "3.weight",
        ["'0.weight'", "BatchNorm2d '1'"],
    ),
    "gelu": (mlp(4, 5, 2, activation=nn.GELU), (6, 4), "2.weight", ["'0.weight'", "GELU '1'"]),
    "layer norm": (
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)),
        (6, 4),
        "3.weight",
        ["LayerNorm '1'"],
    ),
    "residual addition": (
        Net(residual, a=nn.Linear(4, 5), c=nn.Linear(5, 5), b=nn.Linear(5, 2)),
        (6, 4),
        "b.weight",
        ["(add) mixes units"],
    ),
    "inside a residual addition": (
        Net(residual, a=nn.Linear(4, 5), c=nn.Linear(5, 5), b=nn.Linear(5, 2)),
        (6, 4),
        "c.weight",
        ["'a.weight'", "(add) mixes units"],
    ),
    "attention": (
        Net(attend, a=nn.Linear(4, 6), attention=nn.MultiheadAttention(6, 2), b=nn.Linear(6, 2)),
        (2, 5, 4),
        "b.weight",
        ["MultiheadAttention 'attention'"],
    ),
    "transformer layer": (
        nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 2)),
        (2, 5, 4),
        "2.weight",
        ["'1.self_attn'"],
    ),
    "depthwise convolution": (
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)),
        (2, 1, 5, 5),
        "2.weight",
        ["Conv2d '2' is grouped"],
    ),
    "grouped convolution": (
        nn.Sequential(nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=2)),
        (2, 1, 5),
        "2.weight",
        ["Conv1d '2' is grouped"],
    ),
    "a reader of a module used twice": (
        Net(lambda s, x: s.b(s.a(s.a(x).relu()).relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 2)),
        (6, 4),
        "b.weight",
        ["'a.weight' is used more than once"],
    ),
    "the first reader of a module used twice": (
        Net(
            lambda s, x: (s.b(s.a(x).relu()), s.c(s.a(x + 1).relu())),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 2),
            c=nn.Linear(4, 2),
        ),
        (6, 4),
        "b.weight",
        ["'a.weight' is used more than once"],
    ),
    "a module used twice": (
        Net(lambda s, x: s.b(s.b(s.a(x).relu()).relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        (6, 4),
        "b.weight",
        ["'b.weight' is used more than once"],
    ),
    "units that are outputs": (
        Net(lambda s, x: (h := s.a(x).relu(), s.b(h)), a=nn.Linear(4, 5), b=nn.Linear(5, 2)),
        (6, 4),
        "b.weight",
        ["the units of 'a.weight' are an output of the network"],
    ),
    "a reader of the input": (mlp(4, 5, 2), (6, 4), "0.weight", ["'0.weight'", "it reads the input of the network"]),
    "a reader of an lstm": (
        Net(lambda s, x: s.b(s.a(x)[0]), a=nn.LSTM(4, 5), b=nn.Linear(5, 2)),
        (2, 6, 4),
        "b.weight",
        ["LSTM 'a'"],
    ),
    "a bias": (mlp(4, 5, 2), (6, 4), "2.bias", ["is no Linear or Conv weight that ran"]),
    "a weight of an lstm": (
        Net(lambda s, x: s.b(s.a(x)[0]), a=nn.LSTM(4, 5), b=nn.Linear(5, 2)),
        (2, 6, 4),
        "a.weight_ih_l0",
        ["is no Linear or Conv weight that ran"],
    ),
    "pooling over units": (
        nn.Sequential(nn.Linear(4, 6), nn.MaxPool1d(2), nn.Linear(3, 2)),
        (6, 4),
        "2.weight",
        ["MaxPool1d '1'"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rescaled_is_refused_by_name_with_the_ways_out(name: str) -> None:
    net, shape, target, reasons = REFUSED[name]
    graph = trace(net, torch.randn(shape))
    with pytest.raises(ValueError, match=r"^normalize: ") as error:
        rescalable(graph, [target])
    for part in [f"'{target}'", *reasons, "normalize=False"]:
        assert part in str(error.value)
    if "score='normalized'" in str(error.value):  # so that must work
        inputs = ScoreInputs(all_targets(net)[target], dict(net.named_parameters()), graph, torch.Generator())
        Score("normalized").check(inputs)
        assert Score("normalized")(inputs).isfinite().all()
    else:
        assert "score='magnitude'" in str(error.value)


def test_one_target_that_cannot_be_served_refuses_them_all() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    graph = trace(net, torch.randn(6, 4))
    assert rescalable(graph, ["2.weight"]) == ["0.weight"]
    with pytest.raises(ValueError, match="Tanh '3'"):
        rescalable(graph, ["2.weight", "4.weight"])


def unseen(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() ** 2)  # no call that a trace could see


def test_verifying_catches_a_reader_that_the_trace_cannot_see() -> None:
    net = Net(
        lambda s, x: s.b(h := s.a(x).relu()) + s.c(unseen(h)), a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(5, 2)
    )
    x = torch.randn(6, 4)
    graph = trace(net, x)
    assert rescalable(graph, ["b.weight"]) == ["a.weight"]
    with pytest.raises(ValueError, match=r"rescaling the units of a\.weight changes the network's output") as error:
        verify_rescaling(net, [("", ((x,), {}))], graph, ["a.weight"])
    assert "normalize=False" in str(error.value)
    assert "score='normalized'" in str(error.value)


def test_verifying_passes_for_a_module_that_keeps_its_activations() -> None:
    net, x = nn.ModuleDict({"net": mlp(4, 5, 3)}), torch.randn(6, 4)
    net.register_buffer("last", net["net"](x), persistent=False)
    graph = trace(mlp(4, 5, 3), x)
    renamed = [Layer(f"net.{n}", f"net.{y.bias}", y.axes, y.units, y.sources) for n, y in graph.items()]
    verify_rescaling(net, [("net", ((x,), {}))], Graph(renamed), ["net.0.weight"])


def test_verifying_catches_an_output_that_was_exactly_zero_before() -> None:
    net = Net(
        lambda s, x: s.b(h := s.a(x).relu()) - s.c(torch.from_numpy(h.numpy())),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 2),
        c=nn.Linear(5, 2),
    )
    net.load_state_dict({k: net.state_dict()[k.replace("c.", "b.")] for k in net.state_dict()})
    x = torch.randn(6, 4)
    assert int(outputs(net, x)[0].count_nonzero()) == 0
    with pytest.raises(ValueError, match="changes the network's output"):
        verify_rescaling(net, [("", ((x,), {}))], trace(net, x), ["a.weight"])


def test_verifying_passes_where_zeros_stay_zeros() -> None:
    net = mlp(4, 5, 3).double()
    torch.nn.init.zeros_(net.get_parameter("2.weight"))
    torch.nn.init.zeros_(net.get_parameter("2.bias"))
    x = torch.randn(6, 4)
    verify_rescaling(net, [("", ((x,), {}))], trace(net, x), ["0.weight"])


@pytest.mark.parametrize("sources", [[1, 2, 3, 4, 0], [0, 1, 2, 3, -1], [0, 0, 0, 0, 0]])
def test_verifying_catches_a_graph_with_one_wrong_wire(sources: list[int]) -> None:
    net, x = mlp(4, 5, 3), torch.randn(6, 4)
    first, last = trace(net, x).values()
    last.sources = torch.tensor(sources)
    with pytest.raises(ValueError, match="more than 1e-9"):
        verify_rescaling(net, [("", ((x,), {}))], Graph([first, last]), ["0.weight"])


def test_verifying_catches_an_activation_that_is_not_homogeneous() -> None:
    net, x = mlp(4, 5, 3, activation=nn.SiLU), torch.randn(6, 4)
    with pytest.raises(ValueError, match="more than 1e-9"):
        verify_rescaling(net, [("", ((x,), {}))], trace(net, x), ["0.weight"])


def test_an_output_that_is_not_finite_is_said_to_be_so() -> None:
    net, x = mlp(4, 5, 3), torch.randn(6, 4)
    graph = trace(net, x)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="output on the first batch is not finite"):
        verify_rescaling(net, [("", ((x,), {}))], graph, ["0.weight"])


def test_verifying_compares_the_calls_of_the_parts_that_were_traced() -> None:
    net = nn.ModuleDict({"good": mlp(4, 5, 3), "bad": mlp(4, 5, 3, activation=nn.Tanh)})
    x = torch.randn(6, 4)
    good, bad = trace(net["good"], x), trace(net["bad"], x)
    renamed = [
        Layer(f"{part}.{layer.weight}", f"{part}.{layer.bias}", layer.axes, layer.units, layer.sources)
        for part, graph in [("good", good), ("bad", bad)]
        for layer in graph.values()
    ]
    verify_rescaling(net, [("good", ((x,), {})), ("bad", ((x,), {}))], Graph(renamed[:2]), ["good.0.weight"])
    with pytest.raises(ValueError, match=r"bad\.0\.weight"):
        verify_rescaling(net, [("good", ((x,), {})), ("bad", ((x,), {}))], Graph(renamed[2:]), ["bad.0.weight"])


def test_a_unit_whose_norm_is_nan_is_skipped() -> None:
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)
    net = nn.Sequential(first, nn.ReLU(), last)
    graph = trace(net, torch.zeros(2, 3))
    first.weight.data[1, 0] = torch.nan
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rescale_(dict(net.named_parameters()), graph, ["0.weight"])
    assert torch.equal(last.weight[:, 1], before["2.weight"][:, 1])
    assert first.bias[1] == before["0.bias"][1]
    torch.testing.assert_close(first.weight.norm(dim=1)[[0, 2, 3]], torch.ones(3))
