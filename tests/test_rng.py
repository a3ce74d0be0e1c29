"""The random generators of torch, Python and NumPy go back together."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from lightning_cpna.rng import rng_state, set_rng_state

CPU = torch.device("cpu")


def draws() -> list[float]:
    return [
        *torch.randn(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        *np.random.randn(3).tolist(),  # noqa: NPY002
    ]


def test_the_same_numbers_follow_also_through_a_file() -> None:
    draws()
    file = io.BytesIO()
    torch.save(rng_state(CPU), file)
    first = draws()
    assert draws() != first
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True), CPU)
    assert draws() == first
