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
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:50} {1e3 * value:10.2f} ms  {value / next(iter(medians.values())):8.1f} x")
    return medians


def steps(n: int, layer: nn.Module, x: Tensor, gradient: Tensor, mask: Tensor | None = None) -> Callable[[], None]:
    """Return what makes training steps: forward, backward from a given gradient of the output, SGD with momentum.

    With a mask, of a dense layer's weight.
    """
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        for _ in range(n):
            optimizer.zero_grad()
            y = layer(x) if mask is None else nn.functional.linear(x, layer.get_parameter("weight") * mask)
            y.backward(gradient)
            optimizer.step()

    return run


def features_major(x: Tensor) -> Tensor:
    """Lay a batch as a sparse layer gives it to the next one."""
    return x.t().contiguous().t()


def test_a_step_of_ten_thousand_by_ten_thousand_against_dense_times_mask() -> None:
    n = 10_000
    sparse = SparseLinear(n, n, EPSILON, bias=False)
    dense, mask = sparse.to_dense(), sparse.live.float()
    x, gradient = torch.randn(BATCH, n), torch.randn(BATCH, n)
    median = seconds(
        {
            "SparseLinear between sparse layers, 20 steps": steps(
                20, sparse, features_major(x), features_major(gradient)
            ),
            "SparseLinear alone, 20 steps": steps(20, sparse, x, gradient),
            "dense * mask, one step": steps(1, dense, x, gradient, mask),
        },
        rounds=5,
    )
    times = list(median.values())
    assert 20 * times[2] / times[0] >= 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("batch", [32, 1024])
def test_a_step_of_ten_thousand_by_ten_thousand_on_a_gpu_against_dense(batch: int) -> None:
    n = 10_000
    sparse = SparseLinear(n, n, EPSILON, bias=False)
    dense, mask = sparse.to_dense().cuda(), sparse.live.float().cuda()
    x, gradient = torch.randn(batch, n, device="cuda"), torch.randn(batch, n, device="cuda")
    print(f"on {torch.cuda.get_device_name()}, batch {batch}")
    median = seconds(
        {
            "SparseLinear alone, 20 steps": steps(20, sparse.cuda(), x, gradient),
            "dense, 20 steps": steps(20, dense, x, gradient),
            "dense * mask, 20 steps": steps(20, dense, x, gradient, mask),
        },
        rounds=5,
    )
    assert median["SparseLinear alone, 20 steps"] < median["dense, 20 steps"] < median["dense * mask, 20 steps"]


def test_a_step_of_ten_thousand_by_ten_thousand_against_synapses() -> None:
    synapses = pytest.importorskip("synapses", reason="pip install synapses==0.0.14 torch-scatter")
    n = 10_000
    sparse, theirs = SparseLinear(n, n, EPSILON), synapses.SETLayer(n, n, epsilon=EPSILON)
    x, gradient = torch.randn(BATCH, n), torch.randn(BATCH, n)
    median = seconds(
        {
            "SparseLinear between sparse layers": steps(5, sparse, features_major(x), features_major(gradient)),
            "SparseLinear alone": steps(5, sparse, x, gradient),
            "synapses": steps(5, theirs, x, gradient),
        },
        rounds=7,
    )
    times = list(median.values())
    assert times[2] / times[0] >= 10


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
