import copy
import gc
import warnings
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_cpna import (
    Annealing,
    Axes,
    Budget,
    Cubic,
    Geometric,
    Graph,
    Linear,
    OneShot,
    Score,
    ScoreInputs,
    Sparsity,
    keep_top,
    plant_,
    rewire_,
    sparsity_of,
    trace,
)
from lightning_cpna.graph import Layer
from lightning_cpna.schedules import ScheduleFunction, n_remaining
from lightning_cpna.scores import Granularity
from lightning_cpna.sparse import SparseLinear
from lightning_cpna.sparsity import Scope

X = torch.randn(9, 6)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def traced(net: nn.Module, x: Tensor) -> Sparsity:
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, x)
    return sparsity


def count(weight: Tensor, granularity: Granularity) -> int:
    """Count what is not zero in loops; no trained weight here is zero by chance."""
    cells = weight.detach().flatten(2).any(2) if weight.ndim > 2 else weight.detach() != 0  # (unit, input)
    rows: list[list[bool]] = cells.tolist()
    if granularity == "connection":
        return int(weight.detach().count_nonzero())
    if granularity == "unit":
        return sum(any(row) for row in rows)
    return sum(any(column) for column in zip(*rows, strict=True))


def shuffle_(sparsity: Sparsity) -> None:
    """Train, as it were: move every live weight."""
    with torch.no_grad():
        for name, tensor in sparsity.tensors.items():
            live = sparsity.masks[name].live if name in sparsity.masks else torch.ones_like(tensor, dtype=torch.bool)
            tensor.add_(torch.randn_like(tensor) * live)


def slope(step: int, n_start: int, n_end: int) -> int:
    return n_start - 3 * step


SCHEDULES: dict[str, ScheduleFunction] = {
    "annealing": Annealing(2, 9),
    "cubic": Cubic(0, 8, every=2),
    "geometric": Geometric(1, 9),
    "linear": Linear(3, 10, every=3),
    "one-shot": OneShot(4),
    "function": slope,
}
TARGETS: dict[Granularity, dict[str, int | float]] = {
    "connection": {"[02].weight": 0.2, "4.weight": 5},
    "feature": {"[02].weight": 0.5, "4.weight": 2},
    "unit": {"[02].weight": 0.3},
}


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("granularity", TARGETS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_counts_are_exact_after_every_step_and_nothing_returns(
    name: str, granularity: Granularity, scope: Scope
) -> None:
    net = mlp(6, 8, 7, 3)
    sparsity, schedule = traced(net, X), SCHEDULES[name]
    budgets = sparsity.add_budgets(net, TARGETS[granularity], granularity, scope)
    full = {b.label: sum(count(net.get_parameter(n), granularity) for n in b.names) for b in budgets}
    assert {b.label: sparsity.n_remaining(b) for b in budgets} == full
    dead = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in sparsity.tensors.items()}
    for step in range(1, 41):
        shuffle_(sparsity)
        for budget in budgets:
            n = n_remaining(schedule, step, full[budget.label], budget.n_end)
            if n < sparsity.n_remaining(budget):
                sparsity.prune_(budget, n, Score("magnitude"))
            weights = [net.get_parameter(name) for name in budget.names]
            assert n == sparsity.n_remaining(budget) == sum(count(w, granularity) for w in weights)
            assert all(count(w, "connection") > 0 for w in weights)
        for weight_name, mask in sparsity.masks.items():
            assert bool((mask.dead | ~dead[weight_name]).all())
            dead[weight_name] = mask.dead.clone()
            assert int(net.get_parameter(weight_name)[mask.dead].count_nonzero()) == 0
    wanted = {"layer": {**TARGETS[granularity]}, "shared": TARGETS[granularity]}[scope]
    assert all(sparsity.n_remaining(b) == b.n_end < full[b.label] for b in budgets)
    assert len(budgets) == (len(wanted) if scope == "shared" else len(wanted) + 1)


