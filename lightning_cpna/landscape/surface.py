"""The loss of a module over data, as a function of its live weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from lightning_cpna.layers import evaluating
from lightning_cpna.mask import Mask
from lightning_cpna.observe import Loss, n_examples
from lightning_cpna.sparse import INDICES
from lightning_cpna.sparsity import sparsity_of
from lightning_cpna.targets import all_targets, canonical_name, resolve

REPEATABLE = 1e-6  # relative: chosen, above the rounding of a sum in float32 whose order is not fixed


class LossSurface:
    """The mean loss of a module over fixed data, as a function of its weights: what every tool of ``landscape`` looks at.

    A *point* is the vector of the weights that live, ``(n,)``: those whose connections a mask has removed are no
    coordinates, and stay at zero. The module is run in eval mode, with the point in the place of its weights; its own
    weights, gradients, buffers and modes are never touched. What is no coordinate (a frozen parameter, a buffer with
    BatchNorm's statistics) is the module's own at every point, unless a function says otherwise.

    Args:
        module: Any module; where callbacks have pruned it, the one they know (the ``LightningModule``, not a part of it).
        batches: The data: any iterable of batches, for instance ``[(x, y)]`` or a ``DataLoader``. They are read once, and
            kept on the module's device.
        loss: ``(module, batch) -> loss``, a scalar: the mean over the examples of the batch, of which the batch's first
            tensor has the number. It calls the module that it is given.
        names: The parameters that are coordinates, by name or glob; None: all that are trained.
        masks: Which connections live, by canonical name; None: the masks of the module. ``{}``: all, which makes the
            removed ones coordinates, too.

    Attributes:
        n: The number of coordinates.
        names: The parameters, in the order of the coordinates.

    Raises:
        ValueError: If there are no batches or no coordinates, a mask does not fit, the loss is no scalar, differs when it is
            computed again, or computing it changes the module's buffers.

    Examples:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.eye(2)
        >>> surface = LossSurface(net, [x], lambda net, x: net(x).square().sum())
        >>> surface.loss(torch.tensor([3.0, 4.0]))
        25.0
        >>> surface.gradient(torch.tensor([3.0, 4.0]))[1]
        tensor([6., 8.])
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        loss: Loss,
        *,
        names: str | Iterable[str] | None = None,
        masks: Mapping[str, Mask] | None = None,
    ) -> None:
        module = getattr(module, "_orig_mod", module)
        self.module, self._bound = module, _Bound(module, loss)
        if names is None:
            targets = {name: it for name, it in all_targets(module).items() if it.parameter.requires_grad}
        else:
            chosen = [names] if isinstance(names, str) else list(names)
            targets = {target.name: target for group in resolve(module, chosen).values() for target in group}
        if not targets:
            raise ValueError(f"names is {names!r}, which no parameter that is trained is; allowed is at least one")
        masks = sparsity_of(module).masks if masks is None else masks
        _check_masks(module, masks)
        self.names = tuple(targets)
        self._parameters = {name: target.parameter for name, target in targets.items()}
        paths = {id(parameter): path for path, parameter in module.named_parameters()}
        self._paths = {name: paths[id(parameter)] for name, parameter in self._parameters.items()}
        self._live = {  # where a parameter has dead connections: the flat places of the others
            name: mask.live.flatten().nonzero().flatten().to(targets[name].parameter.device)
            for name, mask in masks.items()
            if name in targets and not bool(mask.live.all())
        }
        self._sizes = [
            len(self._live[name]) if name in self._live else target.parameter.numel()
            for name, target in targets.items()
        ]
        self.n = sum(self._sizes)
        if not self.n:
            raise ValueError("masks have removed every connection of names; allowed is at least one that lives")
        self.device = next(iter(self._parameters.values())).device
        self.batches = tuple(_moved(batch, self.device) for batch in batches)
        if not self.batches:
            raise ValueError("batches is empty; allowed is at least one batch")
        sizes = [n_examples(batch) for batch in self.batches]
        self._shares = [size / sum(sizes) for size in sizes]
        self._check_repeatable()

    @torch.no_grad()
    def point(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the point of some weights.

        Args:
            weights: The parameters by name, of their full shapes, as ``state_dict`` has them; None: the module's own. Where
                it has the pattern of a ``SparseLinear``, that is compared, too.

        Raises:
            KeyError: If one is missing.
            ValueError: If one has another shape or pattern, or is not zero where the masks have removed a connection.
        """
        found = {canonical_name(name): x for name, x in (self._parameters if weights is None else weights).items()}
        for name, buffer in self.module.named_buffers():
            other = found.get(canonical_name(name))
            if name.endswith(INDICES) and other is not None and not torch.equal(other.to(buffer.device), buffer):
                raise ValueError(
                    f"weights: {name!r} is another pattern; allowed are the connections that the module's layer has"
                )
        parts = []
        for name, parameter in self._parameters.items():
            if name not in found:
                raise KeyError(f"weights has no {name!r}; allowed are the weights of the whole module")
            tensor = found[name].detach().to(self.device)
            if tensor.shape != parameter.shape:
                shapes = tuple(tensor.shape), tuple(parameter.shape)
                raise ValueError(f"weights: {name!r} has shape {shapes[0]}; allowed is {shapes[1]}")
            part = tensor.flatten()
            if name in self._live:
                live = part[self._live[name]]
                if int(part.count_nonzero()) != int(live.count_nonzero()):
                    raise ValueError(
                        f"weights: {name!r} is not zero where the masks have removed connections, so it lies outside of this "
                        "surface; allowed are weights of these masks, or masks={} for the surface of all connections"
                    )
                part = live
            parts.append(part)
        return torch.cat(parts)

    def weights(self, point: Tensor) -> dict[str, Tensor]:
        """Return the weights of a point, of their full shapes; differentiable."""
        self.check(point)
        found = {}
        for (name, parameter), part in zip(self._parameters.items(), torch.split(point, self._sizes), strict=True):
            if name in self._live:
                part = part.new_zeros(parameter.numel()).index_put((self._live[name],), part)
            found[name] = part.view(parameter.shape).to(parameter.dtype)
        return found

    def has_coordinates_of(self, other: LossSurface) -> bool:
        """Tell whether the coordinates are the same as another surface's."""
        alike = self.names == other.names and self._sizes == other._sizes and self._live.keys() == other._live.keys()
        return alike and all(torch.equal(live, other._live[name]) for name, live in self._live.items())

    def check_others(self, others: Mapping[str, LossSurface]) -> None:
        """Raise if surfaces, by name, have other coordinates than this one."""
        for name, other in others.items():
            if not self.has_coordinates_of(other):
                raise ValueError(
                    f"others: {name!r} has other coordinates than the surface; allowed are the same names and masks"
                )

    def check(self, point: Tensor) -> None:
        """Raise if a tensor is no point of this surface."""
        if point.shape != (self.n,):
            raise ValueError(
                f"point has shape {tuple(point.shape)}; allowed is {(self.n,)}, as surface.point() returns"
            )

    @torch.no_grad()
    def loss(self, point: Tensor, buffers: Mapping[str, Tensor] | None = None) -> float:
        """Return the mean loss at a point.

        Args:
            point: ``(n,)``.
            buffers: What takes the place of the module's buffers, for instance ``batch_norm_statistics(point)``.
        """
        weights = self.weights(point)
        with evaluating(self.module):
            values = [self._run(weights, batch, buffers) for batch in self.batches]
        return sum(share * float(value) for share, value in zip(self._shares, values, strict=True))

    def gradient(self, point: Tensor, buffers: Mapping[str, Tensor] | None = None) -> tuple[float, Tensor]:
        """Return the loss at a point and its gradient, ``(n,)``; the arguments are those of `loss`."""
        total, gradient = 0.0, torch.zeros_like(point)
        with evaluating(self.module), torch.enable_grad():
            for share, batch in zip(self._shares, self.batches, strict=True):
                at = point.detach().requires_grad_()
                value = self._run(self.weights(at), batch, buffers)
                gradient += share * _gradient(value, at)
                total += share * float(value.detach())
        return total, gradient

    def hessian_product(self, point: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function that multiplies a vector ``(n,)`` by the Hessian at a point.

        The graph of the gradient is made once, and kept as long as the function is: a product is then one backward pass.
        It takes the memory of the activations of all batches. Attention is computed by the kernel that has a second
        derivative; recurrent layers of cuDNN have none.
        """
        graphs = []
        with evaluating(self.module), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for share, batch in zip(self._shares, self.batches, strict=True):
                at = point.detach().requires_grad_()
                gradient = _gradient(self._run(self.weights(at), batch), at, create_graph=True)
                if gradient.requires_grad:  # else the loss is linear in the weights
                    graphs.append((share, at, gradient))

        def product(vector: Tensor) -> Tensor:
            self.check(vector)
            total = torch.zeros_like(point)
            for share, at, gradient in graphs:
                (found,) = torch.autograd.grad(
                    gradient, at, vector, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                total += share * found
            return total

        return product

    @torch.no_grad()
    def batch_norm_statistics(self, point: Tensor) -> dict[str, Tensor]:
        """Return the running statistics that BatchNorm layers have at a point, by buffer name: means over the batches.

        Each batch counts alike, whatever its size, as in training with ``momentum=None``. Without such layers there are none.
        """
        weights, buffers = self.weights(point), self._statistics()
        if not buffers:
            return {}
        with self._measuring_statistics():
            for batch in self.batches:
                self._run(weights, batch, buffers)
        return buffers

    def batch_gradient(self, point: Tensor, index: int) -> tuple[float, Tensor]:
        """Return loss and gradient over one batch, where BatchNorm layers use the batch's own statistics, as in training."""
        at = point.detach().requires_grad_()
        with self._measuring_statistics(), torch.enable_grad():
            value = self._run(self.weights(at), self.batches[index], self._statistics())
            gradient = _gradient(value, at)
        return float(value.detach()), gradient

    def _statistics(self) -> dict[str, Tensor]:
        """Copy the buffers that hold statistics, emptied."""
        found: dict[str, Tensor] = {}
        for prefix, part in self.module.named_modules():
            if _has_statistics(part):
                found |= {name: torch.zeros_like(x) for name, x in part.named_buffers(prefix, recurse=False)}
        return found

    def _run(self, weights: Mapping[str, Tensor], batch: Any, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        tensors = {self._paths[name]: weight for name, weight in weights.items()} | dict(buffers or {})
        value: Tensor = functional_call(self._bound, {f"module.{path}": x for path, x in tensors.items()}, (batch,))
        return value

    @contextlib.contextmanager
    def _measuring_statistics(self) -> Iterator[None]:
        """Run the module in eval mode but for its BatchNorm layers, which average what they see."""
        layers = [part for part in self.module.modules() if _has_statistics(part)]
        momenta = [layer.momentum for layer in layers]
        with evaluating(self.module):
            try:
                for layer in layers:
                    layer.training, layer.momentum = True, None
                yield
            finally:
                for layer, momentum in zip(layers, momenta, strict=True):
                    layer.momentum = momentum

    @torch.no_grad()
    def _check_repeatable(self) -> None:
        """Raise if the loss of the first batch is random, or changes the module."""
        weights = self.weights(self.point())
        before = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        buffers = {name: buffer.clone() for name, buffer in before.items()}
        with torch.random.fork_rng(), evaluating(self.module):
            found = [self._run(weights, self.batches[0], buffers) for _ in range(2)]
        if not isinstance(found[0], Tensor) or found[0].numel() != 1:
            shape = tuple(found[0].shape) if isinstance(found[0], Tensor) else type(found[0]).__name__
            raise ValueError(f"loss: it returned {shape}; allowed is a tensor of one number, the mean over the batch")
        values = [float(value) for value in found]
        if changed := [
            name for name in before if not torch.allclose(buffers[name], before[name], 0, 0, equal_nan=True)
        ]:
            raise ValueError(
                f"loss: computing it changes the buffer {changed[0]!r} in eval mode, too; allowed are modules that do not "
                "(BatchNorm that is kept in train mode cannot be looked at)"
            )
        if abs(values[1] - values[0]) > REPEATABLE * abs(values[0]):
            raise ValueError(
                f"loss: the same weights and batch gave {values[0]:.9g} and then {values[1]:.9g}; allowed are modules that "
                "are deterministic in eval mode (dropout that is active there cannot be looked at)"
            )


class _Bound(nn.Module):
    """The loss of a batch as a module, whose parameters and buffers are those of the module that is looked at."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.module, batch)


def _check_masks(module: nn.Module, masks: Mapping[str, Mask]) -> None:
    targets = all_targets(module)
    for name, mask in masks.items():
        if name not in targets:
            raise ValueError(f"masks: {name!r} is no parameter of the module; allowed are {', '.join(targets)}")
        if mask.live.shape != targets[name].parameter.shape:
            shapes = tuple(mask.live.shape), tuple(targets[name].parameter.shape)
            raise ValueError(f"masks: that of {name!r} has shape {shapes[0]}; allowed is {shapes[1]}")


def _gradient(value: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        raise ValueError("loss: what it returns does not depend on the weights that are coordinates")
    (gradient,) = torch.autograd.grad(value, at, create_graph=create_graph)
    return gradient


def _has_statistics(part: nn.Module) -> bool:
    return isinstance(part, _BatchNorm) and part.track_running_stats


def _moved(batch: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda x: x.detach().to(device), batch)
