"""Many copies of a network as one module: every parameter has a leading axis of members."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cpna.mask import Mask
from lightning_cpna.moments import is_elementwise
from lightning_cpna.sparsity import sparsity_of
from lightning_cpna.targets import Axes, ListedAxes, all_targets, axes_of
from lightning_cpna.words import fingerprint

M = TypeVar("M", bound=nn.Module)

CHECKPOINT_KEY = "lightning_cpna_members"


def stack(members: Sequence[M], seeds: Sequence[int] | None = None) -> M:
    """Make one module of many copies of a network, which differ in their parameters and buffers alone.

    The stack is a module of the members' own class, with their names: ``"net.0.weight"`` is ``(member, out, in)`` where a
    member's is ``(out, in)``. It is called with tensors that have a leading axis of members, and returns such tensors. A
    stack of LightningModules is trained by a Trainer as a member would be, with the ``training_step`` and
    ``configure_optimizers`` of the members: the loss is the sum over members, so that each of them is trained as if it were
    alone, and what they log is logged as the mean over members. Masks, scores, schedules and rescaling act on each member
    for itself; a count is that of every member.

    All members run at once (``torch.vmap``): their ``forward`` and ``training_step`` must be made of tensor operations.
    Dropout draws from a generator of each member; a random score draws for all members from one. What
    ``configure_optimizers`` decides by the shapes of parameters, and what hooks do, it decides and they do with those of the
    stack; groups of parameters that are other than a member's are refused. So are recurrent layers, random operations
    besides dropout, metrics that keep a state, gradient clipping by norm, optimizers that mix the entries of a tensor,
    float16 with a gradient scaler, several processes, and manual optimisation.

    Args:
        members: Modules of one class, alike but for the values of their parameters and buffers. They are left as they are.
        seeds: Of the generator of each member, for dropout; None: its place.

    Returns:
        The stack; ``member(stacked, i)`` takes one out of it.

    Raises:
        ValueError: If there is no member, or one is not like the first.
        TypeError: If a member cannot be stacked.

    Examples:
        >>> nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(5)]
        >>> stacked, x = stack(nets), torch.randn(5, 8, 3)
        >>> stacked.get_parameter("0.weight").shape, stacked(x).shape
        (torch.Size([5, 4, 3]), torch.Size([5, 8, 1]))
        >>> torch.allclose(stacked(x)[2], nets[2](x[2]), atol=1e-6)
        True
    """
    if not isinstance(members, Sequence):
        raise TypeError(f"members is a {type(members).__name__}; allowed is a list of modules")
    if not members:
        raise ValueError("members is empty; allowed is at least one module")
    seeds = range(len(members)) if seeds is None else seeds
    if len(seeds) != len(members):
        raise ValueError(f"seeds has {len(seeds)} entries; allowed is one for each of the {len(members)} members")
    for place, one in enumerate(members):
        _check(one, members[0], place)
    stacked: Any = copy.deepcopy(members[0])
    stacked.__class__ = _stacked_class(type(members[0]))  # type: ignore[arg-type]
    stacked._stack = _Members(len(members), [torch.Generator().manual_seed(seed) for seed in seeds])
    _change_tensors_(stacked, lambda name: torch.stack([_tensor(one, name).detach() for one in members]), _with_members)
    _change_example_(stacked, lambda x: x.expand(len(members), *x.shape))
    return stacked  # type: ignore[no-any-return]


def member(stacked: M, place: int) -> M:
    """Take a member out of a stack, as a module of its own.

    Args:
        stacked: What `stack` returned.
        place: Which, from 0.

    Returns:
        A copy of the member, in its own class, with its masks, and with the layers that were traced.

    Raises:
        IndexError: If there is no such member.
        TypeError: If the module is no stack.

    Examples:
        >>> nets = [nn.Linear(3, 1), nn.Linear(3, 1)]
        >>> torch.equal(member(stack(nets), 1).weight, nets[1].weight)
        True
    """
    if not isinstance(stacked, Stacked):
        raise TypeError(f"stacked is a {type(stacked).__name__}; allowed is what stack() returned")
    if not 0 <= place < stacked._stack.n:
        raise IndexError(f"place is {place}; allowed is 0 to {stacked._stack.n - 1}")
    one: Any = copy.deepcopy(stacked)
    one.__class__ = type(stacked).member_class
    del one._stack
    _change_tensors_(one, lambda name: _tensor(stacked, name).detach()[place].clone(), _without_members)
    _change_example_(one, lambda x: x[0])
    sparsity, own = sparsity_of(stacked), sparsity_of(one)
    own.masks.replace(
        {name: Mask(mask.dead[place].clone(), mask.removed[place].clone()) for name, mask in sparsity.masks.items()}
    )
    if sparsity.graph is not None:
        own.graph = sparsity.graph.with_axes({name: target.axes for name, target in own.targets.items()})
    return one  # type: ignore[no-any-return]


@dataclass
class _Members:
    """What a stack knows of its members.

    Attributes:
        n: How many there are; 0 if the tensors are those of the first alone.
        generators: That of each.
        logged: What they log while they run: the value, and the arguments; None while they do not.
    """

    n: int
    generators: list[torch.Generator]
    logged: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] | None = None


class Stacked(nn.Module):
    """What a stack adds to its members' class; `stack` makes it.

    Attributes:
        member_class: The class of the members.
    """

    member_class: type[nn.Module]
    _stack: _Members

    def forward(self, *args: Any, member_method: str = "forward", **kwargs: Any) -> Any:
        """Run every member.

        Args:
            *args: The members' arguments; tensors have a leading axis of members.
            member_method: Which of the members' methods is called.
            **kwargs: Further arguments, likewise.

        Returns:
            What the members return, tensors with a leading axis.
        """
        if self._stack.logged is not None:  # a member calls itself
            return super().forward(*args, **kwargs)
        method = getattr(super(), member_method)
        if self._stack.n == 0:
            args, kwargs = tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, (args, kwargs))
            with self._members_run():
                return method(*args, **kwargs)
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.shape[:1] != (self._stack.n,):
                raise ValueError(
                    f"an argument has shape {tuple(x.shape)}; allowed are tensors with a leading axis of {self._stack.n} "
                    "members: x.expand(n_members, *x.shape) where all read the same"
                )
            if not isinstance(x, Tensor) and _holds_tensors(x, set()):
                raise TypeError(
                    f"an argument is a {type(x).__name__}, whose tensors would be the same for all members; allowed are "
                    "tensors, and lists, tuples and dicts of them"
                )
        runner = _Runner(self, method)
        tensors = {f"stacked.{name}": x for name, x in [*self.named_parameters(), *self.named_buffers()]}
        dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, (args, kwargs))
        with self._members_run() as logged, _MemberDropout(self._stack.generators if self.training else []):
            run = vmap(lambda own, given: functional_call(runner, own, given), (dict.fromkeys(tensors, 0), dims))
            try:
                found, values = run(tensors, (args, kwargs))
            except (RuntimeError, ValueError) as error:
                if not any(words in str(error) for words in ("vmap", "Batching rule")):
                    raise
                raise RuntimeError(
                    f"the members of a stack cannot run {member_method} together; allowed in it are operations on tensors "
                    f"that are not random (but dropout), no recurrent layers, and no metrics or numbers taken from tensors: "
                    f"{error}"
                ) from error
        if self.training:
            sizes = [x.shape[1] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 1]
            for name, value in values.items():
                _, positional, options = logged[name]
                self.log(name, value.mean(), *positional, **{"batch_size": sizes[0] if sizes else None} | options)
        return found

    @contextlib.contextmanager
    def _members_run(self) -> Iterator[dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
        self._stack.logged = {}
        try:
            yield self._stack.logged
        finally:
            self._stack.logged = None

    def member_losses(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what ``training_step`` returns for each member, ``(member,)``; the arguments are as in ``forward``."""
        losses = self(*args, member_method="training_step", **kwargs)
        found: Tensor = losses["loss"] if isinstance(losses, dict) else losses
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the sum of the members' losses."""
        if self._stack.logged is not None:  # a member calls itself
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        return self.member_losses(*args, **kwargs).sum()

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value; of what members log, the mean.

        Raises:
            TypeError: If a member logs anything but a number or a tensor.
        """
        if self._stack.logged is None:
            super().log(name, value, *args, **kwargs)  # type: ignore[misc]
        elif isinstance(value, int | float | Tensor):
            self._stack.logged[name] = (value, args, kwargs)
        else:
            raise TypeError(f"a member logs {name!r}, a {type(value).__name__}; allowed are numbers and tensors")

    def on_train_start(self) -> None:
        """Refuse what mixes members."""
        trainer: Any = self.trainer
        for optimizer in trainer.optimizers:
            kind = type(optimizer).__name__
            if not is_elementwise(optimizer) or kind == "Adafactor":
                raise ValueError(
                    f"configure_optimizers returned {kind}, which may mix the members of a stack; allowed are "
                    "optimizers that update each weight by itself, as Adam, AdamW and SGD of torch.optim do"
                )
        why = None
        if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
            why = "ReduceLROnPlateau, which follows what is logged of all"
        elif getattr(trainer.precision_plugin, "scaler", None) is not None:
            why = "a gradient scaler, which skips the step of all if one of them overflows; precision='bf16-mixed' has none"
        elif trainer.world_size > 1:
            why = f"{trainer.world_size} processes, which divide the batch; devices=1 has one"
        if why is not None:
            raise ValueError(
                f"a stack of members is trained with {why}; allowed is what acts on each member for itself"
            )
        alone: Any = member(self, 0)
        alone.trainer = trainer
        of_member = [x for x in tree_leaves(alone.configure_optimizers()) if isinstance(x, Optimizer)]
        if _groups(self, trainer.optimizers) != _groups(alone, of_member):
            raise ValueError(
                "configure_optimizers makes other groups of a stack's parameters than of a member's, as those of a stack "
                "have an axis more; allowed is to group them by their names"
            )
        super().on_train_start()  # type: ignore[misc]

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Refuse to clip by norm, which would mix members."""
        if gradient_clip_val and gradient_clip_algorithm != "value":
            raise ValueError(
                f"gradient_clip_val is {gradient_clip_val} with gradient_clip_algorithm='norm', which would mix the members "
                "of a stack; allowed is gradient_clip_algorithm='value', or no clipping"
            )
        super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[misc]

    def on_validation_start(self) -> None:
        """Refuse to validate: what members do then is written for one of them."""
        raise NotImplementedError(
            "a stack of members is not validated; allowed is to fit it without validation data, and to measure "
            "stacked(x), or member(stacked, i), afterwards or in a callback"
        )

    on_test_start = on_validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the states of the members' generators."""
        checkpoint[CHECKPOINT_KEY] = [generator.get_state() for generator in self._stack.generators]
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load them."""
        states = checkpoint.get(CHECKPOINT_KEY, [])
        if len(states) != self._stack.n:
            raise ValueError(f"the checkpoint is of {len(states) or 'no'} members; allowed is one of {self._stack.n}")
        for generator, state in zip(self._stack.generators, states, strict=True):
            generator.set_state(state)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        """Pickle by the members' class, as that of the stack has no name."""
        return _unpickled, (self.member_class,), self.__getstate__()  # type: ignore[no-untyped-call]

    def keep_first_(self) -> None:
        """Keep of every tensor the first member alone, so that the stack runs as one network (to be traced, say)."""
        first = {name: _tensor(self, name).detach()[0].clone() for name in _names(self)}
        self._stack.n = 0
        _change_tensors_(self, first.__getitem__, _without_members)


