"""Can what was found be chance? A permutation test on examples that were held out."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH, MAX_MARKS = 1000, 10_000_000  # chosen: permutations at a time, and times examples and labels; 160 MB


@dataclass(frozen=True)
class Certificate:
    """Whether the lowest loss on held-out examples can be chance.

    Attributes:
        loss: The lowest mean loss of any try on the held-out examples.
        chance_loss: What it is in the mean if the held-out labels are permuted; infinite where it once is.
        chance_spread: The standard deviation of that; infinite where the mean is, 0 of a single permutation.
        p_value: How often it is as low then. Where it is above the level, only estimated from the first permutations.
        level: What the p-value must not exceed.
    """

    loss: float
    chance_loss: float
    chance_spread: float
    p_value: float
    level: float

    @property
    def holds(self) -> bool:
        """Whether it cannot be chance."""
        return self.p_value <= self.level

    @property
    def margin(self) -> float:
        """By how many standard deviations the loss is below what it is by chance; infinite where that is infinite."""
        if math.isinf(self.chance_loss):
            return math.inf
        return (self.chance_loss - self.loss) / self.chance_spread if self.chance_spread else 0.0


def failed(losses: Tensor) -> Tensor:
    """Tell which tries have failed, bool ``(try,)``: those with a NaN, or a loss of minus infinity.

    Args:
        losses: As of `certify`.

    Examples:
        >>> failed(torch.tensor([[[0.1, 0.2]], [[0.1, torch.inf]], [[0.1, torch.nan]]]))
        tensor([False, False,  True])
    """
    return (losses.isnan() | (losses == -torch.inf)).flatten(1).any(dim=1)


def n_orders(labels: Tensor) -> float:
    """Count the different orders in which some labels can stand: no p-value is much lower than one in so many.

    Args:
        labels: As of `certify`.

    Examples:
        >>> round(n_orders(torch.tensor([0, 0, 1, 1])))  # 0011 0101 0110 1001 1010 1100
        6
    """
    log = math.lgamma(len(labels) + 1) - sum(math.lgamma(n + 1) for n in torch.bincount(labels).tolist())
    return math.exp(log) if log < math.log(sys.float_info.max) else math.inf


def certify(losses: Tensor, labels: Tensor, level: float, generator: torch.Generator) -> Certificate:
    """Compare the lowest loss of some tries on held-out examples with what it is if their labels are permuted.

    If labels do not depend on the features, the held-out ones are in random order, whatever the tries learned from the
    others, however many tries there are, and however the best is chosen: the p-value is exact, and needs no assumption about
    how losses are distributed (Phipson and Smyth: Permutation p-values should never be zero, 2010, Eq. 2). Examples must be
    independent of each other: where some are repeated, or belong together (as those of one patient), it is too low. So it is
    where their labels helped to choose or to encode the features.

    Args:
        losses: The loss of every try on every held-out example, if its label were each of those that there are, floats
            ``(try, example, label)``. Tries that have ``failed`` are left out.
        labels: Which label each example has, int64 ``(example,)``.
        level: What the p-value must not exceed, in (0, 1).
        generator: Draws the permutations.

    Returns:
        The certificate.

    Raises:
        ValueError: If no try has a finite mean loss, or an argument is out of range.

    Examples:
        >>> labels = torch.tensor([0, 1] * 20)
        >>> learned = torch.eye(2).logical_not().double()[labels]  # the loss is 0 with the right label and 1 with the other
        >>> certify(learned[None], labels, 0.001, torch.Generator().manual_seed(0)).holds
        True
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level!r}; allowed is a float in (0, 1)")
    if losses.ndim != 3 or not losses.is_floating_point():
        raise ValueError(
            f"losses has shape {tuple(losses.shape)} and type {losses.dtype}; allowed are floats, (try, example, label)"
        )
    n_examples, n_labels = losses.shape[1:]
    found = sorted(set(labels.flatten().tolist()))
    if labels.shape != (n_examples,) or labels.dtype != torch.int64 or not set(found) <= set(range(n_labels)):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, type {labels.dtype} and values {found[:10]}; allowed are int64 from 0 "
            f"to {n_labels - 1}, ({n_examples},), as losses has so many"
        )
    losses = losses[~failed(losses)].double()
    if not losses.gather(2, labels[None, :, None].expand(len(losses), -1, 1)).mean(dim=1).isfinite().any():
        raise ValueError("network: no try ended with a finite loss on the held-out examples")
    flat = losses.nan_to_num().flatten(1)  # (try, example * label); infinity is the largest number, which times 0 is 0

    largest = torch.finfo(flat.dtype).max

    def lowest(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest loss of any try, and whose it is, ``(permutation,)``, for labels ``(permutation, example)``."""
        marks = torch.nn.functional.one_hot(chosen, n_labels).flatten(1).to(flat)
        total = flat @ marks.T
        values, tries = total.masked_fill_(total >= largest, torch.inf).min(dim=0)
        return values / len(labels), tries

    (loss,), (winner,) = lowest(labels[None])
    of_winner = flat[winner].abs()
    rounding = 1e-12 * of_winner[of_winner < largest].max()  # sums that are equal differ by less
    n, at_once = math.ceil(1 / level), min(BATCH, max(1, MAX_MARKS // flat.shape[1]))
    drawn: list[Tensor] = []
    n_drawn = as_low = 0
    while n_drawn < n and not as_low:
        orders = torch.rand(min(at_once, n - n_drawn), len(labels), generator=generator).argsort(dim=1)
        drawn.append(lowest(labels[orders])[0])
        n_drawn += len(orders)
        as_low += int((drawn[-1] <= loss + rounding).sum())
    chance = torch.cat(drawn)
    spread = chance.std(correction=min(1, len(chance) - 1)) if chance.mean().isfinite() else chance.mean()
    return Certificate(float(loss), float(chance.mean()), float(spread), (1 + as_low) / (1 + n_drawn), level)
