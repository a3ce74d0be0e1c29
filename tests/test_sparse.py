import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import scipy.sparse
import scipy.stats
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_cpna.sparse
from lightning_cpna import Score, SparseLinear, Sparsity, pattern, rewire_
from lightning_cpna.growth import Factors
from lightning_cpna.moments import moments_of
from tests.helpers import on_every_device, same

F64 = torch.float64
N_IN, N_OUT = 12, 9
PATTERNS = {"some": 0.3, "all": 1.0, "none": 0.0}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
}

with_every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def live_cells(n_out: int, n_in: int, density: float) -> Tensor:
    """Draw which connections live; the first unit and the last input have none, unless all live."""
    live = torch.rand(n_out, n_in) < density
    if density < 1:
        live[0], live[:, -1] = False, False
    return live


def layer_of(density: float = 0.3, bias: bool = True, dtype: torch.dtype = F64) -> SparseLinear:
    return SparseLinear.from_dense(nn.Linear(N_IN, N_OUT, bias, dtype=dtype), live_cells(N_OUT, N_IN, density))


def single(dtype: torch.dtype = F64) -> SparseLinear:
    return SparseLinear.from_cells(torch.tensor([29]), torch.tensor([1.5], dtype=dtype), None, N_IN, N_OUT)


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-12) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual.cpu(), expected.to(actual.dtype).cpu(), rtol=tolerance, atol=tolerance)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copy everything that a module holds, also what it does not save."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def assert_consistent(layer: SparseLinear) -> None:
    """The layer computes what it would if it were made anew of its connections."""
    cells = layer.cells
    assert bool((cells.diff() > 0).all())
    bias = None if layer.bias is None else layer.bias.detach()
    fresh = SparseLinear.from_cells(cells, layer.weight.detach(), bias, layer.in_features, layer.out_features)
    assert same(state_of(layer), state_of(fresh))
    assert all(indices.dtype == torch.int32 for indices in layer.pattern)


def backward(layer: nn.Module, x: Tensor, target: Tensor) -> None:
    layer.zero_grad()
    nn.functional.mse_loss(layer(x), target).backward()


# The dense layer


def inputs(kind: str) -> Tensor:
    shapes = {"1-D": (N_IN,), "3-D": (3, 4, N_IN), "4-D": (2, 3, 2, N_IN), "empty 3-D": (0, 4, N_IN)}
    if kind in shapes:
        return torch.randn(shapes[kind], dtype=F64)
    strided = {
        "transposed": lambda: torch.randn(N_IN, 7, dtype=F64).t(),
        "every other": lambda: torch.randn(7, 2 * N_IN, dtype=F64)[:, ::2],
        "expanded": lambda: torch.randn(1, N_IN, dtype=F64).expand(7, N_IN),
        "permuted 3-D": lambda: torch.randn(N_IN, 3, 4, dtype=F64).permute(2, 1, 0),
    }
    return strided[kind]() if kind in strided else torch.randn(int(kind), N_IN, dtype=F64)


KINDS = ["1-D", "3-D", "4-D", "empty 3-D", "0", "1", "2", "7", "8", "33"]
STRIDED = ["transposed", "every other", "expanded", "permuted 3-D"]


@on_every_device
@pytest.mark.parametrize(("density", "bias"), [(0.3, True), (1.0, True), (0.0, True), (0.3, False), (0.0, False)])
def test_outputs_and_gradients_equal_the_dense_layer(density: float, bias: bool, device: str) -> None:
    layer = layer_of(density, bias).to(device)
    for kind in (*KINDS, *STRIDED):
        layer.zero_grad()
        equals_dense(layer, inputs(kind).to(device))


def equals_dense(layer: SparseLinear, x: Tensor) -> None:
    dense = layer.to_dense()
    x, x_dense = x.detach().requires_grad_(), x.detach().requires_grad_()
    y, y_dense = layer(x), dense(x_dense)
    assert y.shape == y_dense.shape
    close(y, y_dense)
    gradient = torch.randn_like(y_dense)
    y.backward(gradient)
    y_dense.backward(gradient)
    close(x.grad, x_dense.grad)
    assert dense.weight.grad is not None
    close(layer.weight.grad, dense.weight.grad.flatten()[layer.cells])
    assert (layer.bias is None) == (dense.bias is None)
    if layer.bias is not None:
        close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 8, 33])
def test_a_layer_of_one_connection_is_one_product(batch: int) -> None:
    layer, x = single(), torch.randn(batch, N_IN, dtype=F64)
    expected = torch.zeros(batch, N_OUT, dtype=F64)
    expected[:, 2] = 1.5 * x[:, 5]  # 29 = 2 * 12 + 5
    close(layer(x), expected)
    layer(x).sum().backward()
    close(layer.weight.grad, x[:, 5].sum()[None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, N_IN), (3, N_IN), (9, N_IN), (2, 2, N_IN), (N_IN,)])
