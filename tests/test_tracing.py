from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from lightning_cpna import Graph, trace
from lightning_cpna.replay import float64_copy, widen
from lightning_cpna.tracing import trace_calls
from tests.helpers import Net


def sources(graph: Graph) -> dict[str, list[int]]:
    return {name: layer.sources.tolist() for name, layer in graph.items()}


IMAGE = torch.randn(2, 1, 3, 3)
ROWS = torch.randn(5, 3)

# Each network: what it is made of, its input, and by hand which global unit feeds each input of its last layer "b".
WIRINGS: dict[str, tuple[nn.Module, Tensor, list[int]]] = {
    "sequential": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), ROWS, [0, 1, 2, 3]),
    "sequence": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 7, 3), [0, 1, 2, 3]),
    "one row": (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(3), [0, 1, 2, 3]),
    "flatten": (
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)),
        IMAGE,
        [0, 0, 0, 0, 1, 1, 1, 1],
    ),
    "view": (
        Net(lambda s, x: s.b(F.relu(s.a(x)).view(x.shape[0], -1)), a=nn.Conv2d(1, 2, 2), b=nn.Linear(8, 1)),
        IMAGE,
        [0, 0, 0, 0, 1, 1, 1, 1],
    ),
    "view of what was pooled": (
        Net(lambda s, x: s.b(F.max_pool2d(s.a(x), 2, 1).view(len(x), -1)), a=nn.Conv2d(1, 3, 1), b=nn.Linear(12, 1)),
        IMAGE,
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
    ),
    "permuted": (
        Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(1, 2, 2), b=nn.Linear(8, 1)),
        IMAGE,
        [0, 1, 0, 1, 0, 1, 0, 1],
    ),
    "channels last": (
        Net(lambda s, x: s.b(s.a(x).movedim(1, -1)), a=nn.Conv2d(1, 2, 2), b=nn.Linear(2, 1)),
        IMAGE,
        [0, 1],
    ),
    "global pool": (
        nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 1)),
        torch.randn(2, 1, 5),
        [0, 1, 2],
    ),
    "mean over space": (
        Net(lambda s, x: s.b(s.a(x).mean(dim=(2, 3))), a=nn.Conv2d(1, 3, 2), b=nn.Linear(3, 1)),
        IMAGE,
        [0, 1, 2],
    ),
    "3d": (
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(2, 1)),
        torch.randn(2, 1, 3, 3, 3),
        [0, 1],
    ),
    "concatenated with the input": (
        Net(lambda s, x: s.b(torch.cat([x, F.relu(s.a(x)), x[:, :1]], dim=1)), a=nn.Linear(3, 2), b=nn.Linear(6, 1)),
        ROWS,
        [-1, -1, -1, 0, 1, -1],
    ),
    "two branches": (
        Net(
            lambda s, x: s.b(torch.cat([s.c(x).relu(), s.a(x).relu()], dim=-1)),
            a=nn.Linear(3, 1),
            c=nn.Linear(3, 2),
            b=nn.Linear(3, 1),
        ),
        ROWS,
        [0, 1, 2],
    ),
    "half of a chunk, reversed": (
        Net(
            lambda s, x: s.b(torch.cat(s.a(x).chunk(2, dim=1)[::-1], dim=1)[:, 1:]),
            a=nn.Linear(3, 4),
            b=nn.Linear(3, 1),
        ),
        ROWS,
        [3, 0, 1],
    ),
    "gathered": (
        Net(lambda s, x: s.b(s.a(x)[:, torch.tensor([2, 0, 0])]), a=nn.Linear(3, 3), b=nn.Linear(3, 1)),
        ROWS,
        [2, 0, 0],
    ),
    "stacked and transposed": (
        Net(
            lambda s, x: s.b(torch.stack([s.a(x), s.a(x) if False else x[:, :2]], dim=1).transpose(1, 2).flatten(1)),
            a=nn.Linear(3, 2),
            b=nn.Linear(4, 1),
        ),
        ROWS,
        [0, -1, 1, -1],
    ),
    "scaled by numbers": (
        Net(lambda s, x: s.b((s.a(x) * 2 / 3).relu().abs()), a=nn.Linear(3, 2), b=nn.Linear(2, 1)),
        ROWS,
        [0, 1],
    ),
    "in place": (
        Net(lambda s, x: s.b(s.a(x).relu_().mul_(2)), a=nn.Linear(3, 2), b=nn.Linear(2, 1)),
        ROWS,
        [0, 1],
    ),
    "activations of every homogeneous kind": (
        nn.Sequential(
            nn.Linear(3, 2),
            nn.LeakyReLU(),
            nn.PReLU(2),
            nn.Dropout(),
            nn.ReLU(inplace=True),
            nn.Identity(),
            nn.Linear(2, 1),
        ),
        ROWS,
        [0, 1],
    ),
    "keyword arguments of linear": (
        Net(
            lambda s, x: F.linear(input=s.a(x), weight=s.b.weight, bias=s.b.bias), a=nn.Linear(3, 2), b=nn.Linear(2, 1)
        ),
        ROWS,
        [0, 1],
    ),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_sources_of_the_last_layer_are_literal_and_nothing_stands_in_the_way(name: str) -> None:
    net, x, expected = WIRINGS[name]
    graph = trace(net, x)
    *others, last = graph.values()
    assert last.sources.tolist() == expected
    assert last.sources.dtype == torch.int64
    assert last.unknown_source is None
    assert last.is_output
    for layer in others:
        assert layer.sources.tolist() == [-1] * 3 if x.ndim < 3 else set(layer.sources.tolist()) <= {-1}
        assert layer.obstacles == []
        assert layer.lost is None
        assert not layer.is_output


