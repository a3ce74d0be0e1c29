"""Compact networks: equal outputs, counts against torch-pruning's counter, ONNX and torch.export as oracles of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import Score, Sparsity, compact, cost_of, load_compact, trace
from lightning_cpna.layers import layers_of
from tests.helpers import Net


def unread(net: nn.Module, name: str, units: list[int], per_unit: int = 1) -> None:
    """Zero the columns of a layer that read some units of the one before it, each through ``per_unit`` inputs."""
    columns = [unit * per_unit + i for unit in units for i in range(per_unit)]
    net.get_parameter(name).data[:, columns] = 0


def mlp() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    unread(net, "2.weight", [0, 3, 4])
    unread(net, "4.weight", [7])
    return net, torch.randn(12, 6), {"0.weight": 3, "2.weight": 1}


def chain_of_deaths() -> tuple[nn.Module, Tensor, dict[str, int]]:
    """Units that feed only dead units are dead."""
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    unread(net, "4.weight", list(range(1, 8)))
    net.get_parameter("2.weight").data[0, 2:] = 0
    return net, torch.randn(12, 6), {"0.weight": 8, "2.weight": 7}


def constants() -> tuple[nn.Module, Tensor, dict[str, int]]:
    """Units that nothing reaches are constants, which go into the next biases, whatever the nonlinearity."""
    net = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 8), nn.Sigmoid(), nn.Linear(8, 3))
    net.get_parameter("0.weight").data[[1, 5]] = 0
    net.get_parameter("2.weight").data[4] = 0
    return net, torch.randn(12, 6), {"0.weight": 2, "2.weight": 1}


def conv_pool_flatten() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(24, 2),
    )  # fmt: skip
    unread(net, "3.weight", [0, 1, 6])
    unread(net, "6.weight", [2, 5], per_unit=4)
    return net, torch.randn(5, 3, 8, 8), {"0.weight": 3, "3.weight": 2}


def conv1d() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(
        nn.Conv1d(2, 8, 3), nn.LeakyReLU(), nn.AvgPool1d(2), nn.Conv1d(8, 4, 2), nn.Flatten(), nn.Linear(8, 2)
    )
    unread(net, "3.weight", [3, 4])
    return net, torch.randn(5, 2, 8), {"0.weight": 2}


def conv3d() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(
        nn.Conv3d(1, 6, 2), nn.ReLU(), nn.Conv3d(6, 4, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    unread(net, "2.weight", [5])
    unread(net, "5.weight", [0, 1])
    return net, torch.randn(5, 1, 4, 4, 4), {"0.weight": 1, "2.weight": 2}


def two_readers() -> tuple[nn.Module, Tensor, dict[str, int]]:
    def forward(net: Any, x: Tensor) -> Tensor:
        a = net.a(x).relu()
        return torch.cat([net.b(a), net.c(a)], dim=1)

    net = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2), c=nn.Linear(8, 3))
    unread(net, "b.weight", [0, 1, 2])
    unread(net, "c.weight", [1, 2, 3])
    return net, torch.randn(7, 4), {"a.weight": 2}


def concatenation() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = Net(
        lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x).tanh()], dim=1)),
        a=nn.Linear(4, 5), b=nn.Linear(4, 6), c=nn.Linear(11, 2),
    )  # fmt: skip
    unread(net, "c.weight", [0, 4, 5, 10])
    return net, torch.randn(7, 4), {"a.weight": 2, "b.weight": 2}


def batch_norm() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
        nn.Linear(20, 3),
    )  # fmt: skip
    for part in net:
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.running_mean = torch.randn(part.num_features)
    unread(net, "3.weight", [1, 2])
    unread(net, "7.weight", [0, 4], per_unit=4)
    return net.eval(), torch.randn(4, 1, 6, 6), {"0.weight": 2, "3.weight": 2}


def prelu_per_channel() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.PReLU(6), nn.Conv2d(6, 2, 3))
    net[1].weight.data = torch.rand(6)
    unread(net, "2.weight", [0, 5])
    return net, torch.randn(4, 1, 6, 6), {"0.weight": 2}


def residual() -> tuple[nn.Module, Tensor, dict[str, int]]:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.stem(x).relu()
        h = h + net.inner(h.clone()).relu()
        return torch.as_tensor(net.head(h))

    net = Net(forward, stem=nn.Linear(4, 8), inner=nn.Linear(8, 8), head=nn.Linear(8, 2))
    unread(net, "inner.weight", [1, 2, 3])
    unread(net, "head.weight", [2, 3, 4])
    return net, torch.randn(7, 4), {"stem.weight": 2, "inner.weight": 2}


def depthwise() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 3, 1))
    unread(net, "4.weight", [0, 2])
    return net, torch.randn(4, 2, 5, 5), {"0.weight": 2, "2.weight": 2}


def sequence() -> tuple[nn.Module, Tensor, dict[str, int]]:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    unread(net, "2.weight", [0, 7])
    return net, torch.randn(5, 3, 4), {"0.weight": 2}


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor, dict[str, int]]]] = {
    case.__name__: case
    for case in (
        mlp, chain_of_deaths, constants, conv_pool_flatten, conv1d, conv3d, two_readers, concatenation, batch_norm,
        prelu_per_channel, residual, depthwise, sequence,
    )
}  # fmt: skip
on_every_network = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@on_every_network
def test_the_compact_network_computes_the_same_and_its_units_are_gone(case: Any) -> None:
    net, x, dead = case()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compacted = compact(net, x, batch_sizes=())
    torch.testing.assert_close(compacted.module(compacted.inputs(x)), net(x), rtol=1e-5, atol=1e-6)
    more = torch.randn_like(x)  # that the cut was not made for
    torch.testing.assert_close(compacted.module(compacted.inputs(more)), net(more), rtol=1e-5, atol=1e-6)
    assert compacted.removed == dead
    for name, n in dead.items():
        full, cut = net.get_parameter(name), compacted.module.get_parameter(name)
        assert cut.shape[0] == full.shape[0] - n
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


@on_every_network
def test_parameters_and_macs_are_those_that_torch_pruning_counts(case: Any) -> None:
    utils = pytest.importorskip("torch_pruning", reason="the extra 'structured' is not installed").utils
    net, x, _ = case()
    compacted = compact(net, x, batch_sizes=())
    pairs = ((net, x[:1], compacted.before), (compacted.module, compacted.inputs(x[:1]), compacted.after))
    for module, inputs, cost in pairs:
        module.eval()
        _, parameters, layers, _ = utils.count_ops_and_params(module, inputs, layer_wise=True)
        ops = sum(layers[layer] - additions(layer, inputs, module) for layer in layers_of(module).values())
        assert (cost.parameters, cost.macs) == (parameters, ops)
    assert compacted.after.parameters < compacted.before.parameters
    assert compacted.after.macs < compacted.before.macs


def additions(layer: Any, x: Tensor, module: nn.Module) -> int:
    """What that counter counts for a bias: an addition an output, in a Linear only one for each unit."""
    sizes: list[int] = []
    handle = layer.register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
    module(x)
    handle.remove()
    return int(layer.out_features) if isinstance(layer, nn.Linear) else sizes[0]


@on_every_network
def test_files_rebuild_the_compact_network_in_the_full_ones_code(case: Any, tmp_path: Path) -> None:
    net, x, _ = case()
    compacted = compact(net, x, batch_sizes=())
    compacted.save(tmp_path)
    torch.manual_seed(99)
    fresh, _, _ = case()
    loaded, features = load_compact(fresh, tmp_path)
    loaded.train(net.training)
    assert (features is None) == (compacted.features is None)
    small = compacted.inputs(x)
    assert torch.equal(loaded(small), compacted.module(small))
    assert set(json.loads((tmp_path / "widths.json").read_text())) == {"features", "modules"}
    torch.load(tmp_path / "state_dict.pt", weights_only=True)


@pytest.mark.parametrize("case", [mlp, conv_pool_flatten, batch_norm, residual], ids=lambda case: case.__name__)
def test_torch_export_and_onnx_run_the_compact_network(case: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra 'dev')")
    net, x, _ = case()
    compacted = compact(net.eval(), x, batch_sizes=())
    small = compacted.inputs(x)
    expected = net(x).detach()
    program = torch.export.export(compacted.module, (small,))
    torch.testing.assert_close(program.module()(small), expected, rtol=1e-5, atol=1e-6)
    file = tmp_path / "net.onnx"
    torch.onnx.export(compacted.module, (small,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file)
    [found] = session.run(None, {session.get_inputs()[0].name: small.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_unused_features_go_and_their_indices_are_told() -> None:
    net = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))
    unread(net, "0.weight", [0, 1, 5, 8])
    x = torch.randn(6, 9)
    compacted = compact(net, x, batch_sizes=())
    assert compacted.features is not None
    assert compacted.features.tolist() == [2, 3, 4, 6, 7]
    torch.testing.assert_close(compacted.module(x[:, [2, 3, 4, 6, 7]]), net(x))


def test_two_layers_that_read_the_input_keep_what_either_needs() -> None:
    net = Net(lambda m, x: m.a(x) * m.b(x), a=nn.Linear(4, 2), b=nn.Linear(4, 2))
    unread(net, "a.weight", [0, 1])
    unread(net, "b.weight", [0, 3])
    compacted = compact(net, torch.randn(5, 4), batch_sizes=())
    assert compacted.features is not None
    assert compacted.features.tolist() == [1, 2, 3]


def test_an_input_that_is_also_read_elsewhere_is_left_as_it_is_and_named() -> None:
    net = Net(lambda m, x: m.a(x) + x, a=nn.Linear(4, 4))
    unread(net, "a.weight", [0])
    compacted = compact(net, torch.randn(5, 4), batch_sizes=())
    assert compacted.features is None
    assert "unused input features" in compacted.left["a.weight"]
    assert compacted.module.get_parameter("a.weight").shape == (4, 4)


def test_a_forward_with_its_width_written_in_it_is_left_masked_and_named() -> None:
    net = Net(lambda m, x: m.b(m.a(x).relu().view(-1, 8)), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    unread(net, "b.weight", [0, 1])
    x = torch.randn(5, 4)
    compacted = compact(net, x, batch_sizes=())
    assert compacted.removed == {}
    assert "a.weight" in compacted.left
    assert "left as zeros, a.weight" in str(compacted)
    torch.testing.assert_close(compacted.module(x), net(x), rtol=0, atol=0)


def test_constants_stay_where_a_padded_convolution_reads_them() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1))
    net.get_parameter("0.weight").data[2] = 0
    x = torch.randn(3, 1, 5, 5)
    compacted = compact(net, x, batch_sizes=())
    assert compacted.removed == {}
    torch.testing.assert_close(compacted.module(x), net(x))


def test_a_layer_of_dead_units_keeps_one() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    unread(net, "2.weight", list(range(6)))
    x = torch.randn(3, 4)
    compacted = compact(net, x, batch_sizes=())
    assert compacted.module.get_parameter("0.weight").shape == (1, 4)
    torch.testing.assert_close(compacted.module(x), net(x))


def test_nothing_dead_is_nothing_done() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    compacted = compact(net, torch.randn(3, 4), batch_sizes=())
    assert (compacted.removed, compacted.left, compacted.features) == ({}, {}, None)
    assert compacted.before == compacted.after


def test_without_torch_pruning_what_needs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    net, x, _ = batch_norm()
    compacted = compact(net, x, batch_sizes=())
    assert compacted.removed == {}
    assert all("pip install 'lightning-cpna[structured]'" in reason for reason in compacted.left.values())
    assert set(compacted.left) == {"0.weight", "3.weight"}


def test_modes_and_frozen_parameters_stay_as_they_are() -> None:
    net, x, _ = mlp()
    net.get_submodule("1").eval()
    net.get_parameter("0.weight").requires_grad_(False)
    compacted = compact(net, x, batch_sizes=())
    assert [part.training for part in compacted.module.children()] == [True, False, True, True, True]
    assert [p.requires_grad for p in compacted.module.parameters()] == [p.requires_grad for p in net.parameters()]


def test_what_pruning_leaves_is_what_is_cut() -> None:
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, torch.zeros(2, 20))
    hidden, inputs = sparsity.add_budgets(net, {"2.weight": 6, "0.weight": 12})
    sparsity.prune_(hidden, 6, Score("normalized"))
    sparsity.remove_dead_units_()
    sparsity.prune_(inputs, 12, Score("path", exponent=8))
    report = {layer.name: layer for layer in sparsity.report().layers}
    compacted = compact(net, torch.randn(32, 20), batch_sizes=())
    weight = compacted.module.get_parameter("0.weight")
    live = report["0.weight"]
    assert weight.shape == (live.live_units, live.live_features)
    assert int((weight != 0).sum()) == 12


def test_the_latency_is_measured_at_the_batch_sizes_that_are_asked_for() -> None:
    net, x, _ = mlp()
    compacted = compact(net, x, batch_sizes=(1, 256))
    assert set(compacted.before.latency) == set(compacted.after.latency) == {1, 256}
    assert "latency at batch 256" in str(compacted)
    assert cost_of(net, x).latency == {}


def test_files_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    net, x, _ = mlp()
    compact(net, x, batch_sizes=()).save(tmp_path)
    with pytest.raises(ValueError, match=r"is not in the module: the file belongs to another network"):
        load_compact(nn.Sequential(nn.Linear(6, 3)), tmp_path)


def test_a_transposed_convolution_is_counted_and_may_read() -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, stride=2))
    net.get_parameter("2.weight").data[[1, 4]] = 0
    x = torch.randn(2, 2, 5, 5)
    compacted = compact(net, x, batch_sizes=())
    assert compacted.removed == {"0.weight": 2}
    torch.testing.assert_close(compacted.module(x), net(x))
    assert compacted.before.macs == 25 * 2 * 6 + 25 * 6 * 3 * 16


def test_several_inputs_are_a_tuple_and_features_are_those_of_the_first() -> None:
    net = Net(lambda m, x, z: m.b(m.a(x).relu() * z), a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    unread(net, "a.weight", [1, 2])
    x, z = torch.randn(7, 5), torch.randn(7, 1)
    compacted = compact(net, (x, z), batch_sizes=(1,))
    assert compacted.features is not None
    assert compacted.features.tolist() == [0, 3, 4]
    torch.testing.assert_close(compacted.module(compacted.inputs(x), z), net(x, z))


def test_counting_and_timing_leave_running_statistics_alone() -> None:
    net, x, _ = batch_norm()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    cost_of(net, x, (1, 2))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training


def test_a_constant_unit_whose_reader_has_no_bias_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    net.get_parameter("0.weight").data[[0, 1]] = 0
    net.get_parameter("0.bias").data[:2] = torch.tensor([1.0, -1.0])
    compacted = compact(net, torch.randn(5, 4), batch_sizes=())
    assert "has no bias to which their mean could be added" in compacted.left["0.weight"]


def test_a_network_in_which_nothing_is_dead_has_nothing_left() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    assert compact(layer, torch.randn(2, 3, 8), batch_sizes=()).left == {}


def test_a_network_that_is_as_large_as_before_is_not_called_faster() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    assert "times as fast" not in str(compact(net, torch.randn(5, 6), batch_sizes=(1,)))
    net.get_parameter("2.weight").data[:, 1:] = 0
    assert "times as fast" in str(compact(net, torch.randn(5, 6), batch_sizes=(1,)))


def test_bad_examples_and_larger_files_are_refused_by_name(tmp_path: Path) -> None:
    net, x, _ = mlp()
    with pytest.raises(ValueError, match="example is a list; allowed is a tensor, or a tuple of tensors"):
        compact(net, [x])  # type: ignore[arg-type]
    message = r"example has shape \(5, 7\), on which the module fails, copied to float64: RuntimeError: mat1 and mat2"
    with pytest.raises(ValueError, match=message):
        compact(net, torch.rand(5, 7))
    with pytest.raises(ValueError, match="module is a OrderedDict; allowed is"):
        compact(net.state_dict(), x)  # type: ignore[arg-type]
    compact(net, x, batch_sizes=()).save(tmp_path)
    with pytest.raises(ValueError, match="the file belongs to another network"):
        load_compact(nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)), tmp_path)
