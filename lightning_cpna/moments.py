"""What happens to the optimizer? The state (momentum, second moments) of pruned and rescaled weights.

State is found by shape: any tensor of ``optimizer.state[parameter]`` that has the parameter's shape belongs to its weights
one by one. So SGD, Adam, AdamW, RMSprop, Adagrad and their kin are served alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cpna.cells import fill_cells_

# How a state tensor scales when its weight is multiplied by s, so that its gradient is divided by s.
_AS_GRADIENT = {"momentum_buffer", "exp_avg", "exp_inf", "grad_avg", "prev"}
_AS_GRADIENT_SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
_AS_WEIGHT = {"ax"}
_AS_WEIGHT_SQUARED = {"acc_delta"}

_ELEMENTWISE = {
    "SGD",
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "NAdam",
    "RAdam",
    "Adamax",
    "Rprop",
    "ASGD",
    "Adafactor",
}


def is_elementwise(optimizer: Optimizer) -> bool:
    """Tell whether a zero weight with zero gradient and zero moments is sure to stay zero under this optimizer.

    True for torch's own element-by-element optimizers. Muon and LBFGS mix the entries of a tensor, and of a foreign
    optimizer nothing is known: their weights are masked again after each step.

    Examples:
        >>> is_elementwise(torch.optim.Adam([nn.Parameter(torch.zeros(1))]))
        True
    """
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim") and kind.__name__ in _ELEMENTWISE


def optimizer_of(optimizers: Iterable[Optimizer], parameter: nn.Parameter) -> Optimizer | None:
    """Return the optimizer that holds a parameter, or None."""
    for optimizer in optimizers:
        if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    return None


def moments_of(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Find the state of a parameter's weights, one number each: name and tensor."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0:
            yield key, value


@torch.no_grad()
def replace_(parameter: nn.Parameter, change: Callable[[Tensor], Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Give a parameter, its gradient and its moments other tensors, of another shape too; it stays the same object.

    Args:
        parameter: The parameter.
        change: From a tensor of the old shape to one of the new.
        optimizers: Where the moments are.

    Examples:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> replace_(w, lambda old: old[1:], [])
        >>> w
        Parameter containing:
        tensor([2., 3.], requires_grad=True)
    """
    gradient = None if parameter.grad is None else change(parameter.grad)
    for optimizer in optimizers:
        for key, value in list(moments_of(optimizer, parameter)):
            optimizer.state[parameter][key] = change(value)
    set_tensor_(parameter, change(parameter.data), gradient)


def set_tensor_(parameter: nn.Parameter, data: Tensor, gradient: Tensor | None) -> None:
    """Give a parameter a tensor of another shape, and its gradient."""
    other = torch.float32 if parameter.dtype != torch.float32 else torch.float64
    parameter.grad = None
    # A graph that is still alive somewhere keeps the node that adds up gradients of the old shape; another type renews it.
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data
    parameter.grad = gradient


@torch.no_grad()
def zero_moments_(optimizer: Optimizer, parameter: nn.Parameter, cells: Tensor) -> None:
    """Set the optimizer's state to zero for some weights (cells of the flattened parameter).

    Examples:
        >>> w = nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> w.sum().backward(); optimizer.step()
        >>> zero_moments_(optimizer, w, torch.tensor([0]))
        >>> optimizer.state[w]["momentum_buffer"]
        tensor([0., 1.])
    """
    for _, value in moments_of(optimizer, parameter):
        fill_cells_(value, cells, 0)


@torch.no_grad()
def zero_(parameter: nn.Parameter, cells: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Set some weights (cells of the flattened parameter), their gradients and their moments to zero.

    Examples:
        >>> w = nn.Parameter(torch.ones(2))
        >>> zero_(w, torch.tensor([0]), [])
        >>> w.tolist()
        [0.0, 1.0]
    """
    fill_cells_(parameter, cells, 0)
    if parameter.grad is not None:
        fill_cells_(parameter.grad, cells, 0)
    if (optimizer := optimizer_of(optimizers, parameter)) is not None:
        zero_moments_(optimizer, parameter, cells)


@torch.no_grad()
def reset_moments_(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Set the optimizer's state of all weights of a parameter to zero."""
    for _, value in moments_of(optimizer, parameter):
        value.zero_()


@torch.no_grad()
def scale_moments_(optimizer: Optimizer, parameter: nn.Parameter, scale: Tensor) -> None:
    """Transform the optimizer's state as the weights are multiplied by ``scale``.

    Gradients of a rescaled weight are divided by the scale, so first moments are divided by it and second moments by its
    square.

    Args:
        optimizer: The optimizer that holds the parameter.
        parameter: The parameter that is (or was) multiplied.
        scale: Tensor that broadcasts to the parameter's shape, positive.

    Raises:
        ValueError: If the optimizer keeps a state whose scaling is not known.
    """
    known = _AS_GRADIENT | _AS_GRADIENT_SQUARED | _AS_WEIGHT | _AS_WEIGHT_SQUARED
    moments = dict(moments_of(optimizer, parameter))
    if "square_avg" in moments:  # RMSprop's momentum sums gradients that were divided by their size already
        moments.pop("momentum_buffer", None)
    state = optimizer.state.get(parameter, {})
    if unknown := {key for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0} - known:
        raise ValueError(
            f"moments='transform': how {type(optimizer).__name__}'s state {sorted(unknown)} scales is not known; "
            "allowed is moments='keep' or 'reset'"
        )
    for key, value in moments.items():
        if key in _AS_GRADIENT:
            value.div_(scale)
        elif key in _AS_GRADIENT_SQUARED:
            value.div_(scale**2)
        elif key in _AS_WEIGHT:
            value.mul_(scale)
        else:
            value.mul_(scale**2)