@given(
    n_units=st.integers(2, 5),
    n_features=st.integers(1, 5),
    levels=st.integers(1, 3),
    granularity=st.sampled_from(["connection", "feature", "unit"]),
    data=st.data(),
)
def test_pruning_tied_weights_equals_sorting_by_score_and_index(
    n_units: int, n_features: int, levels: int, granularity: Granularity, data: st.DataObject
) -> None:
    net = mlp(n_features, n_units, 2)
    size = n_units * n_features
    values = data.draw(st.lists(st.integers(1, levels), min_size=size, max_size=size))
    weight = net.get_parameter("0.weight")
    weight.data = torch.tensor(values, dtype=torch.float32).view(n_units, n_features)
    rows: list[list[float]] = weight.tolist()
    groups: dict[Granularity, list[list[float]]] = {
        "connection": [[x] for row in rows for x in row],
        "unit": rows,
        "feature": [list(column) for column in zip(*rows, strict=True)],
    }
    scores = [sum(x * x for x in group) for group in groups[granularity]]
    n = data.draw(st.integers(1, len(scores)))
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]
    kept = torch.tensor([i in best for i in range(len(scores))])
    shape = {"connection": (n_units, n_features), "unit": (n_units, 1), "feature": (1, n_features)}[granularity]

    sparsity = traced(net, torch.zeros(2, n_features))
    [budget] = sparsity.add_budgets(net, {"0.weight": 1}, granularity)
    lowest = sparsity.prune_(budget, n, Score("magnitude"))
    assert torch.equal(sparsity.masks["0.weight"].live, kept.view(shape).expand(n_units, n_features))
    assert lowest == pytest.approx(min(scores[i] for i in best) ** 0.5)


@pytest.mark.parametrize("stored", ["dense", "list"])
def test_what_is_known_of_live_connections_follows_them_as_asking_anew_shows(stored: str) -> None:
    torch.manual_seed(0)
    net = mlp(6, 8, 2)
    if stored == "list":
        net[0] = SparseLinear(6, 8, epsilon=3)
    sparsity, score = traced(net, X), Score("path", exponent=3.0)
    if stored == "dense":
        plant_(sparsity, "0.weight", 30)
    [budget] = sparsity.add_budgets(net, {"0.weight": 2})
    for n in (24, 20, 16, 12):
        for _ in range(2):  # after an exchange, and after a removal
            target, mask = sparsity.targets["0.weight"], sparsity.masks["0.weight"]
            cells = mask.live_cells
            scores = score(ScoreInputs(target, sparsity.tensors, sparsity.graph, torch.Generator(), cells=cells))
            weights = target.parameter.detach().flatten()[cells][keep_top(scores, n)]
            sparsity.prune_(budget, n, score)
            left = sparsity.tensors["0.weight"].detach().flatten()
            assert torch.equal(left[sparsity.masks["0.weight"].live_cells], weights)
            n -= 1
        sparsity.prune_(budget, sparsity.n_remaining(budget), score)  # which looks, and takes nothing
        rewire_(sparsity, "0.weight", zeta=0.5, std=1.0)


def test_a_shared_budget_keeps_the_best_of_all_layers_together_by_hand() -> None:
    net = mlp(2, 2, 1)
    weights = {"0.weight": torch.tensor([[1.0, 5.0], [2.0, 6.0]]), "2.weight": torch.tensor([[4.0, 3.0]])}
    net.load_state_dict({**net.state_dict(), **weights})
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"*.weight": 0.5}, scope="shared")
    assert budget == Budget("*.weight", ("0.weight", "2.weight"), "connection", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsity.prune_(budget, 3, Score("magnitude")) == 4.0
    assert net.get_parameter("0.weight").tolist() == [[0.0, 5.0], [0.0, 6.0]]
    assert net.get_parameter("2.weight").tolist() == [[4.0, 0.0]]


@pytest.mark.parametrize("granularity", ["connection", "feature", "unit"])
def test_a_shared_budget_never_empties_a_layer_and_warns_naming_it(granularity: Granularity) -> None:
    net = mlp(6, 5, 4, 2)
    with torch.no_grad():
        net.get_parameter("2.weight").mul_(1e-6)
    best = int(net.get_parameter("2.weight").abs().argmax())
    sparsity = traced(net, X)
    [budget] = sparsity.add_budgets(net, {"[02].weight": 3}, granularity, scope="shared")
    with pytest.warns(UserWarning, match=r"'\[02\]\.weight' would leave nothing of 2\.weight; its best one is kept"):
        lowest = sparsity.prune_(budget, 3, Score("magnitude"))
    assert sparsity.n_remaining(budget) == 3
    assert count(net.get_parameter("2.weight"), granularity) == 1
    assert 0 < lowest < 1e-5
    assert count(net.get_parameter("0.weight"), granularity) == 2
    if granularity == "connection":
        assert sparsity.masks["2.weight"].live.flatten().nonzero().flatten().tolist() == [best]


def test_a_shared_budget_leaves_one_connection_in_each_of_many_hopeless_layers() -> None:
    net = mlp(6, 5, 4, 3, 2)
    with torch.no_grad():
        for i in (2, 4, 6):
            net.get_parameter(f"{i}.weight").mul_(10.0**-i)
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"*.weight": 5}, scope="shared")
    with pytest.warns(UserWarning, match=r"nothing of 2\.weight, 4\.weight, 6\.weight"):
        sparsity.prune_(budget, 5, Score("magnitude"))
    assert [count(net.get_parameter(f"{i}.weight"), "connection") for i in (0, 2, 4, 6)] == [2, 1, 1, 1]


