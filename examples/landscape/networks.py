"""Small networks that are trained on all of their data at once, and the losses that the modules look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import Split, digits
from examples.xor.problem import XORData
from lightning_cpna import sparsity_of

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(
    widths: Sequence[int], seed: int, activation: str = "relu", dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Return a fully connected network.

    Args:
        widths: Of the input, the hidden layers and the output.
        seed: Of the initialisation.
        activation: A key of `ACTIVATIONS`.
        dtype: Of the weights.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a batch; of a single output, that of its sign."""
    logits = net(batch[0])
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], batch[1].to(logits))
    return F.cross_entropy(logits, batch[1])


def error(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the share of wrong answers."""
    logits = net(batch[0])
    answers = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
    wrong: Tensor = answers != batch[1]
    return wrong.double().mean()


def train(
    net: nn.Module, batch: tuple[Tensor, Tensor], steps: int, lr: float, weight_decay: float = 0.0, loss: float = 0.0
) -> int:
    """Train on all of the data with Adam; removed connections stay removed.

    Args:
        net: The network.
        batch: The data.
        steps: How many at most.
        lr: The learning rate.
        weight_decay: Adam's coupled weight decay.
        loss: At which loss training stops.

    Returns:
        How many steps were made.
    """
    masks, weights = sparsity_of(net).masks, dict(net.named_parameters())
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        value = cross_entropy(net, batch)
        if value.item() <= loss:
            return step
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        masks.apply_(weights)
    return steps


def take_masks_(net: nn.Module, pruned: nn.Module) -> None:
    """Remove from a network the connections that were removed from another."""
    masks = sparsity_of(net).masks
    masks.load_state_dict(sparsity_of(pruned).masks.state_dict())
    masks.apply_(dict(net.named_parameters()))


def some_digits(n: int, seed: int, classes: int = 10, dtype: torch.dtype = torch.float64) -> tuple[Split, Split]:
    """Return n digits of the first classes to train on, fewer if there are fewer, and all those of the test part."""
    parts = digits(seed)
    x = torch.cat([parts.train.x, parts.validation.x])
    y = torch.cat([parts.train.y, parts.validation.y])
    chosen, tested = (y < classes).nonzero().flatten()[:n], parts.test.y < classes
    return Split(x[chosen].to(dtype), y[chosen]), Split(parts.test.x[tested].to(dtype), parts.test.y[tested])


def xor(k: int, p: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Split, Split]:
    """Return n examples of the XOR to train on, and as many to test."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)  # lest the first weights be the first inputs
    train, test = (XORData(k, p, n, generator) for _ in range(2))
    return Split(train.x.to(dtype), train.y.long()), Split(test.x.to(dtype), test.y.long())
