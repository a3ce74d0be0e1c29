import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpna import rescale_, trace
from lightning_cpna.cells import cells_of
from lightning_cpna.moments import (
    is_elementwise,
    optimizer_of,
    reset_moments_,
    scale_moments_,
    zero_moments_,
)
from lightning_cpna.rescale import Moments

TINY = 1e-30  # so small an eps that Adam and its kin do not notice the scale of the gradients

DECAYED: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.01, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.05, "t0": 3, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.01, "weight_decay": 0.1},
}
MADE = {name: settings for name, settings in DECAYED.items() if hasattr(torch.optim, name)}


def make(name: str, parameters: list[nn.Parameter], **settings: Any) -> Optimizer:
    optimizer: Optimizer = getattr(torch.optim, name)(parameters, **settings)
    return optimizer


def regression() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 5, dtype=torch.float64)
    return x, torch.sin(x.sum(1, keepdim=True))


def net_of(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 1)).double()


def backward(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    net.zero_grad()
    nn.functional.mse_loss(net(data[0]), data[1]).backward()


def train(net: nn.Module, optimizer: Optimizer, data: tuple[Tensor, Tensor], n_steps: int) -> None:
    for _ in range(n_steps):
        backward(net, data)
        optimizer.step()


@pytest.mark.parametrize("name", MADE)
def test_removed_weights_stay_exactly_zero_under_decay_once_their_moments_are_zero(name: str) -> None:
    net, data = net_of(nn.Tanh()), regression()
    optimizer = make(name, list(net.parameters()), **MADE[name])
    train(net, optimizer, data, 5)
    parameters = [p for p in net.parameters() if p.ndim == 2]
    dead = {p: torch.rand_like(p) < 0.5 for p in parameters}
    for parameter, where in dead.items():
        parameter.data.masked_fill_(where, 0)
        zero_moments_(optimizer, parameter, cells_of(where))
    before = [p.detach().clone() for p in parameters]
    for _ in range(20):
        backward(net, data)
        for parameter, where in dead.items():
            assert parameter.grad is not None
            parameter.grad.masked_fill_(where, 0)
        optimizer.step()
        for parameter, where in dead.items():
            assert int(parameter[where].count_nonzero()) == 0
    for (parameter, where), old in zip(dead.items(), before, strict=True):
        assert bool((parameter.detach()[~where] != old[~where]).any())
    assert is_elementwise(optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "NAdam"])
def test_without_zeroed_moments_removed_weights_come_back(name: str) -> None:
    net, data = net_of(nn.Tanh()), regression()
    optimizer = make(name, list(net.parameters()), **MADE[name])
    train(net, optimizer, data, 5)
    parameter = next(net.parameters())
    parameter.data.zero_()
    backward(net, data)
    assert parameter.grad is not None
    parameter.grad.zero_()
    optimizer.step()
    assert int(parameter.count_nonzero()) == parameter.numel()


def test_every_optimizer_of_torch_is_elementwise_or_masked_again() -> None:
    kinds = [
        kind
        for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(kind, Optimizer) and kind is not Optimizer
    ]
    weight = nn.Parameter(torch.ones(2, 2))
    elementwise = {kind.__name__ for kind in kinds if is_elementwise(kind([weight], lr=0.1))}  # type: ignore[call-arg]
    assert elementwise == set(MADE)
    assert {"SparseAdam", "LBFGS"} <= {kind.__name__ for kind in kinds} - elementwise


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_not_elementwise_and_indeed_moves_zero_weights() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = make("Muon", [weight], lr=0.1)
    weight.data[0, 0] = 0
    weight.grad = torch.randn(3, 3)
    weight.grad[0, 0] = 0
    optimizer.step()
    assert weight[0, 0].item() != 0
    assert not is_elementwise(optimizer)


def test_a_foreign_optimizer_is_not_elementwise_whatever_its_name() -> None:
    foreign = type("Adam", (torch.optim.Adam,), {"__module__": "elsewhere.optim"})
    assert not is_elementwise(foreign([nn.Parameter(torch.zeros(1))]))
    own = type("OwnAdam", (torch.optim.Adam,), {"__module__": "torch.optim.own"})
    assert not is_elementwise(own([nn.Parameter(torch.zeros(1))]))


def test_the_optimizer_of_a_parameter_is_the_one_that_holds_it() -> None:
    a, b, c, extra = (nn.Parameter(torch.ones(2)) for _ in range(4))
    first, second = torch.optim.SGD([a], lr=1.0), torch.optim.SGD([{"params": [extra]}, {"params": [b]}], lr=1.0)
    assert optimizer_of([first, second], a) is first
    assert optimizer_of([first, second], b) is second
    assert optimizer_of([first, second], c) is None
    assert optimizer_of([], a) is None


