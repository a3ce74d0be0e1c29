"""How rewiring goes: how many connections go, which ones come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

GrowthKind = Literal["random", "gradient", "momentum"]


DecayKind = Literal["cosine", "linear", "cubic"]


@dataclass(frozen=True)
class Growth:
    """Which connections come, and with which weights.

    Attributes:
        kind: One of

            - ``"random"``: any that is free (SET, Mocanu et al. 2018).
            - ``"gradient"``: those whose gradient in the last batch is largest (RigL, Evci et al. 2020).
            - ``"momentum"``: those whose gradients in the last 20 batches are, weighted by 0.9 to the power of their age
              (sparse momentum, Dettmers and Zettlemoyer 2019).
        std: They begin with ``N(0, std^2)``; 0 is zero, "initial" the standard deviation of the layer's weights when
            training started.
        seed: The seed of what is drawn; None takes torch's own, which ``seed_everything`` sets.

    Examples:
        >>> Growth("random", std=0.1)
        Growth(kind='random', std=0.1, seed=None)
    """

    kind: GrowthKind = "random"
    std: float | Literal["initial"] = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        kinds = GrowthKind.__args__  # type: ignore[attr-defined]
        if self.kind not in kinds:
            raise ValueError(f"growth is {self.kind!r}; allowed is one of {', '.join(kinds)}, or a Growth")
        if self.std != "initial" and not (isinstance(self.std, int | float) and 0 <= self.std < math.inf):
            raise ValueError(f"std is {self.std!r}; allowed is a float >= 0, or 'initial'")

    @property
    def window(self) -> int:
        """How many batches' gradients are looked at."""
        return {"random": 0, "gradient": 1, "momentum": 20}[self.kind]


@dataclass(frozen=True)
class Decay:
    """A fraction that falls to zero while the run goes on, where rewiring ends.

    Attributes:
        zeta: The fraction at the start.
        kind: "cosine": ``zeta / 2 * (1 + cos(pi t))`` (RigL, Eq. 1), "linear": ``zeta * (1 - t)``, "cubic":
            ``zeta * (1 - t)^3``.
        end: Where it is zero, as a fraction of the run.

    Examples:
        >>> [round(Decay(0.3, end=0.75)(step, 100), 3) for step in (0, 30, 75, 90)]
        [0.3, 0.196, 0.0, 0.0]
    """

    zeta: float = 0.3
    kind: DecayKind = "cosine"
    end: float = 0.75

    def __post_init__(self) -> None:
        check_zeta(self.zeta)
        kinds = DecayKind.__args__  # type: ignore[attr-defined]
        if self.kind not in kinds:
            raise ValueError(f"kind is {self.kind!r}; allowed is one of {', '.join(kinds)}")
        if not 0 < self.end <= 1:
            raise ValueError(f"end is {self.end}; allowed is a fraction of the run in (0, 1]")

    def __call__(self, step: int, total: float) -> float:
        """Return the fraction at an optimizer step of a run of so many."""
        t = min(1.0, step / (self.end * total))
        if self.kind == "cosine":
            return self.zeta / 2 * (1 + math.cos(math.pi * t))
        return self.zeta * (1 - t) ** (1 if self.kind == "linear" else 3)


def check_zeta(zeta: float) -> None:
    """Raise if a fraction is none."""
    if not (isinstance(zeta, float) and 0 < zeta < 1):
        raise ValueError(f"zeta is {zeta!r}; allowed is a float in (0, 1)")


class Factors(NamedTuple):
    """One batch's gradient of a linear layer, ``scale * output_gradient' x``, never multiplied out.

    Attributes:
        output_gradient: ``(row, unit)``.
        x: ``(row, input)``.
        scale: How much it counts.
    """

    output_gradient: Tensor
    x: Tensor
    scale: float

    def wide(self) -> Factors:
        """Return the factors in one type, float32 or better."""
        dtype = torch.promote_types(torch.promote_types(self.output_gradient.dtype, self.x.dtype), torch.float32)
        return Factors(self.output_gradient.to(dtype), self.x.to(dtype), self.scale)
