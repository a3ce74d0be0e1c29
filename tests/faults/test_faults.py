"""What goes wrong in a training: it is killed, the disk is full, the loss is NaN, a file is broken or another's."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_cpna import sparsity_of
from tests.compatibility.callbacks import CALLBACKS, make
from tests.compatibility.networks import NETWORKS, data, module
from tests.faults.train import EPOCHS, SECONDS_A_STEP, newest, train
from tests.helpers import checkpoint, trainer, weights

ROOT = Path(__file__).parents[2]
EVERY = ["CPNAPruning", "NeuronPruning", "SETRewiring", "TicketRewind", "SETRewiring + NeuronPruning"]


def callbacks(name: str) -> list[Any]:
    return [make(config) for config in CALLBACKS[name](NETWORKS["MLP"])]


def assert_same_end(folder: Path, other: Path) -> None:
    (first, masks), (second, others) = (torch.load(one / "end.pt") for one in (folder, other))
    assert masks.keys() == others.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, others[name]), name
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def kill_at_random(folder: Path, callback: str, draw: random.Random) -> bool:
    """Start the training, kill it; return whether it had already ended."""
    command = [sys.executable, "-m", "tests.faults.train", str(folder), callback]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    time.sleep(draw.uniform(0, 1.5 * EPOCHS * 4 * SECONDS_A_STEP))
    process.send_signal(signal.SIGKILL)
    return process.wait() == 0


@pytest.mark.parametrize(
    ("callback", "n_kills"),
    [("CPNAPruning", 2), *(pytest.param(callback, 10, marks=pytest.mark.slow) for callback in EVERY)],
)
def test_a_killed_training_that_is_started_again_ends_as_one_that_was_not(
    callback: str, n_kills: int, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    train(whole, callback)
    draw, n = random.Random(f"{callback} {n_kills}"), 0
    while n < n_kills:
        if not (killed / "end.pt").exists():
            n += not kill_at_random(killed, callback, draw)
        else:
            assert_same_end(killed, whole)
            for file in killed.iterdir():
                file.unlink()
    train(killed, callback)
    assert_same_end(killed, whole)


def test_a_full_disk_is_not_hidden_and_the_checkpoints_before_it_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    whole.mkdir()
    full.mkdir()
    train(whole, "CPNAPruning")
    save, calls = torch.save, []

    def fails_in_the_end(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails_in_the_end)
        with pytest.raises(OSError, match="No space left"):
            train(full, "CPNAPruning")
    assert newest(full) == full / "step=28.ckpt"
    train(full, "CPNAPruning")
    assert_same_end(full, whole)


def test_a_folder_that_cannot_be_written_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files = checkpoint(tmp_path / "file" / "folder", every_n_train_steps=2)
    with pytest.raises(OSError, match="file"):
        trainer(*callbacks("CPNAPruning"), files, enable_checkpointing=True).fit(module("MLP", pl), data())


class NaN:
    """A loss that is NaN from the ninth step on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        factor = torch.nan if self.trainer.global_step >= 8 else 1.0  # type: ignore[attr-defined]
        return super().training_step(batch, batch_idx) * factor  # type: ignore[misc]


@pytest.mark.parametrize("callback", EVERY)
def test_nan_is_neither_large_nor_small_but_an_error_that_names_the_step(callback: str) -> None:
    trained = module("MLP", pl, NaN)
    with pytest.raises(ValueError, match=r"step (9|12)\b.*(NaN|not finite)"):
        trainer(*callbacks(callback), epochs=EPOCHS).fit(trained, data())


def saved(folder: Path, callback: str = "CPNAPruning") -> Path:
    """Return a checkpoint from the middle of a training."""
    files = checkpoint(folder, every_n_train_steps=4)
    trainer(*callbacks(callback), files, epochs=4, enable_checkpointing=True).fit(module("MLP", pl), data())
    return folder / "step=12.ckpt"


@pytest.mark.parametrize("length", [0, 100, 0.5, 0.99])
def test_a_broken_file_is_an_error_and_nothing_is_loaded(length: float, tmp_path: Path) -> None:
    file = saved(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    trained = module("MLP", pl)
    before = weights(trained)
    with pytest.raises((RuntimeError, EOFError, OSError)):
        trainer(*callbacks("CPNAPruning"), epochs=EPOCHS).fit(trained, data(), ckpt_path=file)
    for name, weight in weights(trained).items():
        assert torch.equal(weight, before[name])
    assert all(mask.all_live for mask in sparsity_of(trained).masks.values())


def altered(file: Path, change: Any) -> Path:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    return file


def other_masks(content: dict[str, Any]) -> None:
    masks = content["lightning_cpna"]["masks"]
    masks["net.0.weight"] = masks["net.2.weight"]


def renamed_masks(content: dict[str, Any]) -> None:
    masks = content["lightning_cpna"]["masks"]
    masks["other.weight"] = masks.pop("net.2.weight")


def old_masks(content: dict[str, Any]) -> None:
    content["lightning_cpna"]["version"] = 0


def old_callback(content: dict[str, Any]) -> None:
    for state in content["callbacks"].values():
        if "graph" in state:
            state["version"] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_masks, r"the mask of 'net.0.weight' has shape \(20, 24\), the parameter \(24, 16\)"),
        (renamed_masks, "there is a mask for 'other.weight', but no such parameter"),
        (old_masks, "version 0; this release reads"),
        (old_callback, "version 0; this release reads"),
    ],
)
def test_masks_of_another_network_or_release_are_an_error_that_says_so(
    change: Any, message: str, tmp_path: Path
) -> None:
    file = altered(saved(tmp_path), change)
    trained = module("MLP", pl)
    with pytest.raises(ValueError, match=message):
        trainer(*callbacks("CPNAPruning"), epochs=EPOCHS).fit(trained, data(), ckpt_path=file)
    assert all(mask.all_live for mask in sparsity_of(trained).masks.values())


@pytest.mark.parametrize("callback", EVERY)
def test_a_checkpoint_needs_no_unsafe_pickle(callback: str, tmp_path: Path) -> None:
    assert torch.load(saved(tmp_path, callback), weights_only=True)["lightning_cpna"]["masks"]
