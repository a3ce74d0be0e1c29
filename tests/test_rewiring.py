import copy
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, get_args

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpna import Decay, Growth, Masks, Score, SparseLinear, Sparsity, rewire_, rewiring, trace
from lightning_cpna.growth import DecayKind, Factors, GrowthKind
from lightning_cpna.mask import ListMask
from lightning_cpna.moments import moments_of
from lightning_cpna.rewiring import Decision, plant_, weakest
from tests.helpers import on_every_device, p_of_uniform
from tests.test_sparse import assert_consistent

F64 = torch.float64
NOTHING = torch.empty(0, dtype=torch.int64)
STORAGES = ["dense", "sparse"]
ZETAS = st.integers(1, 19).map(lambda n: Fraction(n, 20))
VALUES = st.sampled_from([-2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 3.0])

in_both_storages = pytest.mark.parametrize("storage", STORAGES)


class Case:
    """A layer of either storage, of which some connections live, seen as a dense one."""

    def __init__(self, storage: str, weight: Tensor, live: Tensor, device: str = "cpu") -> None:
        n_out, n_in = weight.shape
        linear = nn.Linear(n_in, n_out, dtype=weight.dtype)
        linear.weight.data.copy_(weight * live)
        self.layer = (SparseLinear.from_dense(linear, live) if storage == "sparse" else linear).to(device)
        self.sparsity = Sparsity(self.layer)
        self.sparsity.add_mask("weight")
        if storage == "dense":
            self.sparsity.masks["weight"].move_((~live).flatten().nonzero().flatten().to(device), NOTHING.to(device))
        self.size = n_out, n_in
        self.optimizers: list[Optimizer] = []
        self.decisions: list[Decision] = []

    @property
    def parameter(self) -> nn.Parameter:
        return self.layer.get_parameter("weight")

    def full(self, tensor: Tensor) -> Tensor:
        """Put something of the live connections into the shape of the dense layer, on the CPU."""
        tensor = tensor.detach().cpu()
        if not isinstance(self.layer, SparseLinear):
            return tensor.clone()
        full = tensor.new_zeros(self.size)
        full.view(-1)[self.layer.cells.cpu()] = tensor
        return full

    @property
    def weight(self) -> Tensor:
        return self.full(self.parameter)

    @property
    def live(self) -> Tensor:
        mask = self.sparsity.masks["weight"]
        assert mask.n_live == int(mask.live.sum())
        return self.full(mask.live)

    def train(self, make: Callable[[Any], Optimizer]) -> None:
        """Make moments, and a gradient, that are not zero."""
        optimizer = make(self.layer.parameters())
        self.optimizers = [optimizer]
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(20, self.size[1], dtype=self.parameter.dtype)
            (self.layer(x) - torch.randn(20, self.size[0])).square().sum().backward()
            self.sparsity.mask_gradients_()
            optimizer.step()

    def moments(self) -> dict[str, Tensor]:
        assert self.parameter.grad is not None
        found = dict(moments_of(self.optimizers[0], self.parameter)) | {"gradient": self.parameter.grad}
        return {name: self.full(tensor) for name, tensor in found.items()}

    def died(self, decision: Decision, live: Tensor) -> Tensor:
        """Which cells a decision let go of those that lived, in the shape of the dense layer."""
        dying = decision.dying.cpu()
        if isinstance(self.layer, SparseLinear):
            dying = live.flatten().nonzero().flatten()[dying]
        return torch.zeros(live.numel(), dtype=torch.bool).index_fill(0, dying, True).view(self.size)

    def rewire(self, zeta: float, seed: int = 0, **options: Any) -> Decision:
        def keep(decision: Decision) -> Decision:
            self.decisions.append(decision)
            return decision

        standard: dict[str, Any] = {"optimizers": self.optimizers, "generator": torch.Generator().manual_seed(seed)}
        options = standard | {"agree": keep} | options
        before = len(self.decisions)
        n = rewire_(self.sparsity, "weight", zeta, **options)
        if len(self.decisions) == before:  # nothing is to be decided
            nothing = torch.empty(0, dtype=torch.int64)
            self.decisions.append(Decision(nothing, nothing, torch.empty(0, dtype=torch.float64)))
        assert n == len(self.decisions[-1].dying)
        return self.decisions[-1]


def survivors(values: Sequence[float], zeta: Fraction) -> list[float]:
    """Sort what stays when the smallest positive and the largest negative weights go. No zeros."""
    kept = []
    for sign in (1, -1):
        signed = sorted((value for value in values if value * sign > 0), key=abs)
        kept += signed[math.floor(zeta * len(signed)) :]
    return sorted(kept)