def test_the_layer_is_differentiable_twice(shape: tuple[int, ...], bias: bool) -> None:
    layer = layer_of(0.15, bias)
    names = ["weight", "bias"][: 1 + bias]

    def output(x: Tensor, *parameters: Tensor) -> Any:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    arguments = [torch.randn(shape, dtype=F64), *(layer.get_parameter(name).detach().clone() for name in names)]
    for argument in arguments:
        argument.requires_grad_()
    assert torch.autograd.gradcheck(output, arguments)
    assert torch.autograd.gradgradcheck(output, arguments)


@on_every_device
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_float32_is_close_to_float64(batch: int, device: str) -> None:
    exact = layer_of().to(device)
    layer = copy.deepcopy(exact).float()
    x = torch.randn(batch, N_IN, device=device, dtype=F64, requires_grad=True)
    x_float = x.detach().float().requires_grad_()
    exact(x).square().sum().backward()
    y = layer(x_float)
    assert y.dtype == torch.float32
    y.square().sum().backward()
    close(y, exact(x), 1e-5)
    close(x_float.grad, x.grad, 1e-4)
    close(layer.weight.grad, exact.weight.grad, 1e-4)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_multiplied_in_float32(dtype: torch.dtype, device: str) -> None:
    layer = layer_of(dtype=torch.float32).to(device, dtype)
    wide = copy.deepcopy(layer).float()
    x = torch.randn(7, N_IN, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, wide(x.detach().float()).to(dtype))
    y.sum().backward()
    wide(x.detach().float()).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert layer.weight.grad is not None
    assert wide.weight.grad is not None
    assert torch.equal(layer.weight.grad, wide.weight.grad.to(dtype))


@on_every_device
def test_under_autocast_sparse_layers_compute_in_float32(device: str) -> None:
    layer = layer_of(dtype=torch.float32).to(device)
    x = torch.randn(7, N_IN, device=device)
    expected = layer(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        close(layer(x), expected, 1e-6)
        close(layer(x.bfloat16()).float(), layer(x.bfloat16().float()).float(), 1e-6)


@on_every_device
def test_a_net_of_dense_and_sparse_layers_trains_under_autocast(device: str) -> None:
    net = nn.Sequential(nn.Linear(6, N_IN), nn.ReLU(), layer_of(dtype=torch.float32), nn.ReLU(), nn.Linear(N_OUT, 2))
    net = net.to(device)
    exact = copy.deepcopy(net)
    x = torch.randn(16, 6, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = net(x).square().mean()
    loss.backward()
    exact(x).square().mean().backward()
    for parameter, other in zip(net.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        assert float((parameter.grad - other.grad).norm()) < 0.05 * float(other.grad.norm())


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("width", [N_IN - 1, N_IN + 1])
def test_inputs_of_another_width_raise_as_in_a_dense_layer(width: int, dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype=dtype), torch.randn(3, width, dtype=dtype)
    with pytest.raises((RuntimeError, ValueError)):
        layer.to_dense()(x)
    with pytest.raises((RuntimeError, ValueError)):
        layer(x)


# Training


class Pair:
    """A sparse net and the dense one that computes the same, whose other connections rest."""

    def __init__(self, make: Callable[[Any], Optimizer], sizes: tuple[int, ...] = (9, 12, 10, 3)) -> None:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            linear = nn.Linear(n_in, n_out, dtype=F64)
            layers += [SparseLinear.from_dense(linear, live_cells(n_out, n_in, 0.4)), nn.ReLU()]
        self.sparse = nn.Sequential(*layers[:-1])
        self.dense = nn.Sequential(
            *(part.to_dense() if isinstance(part, SparseLinear) else part for part in self.sparse)
        )
        self.names = [f"{i}.weight" for i, part in enumerate(self.sparse) if isinstance(part, SparseLinear)]
        self.of_sparse, self.of_dense = Sparsity(self.sparse), Sparsity(self.dense)
        for name in self.names:
            self.of_dense.add_mask(name)
            resting = (~self.layer(name).live).flatten().nonzero().flatten()
            self.of_dense.masks[name].move_(resting, torch.empty(0, dtype=torch.int64))
        self.sparse_optimizer = make(self.sparse.parameters())
        self.dense_optimizer = make(self.dense.parameters())
        self.factors: dict[str, list[Factors]] = {}
        self.gradients: dict[str, Tensor] = {}
        for name in self.names:
            self.layer(name).register_forward_hook(self._watch(name))

    def layer(self, name: str) -> SparseLinear:
        part = self.sparse.get_submodule(name.removesuffix(".weight"))
        assert isinstance(part, SparseLinear)
        return part

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda g: self.factors.update({name: [Factors(g, x, 1.0)]}))

        return hook

    def step(self, x: Tensor, target: Tensor) -> None:
        backward(self.sparse, x, target)
        backward(self.dense, x, target)
        for name in self.names:
            gradient = self.dense.get_parameter(name).grad
            assert gradient is not None
            self.gradients[name] = gradient.clone()
        self.of_dense.mask_gradients_()
        self.sparse_optimizer.step()
        self.dense_optimizer.step()

    def rewire(self, seed: int, std: float, by_gradient: bool) -> None:
        for name in self.names:
            for sparsity, optimizer, gradient in (
                (self.of_sparse, self.sparse_optimizer, self.factors[name]),
                (self.of_dense, self.dense_optimizer, self.gradients[name]),
            ):
                n = rewire_(
                    sparsity,
                    name,
                    0.4,
                    std=std,
                    gradient=gradient if by_gradient else None,
                    optimizers=[optimizer],
                    generator=torch.Generator().manual_seed(seed),
                )
                assert n > 0

    def compare(self) -> None:
        for name, dense in self.dense.named_parameters():
            sparse = self.sparse.get_parameter(name)
            states = self.sparse_optimizer.state[sparse], self.dense_optimizer.state[dense]
            assert states[0].keys() == states[1].keys()
            pairs = [(sparse, dense), (sparse.grad, dense.grad)]
            pairs += [(states[0][key], states[1][key]) for key in states[0] if isinstance(states[0][key], Tensor)]
            for mine, other in pairs:
                assert mine is not None
                assert other is not None
                if name in self.names and mine.ndim:
                    layer = self.layer(name)
                    assert torch.equal(self.of_dense.masks[name].live, layer.live)
                    assert int(other[~layer.live].count_nonzero()) == 0
                    other = other.flatten()[layer.cells]
                close(mine, other)


@pytest.mark.parametrize(("std", "by_gradient"), [(0.0, False), (0.3, False), (0.0, True)])
@with_every_optimizer
def test_training_and_rewiring_equal_the_dense_net_with_masks(optimizer: str, std: float, by_gradient: bool) -> None:
    pair = Pair(OPTIMIZERS[optimizer])
    x = torch.randn(32, 9, dtype=F64)
    target = torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 3].abs()], 1)
    first = {name: pair.layer(name).cells for name in pair.names}
    for step in range(1, 21):
        pair.step(x, target)
        pair.compare()
        if step % 3 == 0 and step < 18:
            pair.rewire(step, std, by_gradient)
            pair.compare()
    for name in pair.names:
        assert not torch.equal(pair.layer(name).cells, first[name])
        assert_consistent(pair.layer(name))


