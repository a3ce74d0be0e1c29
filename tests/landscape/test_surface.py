"""The loss as a function of live weights: against autograd on the module itself, and against masked dense layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpna import Budget, CPNAPruning, Score, SparseLinear, sparsity_of
from lightning_cpna.landscape import LossSurface, hessian
from tests.helpers import on_every_device, trainer
from tests.landscape.problems import blobs, cross_entropy, net, surface


def pruned(module: nn.Sequential, name: str = "0.weight", n: int = 11) -> nn.Sequential:
    sparsity = sparsity_of(module)
    [budget] = sparsity.add_budgets(module, {name: n})
    assert isinstance(budget, Budget)
    sparsity.prune_(budget, n, Score("magnitude"))
    return module


def test_loss_and_gradient_are_those_of_autograd() -> None:
    module, batch = net(), blobs()
    value, gradient = surface(module, batch).gradient(surface(module, batch).point())
    expected = cross_entropy(module, batch)
    expected.backward()
    assert value == pytest.approx(expected.item(), abs=1e-14)
    grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    assert torch.allclose(gradient, grads, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [7, 32, 95])
def test_batches_of_any_size_give_the_loss_gradient_and_hessian_of_one(size: int) -> None:
    module, (x, y) = net(4), blobs()
    one = surface(module, (x, y))
    many = LossSurface(module, DataLoader(TensorDataset(x, y), batch_size=size), cross_entropy)
    point = one.point()
    assert many.loss(point) == pytest.approx(one.loss(point), abs=1e-14)
    assert torch.allclose(many.gradient(point)[1], one.gradient(point)[1], rtol=0, atol=1e-14)
    assert torch.allclose(hessian(many), hessian(one), rtol=0, atol=1e-13)


def test_a_pruned_layer_has_the_hessian_rows_of_its_live_weights() -> None:
    module, batch = net(), blobs()
    pruned(module)
    live = sparsity_of(module).masks["0.weight"].live.flatten()
    sparse, dense = surface(module, batch), surface(module, batch, masks={})
    at = torch.cat([live.nonzero().flatten(), torch.arange(len(live), dense.n)])
    assert sparse.n == 11 + dense.n - 40
    assert torch.allclose(hessian(sparse), hessian(dense)[at][:, at], rtol=0, atol=1e-14)
    assert torch.equal(sparse.weights(sparse.point())["0.weight"], module.get_parameter("0.weight"))


def test_a_sparse_layer_has_the_landscape_of_the_masked_dense_one() -> None:
    module, batch = net(), blobs()
    pruned(module)
    other: Any = copy.deepcopy(module)
    other[0] = SparseLinear.from_dense(other[0], sparsity_of(module).masks["0.weight"].live)
    dense, sparse = surface(module, batch), surface(other, batch)
    assert sparse.n == dense.n
    assert torch.allclose(sparse.point(), dense.point(), rtol=0, atol=0)
    assert torch.allclose(hessian(sparse), hessian(dense), rtol=0, atol=1e-13)


def test_a_lightning_module_that_a_callback_pruned_has_its_live_weights_as_coordinates() -> None:
    from tests.helpers import Classifier, data

    module = Classifier()
    trainer(CPNAPruning({"net.0.weight": 24, "net.2.weight": 12}), epochs=3).fit(module, data())
    found = LossSurface(module, data(), lambda net, batch: net.training_step(batch, 0))
    assert found.n == 24 + 12 + 16 + 1


def test_one_layer_is_a_block_of_the_hessian() -> None:
    module, batch = net(), blobs()
    whole, part = surface(module, batch), surface(module, batch, names="2.*")
    assert part.names == ("2.bias", "2.weight") or part.names == ("2.weight", "2.bias")
    order = {"2.weight": torch.arange(48, 72), "2.bias": torch.arange(72, 75)}
    at = torch.cat([order[name] for name in part.names])
    assert torch.allclose(hessian(part), hessian(whole)[at][:, at], rtol=0, atol=1e-14)


def with_batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


USES: dict[str, Callable[[LossSurface, Tensor], Any]] = {
    "loss": lambda surface, point: surface.loss(point),
    "gradient": lambda surface, point: surface.gradient(point),
    "hessian": lambda surface, point: hessian(surface, point),
    "statistics": lambda surface, point: surface.batch_norm_statistics(point),
    "batch gradient": lambda surface, point: surface.batch_gradient(point, 0),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was(use: str, fails: bool) -> None:
    module, batch = with_batch_norm(), blobs()
    module[1].eval()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    armed = [False]

    def loss(net: Any, batch: Any) -> Tensor:
        value = cross_entropy(net, batch)
        if armed[0]:
            raise RuntimeError("on purpose")
        return value

    looked_at = LossSurface(module, [batch], loss)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = {name: part.training for name, part in module.named_modules()}
    random = torch.get_rng_state()
    armed[0] = fails
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            USES[use](looked_at, looked_at.point() + 0.1)
    else:
        USES[use](looked_at, looked_at.point() + 0.1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in module.parameters() if p.grad is not None)
    assert module[1].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), random)


def test_batch_norm_statistics_are_the_mean_and_variance_of_the_activations() -> None:
    module, (x, y) = with_batch_norm(), blobs()
    found = LossSurface(module, [(x, y)], cross_entropy)
    point = found.point() * 1.5
    weights = found.weights(point)
    before = F.linear(x, weights["0.weight"], weights["0.bias"])
    statistics = found.batch_norm_statistics(point)
    assert torch.allclose(statistics["1.running_mean"], before.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(statistics["1.running_var"], before.var(0), rtol=0, atol=1e-12)


def test_a_batch_gradient_is_that_of_train_mode_without_dropout() -> None:
    module, batch = with_batch_norm(), blobs()
    found = LossSurface(module, [batch], cross_entropy)
    value, gradient = found.batch_gradient(found.point(), 0)
    twin = copy.deepcopy(module)
    twin[3].eval()
    expected = cross_entropy(twin, batch)
    expected.backward()
    grads = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    assert value == pytest.approx(expected.item(), abs=1e-14)
    assert torch.allclose(gradient, grads, rtol=0, atol=1e-13)


class ActiveDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


class StubbornNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        self.training = True
        out: Tensor = super().forward(x)
        return out


@pytest.mark.parametrize(
    ("part", "message"), [(ActiveDropout(), "deterministic"), (StubbornNorm(8).double(), "running_mean")]
)
def test_what_is_random_or_changes_itself_is_refused(part: nn.Module, message: str) -> None:
    module = nn.Sequential(nn.Linear(5, 8), part, nn.Linear(8, 3)).double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        LossSurface(module, [blobs()], cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_bad_arguments_are_named() -> None:
    module, batch = net(), blobs()
    with pytest.raises(ValueError, match="batches is empty"):
        LossSurface(module, [], cross_entropy)
    with pytest.raises(ValueError, match="matches no parameter"):
        surface(module, batch, names="9.weight")
    with pytest.raises(ValueError, match=r"point has shape \(3,\); allowed is \(75,\)"):
        surface(module, batch).loss(torch.zeros(3))
    with pytest.raises(KeyError, match="weights has no"):
        surface(module, batch).point({})
    with pytest.raises(ValueError, match="shape"):
        surface(module, batch).point({name: torch.zeros(2) for name, _ in module.named_parameters()})
    other = {name: value.clone() for name, value in module.state_dict().items()}
    pruned(module)
    with pytest.raises(ValueError, match="outside of this surface"):
        surface(module, batch).point(other)
    with pytest.raises(ValueError, match="does not depend"):
        LossSurface(module, [batch], lambda net, batch: batch[0].sum()).gradient(surface(module, batch).point())


def test_frozen_parameters_are_no_coordinates_and_a_shared_one_counts_once() -> None:
    module, batch = net(), blobs()
    module[0].bias.requires_grad_(False)
    assert surface(module, batch).n == 75 - 8
    shared: Any = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)).double()
    shared[2].weight = shared[0].weight
    found = surface(shared, (batch[0], batch[1]))
    assert found.n == 25 + 5 + 5
    cross_entropy(shared, batch).backward()
    grads = torch.cat([p.grad.flatten() for p in shared.parameters() if p.grad is not None])
    assert torch.allclose(found.gradient(found.point())[1], grads, rtol=0, atol=1e-13)


def test_compiled_modules_have_the_names_and_the_landscape_of_their_own() -> None:
    module, batch = net(), blobs()
    whole = surface(torch.compile(module, backend="eager"), batch)  # type: ignore[arg-type]
    expected = surface(module, batch)
    assert whole.names == expected.names
    assert torch.equal(hessian(whole), hessian(expected))
    parts: Any = copy.deepcopy(module)
    parts[0] = torch.compile(parts[0], backend="eager")
    found = surface(parts, batch)
    assert found.names == expected.names
    assert torch.equal(found.point(parts.state_dict()), expected.point())
    assert torch.allclose(found.gradient(found.point())[1], expected.gradient(expected.point())[1], rtol=0, atol=1e-14)


def test_weights_of_another_pattern_are_refused() -> None:
    one, other = (
        nn.Sequential(
            SparseLinear(5, 8, epsilon=1, generator=torch.Generator().manual_seed(seed)), nn.ReLU(), nn.Linear(8, 3)
        )
        for seed in (0, 1)
    )
    found = surface(one, blobs(dtype=torch.float32))
    assert torch.equal(found.point(one.state_dict()), found.point())
    with pytest.raises(ValueError, match="is another pattern"):
        found.point(other.state_dict())


def test_masks_and_losses_that_do_not_fit_are_refused() -> None:
    module, batch = net(), blobs()
    mask = sparsity_of(pruned(net())).masks["0.weight"]
    with pytest.raises(ValueError, match=r"masks: '0\.wieght' is no parameter"):
        surface(module, batch, masks={"0.wieght": mask})
    with pytest.raises(ValueError, match=r"masks: that of '2\.weight' has shape \(8, 5\); allowed is \(3, 8\)"):
        surface(module, batch, masks={"2.weight": mask})
    with pytest.raises(ValueError, match=r"loss: it returned \(96, 3\); allowed is a tensor of one number"):
        LossSurface(module, [batch], lambda net, batch: net(batch[0]))


def test_surfaces_of_other_masks_have_other_coordinates() -> None:
    batch = blobs()
    torch.manual_seed(1)
    one, other = pruned(net()), pruned(net())
    assert surface(one, batch).n == surface(other, batch).n
    assert surface(one, batch).has_coordinates_of(surface(one, batch, names=["0.*", "2.*"]))
    assert not surface(one, batch).has_coordinates_of(surface(other, batch))
    assert not surface(one, batch).has_coordinates_of(surface(one, batch, masks={}))


def test_layers_of_several_precisions_are_run_in_their_own() -> None:
    module = nn.Sequential(nn.Linear(5, 8).double(), nn.ReLU(), nn.Linear(8, 3))
    x, y = blobs()

    def loss(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net[2](net[1](net[0](batch[0])).float()), batch[1])

    found = LossSurface(module, [(x, y)], loss)
    assert found.point().dtype == torch.float64
    assert found.gradient(found.point())[0] == pytest.approx(loss(module, (x, y)).item(), rel=1e-6)


@on_every_device
def test_batches_come_to_the_modules_device(device: str) -> None:
    module, (x, y) = net().to(device), blobs()
    found = LossSurface(module, [{"x": x, "y": y}], lambda net, batch: F.cross_entropy(net(batch["x"]), batch["y"]))
    assert found.gradient(found.point())[1].device.type == device