def grows(gradient: Tensor, free: Tensor, n: int) -> list[int]:
    """List the free cells of the largest gradients by sorting; of equal ones the first come."""
    size, is_free = gradient.abs().flatten().tolist(), free.flatten().tolist()
    return sorted(sorted((i for i, f in enumerate(is_free) if f), key=lambda i: (-size[i], i))[:n])


def weights_of(n_out: int, n_in: int) -> Tensor:
    return torch.randn(n_out, n_in, dtype=F64)


def adam(parameters: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, amsgrad=True)


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.001, momentum=0.9)


# Which go


@given(values=st.lists(VALUES, max_size=40), zeta=ZETAS)
def test_without_zeros_the_smallest_positive_and_the_largest_negative_go_ties_included(
    values: list[float], zeta: Fraction
) -> None:
    gone: list[bool] = weakest(torch.tensor(values), float(zeta)).tolist()
    kept = [value for value, g in zip(values, gone, strict=True) if not g]
    assert sorted(kept) == survivors(values, zeta)
    assert sum(gone) == sum(math.floor(zeta * sum(v * sign > 0 for v in values)) for sign in (1, -1))


@given(values=st.lists(VALUES | st.just(0.0) | st.just(-0.0), max_size=40), zeta=ZETAS, seed=st.integers(0, 99))
def test_zeros_go_first_and_count_inside_the_fraction(values: list[float], zeta: Fraction, seed: int) -> None:
    gone: list[bool] = weakest(torch.tensor(values), float(zeta), torch.Generator().manual_seed(seed)).tolist()
    kept = [value for value, g in zip(values, gone, strict=True) if not g]
    others, n_zeros = [value for value in values if value != 0], sum(value == 0 for value in values)
    n_gone = math.floor(zeta * len(values))
    if n_zeros > n_gone:
        assert sum(gone) == n_gone
        assert sorted(value for value in kept if value != 0) == sorted(others)
        return
    assert sorted(kept) == survivors(others, (zeta * len(values) - n_zeros) / max(1, len(others)))
    assert n_gone - 2 < sum(gone) <= n_gone