@with_every_optimizer
def test_dropping_keeps_the_survivors_and_equals_the_dense_layer_with_zeros(optimizer: str) -> None:
    layer = layer_of()
    weight, made = layer.weight, OPTIMIZERS[optimizer](layer.parameters())
    x, target = torch.randn(20, N_IN, dtype=F64), torch.randn(20, N_OUT, dtype=F64)
    for _ in range(4):
        backward(layer, x, target)
        made.step()
    dead = torch.rand(len(weight)) < 0.5
    before = {"value": weight.detach().clone(), "grad": weight.grad} | dict(moments_of(made, weight))
    assert len(before) > 2
    kept_cells = layer.cells[~dead]
    dense = layer.to_dense()
    dense.weight.data[layer.live] = torch.where(dead, 0.0, weight.detach())

    loss = nn.functional.mse_loss(layer(x), target)  # a graph that is alive
    layer.drop_(dead, [made])
    assert layer.weight is weight
    assert torch.equal(layer.cells, kept_cells)
    after = {"value": weight.detach(), "grad": weight.grad} | dict(moments_of(made, weight))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor is not None
        found = after[name]
        assert found is not None
        assert torch.equal(found, tensor[~dead]), name
    assert_consistent(layer)
    close(layer(x), dense(x))
    backward(layer, x, target)
    backward(dense, x, target)
    assert dense.weight.grad is not None
    close(weight.grad, dense.weight.grad.flatten()[layer.cells])
    made.step()
    assert bool((weight != before["value"][~dead]).all())  # type: ignore[index]
    assert float(loss.detach()) > 0


def test_a_layer_of_which_everything_is_dropped_is_its_bias() -> None:
    layer = layer_of()
    layer.drop_(torch.ones(len(layer.weight), dtype=torch.bool))
    assert layer.bias is not None
    assert torch.equal(layer(torch.randn(3, N_IN, dtype=F64)), layer.bias.expand(3, N_OUT))
    assert_consistent(layer)
    backward(layer, torch.randn(3, N_IN, dtype=F64), torch.zeros(3, N_OUT, dtype=F64))
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (0,)


def test_rewiring_a_layer_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer = SparseLinear.from_cells(torch.tensor([1, 3, 4, 8]), values, None, 3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    layer.weight.grad = torch.tensor([10.0, 20.0, 30.0, 40.0])
    optimizer.state[layer.weight]["momentum_buffer"] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    weight = layer.weight
    layer.rewire_(torch.tensor([0, 2]), torch.tensor([1, 7]), torch.tensor([0.5, -0.5], dtype=F64), [optimizer])
    assert layer.weight is weight
    assert layer.cells.tolist() == [1, 3, 7, 8]
    assert weight.tolist() == [0.5, 2.0, -0.5, 4.0]
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 20.0, 0.0, 40.0]
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [0.0, 6.0, 0.0, 8.0]
    assert_consistent(layer)