def test_a_count_that_cannot_leave_one_a_layer_raises() -> None:
    net = mlp(6, 5, 4, 2)
    with pytest.raises(ValueError, match=r"2 should remain of '\*\.weight', whose 3 layers keep one each"):
        Sparsity(net).add_budgets(net, {"*.weight": 2}, scope="shared")


@pytest.mark.parametrize(
    ("wanted", "granularity", "scope", "expected"),
    [
        ({"*.weight": 0.5}, "connection", "layer", [("0.weight", 15), ("2.weight", 10), ("4.weight", 4)]),
        ({"*.weight": 0.5}, "connection", "shared", [("*.weight", 29)]),
        ({"*.weight": 4}, "feature", "layer", [("0.weight", 4), ("2.weight", 4), ("4.weight", 4)]),
        ({"*.weight": 0.4}, "feature", "shared", [("*.weight", 6)]),
        ({"0.weight": 0.4, "2.*t": 3}, "unit", "layer", [("0.weight", 2), ("2.weight", 3)]),
    ],
)
def test_budgets_are_literal(
    wanted: dict[str, int | float], granularity: Granularity, scope: Scope, expected: list[tuple[str, int]]
) -> None:
    net = mlp(6, 5, 4, 2)
    sparsity = Sparsity(net)
    budgets = sparsity.add_budgets(net, wanted, granularity, scope)
    assert [(b.label, b.n_end) for b in budgets] == expected
    assert all(b.granularity == granularity for b in budgets)
    assert sparsity.budgets == budgets


def test_more_than_there_are_raises_by_name() -> None:
    net = mlp(6, 5, 2)
    with pytest.raises(ValueError, match=r"31 should remain of '0\.weight', which has 30"):
        Sparsity(net).add_budgets(net, {"0.weight": 31})
    with pytest.raises(ValueError, match=r"7 should remain of '0\.weight', which has 6"):
        Sparsity(net).add_budgets(net, {"0.weight": 7}, "feature")
    with pytest.raises(ValueError, match=r"'3\.weight' matches no parameter"):
        Sparsity(net).add_budgets(net, {"3.weight": 1})


def test_pruning_to_more_than_is_left_raises_and_changes_nothing() -> None:
    net = mlp(6, 5, 2)
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"0.weight": 3})
    sparsity.prune_(budget, 10, Score("magnitude"))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="n is 11"):
        sparsity.prune_(budget, 11, Score("magnitude"))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_nan_weight_raises() -> None:
    net = mlp(6, 5, 2)
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"0.weight": 3})
    with torch.no_grad():
        net.get_parameter("0.weight")[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 30 are NaN"):
        sparsity.prune_(budget, 10, Score("magnitude"))


def test_a_live_weight_of_zero_counts_and_outlives_a_dead_one() -> None:
    net = nn.Linear(4, 1, bias=False)
    net.weight.data = torch.tensor([[0.0, 3.0, 0.0, 2.0]])
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"weight": 1})
    sparsity.remove_("weight", torch.tensor([[True, False, False, False]]))
    assert sparsity.n_remaining(budget) == 3
    sparsity.prune_(budget, 3, Score("magnitude"))
    assert sparsity.masks["weight"].live.tolist() == [[False, True, True, True]]