@pytest.mark.parametrize("zeta", [0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("values", [[-2.0, -1.0, -3.0], [1.0], [-1.0], [0.0], [], [0.0, -1.0, -2.0], [2.0, 0.0, 1.0]])
def test_layers_of_one_sign_or_none_are_served(values: list[float], zeta: float) -> None:
    gone = weakest(torch.tensor(values), zeta)
    order = sorted(range(len(values)), key=lambda i: abs(values[i]))[: math.floor(zeta * len(values))]
    assert gone.nonzero().flatten().tolist() == sorted(order)


@pytest.mark.parametrize(("n", "zeta", "expected"), [(100, 0.29, 29), (100, 0.57, 57), (1000, 0.001, 1), (10, 0.3, 3)])
def test_a_fraction_that_gives_a_whole_number_gives_that_number(n: int, zeta: float, expected: int) -> None:
    for weights in (torch.rand(n) + 1, -torch.rand(n) - 1, torch.zeros(n)):
        assert int(weakest(weights, zeta).sum()) == expected


def test_of_tied_weights_the_first_go() -> None:
    weights = torch.tensor([0.1, 0.5, 0.5, -0.2, 0.5, -0.4, -0.4, -0.4])
    assert weakest(weights, 0.5).tolist() == [True, True, False, True, False, True, False, False]


def test_of_too_many_zeros_every_one_goes_as_often() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 2.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([weakest(weights, 0.1, generator) for _ in range(4000)]).sum(0)
    assert int(counts[weights != 0].sum()) == 0
    assert scipy.stats.chisquare(counts[weights == 0].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_every_precision_are_compared_as_they_are(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.1, 0.5, -0.2, -0.9, 0.3, -0.4], dtype=dtype)
    assert weakest(weights, 0.34).tolist() == [True, False, True, False, False, False]


def test_a_parameter_can_be_asked_as_it_is() -> None:
    assert weakest(nn.Parameter(torch.tensor([0.1, 0.5, -0.2])), 0.5).tolist() == [True, False, False]


@on_every_device
@in_both_storages
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_raises_with_the_layer_and_changes_nothing(
    bad: float, storage: str, device: str
) -> None:
    weight, live = weights_of(5, 6), torch.rand(5, 6) < 0.5
    weight[live.nonzero()[2].tolist()[0], live.nonzero()[2].tolist()[1]] = bad
    case = Case(storage, weight.masked_fill(~live, 0), live, device)
    before, state, random = case.weight, case.live, torch.Generator().manual_seed(3)
    drawn = random.get_state()
    n = int(live.sum())
    with pytest.raises(ValueError, match=rf"rewiring 'weight': 1 of {n} weights are not finite"):
        case.rewire(0.3, generator=random)
    torch.testing.assert_close(case.weight, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(case.live, state)
    assert torch.equal(random.get_state(), drawn)


# Rewiring


@in_both_storages
@given(
    n_out=st.integers(1, 9),
    n_in=st.integers(1, 9),
    density=st.floats(0, 1),
    zeta=ZETAS,
    signs=st.sampled_from([(1.0,), (-1.0,), (-1.0, 1.0), (-1.0, 0.0, 1.0), (0.0,)]),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**20),
    by_gradient=st.booleans(),
)
def test_counts_stay_exact_and_survivors_keep_their_values_whatever_the_layer(
    storage: str,
    n_out: int,
    n_in: int,
    density: float,
    zeta: Fraction,
    signs: tuple[float, ...],
    levels: int,
    seed: int,
    by_gradient: bool,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    live = torch.rand(n_out, n_in, generator=draw) < density
    sizes = torch.randint(1, levels + 1, (n_out, n_in), generator=draw) / 4
    weight = sizes * torch.tensor(signs)[torch.randint(len(signs), (n_out, n_in), generator=draw)]
    factors = [Factors(torch.randn(3, n_out, generator=draw), torch.randn(3, n_in, generator=draw), 1.0)]
    dense = factors[0].output_gradient.t() @ factors[0].x
    case = Case(storage, weight, live)
    gradient = (factors if storage == "sparse" else dense) if by_gradient else None
    decision = case.rewire(float(zeta), seed, gradient=gradient)

    if bool(live.all()):  # there is nowhere to grow
        assert torch.equal(case.weight, weight)
        return
    died = case.died(decision, live)
    before, n = (weight * live)[live].tolist(), len(decision.born)
    n_zeros, n_gone = before.count(0.0), math.floor(zeta * len(before))
    assert n == int(died.sum()) <= n_gone
    if n_zeros == 0:
        assert sorted(weight[live & ~died].tolist()) == survivors(before, zeta)
    else:
        assert int((weight[died] == 0).sum()) == min(n_zeros, n_gone)
    free = ~live | died
    born = torch.zeros(n_out * n_in, dtype=torch.bool).index_fill(0, decision.born, True).view(n_out, n_in)
    assert int(born.sum()) == n
    assert not bool((born & ~free).any())
    assert torch.equal(case.live, (live & ~died) | born)
    assert int(case.live.sum()) == int(live.sum())
    assert torch.equal(case.weight, weight * (live & ~died))  # what comes is zero
    if by_gradient:
        assert decision.born.tolist() == grows(dense, free, n)


@pytest.mark.parametrize("make", [adam, sgd])
@in_both_storages
def test_survivors_keep_their_moments_and_what_comes_has_none(storage: str, make: Callable[[Any], Optimizer]) -> None:
    live = torch.rand(12, 15) < 0.4
    case = Case(storage, weights_of(12, 15), live)
    case.train(make)
    for seed in range(5):
        live, weight, moments = case.live, case.weight, case.moments()
        assert all(bool((moment[live] != 0).any()) for moment in moments.values())
        decision = case.rewire(0.4, seed)
        died = case.died(decision, live)
        stays = live & ~died
        assert int(died.sum()) > 20
        assert torch.equal(case.weight, weight * stays)
        after = case.moments()
        assert after.keys() == moments.keys()
        assert len(after) == (4 if make is adam else 2)
        for name, moment in moments.items():
            assert torch.equal(after[name], moment * stays), name
        with torch.no_grad():  # so that what came has a weight
            case.parameter.add_(case.parameter == 0, alpha=0.3)
            case.sparsity.masks["weight"].apply_(case.parameter)


@in_both_storages
def test_other_optimizers_and_the_bias_are_left_alone(storage: str) -> None:
    case = Case(storage, weights_of(6, 7), torch.rand(6, 7) < 0.5)
    case.train(adam)
    bias = case.layer.get_parameter("bias")
    other = nn.Parameter(torch.randn_like(case.parameter))
    optimizer = torch.optim.SGD([other], lr=0.1, momentum=0.9)
    optimizer.state[other]["momentum_buffer"] = torch.ones_like(other)
    before = bias.detach().clone(), dict(case.optimizers[0].state[bias])
    case.rewire(0.5, optimizers=[optimizer, *case.optimizers])
    assert bool((optimizer.state[other]["momentum_buffer"] == 1).all())
    assert torch.equal(bias, before[0])
    assert all(torch.equal(case.optimizers[0].state[bias][key], value) for key, value in before[1].items())


@in_both_storages
def test_a_full_layer_is_left_as_it_is(storage: str) -> None:
    weight = weights_of(5, 6)
    case = Case(storage, weight, torch.ones(5, 6, dtype=torch.bool))
    assert len(case.rewire(0.5).dying) == 0
    assert bool(case.live.all())
    assert torch.equal(case.weight, weight)


def test_connections_that_grow_leave_moments_of_earlier_times_behind() -> None:
    case = Case("dense", weights_of(6, 7), torch.rand(6, 7) < 0.5)
    case.train(adam)  # dense before, as it were
    live, moments = case.live, case.moments()
    for _, moment in moments_of(case.optimizers[0], case.parameter):
        moment.fill_(0.5)
    assert case.parameter.grad is not None
    case.parameter.grad.fill_(0.5)
    decision = case.rewire(0.5)
    died = case.died(decision, live)
    touched = died.flatten().index_fill(0, decision.born, True).view(6, 7)
    for name, moment in case.moments().items():
        assert torch.equal(moment, torch.where(touched, 0.0, 0.5).to(moment)), name
    assert len(moments) == 4


@in_both_storages
def test_new_weights_are_normal_with_the_wanted_standard_deviation(storage: str) -> None:
    case = Case(storage, weights_of(300, 200), torch.rand(300, 200) < 0.5)
    decision = case.rewire(0.5, std=0.3)
    born = case.weight.flatten()[decision.born] / 0.3
    assert len(born) > 14_000
    assert scipy.stats.kstest(born.numpy(), "norm").pvalue > 1e-3
    assert float(born.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * len(born)))


def test_both_storages_take_the_same_decisions() -> None:
    weight, live = weights_of(9, 11), torch.rand(9, 11) < 0.3
    cases = [Case(storage, weight, live) for storage in STORAGES]
    for seed in range(10):
        decisions = [case.rewire(0.4, seed, std=0.5) for case in cases]
        assert torch.equal(decisions[0].born, decisions[1].born)
        assert torch.equal(decisions[0].values, decisions[1].values)
        assert torch.equal(cases[0].weight, cases[1].weight)
        assert torch.equal(cases[0].live, cases[1].live)


@in_both_storages
def test_every_process_takes_the_decision_that_is_agreed_on(storage: str) -> None:
    weight, live = weights_of(6, 7), torch.rand(6, 7) < 0.5
    first, second = Case(storage, weight, live), Case(storage, weight, live)
    decision = first.rewire(0.4, seed=1, std=1.0)
    assert rewire_(second.sparsity, "weight", 0.4, agree=lambda _: decision) == len(decision.dying)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.live, second.live)


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_one_process_which_knows_the_places_rewires_as_several_which_look_for_them(seed: int, drops: bool) -> None:
    layer = SparseLinear(13, 9, [0.5, 2, 5][seed % 3], dtype=[F64, torch.bfloat16][seed % 2])
    removed = torch.rand(len(layer.weight)) < [0, 0.3][seed // 6]
    layers = [layer, copy.deepcopy(layer)]
    for alone, layer in enumerate(layers):
        sparsity, optimizer = Sparsity(layer), adam(layer.parameters())
        sparsity.drops = drops
        sparsity.remove_("weight", removed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            layer.weight.grad = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
            optimizer.step()
            agree = None if alone else lambda decision: decision
            n = rewire_(sparsity, "weight", 0.6, std=1.0, optimizers=[optimizer], generator=generator, agree=agree)
            assert n > 0
            assert_consistent(layer)
        layer.register_buffer("momentum", optimizer.state[layer.weight]["exp_avg"])
    states = [layer.state_dict() for layer in layers]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_a_convolution_that_is_channels_last_is_rewired_as_a_contiguous_one(growth: str) -> None:
    torch.manual_seed(1)
    nets = [nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].weight.data = nets[1].weight.data.contiguous(memory_format=torch.channels_last)
    assert not nets[1].weight.is_contiguous()
    gradient = torch.randn_like(nets[0].weight)
    for net in nets:
        sparsity = Sparsity(net)
        plant_(sparsity, "weight", 60, generator=torch.Generator().manual_seed(0))
        for seed in range(3):
            given = None if growth == "random" else torch.empty_like(net.weight).copy_(gradient)
            rewire_(sparsity, "weight", 0.4, std=1.0, gradient=given, generator=torch.Generator().manual_seed(seed))
        assert sparsity.masks["weight"].n_live == 60 == int(net.weight.count_nonzero())
    assert torch.equal(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("growth", ["random", "gradient"])
@in_both_storages
def test_layers_of_low_precision_are_rewired(storage: str, growth: str, dtype: torch.dtype) -> None:
    case = Case(storage, weights_of(8, 9).to(dtype), torch.rand(8, 9) < 0.5)
    factors = [Factors(torch.randn(4, 8, dtype=dtype), torch.randn(4, 9, dtype=dtype), 1.0)]
    dense = factors[0].output_gradient.t() @ factors[0].x
    before, gradient = case.live, factors if storage == "sparse" else dense
    case.rewire(0.5, gradient=gradient if growth == "gradient" else None, std=0.1)
    assert int(case.live.sum()) == int(before.sum())
    assert not torch.equal(case.live, before)
    assert case.parameter.dtype == dtype


# What is removed for good


@pytest.mark.parametrize("growth", ["random", "gradient"])
@in_both_storages
def test_single_connections_that_are_removed_for_good_never_come_back(storage: str, growth: str) -> None:
    live = torch.rand(8, 9) < 0.4
    case = Case(storage, weights_of(8, 9), live)
    removed = torch.zeros(8, 9, dtype=torch.bool)
    budgets = case.sparsity.add_budgets(case.layer, {"weight": 3})
    for seed in range(40):
        if seed in (3, 10):  # some that live, by their places
            before = case.live
            gone = case.sparsity.masks["weight"].live & (torch.rand(case.parameter.shape) < 0.15)
            case.sparsity.remove_("weight", gone)
            removed |= before & ~case.live
            assert int(removed.sum()) > 0
        if seed == 20:
            before = case.live
            n = int(before.sum()) - 4
            case.sparsity.prune_(budgets[0], n, Score("magnitude"))
            removed |= before & ~case.live
            assert int(case.live.sum()) == n
        before = case.live
        g, x = torch.randn(3, 8, dtype=F64), torch.randn(3, 9, dtype=F64)
        gradient = [Factors(g, x, 1.0)] if storage == "sparse" else g.t() @ x
        case.rewire(0.6, seed, std=1.0, gradient=gradient if growth == "gradient" else None)
        assert int(case.live.sum()) == int(before.sum())
        assert not bool((case.live & removed).any())
        assert int(case.weight[removed].count_nonzero()) == 0
    assert int(removed.sum()) > 6


def test_a_dense_mask_may_be_told_what_is_removed_among_what_rests() -> None:
    case = Case("dense", weights_of(6, 7), torch.rand(6, 7) < 0.4)
    removed = ~case.live & (torch.rand(6, 7) < 0.5)
    case.sparsity.masks["weight"].remove_(removed)
    seen = torch.zeros(6, 7, dtype=torch.bool)
    for seed in range(60):
        case.rewire(0.6, seed, std=1.0)
        seen |= case.live
    assert torch.equal(seen, ~removed)


class Closed:
    """Two sparse layers of which some hidden units were removed for good."""

    def __init__(self, drops: bool = True) -> None:
        self.net = nn.Sequential(SparseLinear(7, 10, 2.5, dtype=F64), nn.ReLU(), SparseLinear(10, 4, 2, dtype=F64))
        self.sparsity = Sparsity(self.net)
        self.sparsity.drops = drops
        self.sparsity.graph = trace(self.net, torch.randn(3, 7))
        [budget] = self.sparsity.add_budgets(self.net, {"0.weight": 6}, "unit")
        self.sparsity.prune_units_(budget, 6, {"0.weight": torch.randperm(10)[None].float()})
        mask = self.sparsity.masks["0.weight"]
        assert isinstance(mask, ListMask)
        self.units = mask.units.clone()
        assert int(self.units.sum()) == 4

    def layer(self, name: str) -> SparseLinear:
        part = self.net.get_submodule(name.removesuffix(".weight"))
        assert isinstance(part, SparseLinear)
        return part

    def closed(self, name: str) -> Tensor:
        """Which cells of a layer are removed for good, ``(unit, input)``."""
        where = self.units[:, None] if name == "0.weight" else self.units
        return where.expand(self.layer(name).out_features, self.layer(name).in_features)

    def lives(self, name: str) -> Tensor:
        where = torch.zeros(self.closed(name).shape, dtype=torch.bool)
        where.view(-1)[self.layer(name).cells[self.sparsity.masks[name].live]] = True
        return where

    def rewire(self, name: str, zeta: float, seed: int, gradient: list[Factors] | None) -> tuple[Tensor, Tensor]:
        """Rewire; return which cells died, ``(unit, input)``, and which were born, in order."""
        decisions: list[Decision] = []

        def keep(decision: Decision) -> Decision:
            decisions.append(decision)
            return decision

        cells, died = self.layer(name).cells, torch.zeros(self.closed(name).shape, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        n = rewire_(self.sparsity, name, zeta, std=1.0, gradient=gradient, generator=generator, agree=keep)
        died.view(-1)[cells[decisions[0].dying]] = True
        assert n == len(decisions[0].born) == int(died.sum())
        return died, decisions[0].born


with_and_without_dropping = pytest.mark.parametrize("drops", [True, False])


@pytest.mark.parametrize("growth", ["random", "gradient"])
@with_and_without_dropping
def test_units_that_are_removed_for_good_get_no_connection_again(drops: bool, growth: str) -> None:
    net = Closed(drops)
    for name in ("0.weight", "2.weight"):
        layer, mask, seen = net.layer(name), net.sparsity.masks[name], net.lives(name)
        n_live, n_listed = mask.n_live, len(layer.weight)
        assert (n_listed == n_live) == drops
        for seed in range(60):
            factors = [Factors(torch.randn(2, layer.out_features), torch.randn(2, layer.in_features), 1.0)]
            died, _ = net.rewire(name, 0.6, seed, factors if growth == "gradient" else None)
            assert int(died.sum()) > 0
            assert not bool((net.lives(name) & net.closed(name)).any())
            assert int(net.lives(name).sum()) == mask.n_live == n_live
            assert len(layer.weight) == n_listed
            assert int(layer.weight[mask.dead].count_nonzero()) == 0
            seen |= net.lives(name)
        assert torch.equal(seen, ~net.closed(name))


def test_what_was_removed_and_dropped_only_later_never_comes_back() -> None:
    case = Case("sparse", weights_of(8, 9), torch.rand(8, 9) < 0.5)
    case.sparsity.drops = False
    before = case.live
    n_listed = len(case.parameter)
    case.sparsity.remove_("weight", torch.rand(n_listed) < 0.4)
    removed = before & ~case.live
    for seed in range(60):
        if seed == 5:
            assert len(case.parameter) == n_listed
            case.sparsity.drop_dead_()
            assert len(case.parameter) == n_listed - int(removed.sum())
        case.rewire(0.6, seed, std=1.0)
        assert not bool((case.live & removed).any())
        assert int(case.live.sum()) == n_listed - int(removed.sum())
    assert int(removed.sum()) > 8


@with_and_without_dropping
def test_masks_that_were_saved_remember_what_never_comes_back(drops: bool) -> None:
    net = Closed(drops)
    name = "0.weight"
    layer = net.layer(name)
    net.sparsity.remove_(name, net.sparsity.masks[name].live & (torch.rand(len(layer.weight)) < 0.3))
    removed = set(range(70)) - set(net.lives(name).flatten().nonzero().flatten().tolist())
    masks = Masks()
    masks.load_state_dict(copy.deepcopy(net.sparsity.masks.state_dict()))
    sparsity = Sparsity(net.net)
    sparsity.masks = masks
    sparsity.find_targets(net.net)
    other = copy.deepcopy(layer)
    for seed in range(5):
        net.rewire(name, 0.6, seed, None)
    after = layer.cells
    layer.set_cells_(other.cells)
    layer.weight.data.copy_(other.weight.data)
    for seed in range(5):
        rewire_(sparsity, name, 0.6, std=1.0, generator=torch.Generator().manual_seed(seed))
    assert removed
    assert torch.equal(layer.cells, after)


# Growing by the gradient


def factors_of(n_out: int, n_in: int, scales: Sequence[float], whole: bool = False) -> tuple[list[Factors], Tensor]:
    """Draw gradients of batches of different sizes, and their sum multiplied out; whole numbers have ties."""
    parts = []
    for i, scale in enumerate(scales):
        g, x = torch.randn(i + 2, n_out, dtype=F64), torch.randn(i + 2, n_in, dtype=F64)
        parts.append(Factors(g.round() if whole else g, x.round() if whole else x, scale))
    return parts, sum((p.scale * p.output_gradient.t() @ p.x for p in parts), torch.zeros(n_out, n_in, dtype=F64))


@on_every_device
@pytest.mark.parametrize("block", [1, 7, 30, 2**22])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_out", "n_in", "density"), [(8, 9, 0.3), (3, 25, 0.7), (25, 3, 0.2), (6, 6, 0.9)])
def test_the_free_cells_of_the_largest_gradients_come_as_sorted_by_brute_force(
    n_out: int, n_in: int, density: float, whole: bool, block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewiring, "BLOCK", block)
    weight, live = weights_of(n_out, n_in), torch.rand(n_out, n_in) < density
    factors, dense = factors_of(n_out, n_in, [0.5, 1.0, 0.25], whole)
    moved = [Factors(part.output_gradient.to(device), part.x.to(device), part.scale) for part in factors]
    gradients: dict[str, Any] = {"dense": dense.to(device), "sparse": moved}
    for storage, gradient in gradients.items():
        case = Case(storage, weight, live, device)
        kept = copy.deepcopy(gradient)
        decision = case.rewire(0.5, gradient=gradient)
        died = case.died(decision, live)
        assert sorted(weight[live & ~died].tolist()) == survivors(weight[live].tolist(), Fraction(1, 2))
        assert decision.born.tolist() == grows(dense, ~live | died, int(died.sum()))
        if storage == "dense":
            assert torch.equal(gradient, kept)


@pytest.mark.parametrize("block", [1, 13, 2**22])
@with_and_without_dropping
def test_gradient_growth_among_closed_units_and_inputs_equals_brute_force(
    drops: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewiring, "BLOCK", block)
    net = Closed(drops)
    for name in ("0.weight", "2.weight"):
        layer, before = net.layer(name), net.lives(name)
        net.sparsity.remove_(name, net.sparsity.masks[name].live & (torch.rand(len(layer.weight)) < 0.3))
        removed = net.closed(name) | (before & ~net.lives(name))
        assert int(removed.sum()) > int(net.closed(name).sum())
        for seed in range(10):
            lives = net.lives(name)
            factors, dense = factors_of(layer.out_features, layer.in_features, [1.0, 0.9], whole=seed % 2 == 0)
            died, born = net.rewire(name, 0.5, seed, factors)
            assert born.tolist() == grows(dense, (~lives | died) & ~removed, int(died.sum()))


def test_gradients_of_a_net_under_autocast_are_multiplied_out_in_float32() -> None:
    weight, live = weights_of(8, 9).float(), torch.rand(8, 9) < 0.4
    factors, _ = factors_of(8, 9, [1.0])
    g, x = factors[0].output_gradient.float(), factors[0].x.bfloat16()  # a dense layer's output is what it reads
    expected = Case("sparse", weight, live).rewire(0.5, gradient=[Factors(g, x.float(), 1.0)]).born
    assert torch.equal(Case("sparse", weight, live).rewire(0.5, gradient=[Factors(g, x, 1.0)]).born, expected)


@in_both_storages
def test_a_gradient_that_is_nan_raises_and_changes_nothing(storage: str) -> None:
    case = Case(storage, weights_of(8, 9), torch.rand(8, 9) < 0.4)
    before = case.weight, case.live
    factors, dense = factors_of(8, 9, [1.0])
    dense.fill_(math.nan)
    factors[0].x[:, 3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        case.rewire(0.5, gradient=factors if storage == "sparse" else dense)
    assert torch.equal(case.weight, before[0])
    assert torch.equal(case.live, before[1])


# Growing at random


@in_both_storages
@pytest.mark.parametrize("density", [0.1, 0.4, 0.9])
def test_every_free_cell_grows_as_often(density: float, storage: str) -> None:
    n_rounds, (n_out, n_in) = 1500, (6, 8)
    weight, live = weights_of(n_out, n_in), torch.rand(n_out, n_in) < density
    case = Case(storage, weight, live)
    cells = live.flatten().nonzero().flatten()
    counts, draw = torch.zeros(n_out * n_in), torch.Generator().manual_seed(0)
    removed = torch.zeros(n_out * n_in, dtype=torch.bool)
    if storage == "dense":  # some may never come
        removed = (~live & (torch.rand(n_out, n_in) < 0.2)).flatten()
        case.sparsity.masks["weight"].remove_cells_(removed.nonzero().flatten())
    for _ in range(n_rounds):
        decision = case.rewire(0.5, generator=draw)
        counts[decision.born] += 1
        with torch.no_grad():  # back to the start
            if isinstance(case.layer, SparseLinear):
                case.layer.set_cells_(cells)
                case.layer.weight.copy_(weight.flatten()[cells])
            else:
                case.sparsity.masks["weight"].move_(decision.born, NOTHING)
                case.sparsity.masks["weight"].move_(NOTHING, cells[~case.live.flatten()[cells]])
                case.layer.get_parameter("weight").copy_(weight * live)
        assert torch.equal(case.live, live)
    died = case.died(decision, live)
    free = (~live | died).flatten() & ~removed
    assert int(counts[~free].sum()) == 0
    assert p_of_uniform(counts[free], int(died.sum()), n_rounds) > 1e-3


def test_every_free_cell_of_open_units_grows_as_often() -> None:
    net = Closed()
    for name in ("0.weight", "2.weight"):
        layer = net.layer(name)
        cells, values, lives = layer.cells, layer.weight.detach().clone(), net.lives(name)
        counts = torch.zeros(lives.numel())
        for seed in range(1000):
            died, born = net.rewire(name, 0.5, seed, None)
            counts[born] += 1
            layer.set_cells_(cells)
            layer.weight.data.copy_(values)
        free = ((~lives | died) & ~net.closed(name)).flatten()
        assert int(counts[~free].sum()) == 0
        assert p_of_uniform(counts[free], int(died.sum()), 1000) > 1e-3


# Planting


@on_every_device
@pytest.mark.parametrize("make", [lambda: nn.Linear(20, 15), lambda: nn.Conv2d(5, 6, 3), lambda: nn.Linear(3, 1)])
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_planting_leaves_exactly_so_many_and_keeps_the_variance(
    n: int, make: Callable[[], nn.Module], device: str
) -> None:
    net = make().to(device)
    sparsity, weight = Sparsity(net), net.get_parameter("weight")
    before, n = weight.detach().clone(), min(n, weight.numel())
    plant_(sparsity, "weight", n, generator=torch.Generator().manual_seed(5))
    mask = sparsity.masks["weight"]
    assert mask.n_live == n == int(mask.live.sum()) == int(weight.count_nonzero())
    assert not bool(mask.removed.any())
    torch.testing.assert_close(weight.detach(), before * mask.live / math.sqrt(n / weight.numel()))
    again = make().to(device)
    other = Sparsity(again)
    plant_(other, "weight", n, generator=torch.Generator().manual_seed(5))
    assert torch.equal(other.masks["weight"].live, mask.live)


def test_what_rests_after_planting_can_be_grown_everywhere() -> None:
    net = nn.Linear(6, 5)
    sparsity, seen = Sparsity(net), torch.zeros(5, 6, dtype=torch.bool)
    plant_(sparsity, "weight", 8)
    for seed in range(60):
        seen |= sparsity.masks["weight"].live
        rewire_(sparsity, "weight", 0.7, std=1.0, generator=torch.Generator().manual_seed(seed))
    assert bool(seen.all())
    assert sparsity.masks["weight"].n_live == 8


def test_planted_cells_are_uniform() -> None:
    counts = torch.zeros(30)
    for seed in range(1000):
        sparsity = Sparsity(nn.Linear(6, 5, bias=False))
        plant_(sparsity, "weight", 8, generator=torch.Generator().manual_seed(seed))
        counts += sparsity.masks["weight"].live.flatten()
    assert p_of_uniform(counts, 8, 1000) > 1e-3


def test_planting_what_every_process_agrees_on() -> None:
    net = nn.Linear(6, 5)
    sparsity = Sparsity(net)
    plant_(sparsity, "weight", 3, agree=lambda cells: torch.tensor([2, 11, 29]))
    assert sparsity.masks["weight"].live_cells.tolist() == [2, 11, 29]


@pytest.mark.parametrize("n", [-1, 31])
def test_planting_more_than_there_are_raises_and_changes_nothing(n: int) -> None:
    net = nn.Linear(6, 5)
    before, sparsity = net.weight.detach().clone(), Sparsity(net)
    with pytest.raises(ValueError, match=f"n is {n}; allowed is 0 to 30"):
        plant_(sparsity, "weight", n)
    assert torch.equal(net.weight, before)
    assert sparsity.masks["weight"].n_live == 30


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "best"}, "growth is 'best'; allowed is one of random, gradient, momentum, or a Growth"),
        ({"std": -0.1}, "std is -0.1; allowed is a float >= 0, or 'initial'"),
        ({"std": math.nan}, "std is nan; allowed is a float >= 0, or 'initial'"),
        ({"std": math.inf}, "std is inf; allowed is a float >= 0, or 'initial'"),
        ({"std": "first"}, "std is 'first'; allowed is a float >= 0, or 'initial'"),
        ({"std": None}, "std is None; allowed is a float >= 0, or 'initial'"),
    ],
)
def test_a_growth_that_cannot_be_names_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Growth(**settings)


def test_growth_looks_at_as_many_batches_as_its_paper_says() -> None:
    assert {kind: Growth(kind).window for kind in get_args(GrowthKind)} == {"random": 0, "gradient": 1, "momentum": 20}
    assert Growth("momentum", std="initial") == Growth(std="initial", kind="momentum", seed=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"zeta": z}, f"zeta is {z!r}; allowed is a float in (0, 1)") for z in (0.0, 1.0, -0.1, 1, "a", math.nan)],
        ({"kind": "step"}, "kind is 'step'; allowed is one of cosine, linear, cubic"),
        *[({"end": e}, f"end is {e}; allowed is a fraction of the run in (0, 1]") for e in (0.0, -1, 1.5, math.nan)],
    ],
)
def test_a_decay_that_cannot_be_names_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Decay(**settings)


@pytest.mark.parametrize("end", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("total", [100, 1234.0])
@pytest.mark.parametrize("kind", get_args(DecayKind))
def test_decays_equal_their_closed_forms(kind: DecayKind, total: float, end: float) -> None:
    zeta, decay = 0.4, Decay(0.4, kind, end)
    last = end * total
    forms: dict[str, Callable[[int], float]] = {
        "cosine": lambda t: zeta / 2 * (1 + math.cos(math.pi * t / last)),  # RigL, Eq. 1
        "linear": lambda t: zeta * (last - t) / last,
        "cubic": lambda t: zeta * ((last - t) / last) ** 3,
    }
    for step in range(int(total) + 50):
        expected = forms[kind](step) if step < last else 0.0
        assert decay(step, total) == pytest.approx(expected, abs=1e-12)
        if step >= last:
            assert decay(step, total) == 0.0
    assert decay(0, total) == zeta


def test_the_standard_decay_is_that_of_rigl() -> None:
    assert Decay() == Decay(0.3, "cosine", 0.75)
    assert [round(Decay()(step, 100), 4) for step in (0, 25, 50, 75, 100)] == [0.3, 0.225, 0.075, 0.0, 0.0]
