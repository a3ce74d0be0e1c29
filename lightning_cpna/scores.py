"""Who scores? A saliency score for each connection, and for each whole input feature or unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_cpna.cells import wide
from lightning_cpna.graph import Graph
from lightning_cpna.mask import Kept
from lightning_cpna.targets import Target

Granularity = Literal["connection", "feature", "unit"]
ScoreKind = Literal["magnitude", "normalized", "path", "gradient", "random"]


@dataclass(frozen=True)
class Score:
    """Which score decides what stays.

    Attributes:
        kind: One of

            - ``"magnitude"``: ``|w|``.
            - ``"normalized"``: ``|w|`` times the norm of the unit that feeds it: what ``|w|`` would be after the
              normalisation of Guo et al., Eq. 3, without rescaling anything.
            - ``"path"``: ``|w_ij| * |v_j|`` with ``v_j`` the norm of what unit j feeds (1 at the output).
            - ``"gradient"``: ``|w * dL/dw|`` with the gradient of the last batch (first-order Taylor).
            - ``"random"``: uniform random numbers.
        exponent: For ``"path"``: the score is multiplied by ``(c_i / max c)^exponent``, ``c_i`` the norm of input i's
            path scores, so that connections of inputs that matter as a group stay. 0 switches it off.
        seed: For ``"random"``: the seed of its generator.

    Examples:
        >>> Score("path", exponent=12)
        Score(kind='path', exponent=12, seed=0)
    """

    kind: ScoreKind = "path"
    exponent: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = ScoreKind.__args__  # type: ignore[attr-defined]
        if self.kind not in kinds:
            raise ValueError(f"score is {self.kind!r}; allowed is one of {', '.join(kinds)}, a Score, or a function")
        if not self.exponent >= 0:
            raise ValueError(f"exponent is {self.exponent}; allowed is a float >= 0")
        if self.exponent and self.kind != "path":
            raise ValueError(f"exponent is {self.exponent} with kind={self.kind!r}; allowed is 0, or kind='path'")

    def check(self, inputs: ScoreInputs) -> None:
        """Raise if the weight cannot be scored so: its neighbours are not known, or its columns are no features."""
        if self.kind in ("path", "normalized"):
            inputs.traced(self.kind)
        if self.exponent and inputs.target.axes.groups > 1:
            raise ValueError(
                f"exponent is {self.exponent}, but {inputs.target.name!r} is grouped, so that a column of it is several "
                "features; allowed is 0"
            )

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """Score the connections of one weight.

        Args:
            inputs: What is known of the weight.

        Returns:
            Float tensor of the shape of ``inputs.weight``, larger is more salient.
        """
        w = inputs.weight.abs()
        if self.kind == "normalized":
            return w.mul_(inputs.along_inputs(inputs.feeding_norm))
        if self.kind == "path":
            if not inputs.traced("path").is_last(inputs.target.name):
                w.mul_(inputs.along_units(inputs.outgoing_norm))
            if self.exponent == 0:
                return w
            squares = inputs.sum_of_inputs(w.square())  # (member, input)
            largest = squares.amax(1, keepdim=True).clamp_(min=torch.finfo(squares.dtype).tiny)
            return w.mul_(inputs.along_inputs(squares.div_(largest).pow_(self.exponent / 2)))
        if self.kind == "gradient":
            return w * inputs.gradient.abs()
        if self.kind == "random":
            return inputs.random().to(w)
        return w


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may look at; a score asks only for what it needs.

    Any importable function ``(ScoreInputs) -> Tensor`` can be a score: it answers one number a connection, larger is more
    salient, in a shape that broadcasts to ``weight``.

    Attributes:
        target: The scored parameter.
        tensors: All parameters of the module by canonical name.
        graph: The traced layers, or None if the module could not be traced.
        generator: A seeded CPU generator for scores that draw.
        kept: What is left of the parameter, if it was made smaller.
        cells: Which connections a score is asked for, as cells of the flattened parameter, whose axes must be
            ``(unit, input, *kernel)``; None is all. A function is always asked for all, of a ``SparseLinear`` for all that
            it stores.
        groups: The "unit" and the "input" of each of the cells, int64 ``(cell,)``, if somebody has asked for them already.
    """

    target: Target
    tensors: Mapping[str, nn.Parameter]
    graph: Graph | None
    generator: torch.Generator
    kept: Kept | None = None
    cells: Tensor | None = None
    groups: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weight(self) -> Tensor:
        """The weight, ``(member, unit, input, *kernel)``, or ``(cell,)`` if there are ``cells``; in float32 or better."""
        return self._read(self.target.parameter.detach())

    def _read(self, tensor: Tensor) -> Tensor:
        read = self.target.axes.view(tensor) if self.cells is None else tensor.flatten().index_select(0, self.cells)
        return wide(read)

    @property
    def gradient(self) -> Tensor:
        """The weight's gradient in the last step, in the shape of ``weight``.

        Raises:
            ValueError: If there is none.
        """
        gradient = self.target.parameter.grad
        if gradient is None:
            raise ValueError(
                f"score: {self.target.name!r} has no gradient at the end of the batch; call zero_grad() before the "
                "backward pass instead of after the step, or choose a score that needs no gradient"
            )
        return self._read(gradient)

    @property
    def feeding_norm(self) -> Tensor:
        """The norm of the unit that feeds each input, ``(member, input)``; 1 for inputs of the network."""
        return self.traced("normalized").feeding_norm(self.target.name, self.tensors)

    @property
    def outgoing_norm(self) -> Tensor:
        """The norm of the weights that each unit feeds, ``(member, unit)``; 1 for outputs of the network."""
        return self.traced("path").outgoing_norm(self.target.name, self.tensors)

    def random(self) -> Tensor:
        """Draw uniform numbers in the shape of ``weight``, the same whether the parameter was made smaller or not."""
        if self.cells is not None:  # these are in the same order then
            return torch.rand(self.cells.shape, generator=self.generator)
        parameter = self.target.parameter
        drawn = torch.rand(parameter.shape if self.kept is None else self.kept.shape, generator=self.generator)
        return self.target.axes.view(drawn if self.kept is None else self.kept.select(drawn))

    def along_units(self, values: Tensor) -> Tensor:
        """Lay values of the units, ``(member, unit)``, along the connections, so that they broadcast to ``weight``."""
        if self.cells is None:
            return self.target.axes.along_units(values, self.target.parameter)
        return values[0].index_select(0, self._group("unit"))

    def along_inputs(self, values: Tensor) -> Tensor:
        """Lay values of the inputs, ``(member, input)``, along the connections, so that they broadcast to ``weight``."""
        if self.cells is None:
            return self.target.axes.along_inputs(values, self.target.parameter)
        return values[0].index_select(0, self._group("input"))

    def sum_of_inputs(self, values: Tensor) -> Tensor:
        """Sum values of the connections, in the shape of ``weight``, over those of each input: ``(member, input)``."""
        if self.cells is None:
            return values.sum([1, *range(3, values.ndim)])
        sums = values.new_zeros(1, self.target.axes.n_inputs(self.target.parameter))
        return sums.index_add_(1, self._group("input"), values[None])

    def _group(self, kind: Literal["unit", "input"]) -> Tensor:
        """Return the unit or the input of each of the ``cells``, int64 ``(cell,)``."""
        if kind not in self.groups:
            assert self.cells is not None
            find = self.target.axes.units_of if kind == "unit" else self.target.axes.inputs_of
            self.groups[kind] = find(self.cells, self.target.parameter)
        return self.groups[kind]

    def traced(self, kind: str) -> Graph:
        """Return the graph, which knows what a kind of score must know."""
        name = self.target.name
        if self.graph is None or name not in self.graph:
            reason = "was not traced" if self.graph is None else "is no Linear or Conv weight that the trace saw"
            raise ValueError(f"score: {kind!r} must know the neighbours of {name!r}, which {reason}; {_WAY_OUT}")
        if kind == "normalized" and (unknown := self.graph[name].unknown_source):
            raise ValueError(f"score: {kind!r} must know what feeds {name!r}, but {unknown}; {_WAY_OUT}")
        if kind == "path" and (lost := self.graph[name].lost):
            raise ValueError(f"score: {kind!r} must know what the units of {name!r} feed, but {lost}; {_WAY_OUT}")
        return self.graph


_WAY_OUT = "use score='magnitude' with normalize=False, which need no neighbours"


ScoreFunction = Callable[[ScoreInputs], Tensor]
