"""Unit scores against loops over nested lists."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import Sparsity, UnitActivity, UnitInputs, UnitScore, trace
from lightning_cpna.graph import Graph
from lightning_cpna.unit_scores import UnitScoreKind
from tests.helpers import Net


def linear() -> tuple[nn.Module, Graph, dict[str, str]]:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    return net, trace(net, torch.zeros(2, 4)), {"0.weight": "2.weight", "2.weight": "4.weight"}


def conv() -> tuple[nn.Module, Graph, dict[str, str]]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)
    ).double()
    return net, trace(net, torch.zeros(2, 2, 4, 4)), {"0.weight": "2.weight", "2.weight": "5.weight"}


NETS = {"linear": linear, "conv": conv}
LAYERS = [("linear", "0.weight"), ("linear", "2.weight"), ("conv", "0.weight"), ("conv", "2.weight")]
on_every_layer = pytest.mark.parametrize(("kind", "name"), LAYERS)


def case(kind: str, name: str) -> tuple[UnitInputs, list[list[float]], list[list[float]], list[int], list[int]]:
    """Return the inputs, each unit's incoming and outgoing weights, and how many of them live."""
    net, graph, readers = NETS[kind]()
    sparsity = Sparsity(net)
    sparsity.graph = graph
    for target in (name, readers[name]):
        sparsity.masks.add(target, sparsity.tensors[target])
        sparsity.remove_(target, torch.rand(sparsity.tensors[target].shape) < 0.4)
    w, v = sparsity.tensors[name].detach(), sparsity.tensors[readers[name]].detach()
    incoming, outgoing = (
        [unit.flatten().tolist() for unit in w],
        [unit.flatten().tolist() for unit in v.transpose(0, 1)],
    )
    inputs = UnitInputs(
        sparsity.targets[name], sparsity.targets, sparsity.masks, graph, torch.Generator().manual_seed(1)
    )
    in_degree = [sum(x != 0 for x in unit) for unit in incoming]
    return inputs, incoming, outgoing, in_degree, [sum(x != 0 for x in unit) for unit in outgoing]


def norm(values: list[float]) -> float:
    return math.sqrt(sum(x * x for x in values))


def same(scores: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(scores, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=0)


@on_every_layer
def test_norm_and_path_equal_loops(kind: str, name: str) -> None:
    inputs, incoming, outgoing, _, _ = case(kind, name)
    same(UnitScore("norm")(inputs), [norm(w) for w in incoming])
    same(UnitScore("path")(inputs), [norm(w) * norm(v) for w, v in zip(incoming, outgoing, strict=True)])


@on_every_layer
@pytest.mark.parametrize("degree", ["in_degree", "out_degree"])
def test_degrees_equal_loops_and_ties_are_broken_by_the_generator(kind: str, name: str, degree: UnitScoreKind) -> None:
    inputs, _, _, in_degree, out_degree = case(kind, name)
    counts = in_degree if degree == "in_degree" else out_degree
    state = inputs.generator.get_state()
    scores = UnitScore(degree)(inputs)[0].tolist()
    assert [int(score) for score in scores] == counts
    assert UnitScore(degree)(inputs)[0].tolist() != scores
    inputs.generator.set_state(state)
    assert UnitScore(degree)(inputs)[0].tolist() == scores


@on_every_layer
@pytest.mark.parametrize("score", ["frame_potential", "raw_frame_potential", "inner_product"])
def test_frame_potentials_equal_what_the_double_sum_loses_with_the_unit(
    kind: str, name: str, score: UnitScoreKind
) -> None:
    inputs, incoming, *_ = case(kind, name)
    if score != "raw_frame_potential":
        incoming = [[x / (norm(w) or 1.0) for x in w] for w in incoming]
    power = 1 if score == "inner_product" else 2

    def total(vectors: list[list[float]]) -> float:
        return sum(abs(sum(a * b for a, b in zip(u, w, strict=True))) ** power for u, w in product(vectors, repeat=2))

    expected = [total(incoming) - total(incoming[:i] + incoming[i + 1 :]) for i in range(len(incoming))]
    torch.testing.assert_close(UnitScore(score)(inputs)[0], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        UnitScore(score, largest_first=True)(inputs)[0], -torch.tensor(expected, dtype=torch.float64)
    )


def test_scores_of_activity_are_its_fields_and_the_penalty_is_asked_for() -> None:
    inputs, incoming, *_ = case("linear", "0.weight")
    numbers = torch.rand(4, len(incoming))
    activity = UnitActivity(3, numbers[0], numbers[0], numbers[1], numbers[0], {}, numbers[2], numbers[3])
    seen = UnitInputs(**{**vars(inputs), "activity": activity, "penalize": lambda: numbers[0]})
    kinds: list[tuple[UnitScoreKind, int]] = [
        ("activation", 1),
        ("gradient", 2),
        ("mean_replacement", 3),
        ("penalty", 0),
    ]
    for kind, row in kinds:
        assert torch.equal(UnitScore(kind)(seen)[0], numbers[row])
    with pytest.raises(ValueError, match=r"'mean_replacement' needs the activations of '0\.weight'"):
        UnitScore("mean_replacement")(inputs)
    with pytest.raises(ValueError, match=r"'penalty' of '0\.weight' needs a loss"):
        UnitScore("penalty")(inputs)
    without = UnitInputs(
        **{**vars(inputs), "activity": UnitActivity(3, numbers[0], numbers[0], numbers[1], numbers[2], {}, None, None)}
    )
    with pytest.raises(ValueError, match="'gradient' needs the gradients"):
        UnitScore("gradient")(without)


def test_random_scores_come_from_the_generator() -> None:
    inputs, *_ = case("linear", "0.weight")
    drawn = torch.rand(1, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(UnitScore("random")(inputs), drawn)


def test_an_unknown_kind_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="score is 'nonsense'; allowed is one of norm, path"):
        UnitScore("nonsense")  # type: ignore[arg-type]


def test_two_readers_add_up() -> None:
    def forward(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        a = net.get_submodule("a")(x)
        return net.get_submodule("b")(a), net.get_submodule("c")(a)

    net = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), c=nn.Linear(4, 5))
    sparsity = Sparsity(net)
    graph = trace(net, torch.zeros(2, 3))
    inputs = UnitInputs(sparsity.targets["a.weight"], sparsity.targets, sparsity.masks, graph, torch.Generator())
    assert inputs.out_degree.tolist() == [[7, 7, 7, 7]]
    assert inputs.in_degree.tolist() == [[3, 3, 3, 3]]
