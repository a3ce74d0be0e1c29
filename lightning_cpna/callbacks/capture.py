"""Recording the calls of a module's parts during a training batch, so that they can be traced afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cpna.graph import Graph
from lightning_cpna.replay import Call, Calls
from lightning_cpna.tracing import trace_calls

MAX_ROWS = 4  # chosen: enough to show a network's structure; a float64 pass over more costs as much as a training step
MAX_CALLS = 4  # chosen: of each module in one batch; a discriminator is called three times


class Capture:
    """Records the arguments of the modules that are called and hold given parameters, but for calls inside other calls.

    Args:
        module: The module that is about to train on a batch.
        parameters: Every module around one of these is watched.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self._calls: list[tuple[str, Call]] = []
        self._depth = 0
        self._context = contextlib.ExitStack()
        self._context.enter_context(running_eagerly(module))
        wanted = set(map(id, parameters))
        for path, part in module.named_modules():
            if not wanted.isdisjoint(map(id, part.parameters())):
                enter = part.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True)
                leave = part.register_forward_hook(self._leave, always_call=True)
                self._context.callback(enter.remove)
                self._context.callback(leave.remove)

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_redirected(module):
            return
        if self._depth == 0 and sum(path == other for other, _ in self._calls) < MAX_CALLS:
            self._calls.append((path, (args, kwargs)))
        self._depth += 1

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._depth -= not _is_redirected(module)

    def finish(self) -> Calls:
        """Stop recording; return the calls in their order.

        Arguments with a history, computed by other calls, are marked: their copies require a gradient.
        """
        self.close()
        return [(path, _detached(call)) for path, call in self._calls]

    def close(self) -> None:
        """Stop recording."""
        self._context.close()


def running_eagerly(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Run compiled parts of a module eagerly for a while, so that hooks do not end up in a compiled graph."""
    if not any(is_compiled(part) for part in module.modules()):
        return contextlib.nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        raise RuntimeError("watching a module under torch.compile needs torch >= 2.6; upgrade torch")
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _is_redirected(module: nn.Module) -> bool:
    """Tell whether the forward is the stand-in through which DDP and its like reach ``training_step``."""
    return isinstance(module.forward, FunctionType) and not hasattr(module.forward, "_torchdynamo_orig_callable")


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module's forward is a compiled one."""
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


def few_rows(calls: Calls) -> Calls:
    """Cut the arguments of calls to their first rows, where all of a call have the same number of them."""
    return [(path, _cut(call)) for path, call in calls]


def _cut(call: Call) -> Call:
    sizes = {x.shape[0] if x.ndim else 0 for x in tree_leaves(call) if isinstance(x, Tensor)}
    rows = MAX_ROWS if len(sizes) == 1 else None
    few: Call = tree_map(
        lambda x: x[:rows].detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.ndim else x, call
    )
    return few


def trace_few(module: nn.Module, known: Calls, new: Calls) -> tuple[Graph | None, Calls, str]:
    """Trace calls, with few rows where that works: some networks cannot do with fewer than they were given.

    Returns:
        The graph, the calls that it is of, and why there is none.
    """
    why = ""
    for calls in ([*known, *few_rows(new)], [*known, *new]):
        try:
            return trace_calls(module, calls), calls, ""
        except Exception as error:  # the network is the user's; whoever needs the graph says this again
            why = f"{type(error).__name__}: {error}"
    return None, [], why
