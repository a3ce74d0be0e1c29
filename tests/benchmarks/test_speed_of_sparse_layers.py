"""What sparse layers cost a step and a rewiring, as ratios to what else there is, alternating in one run; one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import SparseLinear, Sparsity, rewire_

pytestmark = pytest.mark.benchmark
BATCH, EPSILON = 32, 10


def seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Alternate the ways, and return the median time of each after a first round."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:50} {1e3 * value:10.2f} ms  {value / next(iter(medians.values())):8.1f} x")
    return medians


def steps(n: int, layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, mask: Tensor | None = None) -> None:
    """Make training steps: forward, backward, SGD with momentum; with a mask, of a dense layer's weight."""
    for _ in range(n):
        optimizer.zero_grad()
        y = layer(x) if mask is None else nn.functional.linear(x, layer.get_parameter("weight") * mask)
        y.square().mean().backward()
        optimizer.step()


def sgd(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)


def test_a_step_of_ten_thousand_by_ten_thousand_against_dense_times_mask() -> None:
    n = 10_000
    sparse = SparseLinear(n, n, EPSILON, bias=False)
    dense, mask, x = sparse.to_dense(), sparse.live.float(), torch.randn(BATCH, n)
    of_sparse, of_dense = sgd(sparse), sgd(dense)
    median = seconds(
        {
            "SparseLinear": lambda: steps(20, sparse, of_sparse, x),
            "dense * mask, one step": lambda: steps(1, dense, of_dense, x, mask),
        },
        rounds=5,
    )
    assert 20 * median["dense * mask, one step"] / median["SparseLinear"] >= 300


def test_a_step_of_ten_thousand_by_ten_thousand_against_synapses() -> None:
    synapses = pytest.importorskip("synapses", reason="pip install synapses==0.0.14 torch-scatter")
    n = 10_000
    sparse, theirs, x = SparseLinear(n, n, EPSILON), synapses.SETLayer(n, n, epsilon=EPSILON), torch.randn(BATCH, n)
    of_sparse, of_theirs = sgd(sparse), sgd(theirs)
    median = seconds(
        {
            "SparseLinear": lambda: steps(5, sparse, of_sparse, x),
            "synapses": lambda: steps(5, theirs, of_theirs, x),
        },
        rounds=7,
    )
    assert median["synapses"] / median["SparseLinear"] >= 10


class COO:
    """SET's rewiring by rebuilding ``torch.sparse`` matrices: what is drawn twice, or is there, is drawn again."""

    def __init__(self, layer: SparseLinear) -> None:
        self.shape = (layer.out_features, layer.in_features)
        self.matrix = layer.to_csr().to_sparse_coo().coalesce()

    def rewire(self, zeta: float) -> None:
        values, indices = self.matrix.values(), self.matrix.indices()
        positive, negative = values[values > 0], values[values < 0]
        high = positive.kthvalue(max(1, int(zeta * len(positive)))).values
        low = negative.kthvalue(len(negative) - max(1, int(zeta * len(negative))) + 1).values
        stays = (values > high) | (values < low)
        n = len(values)
        kept = torch.sparse_coo_tensor(indices[:, stays], values[stays], self.shape, check_invariants=False)
        while (missing := n - kept._nnz()) > 0:
            drawn = torch.stack([torch.randint(size, (missing,)) for size in self.shape])
            new = torch.sparse_coo_tensor(drawn, torch.full((missing,), 1e-9), self.shape, check_invariants=False)
            kept = (kept + new).coalesce()
        self.matrix = kept
        self.forward, self.backward = kept.to_sparse_csr(), kept.to_sparse_csc()


def test_rewiring_two_million_connections_against_rebuilding_through_coo() -> None:
    n = 100_000
    layer = SparseLinear(n, n, EPSILON)
    sparsity, coo = Sparsity(layer), COO(layer)
    median = seconds(
        {
            "rewire_": lambda: rewire_(sparsity, "weight", 0.3, std=0.1),
            "torch.sparse COO, coalesced": lambda: coo.rewire(0.3),
        },
        rounds=5,
    )
    assert median["torch.sparse COO, coalesced"] / median["rewire_"] >= 10