def test_zeroing_and_resetting_touch_only_what_they_name() -> None:
    weight, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.Adam([weight, other], amsgrad=True)
    (weight.sum() + other.sum()).backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    assert before.keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    where = torch.tensor([[True, False, False], [False, False, True]])
    zero_moments_(optimizer, weight, cells_of(where))
    for key, value in before.items():
        expected = value if key == "step" else value * ~where
        assert torch.equal(optimizer.state[weight][key], expected)
    reset_moments_(optimizer, weight)
    assert optimizer.state[weight]["step"] == 1
    assert all(int(optimizer.state[weight][key].count_nonzero()) == 0 for key in before.keys() - {"step"})
    assert torch.equal(optimizer.state[other]["exp_avg"], before["exp_avg"])


def test_an_optimizer_that_has_not_stepped_has_nothing_to_change() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    zero_moments_(optimizer, weight, torch.tensor([0, 1]))
    reset_moments_(optimizer, weight)
    scale_moments_(optimizer, weight, torch.ones(2))
    assert weight not in optimizer.state


# State tensors that grow like the gradient, like its square, like the weight; and those that do not grow.
@pytest.mark.parametrize(
    ("name", "settings", "powers"),
    [
        ("SGD", {"momentum": 0.9}, {"momentum_buffer": 1}),
        ("Adam", {"amsgrad": True}, {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}),
        ("AdamW", {}, {"exp_avg": 1, "exp_avg_sq": 2}),
        ("NAdam", {}, {"exp_avg": 1, "exp_avg_sq": 2}),
        ("RAdam", {}, {"exp_avg": 1, "exp_avg_sq": 2}),
        ("Adamax", {"eps": TINY}, {"exp_avg": 1, "exp_inf": 1}),
        ("Adagrad", {}, {"sum": 2}),
        ("RMSprop", {"centered": True}, {"square_avg": 2, "grad_avg": 1}),
        ("RMSprop", {"momentum": 0.9, "eps": TINY}, {"square_avg": 2, "momentum_buffer": 0}),
    ],
)
def test_scaled_moments_are_those_of_scaled_gradients(
    name: str, settings: dict[str, Any], powers: dict[str, int]
) -> None:
    scale = torch.tensor([[0.25], [3.0], [10.0]], dtype=torch.float64)
    weights = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(2)]
    plain, scaled = (make(name, [weight], lr=0.01, **settings) for weight in weights)
    for _ in range(4):
        gradient = torch.randn(3, 2, dtype=torch.float64)
        weights[0].grad, weights[1].grad = gradient.clone(), gradient / scale
        plain.step()
        scaled.step()
    before = copy.deepcopy(plain.state[weights[0]])
    scale_moments_(plain, weights[0], scale)
    assert powers.keys() == {key for key, value in before.items() if value.shape == (3, 2)}
    for key, power in powers.items():
        torch.testing.assert_close(plain.state[weights[0]][key], scaled.state[weights[1]][key], rtol=1e-12, atol=0)
        torch.testing.assert_close(plain.state[weights[0]][key], before[key] / scale**power, rtol=1e-12, atol=0)


def test_averaged_weights_are_scaled_like_the_weight() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.ASGD([weight], lr=0.1)
    weight.grad = torch.ones(2)
    optimizer.step()
    before = optimizer.state[weight]["ax"].clone()
    scale_moments_(optimizer, weight, torch.tensor([2.0, 5.0]))
    assert torch.equal(optimizer.state[weight]["ax"], before * torch.tensor([2.0, 5.0]))


def test_a_state_of_unknown_scaling_raises_by_name_and_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Rprop([weight])
    weight.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    with pytest.raises(ValueError, match=r"Rprop's state \['step_size'\].*allowed is moments='keep' or 'reset'"):
        scale_moments_(optimizer, weight, torch.full((2,), 2.0))
    assert torch.equal(optimizer.state[weight]["prev"], before["prev"])


@pytest.mark.skipif(not hasattr(torch.optim, "Adafactor"), reason="this torch has no Adafactor")
def test_a_factored_state_of_another_shape_than_the_weight_raises_too() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = make("Adafactor", [weight])
    weight.grad = torch.rand(3, 2)
    optimizer.step()
    with pytest.raises(ValueError, match="Adafactor"):
        scale_moments_(optimizer, weight, torch.full((3, 1), 2.0))


