"""Objects in words: two that differ, and the same one in another process."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch

from lightning_cpna.words import LONG, fingerprint


def adds(n: float) -> Callable[[float], float]:
    return lambda x: x + n


def multiplies(n: float, by: float = 2) -> float:
    return n * by


def reads(value: object, nested: bool = False) -> Callable[[], object]:
    """Make a function that reads a global of this value, itself or in one that it makes."""
    function: Any = (lambda: lambda: READ) if nested else (lambda: READ)
    return FunctionType(function.__code__, {"READ": value})


READ = None


class Power:
    def __init__(self, exponent: float) -> None:
        self.exponent, self.itself = exponent, self

    def me(self) -> Power:
        return self


@dataclass
class Rate:
    value: float


PAIRS: dict[str, tuple[Any, Any]] = {
    "a number and a text": (1, "1"),
    "ints and floats": (1, 1.0),
    "lists and tuples": ([1], (1,)),
    "lists": ([1, 2], [1, 3]),
    "dicts": ({"a": [1]}, {"a": [2]}),
    "long lists": (list(range(1000)), [*range(999), 0]),
    "sets": ({1, 2}, {1, 3}),
    "tensors": (torch.zeros(2000), torch.cat([torch.zeros(1000), torch.ones(1), torch.zeros(999)])),
    "tensors of another type": (torch.zeros(2), torch.zeros(2).bfloat16()),
    "tensors of another shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "arrays": (np.zeros(2000), np.r_[np.zeros(1000), 1, np.zeros(999)]),
    "functions in C": (torch.relu, torch.sin),
    "functions": (adds, multiplies),
    "functions that do something else": (lambda x: x.sin(), lambda x: x.cos()),
    "constants": (lambda x: x + 1, lambda x: x + 2),
    "values from outside": (adds(1), adds(2)),
    "what is made in a function": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "objects from outside": (adds(Power(2)), adds(Power(3))),  # type: ignore[arg-type]
    "long tensors from outside": (adds(torch.zeros(5000)), adds((torch.arange(5000) == 2500).float())),  # type: ignore[arg-type]
    "globals": (reads(0.1), reads(0.2)),
    "globals that can be called": (reads(partial(multiplies, by=3)), reads(partial(multiplies, by=4))),
    "globals of what is made in a function": (reads(0.1, nested=True), reads(0.2, nested=True)),
    "methods of objects": (Power(2).me, Power(3).me),
    "defaults": (lambda x, n=1: x, lambda x, n=2: x),
    "partial arguments": (partial(multiplies, by=3), partial(multiplies, by=4)),
    "nested partial arguments": (partial(map, partial(multiplies, by=3)), partial(map, partial(multiplies, by=4))),
    "classes": (int, float),
    "dataclasses": (Rate(0.1), Rate(0.2)),
    "objects that know nothing to say of themselves": ([Power(2)], [Power(3)]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_values_that_differ_are_described_otherwise(case: str) -> None:
    one, other = PAIRS[case]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)
    assert len(fingerprint(one)) < LONG + 30


def test_a_global_that_only_shares_its_name_with_an_attribute_is_not_read() -> None:
    code = (lambda x: x.READ).__code__
    assert fingerprint(FunctionType(code, {"READ": 1})) == fingerprint(FunctionType(code, {"READ": 2}))


def test_an_object_is_described_alike_in_another_process() -> None:
    program = (
        "from functools import partial; import tests.test_words as t; from lightning_cpna.words import fingerprint;"
        "objects = [t.Rate(1), t.Power(2)];"
        "print(fingerprint([{'b', 'a', 'c'}, object(), t.adds, t.adds(1), partial(t.multiplies, by=3), objects]))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(program, {})
    assert here.getvalue() == other
    assert other.startswith("[{'a', 'b', 'c'}, <object object>, tests.test_words.adds ")