@pytest.mark.parametrize(
    ("dying", "cells", "message"),
    [
        ([0, 2], [2], "cells has 1 connections; allowed is as many as die, 2"),
        ([0, 2], [3, 7], "cells: one of them is there already; allowed are others"),
        ([0, 2], [7, 2], "cells are not ascending; allowed is each connection once, in order"),
        ([0, 2], [7, 7], "cells are not ascending; allowed is each connection once, in order"),
        ([0, 2], [2, 9], "cells reach from 2 to 9; allowed is 0 to 8"),
        ([0, 2], [-1, 2], "cells reach from -1 to 2; allowed is 0 to 8"),
        ([2, 2], [2, 7], r"dying is tensor\(\[2, 2\]\); allowed are places from 0 to 3, ascending"),
        ([2, 0], [2, 7], r"dying is tensor\(\[2, 0\]\); allowed are places from 0 to 3, ascending"),
        ([2, 4], [2, 7], r"dying is tensor\(\[2, 4\]\); allowed are places from 0 to 3, ascending"),
        ([-1, 2], [2, 7], r"dying is tensor\(\[-1,  2\]\); allowed are places from 0 to 3, ascending"),
    ],
)
def test_a_rewiring_that_is_refused_changes_nothing(dying: list[int], cells: list[int], message: str) -> None:
    layer = SparseLinear.from_cells(torch.tensor([1, 3, 4, 8]), torch.tensor([1.0, 2.0, 3.0, 4.0]), None, 3, 3)
    before = state_of(layer)
    with pytest.raises(ValueError, match=message):
        layer.rewire_(torch.tensor(dying), torch.tensor(cells), torch.zeros(len(cells)))
    assert same(state_of(layer), before)


# Layout


