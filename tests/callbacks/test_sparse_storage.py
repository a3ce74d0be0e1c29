"""The pruning callbacks on a SparseLinear do what they do on a dense layer whose mask has the same connections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cpna import CPNAPruning, Cubic, NeuronPruning, Score, SparseLinear, sparsity_of, trace, unit_report
from tests.callbacks.test_rewiring import Double, dense_state, masked, sparse
from tests.helpers import data, trainer

SCHEDULE = Cubic(2, 14)
WAYS: dict[str, Any] = {
    "magnitude": lambda: CPNAPruning({"net.2.weight": 30}, schedule=SCHEDULE, score="magnitude", normalize=False),
    "normalized": lambda: CPNAPruning({"net.2.weight": 30}, schedule=SCHEDULE, score="normalized", normalize=False),
    "CPNA": lambda: CPNAPruning({"net.2.weight": 30}, schedule=SCHEDULE),
    "CPNA, moments follow": lambda: CPNAPruning({"net.2.weight": 30}, schedule=SCHEDULE, normalize="transform"),
    "path": lambda: CPNAPruning({"net.0.weight": 20}, schedule=SCHEDULE, score="path", normalize=False),
    "gradient": lambda: CPNAPruning({"net.0.weight": 20}, schedule=SCHEDULE, score="gradient", normalize=False),
    "random": lambda: CPNAPruning({"net.0.weight": 20}, schedule=SCHEDULE, score="random", normalize=False),
    "groups matter": lambda: CPNAPruning(
        {"net.0.weight": 20}, schedule=SCHEDULE, score=Score("path", exponent=3), normalize=False
    ),
    "features": lambda: CPNAPruning(
        {"net.0.weight": 3}, schedule=SCHEDULE, granularity="feature", score="magnitude", normalize=False
    ),
    "units": lambda: CPNAPruning(
        {"net.2.weight": 8}, schedule=SCHEDULE, granularity="unit", score="magnitude", normalize=False
    ),
    "shared": lambda: CPNAPruning(
        {"net.[02].weight": 50}, schedule=SCHEDULE, scope="shared", score="path", normalize=False
    ),
    "own function": lambda: CPNAPruning(
        {"net.2.weight": 30}, schedule=SCHEDULE, score=lambda inputs: inputs.weight.abs(), normalize=False
    ),
    "neurons by norm": lambda: NeuronPruning({"net.0.weight": 5}, schedule=SCHEDULE, score="norm"),
    "neurons by path": lambda: NeuronPruning({"net.0.weight": 5}, schedule=SCHEDULE, score="path", normalize=True),
    "neurons by mean replacement": lambda: NeuronPruning({"net.[02].weight": 5}, schedule=SCHEDULE),
    "neurons by degree": lambda: NeuronPruning({"net.0.weight": 5}, schedule=SCHEDULE, score="in_degree"),
    "neurons by penalty": lambda: NeuronPruning({"net.0.weight": 5}, schedule=SCHEDULE, score="penalty"),
}


@pytest.mark.parametrize("way", WAYS)
def test_pruning_a_sparse_layer_equals_pruning_a_masked_one(way: str) -> None:
    net = sparse()
    with torch.no_grad():
        for part in net:
            if isinstance(part, SparseLinear) and part.bias is not None:
                part.bias.normal_()
    first, second = Double(copy.deepcopy(net)), masked(net)
    for module in (first, second):
        trainer(WAYS[way](), epochs=6).fit(module, data())
    ours, dense = dense_state(first), dense_state(second)
    for name, value in dense.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, ours[name]), name
        else:
            torch.testing.assert_close(value, ours[name], rtol=0, atol=1e-11, msg=name)
    theirs = {layer.name: layer for layer in sparsity_of(second).report().layers}
    for layer in sparsity_of(first).report().layers:
        assert layer == theirs[layer.name]


def test_overlaps_of_sparse_weight_vectors_are_refused_by_name() -> None:
    callback = NeuronPruning({"net.0.weight": 5}, schedule=SCHEDULE, score="frame_potential")
    with pytest.raises(ValueError, match=r"'net.0.weight', which is sparse, are not compared"):
        trainer(callback, epochs=6).fit(Double(sparse()), data())


def test_units_of_a_sparse_network_are_reported_as_those_of_the_dense_one() -> None:
    net = sparse()
    dense = nn.Sequential(*[part.to_dense() if isinstance(part, SparseLinear) else part for part in net])
    x = torch.rand(32, 6, dtype=torch.float64)
    batches = [(x, x[:, :1])]
    reports = [unit_report(each, trace(each, x), batches, _loss, penalties=True) for each in (net, dense)]
    for mine, theirs in zip(reports[0].layers, reports[1].layers, strict=True):
        assert mine.penalties is not None
        assert theirs.penalties is not None
        torch.testing.assert_close(mine.penalties, theirs.penalties, rtol=1e-9, atol=1e-12)


def _loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(module(batch[0]), batch[1])
