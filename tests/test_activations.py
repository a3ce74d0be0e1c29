"""What units do, against closed forms and brute force in float64: one unit at a time, set to its mean in the forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import Watch, mean_replacement_penalties, observe, sparsity_of, trace
from lightning_cpna.layers import evaluating
from tests.helpers import Net


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@dataclass
class Case:
    """A network, its batches, a layer, and the activation of its units by hand.

    ``run(net, x, edit)`` is the forward written anew; ``edit`` gets the layer's activation, (example, unit, *position),
    where the next layers read it, and answers what they shall read.
    """

    net: nn.Module
    name: str
    run: Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], Tensor]
    batches: list[tuple[Tensor, Tensor]]


def rows(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, dtype=torch.float64), torch.randint(0, 3, (n,))


def mlp_case() -> Case:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def run(net: Any, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        a = edit(net[0](x).relu())
        return torch.as_tensor(net[4](net[2](a).tanh()))

    return Case(net, "0.weight", run, [rows(7, 4), rows(5, 4)])


def conv_case() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Flatten(),
        nn.Linear(27, 3),
    ).double()

    def run(net: Any, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        a = edit(nn.functional.max_pool2d(net[0](x).relu(), 2))
        return torch.as_tensor(net[5](net[3](a).flatten(1)))

    return Case(net, "0.weight", run, [rows(6, 2, 6, 6), rows(6, 2, 6, 6)])


def two_readers_case() -> Case:
    def forward(net: Any, x: Tensor) -> Tensor:
        a = net.a(x).relu()
        return torch.as_tensor(net.b(a) * net.c(a))

    def run(net: Any, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        a = edit(net.a(x).relu())
        return torch.as_tensor(net.b(a) * net.c(a))

    net = Net(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 3), c=nn.Linear(5, 3)).double()
    return Case(net, "a.weight", run, [rows(9, 3)])


CASES = {"mlp": mlp_case, "conv": conv_case, "two readers": two_readers_case}
on_every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


def activations(case: Case) -> Tensor:
    """Return the activations of all batches, (example, unit, position)."""
    seen: list[Tensor] = []

    def note(a: Tensor) -> Tensor:
        seen.append(a.detach().flatten(2) if a.ndim > 2 else a.detach()[:, :, None])
        return a

    for x, _ in case.batches:
        case.run(case.net, x, note)
    return torch.cat(seen)


@torch.no_grad()
def loss_with(case: Case, edit: Callable[[Tensor], Tensor]) -> float:
    total = sum(float(nn.functional.cross_entropy(case.run(case.net, x, edit), y)) * len(x) for x, y in case.batches)
    return total / sum(len(x) for x, _ in case.batches)


def example_changes(case: Case, target: Tensor) -> Tensor:
    """Return for each example and unit (target - a) * dL_i/da, summed over positions, by autograd one example at a time."""
    found = []
    for x, y in case.batches:
        for i in range(len(x)):
            kept: list[Tensor] = []

            def keep(a: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(a.detach().requires_grad_())
                return kept[0]

            nn.functional.cross_entropy(case.run(case.net, x[i : i + 1], keep), y[i : i + 1]).backward()
            a, g = kept[0][0], kept[0].grad
            assert g is not None
            shape = [-1] + [1] * (a.ndim - 1)
            found.append(((target.view(shape) - a.detach()) * g[0]).reshape(len(target), -1).sum(1))
    return torch.stack(found)


def graph_of(case: Case) -> Any:
    return trace(case.net, case.batches[0][0])


@on_every_case
def test_activity_equals_the_moments_of_the_activations_by_hand(make: Callable[[], Case]) -> None:
    case = make()
    activity = observe(case.net, graph_of(case), [case.name], case.batches, cross_entropy)[case.name]
    a = activations(case)
    assert activity.examples == len(a)
    torch.testing.assert_close(activity.largest, a.abs().amax((0, 2)))
    torch.testing.assert_close(activity.spread, a.amax((0, 2)) - a.amin((0, 2)))
    torch.testing.assert_close(activity.mean_magnitude, a.abs().mean((0, 2)))
    torch.testing.assert_close(activity.variance, a.var((0, 2), correction=0))
    for mean in activity.means.values():
        torch.testing.assert_close(mean, a.mean((0, 2)))


@on_every_case
def test_saliencies_equal_one_backward_pass_an_example(make: Callable[[], Case]) -> None:
    case = make()
    activity = observe(case.net, graph_of(case), [case.name], case.batches, cross_entropy)[case.name]
    mean = activations(case).mean((0, 2))
    assert activity.removal_saliency is not None
    assert activity.mean_replacement_saliency is not None
    torch.testing.assert_close(activity.removal_saliency, example_changes(case, torch.zeros_like(mean)).abs().mean(0))
    torch.testing.assert_close(activity.mean_replacement_saliency, example_changes(case, mean).abs().mean(0))


@on_every_case
def test_penalties_equal_the_forward_written_anew_with_one_unit_at_its_mean(make: Callable[[], Case]) -> None:
    case = make()
    graph = graph_of(case)
    means = observe(case.net, graph, [case.name], case.batches, cross_entropy)[case.name].means
    mean = activations(case).mean((0, 2))
    before = loss_with(case, lambda a: a)
    expected = []
    for unit in range(len(mean)):

        def replace(a: Tensor, unit: int = unit) -> Tensor:
            a = a.clone()
            a[:, unit] = mean[unit]
            return a

        expected.append(loss_with(case, replace) - before)
    found = mean_replacement_penalties(case.net, graph, case.name, case.batches, cross_entropy, means)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def without_border(net: nn.Module) -> nn.Module:
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            part.padding = (0, 0)
    return net


@pytest.mark.parametrize("units", [[1], [0, 3], [0, 1, 2]])
@pytest.mark.parametrize("kind", ["mlp", "two readers", "conv without padding"])
def test_removal_with_bias_propagation_equals_replacement_by_the_mean(kind: str, units: list[int]) -> None:
    if kind == "conv without padding":
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 3)).double()

        def run(net: Any, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
            return torch.as_tensor(net[4](net[2](edit(net[0](x).relu())).flatten(1)))

        case = Case(net, "0.weight", run, [rows(8, 2, 6, 6)])
    else:
        case = CASES[kind]()
    sparsity = sparsity_of(case.net)
    sparsity.graph = graph_of(case)
    activity = observe(case.net, sparsity.graph, [case.name], case.batches, cross_entropy)[case.name]
    mean = activations(case).mean((0, 2))

    def replace(a: Tensor) -> Tensor:
        a = a.clone()
        for unit in units:
            a[:, unit] = mean[unit]
        return a

    expected = [case.run(case.net, x, replace) for x, _ in case.batches]
    n = len(mean) - len(units)
    [budget] = sparsity.add_budgets(case.net, {case.name: n}, "unit")
    scores = torch.ones(1, len(mean))
    scores[0, units] = 0
    sparsity.prune_units_(budget, n, {case.name: scores}, means=activity.means)
    for (x, _), wanted in zip(case.batches, expected, strict=True):
        torch.testing.assert_close(case.net(x), wanted, rtol=1e-9, atol=1e-9)
    assert [bool(row.any()) for row in sparsity.masks[case.name].live] == [u not in units for u in range(len(mean))]


def test_a_flattened_map_is_replaced_position_by_position() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    batch = rows(10, 1, 4, 4)
    means = observe(net, trace(net, batch[0]), ["0.weight"], [batch], cross_entropy)["0.weight"].means["3.weight"]
    torch.testing.assert_close(means, net[:3](batch[0]).mean(0))


def test_observing_leaves_weights_gradients_modes_and_hooks_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)).double()
    net[1].eval()
    batch = rows(6, 4)
    cross_entropy(net, batch).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in net.parameters() if p.grad is not None]
    graph = trace(net, batch[0])
    activity = observe(net, graph, ["0.weight"], [batch], cross_entropy)["0.weight"]
    mean_replacement_penalties(net, graph, "0.weight", [batch], cross_entropy, activity.means)
    for (weight, gradient), p in zip(before, net.parameters(), strict=True):
        assert torch.equal(weight, p)
        assert p.grad is not None
        assert torch.equal(gradient, p.grad)
    assert [part.training for part in net] == [True, False, True, True]
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_an_error_in_the_loss_restores_the_mode() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), evaluating(net):
        raise ZeroDivisionError
    assert net.training


def test_a_training_loop_sees_the_gradients_of_its_own_backward_and_the_state_goes_on() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    batches = [rows(6, 4), rows(4, 4)]
    graph = trace(net, batches[0][0])
    whole, first, second = Watch(net), Watch(net, ["2.weight"]), Watch(net)

    def run(watch: Watch, x: Tensor, y: Tensor) -> None:
        with watch:
            nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
        watch.digest(graph, ["0.weight"])

    run(whole, *batches[0])
    run(whole, *batches[1])
    run(first, *batches[0])
    second.load_state_dict(first.state_dict())
    run(second, *batches[1])
    a, b = whole.activity(graph, "0.weight"), second.activity(graph, "0.weight")
    assert a.examples == b.examples == 10
    for key in ("largest", "spread", "mean_magnitude", "variance", "removal_saliency", "mean_replacement_saliency"):
        torch.testing.assert_close(getattr(a, key), getattr(b, key), rtol=0, atol=0)
    expected = observe(net, graph, ["0.weight"], batches, cross_entropy)["0.weight"].removal_saliency
    torch.testing.assert_close(a.removal_saliency, expected)  # each example's own gradient: the loss was a sum


def test_what_is_no_linear_or_conv_and_what_did_not_run_are_named() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = trace(net, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"what '0\.bias' reads cannot be watched"):
        Watch(net, ["0.bias"])
    with pytest.raises(ValueError, match=r"'0\.weight' were not seen: 2\.weight did not run"):
        Watch(net).activity(graph, "0.weight")
    with pytest.raises(ValueError, match=r"'2\.weight' were not seen: no layer"):
        Watch(net).activity(graph, "2.weight")


def test_a_reader_without_a_bias_cannot_take_a_mean() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    sparsity = sparsity_of(net)
    sparsity.graph = trace(net, torch.zeros(2, 4))
    before = sparsity.tensors["2.weight"].detach().clone()
    [budget] = sparsity.add_budgets(net, {"0.weight": 3}, "unit")
    with pytest.raises(ValueError, match=r"'2\.weight', which reads the units of '0\.weight', has no bias"):
        sparsity.prune_units_(budget, 3, {"0.weight": torch.rand(1, 6)}, means={"2.weight": torch.ones(6)})
    assert torch.equal(sparsity.tensors["2.weight"], before)


def test_calls_without_a_gradient_and_checkpointed_ones_are_no_obstacle() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    batch = rows(6, 4)
    graph, plain, disturbed, again = trace(net, batch[0]), Watch(net), Watch(net), Watch(net)
    with plain:
        cross_entropy(net, batch).backward()
    with disturbed:
        with torch.no_grad():
            net(batch[0])
        cross_entropy(net, batch).backward()
    with again:
        out = torch.utils.checkpoint.checkpoint(net, batch[0], use_reentrant=False)
        nn.functional.cross_entropy(out, batch[1]).backward()
    found = []
    for watch in (plain, disturbed, again):
        watch.digest(graph, ["0.weight"])
        found.append(watch.activity(graph, "0.weight"))
    for activity in found[1:]:
        torch.testing.assert_close(activity.mean_replacement_saliency, found[0].mean_replacement_saliency)
    assert [activity.examples for activity in found[:2]] == [6, 12]


def test_a_layer_that_is_called_by_keyword_is_watched() -> None:
    net = Net(lambda m, x: m.b(input=m.a(input=x).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 3)).double()
    batch = rows(6, 4)
    graph = trace(net, batch[0])
    activity = observe(net, graph, ["a.weight"], [batch], cross_entropy)["a.weight"]
    penalties = mean_replacement_penalties(net, graph, "a.weight", [batch], cross_entropy, activity.means)
    assert activity.mean_replacement_saliency is not None
    assert len(penalties) == 6


def test_bad_input_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    batch = rows(6, 4)
    graph = trace(net, batch[0])
    with pytest.raises(ValueError, match=r"'9\.weight' is no layer whose units feed another; allowed here: 0\.weight"):
        observe(net, graph, ["9.weight"], [batch], cross_entropy)
    with pytest.raises(ValueError, match=r"'2\.weight' is no layer whose units feed another"):
        mean_replacement_penalties(net, graph, "2.weight", [batch], cross_entropy, {})
    with pytest.raises(ValueError, match=r"means has no entry for '2\.weight'"):
        mean_replacement_penalties(net, graph, "0.weight", [batch], cross_entropy, {})
    with pytest.raises(ValueError, match="batches is empty"):
        mean_replacement_penalties(net, graph, "0.weight", [], cross_entropy, {"2.weight": torch.zeros(6)})
    assert observe(net, graph, "0.weight", [batch], cross_entropy).keys() == {"0.weight"}