def test_connections_that_are_not_live_do_not_count_towards_their_groups_score() -> None:
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"weight": 1}, "feature")
    sparsity.remove_("weight", torch.tensor([[False, True], [False, False]]))
    sparsity.prune_(budget, 1, lambda inputs: torch.tensor([[[3.0, 4.0], [3.0, 4.0]]]))  # 3 * sqrt(2) against 4
    assert sparsity.masks["weight"].live.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("shape", [(1, 5, 6), (1, 1, 6), (6,)])
def test_a_score_of_ones_own_may_broadcast(shape: tuple[int, ...]) -> None:
    net = nn.Linear(6, 5)
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"weight": 1}, "feature")

    def prefer_late_features(inputs: ScoreInputs) -> Tensor:
        assert inputs.target.name == "weight"
        return torch.arange(1.0, 7.0).expand(shape)

    sparsity.prune_(budget, 2, prefer_late_features)
    assert sparsity.masks["weight"].live.any(0).tolist() == [False] * 4 + [True] * 2


def test_a_score_of_ones_own_may_count() -> None:
    net = nn.Linear(6, 5)
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"weight": 1}, "unit")
    sparsity.graph = Graph([Layer("weight", None, Axes(), range(5), torch.full((6,), -1))])
    sparsity.prune_(budget, 2, lambda inputs: torch.tensor([[[3], [1], [4], [1], [5]]]))
    assert sparsity.masks["weight"].live.any(1).tolist() == [False, False, True, False, True]


def test_random_pruning_depends_on_the_seed_and_on_nothing_else() -> None:
    def pattern(score: Score, generator: torch.Generator | None) -> list[int]:
        net = nn.Linear(6, 5)
        sparsity = Sparsity(net)
        [budget] = sparsity.add_budgets(net, {"weight": 1})
        sparsity.prune_(budget, 10, score, generator=generator)
        live: list[int] = sparsity.masks["weight"].live.flatten().int().tolist()
        return live

    seeded = [pattern(Score("random"), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert pattern(Score("random", seed=1), None) == pattern(Score("random", seed=1), None) == seeded[0]
    assert pattern(Score("random", seed=2), None) == seeded[2]


def test_the_decision_that_is_taken_is_the_one_that_was_agreed() -> None:
    net = nn.Linear(4, 1, bias=False)
    net.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"weight": 1})
    proposed: list[list[bool]] = []

    def decide(keep: Tensor) -> Tensor:
        proposed.extend(keep.tolist())
        return torch.tensor([[True, False, False, True]])

    sparsity.prune_(budget, 2, Score("magnitude"), agree=decide)
    assert proposed == [[False, False, True, True]]
    assert net.weight.tolist() == [[1.0, 0.0, 0.0, 4.0]]


def test_removal_zeroes_weights_gradients_and_moments_in_place() -> None:
    net = mlp(3, 2, 1)
    weight = net.get_parameter("0.weight")
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in net.parameters()]
    net(torch.randn(4, 3)).sum().backward()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    sparsity, address = Sparsity(net), weight.data_ptr()
    before = weight.detach().clone()
    where = torch.tensor([[True, False, False], [False, False, True]])
    sparsity.remove_("0.weight", where, optimizers)
    assert weight.grad is not None
    assert torch.equal(weight.detach(), before * ~where)
    assert torch.equal(weight.grad, (~where).float())
    assert torch.equal(optimizers[0].state[weight]["momentum_buffer"], (~where).float())
    assert weight.data_ptr() == address
    assert sparsity.masks["0.weight"].removed.tolist() == where.tolist()
    assert list(sparsity.masks) == ["0.weight"]


def test_masked_gradients_are_zero_exactly_where_nothing_lives() -> None:
    net = mlp(3, 2, 1)
    sparsity = Sparsity(net)
    where = torch.tensor([[True, False, False], [False, True, True]])
    sparsity.remove_("0.weight", where)
    sparsity.mask_gradients_()
    assert all(p.grad is None for p in net.parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    sparsity.mask_gradients_()
    for name, p in net.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, (~where).float() if name == "0.weight" else torch.ones_like(p))


