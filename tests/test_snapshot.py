"""Snapshots and rewinding, as functions: against what was noted by hand."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import (
    Budget,
    Rewind,
    Score,
    Snapshot,
    SparseLinear,
    restore_masks_,
    rewind_,
    sparsity_of,
    take_snapshot,
)
from tests.helpers import on_every_device, same

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


def network(sparse: bool = False) -> nn.Sequential:
    first: nn.Module = SparseLinear(6, 12, 2) if sparse else nn.Linear(6, 12)
    return nn.Sequential(first, nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 1))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None) -> None:
    device = next(net.parameters()).device
    for seed in range(steps):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)).to(device)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), x[:, :1] * x[:, 1:2]).backward()
        sparsity_of(net).mask_gradients_()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def everything(net: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    noted = {**net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return copy.deepcopy(noted)


@on_every_device
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_everything_goes_back_bit_for_bit(kind: str, sparse: bool, device: str) -> None:
    torch.manual_seed(0)
    net = network(sparse).to(device)
    optimizer = OPTIMIZERS[kind](net.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=50, cycle_momentum=False)
    for at in (0, 5):
        train(net, optimizer, at, scheduler)
        noted = everything(net, optimizer, scheduler)
        snapshot = take_snapshot(sparsity_of(net), [optimizer], [scheduler])
        for _ in range(2):
            train(net, optimizer, 7, scheduler)
            assert not same(noted, everything(net, optimizer, scheduler))
            rewind_(sparsity_of(net), snapshot, optimizers=[optimizer], schedulers=[scheduler])
            assert same(noted, everything(net, optimizer, scheduler))


PARTS = {
    "weights": ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"],
    "buffers": ["1.running_mean", "1.running_var", "1.num_batches_tracked"],
    "optimizer": ["state"],
    "schedule": ["param_groups", "scheduler"],
}


def by_part(noted: dict[str, Any]) -> dict[str, Any]:
    flat = {**noted, **noted["optimizer"]}
    return {part: [flat[name] for name in names] for part, names in PARTS.items()}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_stays_if_it_shall_and_only_that(part: str) -> None:
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    train(net, optimizer, 2, scheduler)
    then, snapshot = everything(net, optimizer, scheduler), take_snapshot(sparsity_of(net), [optimizer], [scheduler])
    train(net, optimizer, 5, scheduler)
    trained = everything(net, optimizer, scheduler)
    rewind_(sparsity_of(net), snapshot, Rewind(**{part: False}), optimizers=[optimizer], schedulers=[scheduler])
    now = by_part(everything(net, optimizer, scheduler))
    for name in PARTS:
        assert same(now[name], by_part(trained if name == part else then)[name]), name


def test_kept_weights_and_buffers_stay_and_the_rest_goes_back() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    then, snapshot = everything(net, optimizer, scheduler), take_snapshot(sparsity_of(net), [optimizer], [scheduler])
    train(net, optimizer, 5, scheduler)
    trained = everything(net, optimizer, scheduler)
    rewind_(sparsity_of(net), snapshot, Rewind("keep"), optimizers=[optimizer], schedulers=[scheduler])
    now = by_part(everything(net, optimizer, scheduler))
    for name in PARTS:
        assert same(now[name], by_part(trained if name in ("weights", "buffers") else then)[name]), name


@pytest.mark.parametrize("sparse", [False, True])
def test_weights_are_snapshot_times_mask_and_dead_ones_have_no_moments(sparse: bool) -> None:
    torch.manual_seed(0)
    net = network(sparse)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    train(net, optimizer, 3)

    def weight() -> Tensor:
        layer = net[0].to_dense() if isinstance(net[0], SparseLinear) else net[0]
        return layer.get_parameter("weight").detach().clone()

    def moments() -> Tensor:
        state: Tensor = optimizer.state[net.get_parameter("0.weight")]["exp_avg"]
        out = torch.zeros(12, 6)
        if not isinstance(net[0], SparseLinear):
            return state.clone()
        out.view(-1)[net[0].cells] = state
        return out

    w, m, snapshot = weight(), moments(), take_snapshot(sparsity_of(net), [optimizer])
    train(net, optimizer, 3)
    sparsity = sparsity_of(net)
    sparsity.add_mask("0.weight")
    sparsity.prune_(Budget("0.weight", ("0.weight",), "connection", 9), 9, Score("random"), optimizers=[optimizer])
    layer = net[0]
    live = layer.live if isinstance(layer, SparseLinear) else sparsity.masks["0.weight"].live
    assert int(live.sum()) == 9
    rewind_(sparsity_of(net), snapshot, optimizers=[optimizer])
    assert torch.equal(weight(), w * live)
    assert torch.equal(moments(), m * live)
    train(net, optimizer, 2)
    assert torch.equal(weight() != 0, live)


def test_a_connection_that_did_not_live_then_begins_at_zero() -> None:
    torch.manual_seed(0)
    net = SparseLinear(30, 20, 2)
    snapshot, then = take_snapshot(sparsity_of(net)), net.to_dense().weight.detach().clone()
    cells = torch.arange(0, 600, 7)
    net.set_cells_(cells)
    rewind_(sparsity_of(net), snapshot)
    expected = torch.zeros(600)
    expected[cells] = then.flatten()[cells]
    assert torch.equal(net.to_dense().weight.flatten(), expected)
    assert 0 < int((expected != 0).sum()) < len(cells)
    restore_masks_(sparsity_of(net), snapshot)
    rewind_(sparsity_of(net), snapshot)
    assert torch.equal(net.to_dense().weight, then)


def test_fresh_weights_are_those_of_the_snapshot_in_another_order() -> None:
    torch.manual_seed(0)
    net = network()
    nn.init.constant_(net.get_parameter("0.bias"), 0.5)
    snapshot = take_snapshot(sparsity_of(net))
    rewind_(sparsity_of(net), snapshot, redraw=torch.Generator().manual_seed(1))
    assert not torch.equal(net.get_parameter("0.weight"), snapshot.weights["0.weight"])
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, snapshot.weights[name].flatten().sort().values)
    assert torch.equal(net.get_parameter("0.bias"), torch.full((12,), 0.5))
    once = copy.deepcopy(net.state_dict())
    rewind_(sparsity_of(net), snapshot, redraw=torch.Generator().manual_seed(1))
    assert same(once, net.state_dict())


@pytest.mark.parametrize("sparse", [False, True])
def test_under_a_mask_fresh_weights_come_from_those_that_lived(sparse: bool) -> None:
    torch.manual_seed(0)
    net = network(sparse)
    sparsity = sparsity_of(net)
    if not sparse:
        sparsity.remove_("0.weight", torch.rand(12, 6) < 0.5)
    n_then, snapshot = int((sparsity.tensors["0.weight"] != 0).sum()), take_snapshot(sparsity_of(net))
    sparsity.add_mask("0.weight")
    sparsity.prune_(Budget("0.weight", ("0.weight",), "connection", 10), 10, Score("random"))
    rewind_(sparsity_of(net), snapshot, redraw=torch.Generator().manual_seed(2))
    now = sparsity.tensors["0.weight"].detach()
    found = now[now != 0]
    assert len(found) == 10 < n_then
    assert len(torch.unique(found)) == 10
    assert set(found.tolist()) <= set(snapshot.weights["0.weight"].flatten().tolist())


def test_a_snapshot_is_tensors_and_primitives_on_the_cpu() -> None:
    net = network(sparse=True)
    optimizer = torch.optim.Adam(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(net, optimizer, 2, scheduler)
    snapshot = take_snapshot(sparsity_of(net), [optimizer], [scheduler])
    file = io.BytesIO()
    torch.save(vars(snapshot), file)
    file.seek(0)
    loaded = Snapshot(**torch.load(file, weights_only=True))
    assert same(vars(snapshot), vars(loaded))
    noted = everything(net, optimizer, scheduler)
    train(net, optimizer, 2, scheduler)
    rewind_(sparsity_of(net), loaded, optimizers=[optimizer], schedulers=[scheduler])
    assert same(noted, everything(net, optimizer, scheduler))


def test_what_is_not_its_own_is_refused_and_nothing_is_changed() -> None:
    net, other = network(), nn.Sequential(nn.Linear(6, 12))
    narrow = nn.Sequential(nn.Linear(6, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"same parameters, see '1\.bias'.*another network"):
        rewind_(sparsity_of(net), take_snapshot(sparsity_of(other)))
    with pytest.raises(ValueError, match=r"optimizers and schedulers are 1 and 0; allowed are .* 0 and 0"):
        rewind_(sparsity_of(net), take_snapshot(sparsity_of(net)), optimizers=[optimizer])
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(12, 6\).*\(11, 6\)"):
        rewind_(sparsity_of(net), take_snapshot(sparsity_of(narrow)))
    with pytest.raises(TypeError, match="what is 'init'; allowed is a Rewind, or None"):
        rewind_(sparsity_of(net), take_snapshot(sparsity_of(net)), "init")  # type: ignore[arg-type]
    assert same(before, net.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "start"}, r"rewind_to \(or to\) is 'start'; allowed is 'init', 'keep', or an optimizer step"),
        ({"to": 0}, r"rewind_to \(or to\) is 0"),
        ({"to": True}, r"rewind_to \(or to\) is True"),
        ({"buffers": "no"}, "buffers is 'no'; allowed is True or False"),
    ],
)
def test_a_rewind_refuses_what_it_is_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewind(**options)


def test_frozen_parameters_are_not_drawn_anew() -> None:
    net = network()
    net[0].requires_grad_(False)
    snapshot = take_snapshot(sparsity_of(net))
    rewind_(sparsity_of(net), snapshot, redraw=torch.Generator())
    assert torch.equal(net.get_parameter("0.weight"), snapshot.weights["0.weight"])
    assert not torch.equal(net.get_parameter("3.weight"), snapshot.weights["3.weight"])


def test_other_buffers_and_parameter_groups_are_named_before_anything_changes() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    snapshot = take_snapshot(sparsity_of(net), [optimizer])
    nn.init.zeros_(net.get_parameter("0.weight"))
    net[1] = nn.BatchNorm1d(12, track_running_stats=False)
    with pytest.raises(ValueError, match=r"'1\.running_mean' has shape None, in the snapshot \(12,\)"):
        rewind_(sparsity_of(net), snapshot, optimizers=[optimizer])
    net[1] = nn.BatchNorm1d(12)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match=r"SGD has 2 parameter groups; allowed are as many as .* 1"):
        rewind_(sparsity_of(net), snapshot, optimizers=[optimizer])
    assert not bool(net.get_parameter("0.weight").any())