def test_layers_are_in_the_order_in_which_they_ran_with_units_counted_on() -> None:
    net = Net(
        lambda s, x: (s.c(h := s.a(x).relu()), s.b(h)),
        b=nn.Linear(4, 2),
        a=nn.Linear(3, 4, bias=False),
        c=nn.Linear(4, 5),
    )
    graph = trace(net, ROWS)
    assert {name: layer.units for name, layer in graph.items()} == {
        "a.weight": range(4),
        "c.weight": range(4, 9),
        "b.weight": range(9, 11),
    }
    assert {name: layer.bias for name, layer in graph.items()} == {
        "a.weight": None,
        "c.weight": "c.bias",
        "b.weight": "b.bias",
    }
    assert [layer.weight for layer in graph.fed_by("a.weight")] == ["c.weight", "b.weight"]
    assert [layer.weight for layer in graph.feeding("b.weight")] == ["a.weight"]
    assert graph.feeding("a.weight") == graph.fed_by("b.weight") == []
    assert len(graph) == 3


def test_columns_name_the_inputs_and_the_unit_that_feeds_each() -> None:
    graph = trace(*WIRINGS["concatenated with the input"][:2])
    inputs, units = graph.columns("b.weight", "a.weight", torch.device("cpu"))
    assert (inputs.tolist(), units.tolist()) == ([3, 4], [0, 1])


