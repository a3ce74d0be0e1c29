"""What a resumed fit must not change, what it may, and what loading a checkpoint for anything else does not ask."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Geometric,
    Growth,
    NeuronPruning,
    Rewind,
    SETRewiring,
    TicketRewind,
    sparsity_of,
)
from tests.helpers import Classifier, checkpoint, checkpoints, data, trainer

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cpna": (CPNAPruning, {"targets": {"net.2.weight": 5}, "schedule": Annealing(1, 12), "score": "magnitude"}),
    "neurons": (NeuronPruning, {"targets": {"net.0.weight": 4}, "schedule": Geometric(1, 12), "compensate": None}),
    "rewiring": (SETRewiring, {"targets": {"net.0.weight": 20}, "every": 4}),
    "ticket": (TicketRewind, {"targets": {"net.2.weight": 5}, "epochs": 1, "levels": 2}),
}


def make(name: str, **other: Any) -> Any:
    kind, arguments = KINDS[name]
    return kind(**(arguments | other))


def saved(folder: Path, callback: Any) -> Path:
    """Train and return the first checkpoint."""
    files = checkpoint(folder, every_n_train_steps=4)
    trainer(callback, files, enable_checkpointing=True).fit(Classifier(), data())
    return checkpoints(folder)[0]


@pytest.mark.parametrize(
    ("name", "argument", "other"),
    [
        ("cpna", "targets", {"net.2.weight": 4}),
        ("cpna", "targets", {"net.2.weight": 5, "net.0.weight": 9}),
        ("cpna", "targets", {"net.0.weight": 5}),
        ("cpna", "granularity", "feature"),
        ("cpna", "scope", "shared"),
        ("neurons", "targets", {"net.0.weight": 3}),
        ("neurons", "scope", "shared"),
        ("rewiring", "targets", {"net.0.weight": 21}),
        ("rewiring", "targets", ["net.0.weight"]),
        ("ticket", "targets", {"net.2.weight": 4}),
        ("ticket", "epochs", 2),
        ("ticket", "levels", 3),
        ("ticket", "rewind_to", Rewind("keep")),
        ("ticket", "rewind_to", Rewind("init", optimizer=False)),
        ("ticket", "controls", ["shuffle"]),
        ("ticket", "granularity", "feature"),
        ("ticket", "scope", "shared"),
    ],
)
def test_other_arguments_are_refused_by_name_before_masks_are_loaded(
    tmp_path: Path, name: str, argument: str, other: Any
) -> None:
    file = saved(tmp_path, make(name))
    module = Classifier()
    shown = repr(other) if isinstance(other, Rewind) else other
    with pytest.raises(ValueError, match=re.escape(f"{name}: {argument} is {shown!r}; allowed is what it was when")):
        trainer(make(name, **{argument: other})).fit(module, data(), ckpt_path=file)
    assert not sparsity_of(module).masks


class Judged(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_validated_whatever_the_targets_are(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path, make(name))
    other = make(name, targets={"net.0.weight": 7})
    for act in ("validate", "test", "predict"):
        module = Judged()
        getattr(trainer(other), act)(module, data(), ckpt_path=file)
        assert sparsity_of(module).masks


@pytest.mark.parametrize(
    ("name", "other", "before", "after"),
    [
        ("cpna", {"schedule": Annealing(0.1, 0.8)}, "Annealing(start=1, end=12", "Annealing(start=2, end=16"),
        ("cpna", {"score": "random"}, "kind='magnitude'", "kind='random'"),
        ("neurons", {"schedule": Geometric(1, 14)}, "Geometric(start=1, end=12", "Geometric(start=1, end=14"),
        ("rewiring", {"zeta": 0.5}, "zeta: 0.3", "zeta: 0.5"),
        ("rewiring", {"every": 2}, "every 4 optimizer steps", "every 2 optimizer steps"),
        ("rewiring", {"growth": Growth("gradient")}, "kind='random'", "kind='gradient'"),
        ("neurons", {"compensate": "mean"}, "seed=0)", "goes into the biases"),
        ("neurons", {"normalize": True}, "seed=0)", "the units are normalised"),
    ],
)
def test_another_way_warns_and_the_same_does_not(
    tmp_path: Path, name: str, other: dict[str, Any], before: str, after: str
) -> None:
    file = saved(tmp_path, make(name))
    expected = rf"^{name}: .* goes on by .*{re.escape(after)}.* had .*{re.escape(before)}"
    with pytest.warns(UserWarning, match=expected):
        trainer(make(name, **other)).fit(Classifier(), data(), ckpt_path=file)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on by.*")
        trainer(make(name)).fit(Classifier(), data(), ckpt_path=file)


def test_other_treatment_of_the_moments_warns(tmp_path: Path) -> None:
    file = saved(tmp_path, make("cpna", score=None))
    with pytest.warns(UserWarning, match=r"are normalised, moments: transform, where the fit before had"):
        trainer(make("cpna", score=None, normalize="transform")).fit(Classifier(), data(), ckpt_path=file)


def test_a_zeta_of_numpy_is_resumed(tmp_path: Path) -> None:
    file = saved(tmp_path, make("rewiring", zeta=np.float64(0.4)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rewiring: .* goes on by")
        trainer(make("rewiring", zeta=0.4)).fit(Classifier(), data(), ckpt_path=file)


class SavesFirst(pl.Callback):
    """Saves the state of another callback before that one's batch has ended."""

    def __init__(self, other: Any) -> None:
        self.other, self.states = other, list[dict[str, Any]]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.states.append(self.other.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_the_first_state_of_a_fit_says_its_ways(name: str) -> None:
    callback = make(name)
    saves = SavesFirst(callback)
    trainer(saves, callback).fit(Classifier(), data())
    assert saves.states[0]["ways"]
    assert all(state["ways"] == saves.states[0]["ways"] for state in saves.states)


@pytest.mark.parametrize("name", KINDS)
def test_a_density_of_numpy_is_resumed(tmp_path: Path, name: str) -> None:
    targets = {"net.0.weight": np.float64(0.25)}
    file = saved(tmp_path, make(name, targets=targets))
    module = Classifier()
    trainer(make(name, targets=targets)).fit(module, data(), ckpt_path=file)
    assert sparsity_of(module).masks
