"""Saliencies of weights by a Taylor expansion of the loss over a data set: what does the loss change by if one is zero?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_cpna.layers import evaluating
from lightning_cpna.observe import Loss
from lightning_cpna.targets import resolve

WeightSaliency = Literal["first_order", "second_order", "hessian", "hessian_diagonal"]


def weight_saliencies(
    module: nn.Module,
    names: Iterable[str],
    batches: Sequence[Any],
    loss: Loss,
    kind: WeightSaliency,
    *,
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Score weights by what the loss would change by, to some order, if all of them went to zero: each one's share.

    With ``d = -w`` for all scored weights together, gradient g and Hessian H of the mean loss:

    - ``"first_order"``: ``|d * g|``.
    - ``"second_order"``: ``|d * (g + H d)|``.
    - ``"hessian"``: ``|d * (H d)|``.
    - ``"hessian_diagonal"``: ``w^2 |H_ii| / 2``, as in optimal brain damage, where each weight goes alone. The diagonal is
      estimated by Hutchinson's method, the mean of ``z * (H z)`` over random signs z.

    Args:
        module: The module; it is run in eval mode and left as it is.
        names: Names or globs of the weights.
        batches: The batches over which the loss is the mean.
        loss: Computes the mean loss of a batch.
        kind: Which saliency.
        probes: For "hessian_diagonal": how many random vectors; the error falls as their root.
        generator: For "hessian_diagonal": draws them; None is seeded with 0.

    Raises:
        ValueError: If an argument is out of range, or a weight is frozen.

    Returns:
        The saliencies by canonical name, each of the weight's shape.

    Reference:
        Evci: Detecting dead weights and units in neural networks (2018), Section 2 (there without a factor 1/2 in the second
        order, as here); LeCun, Denker, Solla: Optimal brain damage (1990), Eq. 5.

    Examples:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> x = torch.eye(2)
        >>> saliency = weight_saliencies(net, ["weight"], [x], lambda net, x: net(x).square().sum(), "first_order")
        >>> saliency["weight"]  # w * dL/dw = 2 w^2
        tensor([[2., 8.]])
    """
    if kind not in (kinds := WeightSaliency.__args__):  # type: ignore[attr-defined]
        raise ValueError(f"kind is {kind!r}; allowed is one of {', '.join(kinds)}")
    if probes < 1:
        raise ValueError(f"probes is {probes}; allowed is an int >= 1")
    if not len(batches):
        raise ValueError("batches is empty; allowed is at least one batch")
    names = [names] if isinstance(names, str) else names
    targets = {target.name: target.parameter for group in resolve(module, names).values() for target in group}
    for name, parameter in targets.items():
        if not parameter.requires_grad:
            raise ValueError(
                f"names: {name!r} is frozen (requires_grad=False); allowed are parameters that are trained"
            )
    weights = list(targets.values())
    generator = generator or torch.Generator().manual_seed(0)
    directions = {
        "first_order": [],
        "second_order": [[-w.detach() for w in weights]],
        "hessian": [[-w.detach() for w in weights]],
        "hessian_diagonal": [[_signs(w, generator) for w in weights] for _ in range(probes)],
    }
    with evaluating(module), torch.enable_grad():
        gradients, products = _derivatives(module, weights, batches, loss, directions[kind])
    scores = []
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        d = -w.detach()
        if kind == "first_order":
            scores.append((d * g).abs())
        elif kind == "second_order":
            scores.append((d * (g + products[0][i])).abs())
        elif kind == "hessian":
            scores.append((d * products[0][i]).abs())
        else:
            diagonal = torch.stack([z[i] * hz[i] for z, hz in zip(directions[kind], products, strict=True)]).mean(0)
            scores.append(d.square() * diagonal.abs() / 2)
    return dict(zip(targets, scores, strict=True))


def _derivatives(
    module: nn.Module, weights: list[nn.Parameter], batches: Sequence[Any], loss: Loss, directions: list[list[Tensor]]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the gradient of the mean loss over the batches, and its Hessian times each direction."""
    gradients = [torch.zeros_like(w) for w in weights]
    products = [[torch.zeros_like(w) for w in weights] for _ in directions]
    n_batches = len(batches)
    for batch in batches:
        found = torch.autograd.grad(
            loss(module, batch), weights, create_graph=bool(directions), allow_unused=True, materialize_grads=True
        )
        for total, gradient in zip(gradients, found, strict=True):
            total += gradient.detach() / n_batches
        for direction, sums in zip(directions, products, strict=True):
            curved = [(gradient, z) for gradient, z in zip(found, direction, strict=True) if gradient.requires_grad]
            if not curved:  # the loss is linear in the weights
                continue
            hessian = torch.autograd.grad(
                [gradient for gradient, _ in curved],
                weights,
                [z for _, z in curved],
                retain_graph=True,
                allow_unused=True,
            )
            for total, product in zip(sums, hessian, strict=True):
                if product is not None:
                    total += product / n_batches
    return gradients, products


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