@dataclass
class Outputs:
    hidden: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda h, y: (h, y),
        lambda h, y: [y, {"deep": (h,)}],
        lambda h, y: {"hidden": h, "logits": y},
        lambda h, y: Outputs(h, y),
        lambda h, y: (h.detach(), y.softmax(-1)),
        lambda h, y: (h.sum(), y),
        lambda h, y: (torch.cat([h, y], dim=1), None, 3),
    ],
)
def test_every_layer_whose_units_reach_an_output_is_an_output(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    net = Net(lambda s, x: wrap(h := s.a(x).relu(), s.b(h)), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    graph = trace(net, ROWS)
    assert [layer.is_output for layer in graph.values()] == [True, True]
    assert "the units of 'a.weight' are an output of the network" in graph["a.weight"].obstacles


def test_a_hidden_layer_is_no_output() -> None:
    net = Net(lambda s, x: {"logits": s.b(s.a(x).relu())}, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    graph = trace(net, ROWS)
    assert [layer.is_output for layer in graph.values()] == [False, True]


def test_an_output_inside_an_object_that_is_not_looked_into_is_not_taken_for_unread() -> None:
    net = Net(lambda s, x: Normal(s.b(s.a(x).relu()), 1.0), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    layer = trace(net, ROWS)["b.weight"]
    assert layer.is_output or layer.lost is not None


@pytest.mark.parametrize(
    ("between", "width", "obstacle"),
    [
        (nn.BatchNorm1d(4), 4, "BatchNorm1d '1' (batch_norm) does not scale with its input"),
        (nn.GELU(), 4, "GELU '1' (gelu) does not scale with its input"),
        (nn.Tanh(), 4, "Tanh '1' (tanh) does not scale with its input"),
        (nn.SiLU(), 4, "SiLU '1' (silu) does not scale with its input"),
        (nn.Sequential(nn.Identity(), nn.ELU()), 4, "ELU '1.1' (elu) does not scale with its input"),
        (Net(lambda s, h: h + 1), 4, "Net '1' (add) does not scale with its input"),
        (Net(lambda s, h: h * -1), 4, "Net '1' (mul) does not scale with its input"),
        (Net(lambda s, h: h.clamp(max=1)), 4, "Net '1' (clamp) does not scale with its input"),
        (Net(lambda s, h: h**2), 4, "Net '1' (pow) does not scale with its input"),
    ],
)
def test_what_keeps_units_apart_but_does_not_scale_is_an_obstacle_by_name(
    between: nn.Module, width: int, obstacle: str
) -> None:
    graph = trace(nn.Sequential(nn.Linear(3, 4), between, nn.Linear(width, 2)), ROWS)
    assert graph["0.weight"].obstacles == [obstacle]
    assert graph["2.weight"].sources.tolist() == [0, 1, 2, 3]
    assert graph["0.weight"].lost is None


@pytest.mark.parametrize(
    ("between", "width", "reason"),
    [
        (nn.LayerNorm(4), 4, "LayerNorm '1' (layer_norm) mixes units"),
        (nn.Softmax(dim=1), 4, "Softmax '1' (softmax) mixes units"),
        (nn.AvgPool1d(2), 2, "AvgPool1d '1' (avg_pool1d) mixes units"),
        (nn.MaxPool1d(2), 2, "MaxPool1d '1' (max_pool1d) mixes units"),
        (Net(lambda s, h: h.view(-1, 2, 2).amax(dim=2)), 2, "Net '1' (amax) mixes units"),
        (Net(lambda s, h: h.sum(dim=1, keepdim=True)), 1, "Net '1' (sum) mixes units"),
        (Net(lambda s, h: h + h.relu()), 4, "Net '1' (add) mixes units"),
        (Net(lambda s, h: h @ torch.ones(4, 4, dtype=h.dtype)), 4, "Net '1' (matmul) mixes units"),
        (Net(lambda s, h: h.view(-1, 2)), 2, "units of 0.weight share inputs of '2.weight'"),
    ],
)
def test_what_mixes_units_loses_them_by_name(between: nn.Module, width: int, reason: str) -> None:
    graph = trace(nn.Sequential(nn.Linear(3, 4), between, nn.Linear(width, 2)), torch.randn(8, 3))
    first, last = graph.values()
    assert first.lost == reason
    assert reason in first.obstacles
    assert last.unknown_source == reason
    assert last.sources.tolist() == [-1] * width


def attend(net: Any, x: Tensor) -> Any:
    h = net.a(x)
    return net.b(net.attention(h, h, h)[0])


@pytest.mark.parametrize(
    ("net", "x", "reason"),
    [
        (
            Net(lambda s, x: s.b(s.lstm(s.a(x))[0]), a=nn.Linear(3, 4), lstm=nn.LSTM(4, 4), b=nn.Linear(4, 2)),
            torch.randn(2, 5, 3),
            "LSTM 'lstm' (lstm)",
        ),
        (
            Net(lambda s, x: s.b(s.gru(s.a(x))[1][0]), a=nn.Linear(3, 4), gru=nn.GRU(4, 4), b=nn.Linear(4, 2)),
            torch.randn(2, 5, 3),
            "GRU 'gru' (gru)",
        ),
        (
            Net(attend, a=nn.Linear(3, 4), attention=nn.MultiheadAttention(4, 2), b=nn.Linear(4, 2)),
            torch.randn(2, 5, 3),
            "MultiheadAttention 'attention'",
        ),
        (
            Net(
                lambda s, x: s.b(s.t(s.a(x))),
                a=nn.Linear(3, 4),
                t=nn.TransformerEncoderLayer(4, 2, 8),
                b=nn.Linear(4, 2),
            ),
            torch.randn(2, 5, 3),
            "MultiheadAttention 't.self_attn'",
        ),
        (
            Net(
                lambda s, x: s.b(s.up(s.a(x)).flatten(1)),
                a=nn.Conv1d(1, 2, 2),
                up=nn.ConvTranspose1d(2, 2, 2),
                b=nn.Linear(6, 2),
            ),
            torch.randn(2, 1, 3),
            "ConvTranspose1d 'up'",
        ),
    ],
)
def test_what_is_no_layer_of_ours_is_an_unknown_source_by_name(net: nn.Module, x: Tensor, reason: str) -> None:
    graph = trace(net, x)
    unknown = graph["b.weight"].unknown_source
    assert unknown is not None
    assert reason in unknown
    assert graph["a.weight"].lost is not None
    assert graph["a.weight"].obstacles != []


def test_weights_that_read_the_input_without_being_a_layer_are_an_unknown_source() -> None:
    net = Net(lambda s, x: s.b(s.lstm(x)[0]), lstm=nn.LSTM(3, 4), b=nn.Linear(4, 2))
    assert trace(net, torch.randn(2, 5, 3))["b.weight"].unknown_source == "LSTM 'lstm' (lstm) mixes units"


def test_a_layer_whose_weight_is_computed_is_an_unknown_source() -> None:
    net = Net(lambda s, x: s.b(F.linear(x, s.a.weight * 2).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    graph = trace(net, ROWS)
    assert list(graph) == ["b.weight"]
    assert graph["b.weight"].unknown_source == "Net '' (linear) mixes units"


def test_an_embedding_is_an_input_like_any_other() -> None:
    net = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = trace(net, torch.randint(9, (5,)))
    assert sources(graph) == {"1.weight": [-1] * 3, "3.weight": [0, 1, 2, 3]}
    assert graph["1.weight"].unknown_source is None


def test_a_grouped_convolution_loses_what_feeds_it_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = trace(net, IMAGE)
    assert graph["0.weight"].lost == graph["2.weight"].unknown_source == "Conv2d '2' is grouped"
    assert graph["2.weight"].sources.tolist() == [-1]
    assert graph["4.weight"].sources.tolist() == [4, 5, 6, 7]


def test_a_layer_used_twice_in_a_row_is_lost_by_name_and_so_is_what_feeds_it() -> None:
    net = Net(
        lambda s, x: s.b(s.twice(s.twice(s.a(x).relu()).relu()).relu()),
        a=nn.Linear(3, 4),
        twice=nn.Linear(4, 4),
        b=nn.Linear(4, 2),
    )
    graph = trace(net, ROWS)
    for name in ("a.weight", "twice.weight"):
        assert graph[name].lost == "'twice.weight' is used more than once"
        assert graph[name].obstacles == ["'twice.weight' is used more than once"]
    assert graph["twice.weight"].unknown_source == "'twice.weight' is used more than once"
    assert graph.feeding("twice.weight") == []
    assert [layer.weight for layer in graph.feeding("b.weight")] == ["twice.weight"]


def siamese() -> nn.Module:
    return Net(
        lambda s, x, y: (s.b(s.twin(x).relu()), s.c(s.twin(y).relu())),
        twin=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
        c=nn.Linear(4, 2),
    )


@pytest.mark.parametrize("reader", ["b.weight", "c.weight"])
def test_each_reader_of_a_layer_used_twice_knows_who_feeds_it_or_why_not(reader: str) -> None:
    graph = trace(siamese(), ROWS, ROWS)
    unknown = graph[reader].unknown_source
    feeds = [layer.weight for layer in graph.feeding(reader)]
    assert feeds == ["twin.weight"] or (unknown is not None and "'twin.weight' is used more than once" in unknown)
    assert graph["twin.weight"].lost == "'twin.weight' is used more than once"


def test_what_is_written_into_a_tensor_is_not_taken_for_the_networks_input() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        joined = torch.zeros(len(x), 6, dtype=x.dtype)
        joined[:, :4] = net.a(x).relu()
        joined[:, 4:] = x[:, :2]
        out: Tensor = net.b(joined)
        return out

    graph = trace(Net(forward, a=nn.Linear(3, 4), b=nn.Linear(6, 2)), ROWS)
    assert graph["b.weight"].unknown_source is not None
    assert graph["a.weight"].lost is not None


@pytest.mark.parametrize("cast", [lambda x: x.float(), lambda x: x.to(torch.float32)])
def test_a_forward_that_casts_to_float32_is_traced_all_the_same(cast: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda s, x: s.b(s.a(cast(x)).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert sources(trace(net, ROWS)) == {"a.weight": [-1] * 3, "b.weight": [0, 1, 2, 3]}


def test_arguments_by_position_and_keyword_are_passed_on() -> None:
    net = Net(
        lambda s, x, *, mask, flag: s.b(s.a(x).relu()) * mask if flag else None, a=nn.Linear(3, 4), b=nn.Linear(4, 2)
    )
    assert len(trace(net, ROWS, mask=torch.ones(5, 1), flag=True)) == 2


def test_calls_of_two_parts_make_one_graph_with_full_names() -> None:
    net = nn.ModuleDict(
        {
            "left": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
            "right": nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1)),
        }
    )
    graph = trace_calls(net, [("left", ((ROWS,), {})), ("right", ((torch.randn(5, 2),), {}))])
    assert sources(graph) == {
        "left.0.weight": [-1] * 3,
        "left.2.weight": [0, 1, 2, 3],
        "right.0.weight": [-1] * 2,
        "right.2.weight": [6, 7, 8, 9, 10],
    }
    assert [layer.is_output for layer in graph.values()] == [False, True, False, True]
    assert graph["left.0.weight"].obstacles == ["Tanh 'left.1' (tanh) does not scale with its input"]
    assert graph["left.0.weight"].bias == "left.0.bias"


def test_a_weight_that_two_calls_share_goes_by_its_first_name_and_is_used_more_than_once() -> None:
    encoder, decoder = nn.Linear(3, 4), nn.Linear(3, 4)
    decoder.weight = encoder.weight
    net = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    graph = trace_calls(net, [("encoder", ((ROWS,), {})), ("decoder", ((ROWS,), {}))])
    assert list(graph) == ["encoder.weight"]
    assert graph["encoder.weight"].lost == "'encoder.weight' is used more than once"


def test_tracing_leaves_the_module_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).bfloat16()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parameters, random = list(net.parameters()), torch.get_rng_state()
    trace(net, ROWS.bfloat16())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(old is new for old, new in zip(parameters, net.parameters(), strict=True))
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in net.parameters())
    assert all(part.training for part in net.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_compiled_part_is_traced_uncompiled_under_its_own_names() -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    compiled: Any = torch.compile(body, backend="eager")
    net = nn.Sequential(compiled, nn.Linear(4, 2))
    assert sources(trace(net, ROWS)) == {"0.0.weight": [-1] * 3, "1.weight": [0, 1, 2, 3]}
    whole: Any = torch.compile(nn.Sequential(nn.Linear(3, 4)), backend="eager")
    assert list(trace(whole, ROWS)) == ["0.weight"]


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        self.seen.append(out)
        return out


@pytest.mark.parametrize("prefix", ["", "net"])
def test_a_module_that_keeps_its_activations_is_traced_all_the_same(prefix: str) -> None:
    module = Remembering()
    module(ROWS)  # what it keeps has a gradient function, so that it cannot simply be copied
    graph = trace_calls(module, [(prefix, ((ROWS,), {}))])
    assert sources(graph) == {"net.0.weight": [-1] * 3, "net.2.weight": [0, 1, 2, 3]}
    assert len(module.seen) == 1


def never(*args: Any) -> Any:
    raise AssertionError(args)


@pytest.mark.parametrize("place", ["_compiled_call_impl", "forward"])
def test_a_part_compiled_in_place_is_traced_uncompiled(place: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    setattr(net[0], place, never)
    assert sources(trace(net, ROWS)) == {"0.weight": [-1] * 3, "1.weight": [0, 1, 2, 3]}
    with pytest.raises(AssertionError):
        net(ROWS)


def test_the_float64_copy_is_a_copy_in_float64_and_the_modules_own_mode_without_gradients() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with float64_copy(net) as twin:
        assert all(p.dtype == torch.float64 for p in twin.parameters())
        assert all(part.training for part in twin.modules())
        assert not torch.is_grad_enabled()
        next(twin.parameters()).zero_()
    assert torch.is_grad_enabled()
    assert next(net.parameters()).dtype == torch.float32
    assert int(next(net.parameters()).count_nonzero()) == 12


def test_widening_touches_float_tensors_only() -> None:
    integers, mask = torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.bool)
    (x, n, rest), kwargs = widen(((ROWS.half(), integers, {"deep": [ROWS, 3]}), {"mask": mask, "name": "x"}))
    assert x.dtype == rest["deep"][0].dtype == torch.float64
    assert n is integers
    assert kwargs["mask"] is mask
    assert (rest["deep"][1], kwargs["name"]) == (3, "x")


def test_the_float64_copy_of_many_buffers_mixes_up_none() -> None:
    net = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(20)))
    for i, norm in enumerate(net):
        norm.running_mean.fill_(i)  # type: ignore[operator]
    with float64_copy(net) as twin:
        assert [float(norm.running_mean[0]) for norm in twin] == list(range(20))  # type: ignore[attr-defined]


def test_a_reader_that_only_training_runs_is_seen() -> None:
    net = Net(
        lambda s, x: (h := s.a(x).relu(), s.b(h), s.c(h) if s.training else None)[1:],
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 2),
        c=nn.Linear(4, 2),
    )
    assert [layer.weight for layer in trace(net, ROWS).fed_by("a.weight")] == ["b.weight", "c.weight"]