def test_removed_units_leave_nothing_behind_and_the_others_as_they_were() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    sparsity = traced(net, torch.randn(2, 1, 3, 3))
    [budget] = sparsity.add_budgets(net, {"0.weight": 2}, "unit")
    before = copy.deepcopy(net.state_dict())
    sizes = before["0.weight"].flatten(1).norm(dim=1)
    kept = sorted(sizes.argsort(descending=True)[:2].tolist())
    sparsity.prune_(budget, 2, Score("magnitude"))
    alive = torch.tensor([i in kept for i in range(4)])
    assert torch.equal(net.get_parameter("0.weight").detach(), before["0.weight"] * alive.view(4, 1, 1, 1))
    assert torch.equal(net.get_parameter("3.weight").detach(), before["3.weight"] * alive.repeat_interleave(4))
    assert torch.equal(net.get_parameter("3.bias").detach(), before["3.bias"])
    assert sparsity.masks["3.weight"].n_live == 3 * 2 * 4


@pytest.mark.parametrize(
    ("net", "name", "trace_it", "reason"),
    [
        (mlp(6, 5, 2), "0.weight", False, "not traced"),
        (mlp(6, 5, 2), "2.weight", True, "they are the output of the network"),
        (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)), "0.weight", True, "LayerNorm '1'"),
        (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)), "1.weight", True, "trace"),
    ],
)
def test_units_whose_readers_are_not_known_cannot_be_removed_by_name_and_reason(
    net: nn.Module, name: str, trace_it: bool, reason: str
) -> None:
    sparsity = traced(net, X) if trace_it else Sparsity(net)
    [budget] = sparsity.add_budgets(net, {name: 1}, "unit")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=rf"'{name}' cannot be removed: .*{reason}"):
        sparsity.prune_(budget, 1, Score("magnitude"))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_dead_units_cascade_from_the_output_to_the_input_by_hand() -> None:
    net = mlp(2, 2, 2, 2, 1)
    for p in net.parameters():
        nn.init.ones_(p)
    sparsity = traced(net, torch.randn(3, 2))
    sparsity.remove_("6.weight", torch.tensor([[False, True]]))  # unit 1 of layer 4 feeds nothing
    sparsity.remove_("4.weight", torch.tensor([[False, True], [False, False]]))  # unit 1 of layer 2 fed only that
    sparsity.remove_("2.weight", torch.tensor([[False, True], [False, False]]))
    sparsity.remove_dead_units_()
    weights = [net.get_parameter(f"{i}.weight").tolist() for i in (0, 2, 4, 6)]
    assert weights == [[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 0]]]
    assert sparsity.masks["0.weight"].removed.tolist() == [[False, False], [True, True]]


def test_removing_dead_units_leaves_the_function_as_it_is() -> None:
    net = nn.Sequential(
        *[nn.Conv2d(2, 6, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 2), nn.ReLU(), nn.Flatten()],
        *[nn.Linear(20, 7), nn.GELU(), nn.Linear(7, 2)],
    ).double()
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64)
    sparsity = traced(net, x)
    for budget in sparsity.add_budgets(net, {"3.weight": 0.3, "6.weight": 0.1, "8.weight": 3}):
        sparsity.prune_(budget, budget.n_end, Score("magnitude"))
    sparsity.budgets.clear()
    before, live = net(x), {name: count(p, "connection") for name, p in sparsity.tensors.items() if p.ndim > 1}
    sparsity.remove_dead_units_()
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-14)
    assert all(count(net.get_parameter(f"{i}.weight"), "connection") < live[f"{i}.weight"] for i in (3, 6))
    for layer in sparsity.report().layers[:-1]:
        rows = sparsity.masks[layer.name].live.flatten(1).any(1)
        assert layer.live_units == int(rows.sum())


@pytest.mark.parametrize(
    ("target", "granularity", "expected"),
    [
        ({"0.weight": 4}, "connection", 4),  # both units' connections are needed
        ({"0.weight": 3}, "connection", 4),  # removing two would leave two
        ({"0.weight": 2}, "connection", 2),
        ({"0.weight": 2}, "feature", 2),  # the live unit reads both features
        ({"0.weight": 2}, "unit", 4),
        ({"0.weight": 1}, "unit", 2),
        ({"[02].weight": 5}, "connection", 4),  # 4 + 2 are left, without the dead unit 2 + 2
        ({"[02].weight": 4}, "connection", 2),
    ],
)
@pytest.mark.parametrize("stored", ["dense", "sparse"])
def test_dead_units_stay_where_a_budget_needs_them_by_hand(
    target: dict[str, int | float], granularity: Granularity, expected: int, stored: str
) -> None:
    net = mlp(2, 2, 2, 1)
    if stored == "sparse":
        first: Any = net[0]
        net[0] = SparseLinear.from_dense(first)
    sparsity = traced(net, torch.randn(3, 2))
    sparsity.add_budgets(net, target, granularity, scope="shared")
    sparsity.remove_(
        "2.weight", torch.tensor([[False, True], [False, True]])
    )  # unit 1 of the first layer feeds nothing
    sparsity.remove_dead_units_()
    assert sparsity.masks["0.weight"].n_live == expected
    assert int((net.get_parameter("0.weight") != 0).sum()) == expected


