"""Random masks in the place of those that were found: exact counts, uniform draws, whole units."""

from __future__ import annotations

import torch
from torch import nn

from lightning_cpna import Budget, Score, SparseLinear, rewind_, shuffle_masks_, sparsity_of, take_snapshot, trace
from tests.helpers import p_of_uniform


def test_shuffled_masks_have_the_same_counts_and_are_uniform() -> None:
    counts, rounds = torch.zeros(24), 400
    net, generator = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.Generator().manual_seed(0)
    snapshot, sparsity = take_snapshot(sparsity_of(net)), sparsity_of(net)
    sparsity.remove_("0.weight", torch.arange(24).view(4, 6) > 8)
    sparsity.remove_("2.weight", torch.arange(8).view(2, 4) > 2)
    for _ in range(rounds):
        shuffle_masks_(sparsity_of(net), snapshot, generator=generator)
        assert [mask.n_live for mask in sparsity.masks.values()] == [9, 3]
        counts += sparsity.masks["0.weight"].live.flatten()
    assert p_of_uniform(counts, 9, rounds) > 1e-3


def test_shuffled_units_are_whole_and_as_many() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
    sparsity, seen = sparsity_of(net), set()
    snapshot, sparsity.graph = take_snapshot(sparsity_of(net)), trace(net, torch.randn(8, 6))
    budgets = sparsity.add_budgets(net, {"0.weight": 4, "2.weight": 3}, "unit")
    for budget, n in zip(budgets, (4, 3), strict=True):
        sparsity.prune_(budget, n, Score("magnitude"))
    before = {name: mask.n_live for name, mask in sparsity.masks.items()}
    for seed in range(5):
        shuffle_masks_(sparsity_of(net), snapshot, generator=torch.Generator().manual_seed(seed))
        assert {name: mask.n_live for name, mask in sparsity.masks.items()} == before
        first, second, last = (sparsity.masks[f"{i}.weight"].live for i in (0, 2, 4))
        assert first.all(1).sum() == first.any(1).sum() == 4
        assert torch.equal(second.any(0), first.any(1))
        assert second.any(1).sum() == 3
        assert torch.equal(last.any(0), second.any(1))
        seen.add(tuple(first.any(1).tolist()))
    assert len(seen) > 1


def test_a_sparse_layer_is_shuffled_among_the_connections_of_the_snapshot() -> None:
    torch.manual_seed(0)
    net = SparseLinear(30, 20, 2)
    snapshot, sparsity, then = take_snapshot(sparsity_of(net)), sparsity_of(net), net.live
    sparsity.add_mask("weight")
    sparsity.prune_(Budget("weight", ("weight",), "connection", 40), 40, Score("magnitude"))
    found = net.live
    shuffle_masks_(sparsity_of(net), snapshot, generator=torch.Generator().manual_seed(0))
    assert int(net.live.sum()) == len(net.weight) == 40
    assert bool((net.live <= then).all())
    assert not torch.equal(net.live, found)


def test_random_masks_on_a_network_that_was_sparse_have_weights_everywhere() -> None:
    torch.manual_seed(0)
    net = nn.Linear(30, 20)
    sparsity = sparsity_of(net)
    sparsity.remove_("weight", torch.rand(20, 30) < 0.9)
    sparsity.masks.apply_(sparsity.tensors)
    snapshot, n = take_snapshot(sparsity), sparsity.masks["weight"].n_live
    then = sparsity.masks["weight"].live
    generator = torch.Generator().manual_seed(0)
    shuffle_masks_(sparsity, snapshot, generator=generator)
    rewind_(sparsity, snapshot, fill=generator)
    now = sparsity.masks["weight"].live
    assert torch.equal(net.weight != 0, now)
    assert int(now.sum()) == n
    assert torch.equal(net.weight[now & then], snapshot.weights["weight"][now & then])
    assert set(net.weight[now].tolist()) <= set(snapshot.weights["weight"][then].tolist())
