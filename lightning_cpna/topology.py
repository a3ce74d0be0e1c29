"""How many connections does each layer get? Erdos-Renyi counts, and one density shared out over layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Distribution = Literal["uniform", "er", "erk"]


def n_connections(n_in: int, n_out: int, epsilon: float) -> int:
    """Return how many connections an Erdos-Renyi layer has: ``epsilon * (n_in + n_out)``, or all (SET, Eq. 1).

    Raises:
        ValueError: If epsilon is not positive.

    Examples:
        >>> n_connections(1000, 500, epsilon=2), n_connections(10, 10, epsilon=20)
        (3000, 100)
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; allowed is a float > 0")
    return max(1, round(min(n_in * n_out, epsilon * (n_in + n_out))))


def shared_out(shapes: Mapping[str, Sequence[int]], total: int, distribution: Distribution) -> dict[str, int]:
    """Share out connections over layers.

    Args:
        shapes: The shape of each weight, ``(unit, input, *kernel)``, by name.
        total: How many connections all of them have together.
        distribution: "uniform": every layer has the same density. "er": it is proportional to ``(n_in + n_out) / (n_in *
            n_out)``. "erk": the kernel's sides count likewise, ``sum(shape) / prod(shape)`` (RigL, Evci et al. 2020,
            Section 3). A layer that would have more than all has all, and the others have the rest.

    Returns:
        The count of each, one at least, ``total`` in all.

    Raises:
        ValueError: If ``total`` is less than one a layer, or more than there is.

    Examples:
        >>> shared_out({"a": (100, 100), "b": (10, 100)}, 1100, "er")
        {'a': 710, 'b': 390}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if not len(sizes) <= total <= sum(sizes.values()):
        raise ValueError(f"total is {total}; allowed is {len(sizes)}, one a layer, to all, {sum(sizes.values())}")
    weights = {
        name: {"uniform": float(sizes[name]), "er": sum(shape[:2]) * math.prod(shape[2:]), "erk": float(sum(shape))}[
            distribution
        ]
        for name, shape in shapes.items()
    }
    full: dict[str, int] = {}
    while True:
        open_ = {name: weight for name, weight in weights.items() if name not in full}
        left = total - sum(full.values())
        shares = {name: left * weight / sum(open_.values()) for name, weight in open_.items()}
        too_many = {name: sizes[name] for name, share in shares.items() if share >= sizes[name]}
        if not too_many or len(too_many) == len(open_):
            break
        full |= too_many
    counts = full | {name: min(sizes[name], max(1, math.floor(share))) for name, share in shares.items()}
    by_rest = sorted(shapes, key=lambda name: math.floor(shares.get(name, 0)) - shares.get(name, 0))
    while (missing := total - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        for name in [n for n in by_rest if 1 <= counts[n] + step <= sizes[n]][: abs(missing)]:
            counts[name] += step
    return {name: counts[name] for name in shapes}
