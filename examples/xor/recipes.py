"""How each network is trained: phases of training, and what is annealed in which of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from examples.xor.problem import Phase
from lightning_cpna import Annealing, CPNAPruning, Geometric, Score

METHODS = ("nn", "cpa_hidden", "cpna_hidden", "cpna_all", "cpna_all_plain", "fsa_cpna")
HIDDEN, INPUT = "net.2.weight", "net.0.weight"


class Problem(NamedTuple):
    """A row of Guo et al., Table 1: dimensions, hidden units, and the connections that remain of either layer."""

    p: int
    hidden: int
    n_hidden: int
    n_inputs: int


PROBLEMS = {3: Problem(60, 1024, 12, 24), 4: Problem(40, 2048, 16, 32), 5: Problem(20, 4096, 64, 256)}


@dataclass(frozen=True)
class Pruning:
    """What a phase anneals.

    Attributes:
        target: The weight.
        n_end: What remains of it.
        options: Further arguments of ``CPNAPruning``.
    """

    target: str
    n_end: int
    options: dict[str, Any] = field(default_factory=dict)


Recipe = list[tuple[Phase, Pruning | None]]


def hidden(n: int, **options: Any) -> Pruning:
    """Anneal the connections of the hidden layer, normalised (Eq. 2 and 3)."""
    return Pruning(HIDDEN, n, options)


def hidden_by_score(n: int) -> Pruning:
    """The same by the score that needs no rescaling."""
    return hidden(n, score="normalized", normalize=False)


def inputs(n: int, exponent: float = 0.0) -> Pruning:
    """Anneal the connections of the input layer by path score."""
    return Pruning(INPUT, n, {"score": Score("path", exponent=exponent), "normalize": False})


def features(n: int) -> Pruning:
    """Anneal whole input features by the norm of their column."""
    return Pruning(INPUT, n, {"granularity": "feature"})


def recipe(k: int, method: str) -> Recipe:
    """Return the phases of a method on the k-dimensional problem; the rates were chosen on seeds that are not reported."""
    problem = PROBLEMS[k]
    pretraining = Phase(100, None, weight_decay=2e-3) if k == 4 else Phase(60)
    annealing = {
        3: Phase(600, None),
        4: Phase(600, None, weight_decay=2e-3),
        5: Phase(600, None, weight_decay=1.5e-3),
    }[k]
    if method == "nn":
        return [(Phase(200), None)]
    if method == "cpa_hidden":
        return [(pretraining, None), (annealing, hidden(problem.n_hidden, normalize=False))]
    if method == "cpna_hidden":
        return [(pretraining, None), (annealing, hidden(problem.n_hidden))]
    if k == 5 and method in ("cpna_all", "cpna_all_plain"):
        plain = method == "cpna_all_plain"
        return [
            (pretraining, None),
            (Phase(100, lr=3e-3, weight_decay=1e-4), hidden_by_score(512)),
            (Phase(300), inputs(2048, exponent=0 if plain else 12)),
            (Phase(300, lr=3e-3, weight_decay=1e-4), hidden_by_score(problem.n_hidden)),
            (Phase(300, weight_decay=1e-4), inputs(problem.n_inputs, exponent=0 if plain else 8)),
            (Phase(150, lr_end=1e-4, weight_decay=1e-5), None),
        ]
    if k == 3 and method in ("cpna_all", "cpna_all_plain"):
        return [(pretraining, None), (Phase(200, 1000), hidden(problem.n_hidden)), *_tail(problem, epochs=167)]
    if method in ("cpna_all", "cpna_all_plain"):
        return [*recipe(k, "cpna_hidden"), *_tail(problem)]
    if k == 5:
        return [
            (Phase(60), None),
            (Phase(40), features(k)),
            (Phase(300, lr=3e-3, weight_decay=1e-4), hidden_by_score(problem.n_hidden)),
            (Phase(300, weight_decay=1e-4), inputs(problem.n_inputs)),
            (Phase(150, lr_end=1e-4, weight_decay=1e-5), None),
        ]
    if k == 4:
        return [
            (pretraining, None),
            (Phase(60), features(k)),
            (Phase(268, 1000), hidden(problem.n_hidden)),
            *_tail(problem, epochs=667, fine_tuning=150),
        ]
    return [
        (Phase(60), None),
        (Phase(40), features(k)),
        (Phase(100, 1000, weight_decay=1e-4), hidden_by_score(problem.n_hidden)),
        *_tail(problem),
    ]


def _tail(problem: Problem, epochs: int = 334, fine_tuning: int = 100) -> Recipe:
    """Anneal the input connections, then train what is left."""
    return [
        (Phase(epochs, 1000, weight_decay=1e-4), inputs(problem.n_inputs)),
        (Phase(fine_tuning, 1000, lr_end=1e-4, weight_decay=1e-5), None),
    ]


def callbacks(recipe: Recipe, n: int, shrink: bool = False) -> list[CPNAPruning]:
    """Turn what the phases anneal into callbacks, whose steps count from the start of the run.

    Features and input connections are annealed geometrically over the whole phase; the hidden layer by Eq. 2, whose
    window is the phase and whose descent is its first half.
    """
    found: list[CPNAPruning] = []
    start = 0
    for phase, pruning in recipe:
        steps = phase.steps(n)
        if pruning is not None:
            is_hidden = pruning.target == HIDDEN
            kind = "hidden" if is_hidden else pruning.options.get("granularity", "input")
            earlier = sum(callback.name.startswith(kind) for callback in found)
            found.append(
                CPNAPruning(
                    {pruning.target: pruning.n_end},
                    schedule=Annealing(start, start + steps // 2) if is_hidden else Geometric(start, start + steps),
                    name=f"{kind}_{earlier + 1}" if earlier else kind,
                    shrink=shrink,
                    **pruning.options,
                )
            )
        start += steps
    return found
