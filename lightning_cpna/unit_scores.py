"""Who scores the units? A saliency score for each unit of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lightning_cpna.activations import UnitActivity
from lightning_cpna.graph import Graph
from lightning_cpna.mask import Kept
from lightning_cpna.masks import Masks
from lightning_cpna.report import live_mask
from lightning_cpna.targets import ListedAxes, Target

if TYPE_CHECKING:
    from lightning_cpna.sparsity import Sparsity

UnitScoreKind = Literal[
    "norm",
    "path",
    "in_degree",
    "out_degree",
    "activation",
    "gradient",
    "mean_replacement",
    "penalty",
    "frame_potential",
    "raw_frame_potential",
    "inner_product",
    "random",
]
_OF_ACTIVITY = ("activation", "gradient", "mean_replacement")


@dataclass(frozen=True)
class UnitScore:
    """Which score decides which units stay.

    Attributes:
        kind: One of

            - ``"norm"``: the norm of the unit's incoming weights.
            - ``"path"``: that times the norm of what the unit feeds: its outgoing norm after the normalisation of Guo et
              al., Eq. 3.
            - ``"in_degree"``, ``"out_degree"``: the number of its live incoming or outgoing connections (NPSET ranks by
              fewest outgoing); ties are broken at random (by ``"path"``, NPSET would keep 5 to 9 % more connections than in
              its paper).
            - ``"activation"``: its mean magnitude.
            - ``"gradient"``: ``mean_x |a * dL/da|``, the first-order change of the loss if it is set to zero.
            - ``"mean_replacement"``: ``mean_x |(mean(a) - a) * dL/da|``, if it is set to its mean (Evci 2018).
            - ``"penalty"``: what the loss really rises by if it is set to its mean, a forward pass for each unit.
            - ``"frame_potential"``: what it adds to the frame potential ``||W W'||_F^2`` of the unit-normalised weight
              vectors: large if its weight vector is like others'. ``"raw_frame_potential"`` does not normalise, and
              ``"inner_product"`` takes the magnitudes of the inner products instead of their squares.
            - ``"random"``: uniform random numbers.
        largest_first: Whether the units with the largest scores go first.
        seed: For ``"random"`` and the degrees: the seed of the generator.

    Examples:
        >>> UnitScore("frame_potential", largest_first=True)
        UnitScore(kind='frame_potential', largest_first=True, seed=0)
    """

    kind: UnitScoreKind = "mean_replacement"
    largest_first: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = UnitScoreKind.__args__  # type: ignore[attr-defined]
        if self.kind not in kinds:
            raise ValueError(
                f"score is {self.kind!r}; allowed is one of {', '.join(kinds)}, a UnitScore, or a function"
            )

    @property
    def needs_activity(self) -> bool:
        """Whether the activations must have been watched."""
        return self.kind in _OF_ACTIVITY

    def __call__(self, inputs: UnitInputs) -> Tensor:
        """Score the units of one layer.

        Returns:
            Float tensor ``(member, unit)``; what is smaller goes first.
        """
        scores = self._scores(inputs)
        return -scores if self.largest_first else scores

    def _scores(self, inputs: UnitInputs) -> Tensor:
        if self.kind == "random":
            return inputs.random()
        if self.kind == "norm":
            return inputs.norm
        if self.kind == "path":
            return inputs.path
        if self.kind in ("in_degree", "out_degree"):
            degree = inputs.in_degree if self.kind == "in_degree" else inputs.out_degree
            return degree + inputs.random().to(degree.device)
        if self.kind == "penalty":
            return inputs.penalties()[None]
        if self.kind in _OF_ACTIVITY:
            return inputs.saliency(self.kind)[None]
        return inputs.overlap(normalize=self.kind != "raw_frame_potential", squared=self.kind != "inner_product")


UnitScoreFunction = Callable[["UnitInputs"], Tensor]
"""``(inputs) -> (member, unit)``: any importable function can be a score; what is smaller goes first."""


@dataclass(frozen=True)
class UnitInputs:
    """What a unit score may look at; a score asks only for what it needs.

    Attributes:
        target: The layer's weight.
        targets: All parameters of the module by canonical name.
        masks: The module's masks.
        graph: The traced layers.
        generator: A seeded CPU generator for scores that draw.
        kept: What is left of the weight, if it was made smaller.
        activity: What the units did, or None if nobody watched.
        penalize: Computes the exact mean replacement penalties, ``(unit,)``, or None.
    """

    target: Target
    targets: Mapping[str, Target]
    masks: Masks
    graph: Graph
    generator: torch.Generator
    kept: Kept | None = None
    activity: UnitActivity | None = None
    penalize: Callable[[], Tensor] | None = None

    @classmethod
    def of(
        cls,
        sparsity: Sparsity,
        name: str,
        generator: torch.Generator,
        *,
        activity: UnitActivity | None = None,
        penalize: Callable[[], Tensor] | None = None,
    ) -> UnitInputs:
        """Gather what is known of a hidden layer whose units can be removed.

        Args:
            sparsity: The module, traced.
            name: The layer's weight.
            generator: For scores that draw.
            activity: What the units did.
            penalize: Computes the exact mean replacement penalties.

        Raises:
            ValueError: If the layer's units cannot be removed.
        """
        graph = sparsity.with_removable_units(name)
        return cls(
            target=sparsity.targets[name],
            targets=sparsity.targets,
            masks=sparsity.masks,
            graph=graph,
            generator=generator,
            kept=sparsity.kept.get(name),
            activity=activity,
            penalize=penalize,
        )

    @property
    def _tensors(self) -> dict[str, nn.Parameter]:
        return {name: target.parameter for name, target in self.targets.items()}

    @property
    def norm(self) -> Tensor:
        """The norm of each unit's incoming weights, ``(member, unit)``; the bias is left out."""
        return self.graph.incoming_norm(self.target.name, self._tensors)

    @property
    def path(self) -> Tensor:
        """The norm of each unit's incoming weights times that of the weights that it feeds, ``(member, unit)``."""
        return self.norm * self.graph.outgoing_norm(self.target.name, self._tensors)

    def random(self) -> Tensor:
        """Draw uniform numbers, ``(member, unit)``, the same whether the weight was made smaller or not."""
        if self.kept is None:
            axes, weight = self.target.axes, self.target.parameter
            return torch.rand(axes.n_members(weight), axes.n_units(weight), generator=self.generator)
        return torch.rand(1, self.kept.shape[0], generator=self.generator)[:, self.kept.rows]

    @property
    def in_degree(self) -> Tensor:
        """The number of each unit's live incoming connections, int64 ``(member, unit)``."""
        return self.target.axes.sum_of_units(live_mask(self.masks, self.target))

    @property
    def out_degree(self) -> Tensor:
        """The number of each unit's live outgoing connections, int64 ``(member, unit)``."""
        degree = torch.zeros_like(self.in_degree)
        for reader in self.graph.fed_by(self.target.name):
            read = reader.axes.sum_of_inputs(live_mask(self.masks, self.targets[reader.weight]))  # (member, input)
            degree += self.graph.at_units(read, reader.weight, self.target.name)
        return degree

    def overlap(self, normalize: bool, squared: bool) -> Tensor:
        """Return what each unit adds to the sum over all pairs of weight vectors of ``|<w_i, w_j>|`` (or its square).

        Reference:
            Benedetto and Fickus: Finite normalized tight frames (2003), Definition 6.1.

        Raises:
            ValueError: If the weight is a list of connections.
        """
        if isinstance(self.target.axes, ListedAxes):
            raise ValueError(
                f"score: the weight vectors of {self.target.name!r}, which is sparse, are not compared with each other; "
                "allowed for it are the other scores"
            )
        w = self.target.axes.view(self.target.parameter.detach()).flatten(2).double()  # (member, unit, weight)
        if normalize:
            w = nn.functional.normalize(w, dim=2)
        gram = (w @ w.transpose(1, 2)).abs()
        gram = gram.square() if squared else gram
        return 2 * gram.sum(2) - gram.diagonal(dim1=1, dim2=2)

    def saliency(self, kind: str) -> Tensor:
        """Return the mean magnitude of the activation, or the first-order saliency of removal or replacement, ``(unit,)``.

        Raises:
            ValueError: If nobody watched the activations, or no gradient was seen.
        """
        if self.activity is None:
            raise ValueError(f"score: {kind!r} needs the activations of {self.target.name!r}, which nobody watched")
        if kind == "activation":
            return self.activity.mean_magnitude
        saliency = self.activity.removal_saliency if kind == "gradient" else self.activity.mean_replacement_saliency
        if saliency is None:
            raise ValueError(
                f"score: {kind!r} needs the gradients at what {self.target.name!r} feeds, but none came back"
            )
        return saliency

    def penalties(self) -> Tensor:
        """Return the exact mean replacement penalties, ``(unit,)``.

        Raises:
            ValueError: If there is no way to compute them here.
        """
        if self.penalize is None:
            raise ValueError(
                f"score: 'penalty' of {self.target.name!r} needs a loss and examples, which are not known here"
            )
        return self.penalize()