@given(seed=st.integers(0, 1000), ends=st.tuples(*[st.integers(1, 6)] * 3))
def test_no_budget_falls_below_its_count_however_the_layers_are_pruned(seed: int, ends: tuple[int, int, int]) -> None:
    torch.manual_seed(seed)
    net = mlp(3, 4, 4, 2)
    sparsity = traced(net, torch.randn(5, 3))
    budgets = sparsity.add_budgets(net, {f"{2 * i}.weight": end for i, end in enumerate(ends)})
    for step in range(1, 12):
        for budget in reversed(budgets):
            n = n_remaining(Linear(0, 10), step, 8, budget.n_end)
            if n < sparsity.n_remaining(budget):
                sparsity.prune_(budget, n, Score("path"))
            sparsity.remove_dead_units_()
            for other in budgets:
                assert count(net.get_parameter(other.names[0]), "connection") >= other.n_end
    assert [count(net.get_parameter(b.names[0]), "connection") for b in budgets] == list(ends)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out: Tensor = self.c(h + self.b(h))
        return out


def test_units_that_are_outputs_or_lost_are_never_dead() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    sparsity = traced(net, torch.randn(5, 3))
    sparsity.remove_("2.weight", torch.ones(2, 4, dtype=torch.bool))
    before = copy.deepcopy(net.state_dict())
    sparsity.remove_dead_units_()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    sparsity = traced(Residual(), torch.randn(5, 3))
    sparsity.remove_("b.weight", torch.tensor([[True, False, False]] * 3))
    sparsity.remove_dead_units_()
    assert list(sparsity.masks) == ["b.weight"]
    untraced = Sparsity(net)
    untraced.remove_dead_units_()
    assert len(untraced.masks) == 0


class Stack(nn.Module):
    parameter_axes = {"first": Axes(member=0, unit=1, input=2), "last": Axes(member=0, unit=1, input=2)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 4, 3))
        self.last = nn.Parameter(torch.randn(2, 2, 4))


def stacked() -> tuple[Stack, Sparsity]:
    net = Stack()
    sparsity = Sparsity(net)
    axes = net.parameter_axes["first"]
    sparsity.graph = Graph(
        [
            Layer("first", None, axes, range(4), torch.full((3,), -1)),
            Layer("last", None, axes, range(4, 6), torch.arange(4), is_output=True),
        ]
    )
    return net, sparsity


def per_member(weight: Tensor, granularity: Granularity) -> list[int]:
    return [count(member, granularity) for member in weight]


@pytest.mark.parametrize(
    ("granularity", "n"), [("connection", 7), ("connection", 1), ("feature", 2), ("unit", 3), ("unit", 1)]
)
def test_every_member_of_a_stacked_network_keeps_its_own_count(granularity: Granularity, n: int) -> None:
    net, sparsity = stacked()
    with torch.no_grad():
        net.first[1] *= 100
    alone = [mlp(3, 4, 2) for _ in range(2)]
    [budget] = sparsity.add_budgets(net, {"first": n}, granularity)
    sparsity.prune_(budget, n, Score("magnitude"))
    assert per_member(net.first, granularity) == [n, n]
    assert sparsity.n_remaining(budget) == n
    for member, single in enumerate(alone):
        single.load_state_dict({**single.state_dict(), "0.weight": stacked_before(member)})
        sparse = traced(single, torch.randn(5, 3))
        [own] = sparse.add_budgets(single, {"0.weight": n}, granularity)
        sparse.prune_(own, n, Score("magnitude"))
        assert torch.equal(sparse.masks["0.weight"].live, sparsity.masks["first"].live[member])


def stacked_before(member: int) -> Tensor:
    torch.manual_seed(0)
    net, _ = stacked()
    return net.first.detach()[member] * (100 if member else 1)


