"""The states of the global random number generators, as tensors and Python primitives."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators of torch, Python and NumPy, and of a CUDA device.

    Examples:
        >>> state = rng_state(torch.device("cpu"))
        >>> first = torch.rand(3)
        >>> set_rng_state(state, torch.device("cpu"))
        >>> torch.equal(first, torch.rand(3))
        True
    """
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy, dict)
    numpy["state"]["key"] = torch.tensor(numpy["state"]["key"].tolist())
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators back to a state."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    keys = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": keys}})  # noqa: NPY002
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
