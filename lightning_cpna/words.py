"""Objects in words, the same in every process: for people, and to tell one from another."""

from __future__ import annotations

import dis
import hashlib
import re
from collections.abc import Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor

LONG = 200  # characters, from which on a hash stands for them


def in_words(rule: object) -> str:
    """Name a schedule, a score, or a function in its place.

    Examples:
        >>> in_words(max)
        'max'
        >>> in_words(partial(in_words, rule=3))
        'functools.partial(<function in_words>, rule=3)'
        >>> in_words(("mu", np.float64(3.5)))
        "('mu', 3.5)"
    """
    words = _plain(str(getattr(rule, "__qualname__", repr(rule))))
    return re.sub(r"np\.\w+\(([^()]*)\)", r"\1", words)


def fingerprint(value: object, above: tuple[int, ...] = ()) -> str:
    """Describe a value so that others are described otherwise: numbers, texts, tensors, containers, functions.

    Of any other object it is its ``repr``, with its attributes where its class writes none.

    Args:
        value: The value.
        above: The ``id`` of what it is part of, from the outermost on.

    Examples:
        >>> fingerprint({"lr": 0.1, "widths": [3, 4]})
        "{'lr': 0.1, 'widths': [3, 4]}"
        >>> fingerprint(lambda x: x + 1) == fingerprint(lambda x: x + 2)
        False
        >>> fingerprint(torch.zeros(2)) == fingerprint(torch.ones(2))
        False
    """
    if id(value) in above:
        return f"what is {above[::-1].index(id(value)) + 1} above"
    within = partial(fingerprint, above=(*above, id(value)))
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {_hash(data)}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.dtype} {value.shape} {_hash(value.tobytes())}"
    if isinstance(value, partial):
        words = f"partial({', '.join(map(within, (value.func, value.args, value.keywords)))})"
    elif isinstance(value, Mapping):
        words = f"{{{', '.join(f'{within(key)}: {within(its)}' for key, its in value.items())}}}"
    elif isinstance(value, list | tuple):
        opening, closing = "[]" if isinstance(value, list) else "()"
        words = f"{opening}{', '.join(map(within, value))}{closing}"
    elif isinstance(value, set | frozenset):
        words = f"{{{', '.join(sorted(map(within, value)))}}}"
    elif isinstance(value, FunctionType):
        words = f"{value.__module__}.{value.__qualname__} {_hash(' '.join(map(within, _parts(value))).encode())}"
    elif isinstance(value, MethodType):
        words = f"{within(value.__func__)} of {within(value.__self__)}"
    elif isinstance(value, CodeType):
        words = f"{value.co_code.hex()} {value.co_names} {within(value.co_consts)}"
    elif type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        words = f"{_plain(repr(value))} with {within(vars(value))}"
    else:
        words = f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else _plain(repr(value))
    return words if len(words) <= LONG else f"{words[:LONG]}... {_hash(words.encode())}"


def _parts(function: FunctionType) -> tuple[object, ...]:
    """List what a function does, and with which defaults and values from outside."""
    space = function.__globals__
    outside = [cell.cell_contents for cell in function.__closure__ or ()]
    read = {name: space[name] for name in sorted(_globals(function.__code__)) if name in space}
    own = {name: value for name, value in read.items() if not _is_elsewhere(value, space)}
    return function.__code__, function.__defaults__, function.__kwdefaults__, outside, own


def _globals(code: CodeType) -> set[str]:
    """Name the globals that a function reads, or one that is made in it."""
    read = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return read.union(*(_globals(const) for const in code.co_consts if isinstance(const, CodeType)))


def _is_elsewhere(value: object, space: dict[str, object]) -> bool:
    """Tell whether a global is only a name for a module, a class, or a function of another module."""
    return isinstance(value, type | ModuleType) or getattr(value, "__globals__", space) is not space


def _plain(words: str) -> str:
    """Leave out addresses."""
    return re.sub(" at 0x[0-9a-f]+", "", words)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