@functools.cache
def _stacked_class(member_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Stacked{member_class.__name__}", (Stacked, member_class), {"member_class": member_class})


def _unpickled(member_class: type[nn.Module]) -> nn.Module:
    kind = _stacked_class(member_class)  # type: ignore[arg-type]
    return kind.__new__(kind)


class _Runner(nn.Module):
    """Calls a method of a member whose tensors `functional_call` has put into the stack."""

    def __init__(self, stacked: Stacked, method: Callable[..., Any]) -> None:
        super().__init__()
        self.stacked, self.method = stacked, method

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        before = dict(self.stacked.named_buffers())
        out = self.method(*args, **kwargs)
        if replaced := [name for name, buffer in self.stacked.named_buffers() if before.get(name) is not buffer]:
            raise TypeError(f"a member replaces its buffer {replaced[0]!r}; allowed is to change it in place")
        logged = self.stacked._stack.logged or {}
        return out, {name: _as_float(value) for name, (value, *_) in logged.items()}


def _as_float(value: float | Tensor) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.is_floating_point() else tensor.float()


class _MemberDropout(TorchFunctionMode):
    """Lets dropout draw from the generator of each member."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.dropout and self.generators:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        noise = _Noise.apply(input, p, self.generators) if p < 1 else 0  # type: ignore[no-untyped-call]
        return input.mul_(noise) if inplace else input * noise


class _Noise(torch.autograd.Function):
    """Draws what dropout multiplies with: each member's from its own generator, as the member would alone."""

    @staticmethod
    def forward(x: Tensor, p: float, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw for one member; a stack has several, for whom `vmap` is called."""
        (generator,) = generators
        noise = torch.empty(x.shape, dtype=x.dtype, device=generator.device).bernoulli_(1 - p, generator=generator)
        return noise.div_(1 - p).to(x.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Say that nothing flows back."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, p: float, generators: Any) -> tuple[Tensor, int]:
        """Draw for every member."""
        example = x if in_dims[0] is None else x.movedim(in_dims[0], 0)[0]
        return torch.stack([_Noise.forward(example, p, [generator]) for generator in generators]), 0


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, local = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), local)
    return found


def _names(module: nn.Module) -> list[str]:
    """List the names of parameters and buffers; a shared one appears once."""
    return [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]


def _holds_tensors(value: object, seen: set[int]) -> bool:
    """Tell whether tensors are in an object that is none of PyTorch's containers, or in what it holds and was not seen."""
    if id(value) in seen or isinstance(value, type | ModuleType):
        return False
    seen.add(id(value))
    slots = (getattr(value, name, None) for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()))
    held = value.values() if isinstance(value, Mapping) else [*getattr(value, "__dict__", {}).values(), *slots]
    return any(isinstance(x, Tensor) or _holds_tensors(x, seen) for x in tree_leaves(list(held)))


def _change_tensors_(module: nn.Module, change: Callable[[str], Tensor], axes: Callable[[Axes], Axes]) -> None:
    """Give a module other parameters and buffers under the names of its own, and say what their axes are."""
    new: dict[int, Tensor] = {}
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        tensor = change(name)
        new[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for owner in module.modules():
        local = {name: axes(axes_of(owner, name)) for name, _ in owner.named_parameters(recurse=False)}
        if local:
            owner.parameter_axes = local  # type: ignore[assignment]
        tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
        for table in tables:
            table |= {name: new[id(old)] for name, old in table.items() if old is not None}


def _change_example_(module: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Give a LightningModule another ``example_input_array``, if it has one."""
    example = getattr(module, "example_input_array", None)
    if example is not None:
        module.example_input_array = tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, example)


def _groups(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[set[str]]]:
    """Return the names of the parameters in each group of each optimizer."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[{names[id(x)] for x in group["params"]} for group in optimizer.param_groups] for optimizer in optimizers]


def _with_members(axes: Axes) -> Axes:
    return dataclasses.replace(axes, member=0, unit=axes.unit + 1, input=None if axes.input is None else axes.input + 1)


def _without_members(axes: Axes) -> Axes:
    return dataclasses.replace(
        axes, member=None, unit=axes.unit - 1, input=None if axes.input is None else axes.input - 1
    )


def _check(one: nn.Module, first: nn.Module, place: int) -> None:
    """Raise if a member cannot be stacked with the first."""
    if not isinstance(one, nn.Module):
        raise TypeError(f"members[{place}] is a {type(one).__name__}; allowed are modules")
    if isinstance(one, Stacked):
        raise TypeError(f"members[{place}] is a stack itself; allowed are its members")
    if getattr(one, "automatic_optimization", True) is False:
        raise TypeError(f"members[{place}] optimises by itself; allowed are modules with automatic_optimization")
    if recurrent := [name for name, part in one.named_modules() if isinstance(part, nn.RNNBase)]:
        raise TypeError(
            f"members[{place}]: {recurrent[0] or 'it'} is recurrent, which torch.vmap cannot run; allowed are others"
        )
    for name, target in all_targets(one).items():
        if isinstance(target.parameter, UninitializedParameter) or isinstance(target.axes, ListedAxes):
            what = "has no shape yet" if not isinstance(target.axes, ListedAxes) else "belongs to a SparseLinear"
            raise TypeError(f"members[{place}]: {name!r} {what}; allowed are dense weights")
    for parts in (_modules, _tensors):
        own, other = parts(one), parts(first)
        if own != other:
            name = next(n for n in [*own, *other] if own.get(n) != other.get(n))
            raise ValueError(
                f"members[{place}]: {name or 'it'} is {own.get(name, 'not there')}; allowed is what the first has: "
                f"{other.get(name, 'nothing')}"
            )


def _modules(module: nn.Module) -> dict[str, str]:
    """Describe by name the parts of a module: what they are, and their attributes."""
    described = {}
    for name, part in module.named_modules():
        mode = "training" if part.training else "eval"
        described[name] = f"{type(part).__name__}({part.extra_repr()}) in {mode} mode"
        base = next((kind for kind in type(part).__mro__ if kind.__name__ == "LightningModule"), nn.Module)
        own = {key: value for key, value in vars(part).items() if key not in _of_every(base)}
        described |= {f"{name}.{key}".lstrip("."): fingerprint(value) for key, value in own.items()}
    return described


@functools.cache
def _of_every(base: type[nn.Module]) -> set[str]:
    """Name the attributes that every module has, which say nothing of what it computes."""
    return {*vars(base()), "parameter_axes"}


def describe(module: nn.Module) -> str:
    """Describe a module's class, parts, attributes, and parameters, but for their values."""
    return repr((type(module).__module__, _modules(module), _tensors(module)))


def _tensors(module: nn.Module) -> dict[str, str]:
    """Describe the parameters and buffers of a module by name."""
    return {
        name: f"{tuple(x.shape)} {x.dtype} on {x.device}{', trained' if x.requires_grad else ''}"
        for name, x in [*module.named_parameters(), *module.named_buffers()]
    }
