import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_cpna import SparseLinear
from lightning_cpna.topology import Distribution, n_connections, shared_out

Shapes = dict[str, tuple[int, ...]]

LINEAR = st.tuples(st.integers(1, 40), st.integers(1, 40))
CONV = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3))
LAYERS = st.lists(LINEAR | CONV, min_size=1, max_size=6).map(lambda shapes: {str(i): s for i, s in enumerate(shapes)})
DISTRIBUTIONS = get_args(Distribution)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def published_density(shape: tuple[int, ...], distribution: Distribution) -> float:
    if distribution == "uniform":
        return 1.0
    if distribution == "er":
        return (shape[0] + shape[1]) / (shape[0] * shape[1])
    return sum(shape) / math.prod(shape)


def published_shares(shapes: Shapes, total: int, distribution: Distribution) -> dict[str, float]:
    """Scale the densities to the total; the densest layer is full where it would be more than that, and again."""
    raw = {name: published_density(shape, distribution) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while len(full) < len(shapes):
        left = total - sum(sizes[name] for name in full)
        scale = left / sum(raw[name] * sizes[name] for name in shapes if name not in full)
        densest = max(raw[name] for name in shapes if name not in full)
        if scale * densest <= 1:
            return {name: sizes[name] * (1 if name in full else scale * raw[name]) for name in shapes}
        full |= {name for name in shapes if raw[name] == densest}
    return {name: float(size) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("n_in", "n_out", "epsilon", "expected"),
    [
        (1000, 500, 2, 3000),
        (784, 1000, 20.0, 35_680),
        (10, 10, 20, 100),
        (10, 10, 5, 100),
        (10, 10, 4.95, 99),
        (3, 4, 1e-9, 1),
        (1, 1, 0.1, 1),
        (200_000, 200_000, 1, 400_000),
        (3, 4, 0.35, 2),
        (10**6, 10**6, 10**6, 10**12),
        (3, 4, math.inf, 12),
    ],
)
def test_n_connections_in_closed_form(n_in: int, n_out: int, epsilon: float, expected: int) -> None:
    assert n_connections(n_in, n_out, epsilon) == expected
    assert n_connections(n_out, n_in, epsilon) == expected


@given(n_in=st.integers(1, 3000), n_out=st.integers(1, 3000), epsilon=st.floats(1e-6, 1e4))
def test_n_connections_is_the_nearest_whole_number_between_one_and_all(n_in: int, n_out: int, epsilon: float) -> None:
    n, wanted = n_connections(n_in, n_out, epsilon), epsilon * (n_in + n_out)
    assert 1 <= n <= n_in * n_out
    assert abs(n - min(max(wanted, 1), n_in * n_out)) <= 0.5


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan])
def test_an_epsilon_that_is_not_positive_raises(epsilon: float) -> None:
    with pytest.raises(ValueError, match=rf"epsilon is {epsilon}; allowed is a float > 0"):
        n_connections(3, 4, epsilon)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@given(shapes=LAYERS, fraction=st.floats(0.0, 1.0))
def test_shared_out_counts_are_the_published_densities_rounded_and_sum_exactly_to_the_total(
    distribution: Distribution, shapes: Shapes, fraction: float
) -> None:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = len(sizes) + round(fraction * (sum(sizes.values()) - len(sizes)))
    shares = published_shares(shapes, total, distribution)
    assume(min(shares.values()) >= 1)
    with at_most(5):
        counts = shared_out(shapes, total, distribution)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert 1 <= count <= sizes[name]
        assert abs(count - shares[name]) < 1 + 1e-9