def equal_rows(net: nn.Sequential, norm: float) -> None:
    first = net[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight.mul_(norm / first.weight.norm(dim=1, keepdim=True))


def grouped(name: str, net: nn.Sequential, rates: list[float], settings: dict[str, Any]) -> Optimizer:
    first, bias, last, last_bias = net.parameters()
    groups = [[first, bias], [last], [last_bias]]
    parameters: Any = [{"params": g, "lr": rate} for g, rate in zip(groups, rates, strict=True)]
    return make(name, parameters, **settings)


# Scaling the weights of a layer by s turns gradients g to g / s. A rule whose step is proportional to g^p then takes s
# times the step it took, so the function stays the same, with a learning rate times s^(1 + p). So the two nets, one
# rescaled, must go on alike. All rows have one norm, so that one learning rate a layer serves.
@pytest.mark.parametrize(
    ("name", "settings", "p"),
    [
        ("SGD", {"momentum": 0.9}, 1),
        ("SGD", {"momentum": 0.9, "nesterov": True}, 1),
        ("Adam", {"eps": TINY}, 0),
        ("Adam", {"eps": TINY, "amsgrad": True}, 0),
        ("AdamW", {"eps": TINY, "weight_decay": 0.0}, 0),
        ("NAdam", {"eps": TINY}, 0),
        ("Adamax", {"eps": TINY}, 0),
        ("Adagrad", {"eps": TINY}, 0),
        ("RMSprop", {"eps": TINY}, 0),
        ("RMSprop", {"eps": TINY, "centered": True}, 0),
        ("RMSprop", {"eps": TINY, "momentum": 0.9}, 0),
    ],
)
def test_a_rescaled_net_with_transformed_moments_follows_the_same_trajectory(
    name: str, settings: dict[str, Any], p: int
) -> None:
    norm, rate = 3.0, 0.01
    net, data = net_of(nn.LeakyReLU(0.2)), regression()
    optimizer = grouped(name, net, [rate] * 3, settings)
    train(net, optimizer, data, 8)
    equal_rows(net, norm)

    twin = copy.deepcopy(net)
    rates = [rate * (1 / norm) ** (1 + p), rate * norm ** (1 + p), rate]
    twin_optimizer = grouped(name, twin, [rate] * 3, settings)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, new in zip(twin_optimizer.param_groups, rates, strict=True):
        group["lr"] = new
    parameters = dict(twin.named_parameters())
    rescale_(parameters, trace(twin, data[0]), ["0.weight"], optimizers=[twin_optimizer], moments="transform")

    for _ in range(10):
        torch.testing.assert_close(twin(data[0]), net(data[0]), rtol=1e-9, atol=1e-11)
        before = net(data[0]).detach()
        train(net, optimizer, data, 1)
        train(twin, twin_optimizer, data, 1)
        assert float((net(data[0]).detach() - before).abs().max()) > 1e-5
    torch.testing.assert_close(twin(data[0]), net(data[0]), rtol=1e-9, atol=1e-11)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(2, 3, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.conv(x).relu().flatten(1))
        return out


def rescaled_conv(moments: Moments) -> tuple[Tensor, dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    net = Stack().double()
    optimizer = torch.optim.Adam(net.parameters(), amsgrad=True)
    x = torch.randn(8, 2, 3, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    names = dict(net.named_parameters())
    norm = net.conv.weight.detach().flatten(1).norm(dim=1)  # (unit,)

    def state() -> dict[str, dict[str, Tensor]]:
        return {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in names.items()}

    before = state()
    rescale_(names, trace(net, x), ["conv.weight"], optimizers=[optimizer], moments=moments)
    return norm, before, state()


def test_transformed_moments_of_conv_bias_and_reader_are_divided_by_scale_and_square() -> None:
    norm, before, after = rescaled_conv("transform")
    scales = {
        "conv.weight": (1 / norm).view(3, 1, 1),
        "conv.bias": 1 / norm,
        "last.weight": norm.repeat_interleave(2).view(1, 6),  # two cells a channel
        "last.bias": torch.ones(2, dtype=torch.float64),
    }
    for name, scale in scales.items():
        for key, power in [("exp_avg", 1), ("exp_avg_sq", 2), ("max_exp_avg_sq", 2), ("step", 0)]:
            expected = before[name][key] / scale**power if power else before[name][key]
            torch.testing.assert_close(after[name][key], expected, rtol=1e-12, atol=0)


def test_kept_moments_are_untouched_and_reset_moments_are_zero_where_weights_were_rescaled() -> None:
    _, before, after = rescaled_conv("keep")
    assert all(torch.equal(after[name][key], before[name][key]) for name in before for key in before[name])
    _, before, after = rescaled_conv("reset")
    for name in before:
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            untouched = name == "last.bias"
            assert torch.equal(
                after[name][key], before[name][key] if untouched else torch.zeros_like(before[name][key])
            )


@pytest.mark.parametrize("change", [zero_moments_, scale_moments_])
def test_the_state_is_changed_in_place(change: Callable[[Optimizer, nn.Parameter, Tensor], None]) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(2)
    optimizer.step()
    buffer = optimizer.state[weight]["momentum_buffer"]
    change(optimizer, weight, torch.tensor([1]) if change is zero_moments_ else torch.tensor([4.0, 1.0]))
    assert optimizer.state[weight]["momentum_buffer"] is buffer
    assert buffer.tolist() == ([1.0, 0.0] if change is zero_moments_ else [0.25, 1.0])