class Copies(TorchDispatchMode):
    """Lists the copies that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous"):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_batches_stay_features_major_and_nothing_is_copied_between_layers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = SparseLinear(N_IN, 20, 2, dtype=dtype), SparseLinear(20, N_OUT, 2, dtype=dtype)
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    read: list[Tensor] = []
    passed: list[Tensor] = []

    def spy(values: Tensor, x: Tensor, *rest: Any) -> Tensor:
        read.append(x)
        product: Tensor = pattern.sparse_matmul(values, x, *rest)
        return product

    monkeypatch.setattr(lightning_cpna.sparse, "sparse_matmul", spy)
    for part in net:
        part.register_forward_hook(lambda _, __, output: passed.append(output))
    for shape in ((8, N_IN), (2, 4, N_IN)):
        read.clear()
        passed.clear()
        x = torch.randn(shape, dtype=dtype)
        with Copies() as copies:
            y = net(x)
        assert len(copies.made) == 1  # of x, into features-major order
        for output, width in zip(passed, (20, 20, N_OUT), strict=True):
            assert output.shape == (*shape[:-1], width)
            assert output.stride() == ((1, 8) if len(shape) == 2 else (4, 1, 8))
        assert read[1].data_ptr() == passed[1].data_ptr()
        assert read[1].is_contiguous()

        x = torch.randn(N_IN, 8, dtype=dtype).t().requires_grad_()
        with Copies() as copies:
            y = net(x)
            y.backward(torch.randn(N_OUT, 8, dtype=dtype).t())
        assert copies.made == []
        assert x.grad is not None
        assert x.grad.stride() == (1, 8)


# Compiling and exporting


def two_layers() -> nn.Sequential:
    return nn.Sequential(SparseLinear(N_IN, 10, 2), nn.ReLU(), SparseLinear(10, 4, 2))


@on_every_device
def test_a_compiled_net_equals_the_eager_one_also_after_rewiring(device: str) -> None:
    net = two_layers().to(device)
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(8, N_IN, device=device)

    def compare() -> None:
        found = []
        for module in (net, compiled):
            net.zero_grad()
            y = module(x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in net.parameters())])
        for mine, other in zip(*found, strict=True):
            close(mine, other, 1e-6)

    compare()
    sparsity = Sparsity(net)
    for name in ("0.weight", "2.weight"):
        before = state_of(net)
        assert rewire_(sparsity, name, 0.5, std=1.0) > 5
        assert not same(state_of(net), before)
        compare()
    part = net[2]
    assert isinstance(part, SparseLinear)
    part.drop_(torch.rand(len(part.weight), device=device) < 0.5)
    compare()


def test_an_exported_net_equals_the_eager_one_for_every_batch_size() -> None:
    net = two_layers()
    shapes = {"input": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(net, (torch.randn(8, N_IN),), dynamic_shapes=shapes).module()
    for batch in (2, 8, 33):
        x = torch.randn(batch, N_IN)
        close(exported(x), net(x), 1e-6)


# Never dense


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_layer_that_would_have_160_gb_lives_in_a_few_megabytes(dtype: torch.dtype) -> None:
    n = 200_000
    layer = SparseLinear(n, n, epsilon=1, dtype=dtype)
    assert len(layer.weight) == 2 * n
    assert sum(t.numel() * t.element_size() for t in state_of(layer).values()) < 16e6
    optimizer = torch.optim.Adam(layer.parameters())
    x = torch.randn(2, n, dtype=dtype, requires_grad=True)
    layer(x).square().sum().backward()
    optimizer.step()
    sparsity, before = Sparsity(layer), layer.cells
    assert 0.29 * 2 * n < rewire_(sparsity, "weight", 0.3, optimizers=[optimizer]) <= 0.3 * 2 * n
    assert int(torch.isin(layer.cells, before).sum()) < 0.701 * 2 * n
    [budget] = sparsity.add_budgets(layer, {"weight": 300_000})
    sparsity.prune_(budget, 300_000, Score("magnitude"), optimizers=[optimizer])
    assert len(layer.weight) == 300_000
    rewire_(sparsity, "weight", 0.3, optimizers=[optimizer])

    file = io.BytesIO()
    torch.save({"net": layer.state_dict(), "masks": sparsity.masks.state_dict()}, file)
    assert file.tell() < 16e6
    file.seek(0)
    loaded = SparseLinear(n, n, epsilon=0.01, dtype=dtype)
    loaded.load_state_dict(torch.load(file, weights_only=True)["net"])
    copies = [loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), SparseLinear.from_csr(layer.to_csr())]
    with torch.no_grad():
        assert layer.bias is not None
        copies[3].bias = layer.bias
        y = layer(x)
        assert all(torch.equal(other(x), y) for other in copies)
        matrix = scipy.sparse.csr_array((layer.weight.numpy(), layer.col_indices.numpy(), layer.crow_indices.numpy()))
        matrix.resize((n, n))
        close(y, torch.from_numpy(x.detach().numpy() @ matrix.T) + layer.bias, 1e-5)


# Making


@pytest.mark.parametrize(("n_in", "n_out", "epsilon"), [(100, 50, 2.0), (7, 3, 20.0), (9, 11, 1e-9), (1, 1, 1.0)])
def test_a_new_layer_has_exactly_as_many_connections_as_asked(n_in: int, n_out: int, epsilon: float) -> None:
    layer = SparseLinear(n_in, n_out, epsilon)
    n = min(n_in * n_out, max(1, round(epsilon * (n_in + n_out))))
    assert layer.weight.shape == (n,) == layer.cells.shape
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.zeros(n_out))
    assert int(layer.live.sum()) == n
    assert_consistent(layer)
    assert f"in_features={n_in}, out_features={n_out}, connections={n}, bias=True" in repr(layer)


def test_values_are_he_normal_with_the_mean_fan_in_and_connections_uniform() -> None:
    layer = SparseLinear(1500, 500, epsilon=20)
    values = layer.weight.detach() / math.sqrt(2 / (len(layer.weight) / 500))
    assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert float(values.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * len(values)))
    assert scipy.stats.kstest(layer.cells.numpy() / 750_000, "uniform").pvalue > 1e-3
    assert scipy.stats.chisquare(torch.bincount(layer.col_indices % 10).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("replace", [False, True])
def test_the_generator_says_what_is_drawn(replace: bool) -> None:
    layers = [SparseLinear(30, 20, 2, replace=replace, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert same(state_of(layers[0]), state_of(layers[1]))
    assert not torch.equal(layers[0].cells[:20], layers[2].cells[:20])
    assert not torch.equal(layers[0].weight[:20], layers[2].weight[:20])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "in_features is 0; allowed is an int >= 1"),
        ((3, -1), "out_features is -1; allowed is an int >= 1"),
        ((2.0, 3), "in_features is 2.0; allowed is an int >= 1"),
        ((3, True), "out_features is True; allowed is an int >= 1"),
        ((3, 3, 0.0), "epsilon is 0.0; allowed is a float > 0"),
        ((3, 3, math.nan), "epsilon is nan; allowed is a float > 0"),
        ((10**6, 10**6, 1e4), r"epsilon is 10000.0: 20000000000 connections; allowed are fewer than 2**31 in a layer"),
    ],
)
def test_arguments_out_of_range_raise(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseLinear(*arguments)


# Converting


@pytest.mark.parametrize("bias", [True, False])
def test_there_and_back_from_dense(bias: bool) -> None:
    linear, live = nn.Linear(N_IN, N_OUT, bias), live_cells(N_OUT, N_IN, 0.4)
    zero = live.nonzero()[3].tolist()
    linear.weight.data[zero[0], zero[1]] = 0.0
    layer = SparseLinear.from_dense(linear, live)
    assert torch.equal(layer.live, live)
    assert len(layer.weight) == int(live.sum())
    assert int((layer.weight == 0).sum()) == 1
    dense = layer.to_dense()
    assert torch.equal(dense.weight, linear.weight * live)
    assert (dense.bias is None) == (not bias)
    assert not bias or torch.equal(dense.bias, linear.bias)
    assert dense.weight.requires_grad
    assert layer.weight.requires_grad
    assert_consistent(layer)
    again = SparseLinear.from_dense(dense)  # those that are not zero
    assert torch.equal(again.live, linear.weight * live != 0)


@pytest.mark.parametrize("density", PATTERNS.values(), ids=PATTERNS)
def test_csr_equals_scipy_there_and_back(density: float) -> None:
    layer = layer_of(density)
    csr = layer.to_csr()
    assert csr.layout == torch.sparse_csr
    expected = scipy.sparse.csr_array(layer.to_dense().weight.detach().numpy())
    assert csr.crow_indices().tolist() == expected.indptr.tolist()
    assert csr.col_indices().tolist() == expected.indices.tolist()
    assert csr.values().tolist() == expected.data.tolist()
    again = SparseLinear.from_csr(csr, None if layer.bias is None else layer.bias.detach())
    assert same(state_of(again), state_of(layer))
    csr.values().zero_()
    csr.col_indices().zero_()
    assert same(state_of(again), state_of(layer))
    assert_consistent(layer)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_csr_matrix_with_unsorted_columns_and_zeros_is_taken_as_it_is(dtype: torch.dtype) -> None:
    crow, col = torch.tensor([0, 3, 3, 5], dtype=dtype), torch.tensor([2, 0, 3, 1, 0], dtype=dtype)
    matrix = torch.sparse_csr_tensor(crow, col, torch.tensor([1.0, 2.0, 0.0, 4.0, 5.0]), (3, 4), check_invariants=False)
    layer = SparseLinear.from_csr(matrix, torch.tensor([7.0, 8.0, 9.0]))
    assert layer.to_dense().weight.tolist() == [[2.0, 0.0, 1.0, 0.0], [0.0] * 4, [5.0, 4.0, 0.0, 0.0]]
    assert layer.weight.tolist() == [2.0, 1.0, 0.0, 5.0, 4.0]
    assert layer.cells.tolist() == [0, 2, 3, 8, 9]
    assert layer.bias is not None
    assert layer.bias.tolist() == [7.0, 8.0, 9.0]
    assert_consistent(layer)


def test_what_is_no_csr_matrix_raises() -> None:
    message = "matrix is 2-D with layout {}; allowed is 2-D in torch.sparse_csr"
    for matrix in (torch.eye(3), torch.eye(3).to_sparse_coo(), torch.eye(3).to_sparse_csc()):
        with pytest.raises(ValueError, match=re.escape(message.format(matrix.layout))):
            SparseLinear.from_csr(matrix)
    with pytest.raises(ValueError, match="matrix is 3-D"):
        SparseLinear.from_csr(torch.eye(3).expand(2, 3, 3).to_sparse_csr())
    twice = torch.sparse_csr_tensor([0, 2], [1, 1], [1.0, 2.0], (1, 3), check_invariants=False)
    with pytest.raises(ValueError, match="each connection once"):
        SparseLinear.from_csr(twice)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([3, 1], "cells are not ascending; allowed is each connection once, in order"),
        ([1, 1], "cells are not ascending"),
        ([-1, 1], "cells reach from -1 to 1; allowed is 0 to 11"),
        ([0, 12], "cells reach from 0 to 12; allowed is 0 to 11"),
        ([5, 99, 7], "cells are not ascending"),
    ],
)
def test_cells_that_are_out_of_order_or_beyond_the_layer_raise(cells: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_cells(torch.tensor(cells), torch.ones(len(cells)), None, 3, 4)
    layer = SparseLinear(3, 4, 1)
    before = state_of(layer)
    with pytest.raises(ValueError, match=message):
        layer.set_cells_(torch.tensor(cells))
    assert same(state_of(layer), before)


@pytest.mark.parametrize(("n_values", "n_bias"), [(2, 4), (4, 4), (3, 3), (1, 4), (3, 1)])
def test_values_or_biases_that_do_not_fit_the_cells_raise(n_values: int, n_bias: int) -> None:
    shapes = re.escape(
        f"values and bias have shapes (({n_values},), ({n_bias},)); allowed are (3,), as cells, and (4,)"
    )
    with pytest.raises(ValueError, match=shapes):
        SparseLinear.from_cells(torch.tensor([0, 4, 9]), torch.ones(n_values), torch.ones(n_bias), 3, 4)


def test_a_mask_of_another_shape_raises() -> None:
    with pytest.raises(ValueError, match=r"live has shape \(3, 3\); allowed is the weight's, \(3, 2\)"):
        SparseLinear.from_dense(nn.Linear(2, 3), torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"live has shape \(2, 3\); allowed is the weight's, \(3, 2\)"):
        SparseLinear.from_dense(nn.Linear(2, 3), torch.ones(2, 3, dtype=torch.bool))


def test_set_cells_moves_the_values_or_begins_at_zero() -> None:
    layer = SparseLinear(3, 4, 1)
    weight, values = layer.weight, layer.weight.tolist()
    layer.set_cells_(torch.tensor([0, 1, 2, 3, 4, 5, 11]))
    assert layer.cells.tolist() == [0, 1, 2, 3, 4, 5, 11]
    assert layer.weight.tolist() == values
    layer.set_cells_(torch.tensor([2, 9]))
    assert layer.weight is weight
    assert layer.weight.tolist() == [0.0, 0.0]
    assert_consistent(layer)
    layer.set_cells_(torch.empty(0, dtype=torch.int64))
    assert layer(torch.ones(2, 3)).tolist() == [[0.0] * 4] * 2
    assert_consistent(layer)


def take_cells(layer: SparseLinear) -> None:
    layer.set_cells_(torch.tensor([0, 1, 2]))


def take_file(layer: SparseLinear) -> None:
    layer.load_state_dict(SparseLinear(layer.in_features, layer.out_features, 0.1).state_dict())


on_both_ways = pytest.mark.parametrize("change", [take_cells, take_file])


@on_both_ways
def test_another_number_of_connections_may_come_while_a_graph_is_alive(change: Callable[[SparseLinear], None]) -> None:
    layer, x = layer_of(dtype=torch.float32), torch.randn(3, N_IN)
    loss = layer(x).sum()
    loss.backward()
    layer.zero_grad()
    change(layer)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == layer.weight.shape
    assert loss.ndim == 0


@on_both_ways
def test_no_gradient_of_another_number_of_connections_is_left(change: Callable[[SparseLinear], None]) -> None:
    layer = layer_of(dtype=torch.float32)
    layer(torch.randn(3, N_IN)).sum().backward()
    change(layer)
    shape = None if layer.weight.grad is None else layer.weight.grad.shape
    assert shape in (None, layer.weight.shape)


@with_every_optimizer
@pytest.mark.parametrize("which", ["units", "inputs", "both"])
def test_selecting_units_and_inputs_equals_slicing_the_dense_layer_and_spreading_undoes_it(
    which: str, optimizer: str
) -> None:
    layer = layer_of(bias=False)
    weight, made = layer.weight, OPTIMIZERS[optimizer](layer.parameters())
    backward(layer, torch.randn(20, N_IN, dtype=F64), torch.randn(20, N_OUT, dtype=F64))
    made.step()
    units, inputs = torch.tensor([0, 2, 3, 7, 8]), torch.tensor([1, 2, 4, 5, 6, 7, 10, 11])
    chosen = {"units": {"units": units}, "inputs": {"inputs": inputs}, "both": {"units": units, "inputs": inputs}}[
        which
    ]
    rows, columns = chosen.get("units", torch.arange(N_OUT)), chosen.get("inputs", torch.arange(N_IN))
    dense, live = layer.to_dense().weight.detach(), layer.live
    kept = layer.live.new_zeros(N_OUT, N_IN)
    kept[rows[:, None], columns] = True
    moments = dict(moments_of(made, weight))
    places = kept.flatten()[layer.cells]
    layer.select_(**chosen, optimizers=[made])
    assert layer.weight is weight
    assert (layer.out_features, layer.in_features) == (len(rows), len(columns)) == tuple(layer.shape.tolist())
    assert torch.equal(layer.to_dense().weight, dense[rows][:, columns])
    assert torch.equal(layer.live, live[rows][:, columns])
    assert dict(moments_of(made, weight)).keys() == moments.keys()
    assert all(torch.equal(moment, moments[key][places]) for key, moment in moments_of(made, weight))
    assert_consistent(layer)
    close(layer(torch.ones(len(columns), dtype=F64)), dense[rows][:, columns].sum(1))
    layer.spread_(rows, columns, N_OUT, N_IN)
    assert torch.equal(layer.to_dense().weight, dense * kept)
    assert torch.equal(layer.live, live & kept)
    assert_consistent(layer)


# Saving


def test_only_the_values_and_where_they_are_is_saved() -> None:
    assert list(layer_of().state_dict()) == ["weight", "bias", "shape", "crow_indices", "col_indices"]
    assert list(layer_of(bias=False).state_dict()) == ["weight", "shape", "crow_indices", "col_indices"]


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("assign", [False, True])
def test_a_fresh_layer_takes_another_number_of_connections(epsilon: float, assign: bool) -> None:
    saved, fresh = SparseLinear(N_IN, N_OUT, 2.0), SparseLinear(N_IN, N_OUT, epsilon)
    weight = fresh.weight
    fresh.load_state_dict(copy.deepcopy(saved.state_dict()), strict=True, assign=assign)
    assert assign or fresh.weight is weight
    assert same(state_of(fresh), state_of(saved))
    x = torch.randn(5, N_IN)
    assert torch.equal(fresh(x), saved(x))
    assert_consistent(fresh)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_a_layer_that_was_loaded_has_a_pattern_of_its_own(epsilon: float) -> None:
    saved, fresh = SparseLinear(N_IN, N_OUT, 2.0), SparseLinear(N_IN, N_OUT, epsilon)
    fresh.load_state_dict(saved.state_dict())
    before = state_of(fresh)
    rewire_(Sparsity(saved), "weight", 0.5)
    assert same(state_of(fresh), before)


@with_every_optimizer
@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizer_made_before_loading_goes_on_as_the_saved_one(stepped: bool, optimizer: str) -> None:
    x, target = torch.randn(20, N_IN), torch.randn(20, N_OUT)
    saved, fresh = SparseLinear(N_IN, N_OUT, 2.0), SparseLinear(N_IN, N_OUT, 1.0)
    first, second = OPTIMIZERS[optimizer](saved.parameters()), OPTIMIZERS[optimizer](fresh.parameters())
    for layer, made in ((saved, first), (fresh, second))[: 1 + stepped]:
        for _ in range(3):
            backward(layer, x, target)
            made.step()
    file = io.BytesIO()
    torch.save([saved.state_dict(), first.state_dict()], file)
    file.seek(0)
    net, optimizer_state = torch.load(file, weights_only=True)
    fresh.load_state_dict(net)
    second.load_state_dict(optimizer_state)
    for _ in range(3):
        for layer, made in ((saved, first), (fresh, second)):
            backward(layer, x, target)
            made.step()
    assert same(state_of(fresh), state_of(saved))


def damaged(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    state = copy.deepcopy(SparseLinear(4, 3, 1.0, generator=torch.Generator().manual_seed(0)).state_dict())
    state["col_indices"] = torch.tensor([0, 2, 3, 1, 3, 0, 2], dtype=torch.int32)
    state["crow_indices"] = torch.tensor([0, 3, 5, 7], dtype=torch.int32)
    return {**state, name: change(state[name])}


def put(place: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([place]), value)


DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a value too few": ("weight", lambda w: w[:-1]),
    "an input beyond": ("col_indices", put(2, 4)),
    "an input below": ("col_indices", put(0, -1)),
    "an input too few": ("col_indices", lambda c: c[:-1]),
    "an input twice": ("col_indices", put(1, 0)),
    "inputs out of order": ("col_indices", put(0, 3)),
    "a unit too few": ("crow_indices", lambda c: c[:-1]),
    "falling": ("crow_indices", put(1, 6)),
    "a late start": ("crow_indices", put(0, 1)),
    "an early end": ("crow_indices", put(3, 6)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pattern_raises_and_changes_nothing(damage: str) -> None:
    layer = SparseLinear(4, 3, 0.5)
    layer.load_state_dict(damaged("weight", lambda w: w))  # what is not damaged is taken
    assert_consistent(layer)
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="do not fit together: the file is damaged"):
        layer.load_state_dict(damaged(*DAMAGES[damage]))
    assert same(state_of(layer), before)


def test_a_file_of_another_shape_raises_with_both_shapes_and_changes_nothing() -> None:
    layer = SparseLinear(4, 3, 1.0)
    before = state_of(layer)
    for other in (SparseLinear(3, 4, 1.0), SparseLinear(5, 3, 0.875), SparseLinear(40, 30, 1.0)):
        shape = [other.out_features, other.in_features]
        message = rf"SparseLinear: the file's layer has (out_features, in_features) {shape}; allowed is [3, 4]"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            layer.load_state_dict(other.state_dict())
        assert same(state_of(layer), before)
        with pytest.raises(RuntimeError, match=re.escape(message.replace("SparseLinear", "1"))):
            nn.Sequential(nn.ReLU(), layer).load_state_dict(nn.Sequential(nn.ReLU(), other).state_dict())
        assert same(state_of(layer), before)


@pytest.mark.parametrize("name", ["weight", "bias", "shape", "crow_indices", "col_indices"])
def test_what_is_missing_from_a_file_or_too_much_is_named(name: str) -> None:
    layer = layer_of()
    state = dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"order"'):
        layer.load_state_dict({**state, "order": layer.order})
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        layer.load_state_dict(state)


def saved_and_loaded(layer: SparseLinear) -> SparseLinear:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = SparseLinear(N_IN, N_OUT, 0.2, dtype=F64)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return loaded


def whole_saved_and_loaded(layer: SparseLinear) -> SparseLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: SparseLinear = torch.load(file, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[SparseLinear], SparseLinear]] = {
    "state_dict": saved_and_loaded,
    "torch.save": whole_saved_and_loaded,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_computes_the_same_and_lives_its_own_life(kind: str) -> None:
    layer, x = layer_of(), torch.randn(5, N_IN, dtype=F64)
    other = COPIES[kind](layer)
    assert same(state_of(other), state_of(layer))
    assert torch.equal(other(x), layer(x))
    before = state_of(layer)
    rewire_(Sparsity(other), "weight", 0.5)
    other.drop_(other.weight < 0)
    assert same(state_of(layer), before)
    assert_consistent(other)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda layer: layer.double(), F64),
        (lambda layer: layer.half(), torch.float16),
        (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda layer: layer.to(F64).float(), torch.float32),
    ],
)
def test_casting_leaves_the_pattern_int32(cast: Callable[[SparseLinear], SparseLinear], dtype: torch.dtype) -> None:
    layer = layer_of(dtype=torch.float32)
    indices = [tensor.clone() for tensor in layer.pattern]
    cast(layer)
    assert layer.weight.dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    for before, after in zip(indices, layer.pattern, strict=True):
        assert after.dtype == torch.int32
        assert torch.equal(after, before)
    assert layer.shape.dtype == torch.int64
    assert layer(torch.randn(2, N_IN, dtype=dtype)).dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_layer_moves_between_devices_and_loads_across_them() -> None:
    layer, x = layer_of(), torch.randn(5, N_IN, dtype=F64)
    moved = copy.deepcopy(layer).cuda()
    assert all(indices.is_cuda for indices in moved.pattern)
    close(moved(x.cuda()), layer(x))
    other = SparseLinear(N_IN, N_OUT, 0.2, device="cuda", dtype=F64)
    other.load_state_dict(layer.state_dict())
    assert all(indices.is_cuda for indices in other.pattern)
    rewire_(Sparsity(other), "weight", 0.5)
    other.drop_(other.weight < 0)
    assert_consistent(other)
    back = SparseLinear(N_IN, N_OUT, 0.2, dtype=F64)
    back.load_state_dict(other.state_dict())
    close(back(x), other(x.cuda()))