@pytest.mark.parametrize("distribution", ["uniform", "er"])
@given(shapes=LAYERS, fraction=st.floats(0.0, 0.2))
def test_shared_out_gives_every_layer_at_least_one_where_connections_are_few(
    distribution: Distribution, shapes: Shapes, fraction: float
) -> None:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = len(sizes) + round(fraction * (sum(sizes.values()) - len(sizes)))
    with at_most(5):
        counts = shared_out(shapes, total, distribution)
    assert sum(counts.values()) == total
    assert all(1 <= count <= sizes[name] for name, count in counts.items())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "shapes",
    [
        {"conv": (1, 2, 1, 1)} | {f"{i}": (1, 1) for i in range(10)},
        {"conv": (8, 1, 1, 1), "a": (1, 1), "b": (1, 1), "c": (2, 2)},
        {"a": (100, 100), "b": (1, 1), "c": (1, 1)},
        {"a": (1, 1)},
    ],
)
def test_shared_out_serves_every_total_from_one_a_layer_to_all(distribution: Distribution, shapes: Shapes) -> None:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    low, high = len(sizes), sum(sizes.values())
    for total in range(low, high + 1, max(1, (high - low) // 40)):
        with at_most(2):
            counts = shared_out(shapes, total, distribution)
        assert sum(counts.values()) == total
        assert all(1 <= count <= sizes[name] for name, count in counts.items())


def test_shared_out_by_hand() -> None:
    shapes: Shapes = {"a": (100, 100), "b": (10, 100)}
    assert shared_out(shapes, 1100, "uniform") == {"a": 1000, "b": 100}
    assert shared_out(shapes, 1100, "er") == {"a": 710, "b": 390}  # 200 : 110
    assert shared_out(shapes, 1100, "erk") == {"a": 710, "b": 390}
    convs: Shapes = {"a": (16, 16, 3, 3), "b": (16, 16)}
    assert shared_out(convs, 256, "uniform") == {"a": 230, "b": 26}  # 230.4 : 25.6
    assert shared_out(convs, 256, "er") == {"a": 230, "b": 26}  # 32 * 9 : 32, the kernel does not count
    assert shared_out(convs, 70, "erk") == {"a": 38, "b": 32}  # 38 : 32


def test_a_layer_that_would_have_more_than_all_is_full_and_the_others_have_the_rest() -> None:
    shapes: Shapes = {"a": (100, 100), "b": (2, 2), "c": (50, 100)}
    counts = shared_out(shapes, 7004, "er")  # b would have 7004 * 4 / 354 = 79
    assert counts == {"a": 4000, "b": 4, "c": 3000}  # 7000 as 200 : 150
    assert shared_out(shapes, 15_004, "er") == {"a": 10_000, "b": 4, "c": 5000}


@pytest.mark.parametrize("total", [-1, 0, 1, 11_001])
def test_a_total_that_is_too_small_or_too_large_raises(total: int) -> None:
    with pytest.raises(ValueError, match=rf"total is {total}; allowed is 2, one a layer, to all, 11000"):
        shared_out({"a": (100, 100), "b": (10, 100)}, total, "er")


@pytest.mark.parametrize(("n_in", "n_out", "epsilon"), [(30, 20, 2.0), (12, 10, 5.0), (100, 80, 0.5), (3, 4, 20.0)])
def test_connections_drawn_with_replacement_are_as_many_in_the_mean_as_there_are_different_draws(
    n_in: int, n_out: int, epsilon: float
) -> None:
    n_cells, n_draws = n_in * n_out, round(epsilon * (n_in + n_out))
    counts = []
    for seed in range(50):
        layer = SparseLinear(n_in, n_out, epsilon, replace=True, generator=torch.Generator().manual_seed(seed))
        assert len(layer.weight) == len(set(layer.cells.tolist())) <= n_draws
        counts.append(len(layer.weight))
    expected = n_cells * (1 - (1 - 1 / n_cells) ** n_draws)
    pairs = n_cells * (n_cells - 1) * (1 - 2 / n_cells) ** n_draws
    empty = n_cells * (1 - 1 / n_cells) ** n_draws
    variance = pairs + empty - empty**2  # of the number of empty cells
    assert abs(sum(counts) / 50 - expected) < 4 * math.sqrt(variance / 50)