def test_dead_units_never_take_a_single_member_below_its_count() -> None:
    net, sparsity = stacked()
    sparsity.add_budgets(net, {"first": 9})
    where = torch.zeros(2, 2, 4, dtype=torch.bool)
    where[0, :, :2] = True  # two units of member 0 feed nothing; without them it has 6 connections, the mean is 9
    sparsity.remove_("last", where)
    sparsity.remove_dead_units_()
    assert min(per_member(net.first, "connection")) >= 9


def test_a_member_that_lost_dead_units_does_not_stop_the_others_from_being_pruned() -> None:
    net, sparsity = stacked()
    [budget] = sparsity.add_budgets(net, {"first": 4})
    where = torch.zeros(2, 2, 4, dtype=torch.bool)
    where[0, :, :2] = True
    sparsity.remove_("last", where)
    sparsity.remove_dead_units_()
    assert per_member(net.first, "connection") == [6, 12]
    if sparsity.n_remaining(budget) > 8:
        sparsity.prune_(budget, 8, Score("magnitude"))
    assert per_member(net.first, "connection") == [6, 8]
    sparsity.prune_(budget, 4, Score("magnitude"))
    assert per_member(net.first, "connection") == [4, 4]


def test_finding_targets_anew_keeps_the_masks_and_checks_them() -> None:
    net = mlp(3, 2, 1)
    sparsity = Sparsity(net)
    sparsity.remove_("0.weight", torch.tensor([[True, False, False], [False, False, True]]))
    sparsity.find_targets(copy.deepcopy(net))
    assert sparsity.masks["0.weight"].n_live == 4
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(2, 3\), the parameter \(2, 4\)"):
        sparsity.find_targets(mlp(4, 2, 1))
    with pytest.raises(ValueError, match=r"a mask for '0\.weight', but no such parameter"):
        sparsity.find_targets(nn.Linear(3, 2))


def test_the_report_names_what_should_remain_of_each_layers_own_budget() -> None:
    net = mlp(6, 5, 4, 2)
    sparsity = traced(net, X)
    sparsity.add_budgets(net, {"4.weight": 3})
    sparsity.add_budgets(net, {"[02].weight": 10}, scope="shared")
    wanted: dict[str, Any] = {layer.name: layer.target for layer in sparsity.report().layers}
    assert wanted == {"4.weight": 3, "0.weight": None, "2.weight": None}


def test_everyone_who_asks_for_a_modules_sparsity_gets_the_same_as_long_as_it_lives() -> None:
    net, other = mlp(3, 2, 1), mlp(3, 2, 1)
    assert sparsity_of(net) is sparsity_of(net)
    assert sparsity_of(net) is not sparsity_of(other)
    assert list(sparsity_of(net).targets) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    gone = weakref.ref(sparsity_of(other))
    del other
    gc.collect()
    assert gone() is None


def test_features_of_a_grouped_convolution_are_refused() -> None:
    net = nn.Conv1d(4, 4, 3, groups=2)
    with pytest.raises(ValueError, match="granularity='feature': 'weight' is grouped"):
        Sparsity(net).add_budgets(net, {"weight": 1}, granularity="feature")


def test_a_shared_budget_passes_over_a_layer_in_which_nothing_lives() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"*.weight": 6}, scope="shared")
    sparsity.remove_("2.weight", torch.tensor(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsity.prune_(budget, 6, Score("magnitude"))
    assert [mask.n_live for mask in sparsity.masks.values()] == [6, 0]


def test_a_score_of_minus_infinity_goes_first_but_the_count_is_exact() -> None:
    net = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0, 0.0]]))
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"weight": 4})
    sparsity.prune_(budget, 4, lambda inputs: inputs.weight.abs().log())
    assert sparsity.masks["weight"].live.tolist() == [[True, True, True, True, False, False]]


def test_a_mask_that_stayed_on_another_device_follows_its_parameter() -> None:
    net = nn.Linear(3, 2, bias=False)
    sparsity = Sparsity(net)
    [budget] = sparsity.add_budgets(net, {"weight": 2})
    mask = sparsity.masks["weight"]
    moved: list[torch.device] = []
    mask.to_ = moved.append  # type: ignore[method-assign, assignment]
    sparsity.prune_(budget, 2, Score("magnitude"))
    assert moved == [net.weight.device]
