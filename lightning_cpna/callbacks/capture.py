"""Recording the calls of a module's parts during a training batch, so that they can be traced afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cpna.tracing import Call

MAX_ROWS = 4  # chosen: enough to show a network's structure; a float64 pass over more costs as much as a training step


class Capture:
    """Records the arguments of the outermost modules that are called and hold given parameters.

    Args:
        module: The module that is about to train on a batch.
        parameters: Every module around one of these is watched.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self._calls: dict[str, Call] = {}
        self._context = contextlib.ExitStack()
        if any(_is_compiled(m) for m in module.modules()):
            if not hasattr(torch.compiler, "set_stance"):
                raise RuntimeError("tracing a module under torch.compile needs torch >= 2.6; upgrade torch")
            # The hooks must not end up in a compiled graph: the first batch runs eagerly.
            self._context.enter_context(torch.compiler.set_stance("force_eager"))
        wanted = set(map(id, parameters))
        for path, part in module.named_modules():
            if not wanted.isdisjoint(map(id, part.parameters())):
                hook = part.register_forward_pre_hook(partial(self._record, path), with_kwargs=True)
                self._context.callback(hook.remove)

    def _record(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Strategies such as DDP reach training_step through a temporary stand-in for the module's forward, a plain
        # function; that call is not the network's.
        redirected = isinstance(module.forward, FunctionType) and not hasattr(
            module.forward, "_torchdynamo_orig_callable"
        )
        if not redirected:
            self._calls[path] = (args, kwargs)

    def finish(self) -> dict[str, Call]:
        """Stop recording; return the calls by module path, outermost modules only.

        Arguments with a history, computed by other calls, are marked: their copies require a gradient.
        """
        self.close()
        return {path: _detached(call) for path, call in outermost(self._calls).items()}

    def close(self) -> None:
        """Stop recording."""
        self._context.close()


def outermost(calls: Mapping[str, Call]) -> dict[str, Call]:
    """Leave out the calls of modules that are inside another one that was called."""
    return {path: calls[path] for path in sorted(calls) if not any(_inside(path, other) for other in calls)}


def _inside(path: str, other: str) -> bool:
    return path != other and (other == "" or path.startswith(f"{other}."))


def _is_compiled(module: nn.Module) -> bool:
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )


def _detached(call: Call) -> Call:
    detached: Call = tree_map(
        lambda x: x.detach().clone().requires_grad_(x.grad_fn is not None) if isinstance(x, Tensor) else x, call
    )
    return detached


def few_rows(calls: Mapping[str, Call]) -> dict[str, Call]:
    """Cut the arguments of calls to their first rows, where all of a call have the same number of them."""
    return {path: _cut(call) for path, call in calls.items()}


def _cut(call: Call) -> Call:
    sizes = {x.shape[0] if x.ndim else 0 for x in tree_leaves(call) if isinstance(x, Tensor)}
    rows = MAX_ROWS if len(sizes) == 1 else None
    few: Call = tree_map(
        lambda x: x[:rows].detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.ndim else x, call
    )
    return few
