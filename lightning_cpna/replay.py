"""Replaying calls of a module's parts on a float64 copy of the module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cpna.stacked import Stacked
from lightning_cpna.targets import canonical_name

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of a module's forward."""
Calls = Sequence[tuple[str, Call]]
"""Calls of submodules, by name; ``""`` is the module itself."""

_CASTS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}


def replay(module: nn.Module, prefix: str, call: Call) -> list[Tensor]:
    """Repeat a call on a float64 copy; return the float tensors among its outputs."""
    args, kwargs = widen(call)
    output = module.get_submodule(canonical_name(prefix))(*args, **kwargs)
    return [x for x in tree_leaves(plain(output)) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def largest_difference(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """Return by how much outputs changed, each as a fraction of its largest magnitude: the largest.

    Raises:
        ValueError: If an output has another shape.
    """
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            raise ValueError(f"the output would have shape {tuple(new.shape)} instead of {tuple(old.shape)}")
        difference = float((new - old).abs().max() / old.abs().max().clamp(min=torch.finfo(old.dtype).tiny))
        largest = difference if not difference <= largest else largest  # NaN is the largest
    return largest


def why_not(before: Iterable[Tensor], run: Callable[[], Iterable[Tensor]], tolerance: float) -> str:
    """Run a network that was changed; return why it cannot be changed so, nothing if its outputs stay what they were."""
    try:
        difference = largest_difference(before, run())
    except Exception as error:  # whatever the network's own code says to tensors of another width
        return reason(error)
    return "" if difference <= tolerance else f"the output would change by {difference:.1e} of its magnitude"


def reason(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def plain(output: Any) -> Any:
    """Turn dataclass outputs into dicts, whose leaves can be found."""
    return vars(output) if hasattr(output, "__dataclass_fields__") else output


def widen(call: Call) -> Call:
    """Turn the float tensors among a call's arguments into float64."""
    wide: Call = tree_map(lambda x: _wide_copy(x) if isinstance(x, Tensor) else x, call)
    return wide


def _wide_copy(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor  # which has no float64
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def float64_copy(module: nn.Module) -> Iterator[nn.Module]:
    """Yield an uncompiled float64 copy of a module, with gradients off and a random state of its own.

    The copy is in the module's own mode, so that what is traced is what is trained. Of a stack it has the first member.
    """
    memo: dict[int, Any] = {}
    for value in _activations(module):
        memo[id(value)] = value.detach().clone()  # it cannot be copied with its history
    original = getattr(module, "_orig_mod", module)
    twin = copy.deepcopy(original, memo)
    for child in twin.modules():
        child.__dict__.pop("forward", None)  # Lightning compiles a module by replacing its forward
        child._compiled_call_impl = None
        for name, grandchild in list(child.named_children()):
            if hasattr(grandchild, "_orig_mod"):
                setattr(child, name, grandchild._orig_mod)
    if any(parameter.device.type == "mps" for parameter in twin.parameters()):
        twin = twin.cpu()
    with torch.no_grad(), torch.random.fork_rng(_cuda_devices()), _Float64():
        for name, part in twin.named_modules():
            if isinstance(part, Stacked) and name:
                raise ValueError(f"{name!r} is a stack inside another module; allowed is a stack of the whole")
        if isinstance(twin, Stacked):
            twin.keep_first_()
            if "_trainer" in vars(original):  # which copies leave out, but training_step may ask
                twin._trainer = original._trainer
        yield twin.double()


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def _activations(module: nn.Module) -> Iterator[Tensor]:
    """Find tensors with a history that modules keep, alone or in containers."""
    for child in module.modules():
        for value in tree_leaves([v for k, v in vars(child).items() if k not in ("_parameters", "_modules")]):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value


class _Float64(TorchFunctionMode):
    """Keeps every float tensor in float64, whatever the forward casts to."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__ in _CASTS and isinstance(out, Tensor) and out.is_floating_point():
            return args[0].to(out.device, torch.float64)  # not the rounded result: rounding would hide what is compared
        return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, out)
