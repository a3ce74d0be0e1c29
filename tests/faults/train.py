"""A training that is killed: `python -m tests.faults.train FOLDER CALLBACK` goes on from the folder's newest checkpoint."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from tests.compatibility.callbacks import CALLBACKS, make
from tests.compatibility.networks import NETWORKS, data, module
from tests.helpers import (
    checkpoint,
    checkpoints,
    live_masks,
    trainer,
    weights,
)

EPOCHS, SECONDS_A_STEP = 9, 0.02


class Slow(pl.Callback):
    """Leaves time to be killed in."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(SECONDS_A_STEP)


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the latest step, if there is one."""
    return next(reversed(checkpoints(folder)), None)


def train(folder: Path, callback: str, *others: Any) -> None:
    """Train to the end, and save the weights and masks that result.

    Checkpoints are those of epochs: resumed twice from ones by step, Lightning (2.6) trains an epoch too many.
    """
    torch.set_num_threads(1)
    network = NETWORKS["MLP"]
    trained = module("MLP", pl)
    callbacks = [
        *map(make, CALLBACKS[callback](network)),
        *others,
        checkpoint(folder, every_n_epochs=1, save_on_train_epoch_end=True),
    ]
    trainer(*callbacks, epochs=EPOCHS, enable_checkpointing=True).fit(trained, data(), ckpt_path=newest(folder))
    torch.save((weights(trained), live_masks(trained)), folder / "end.part")
    (folder / "end.part").rename(folder / "end.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("begins", flush=True)
    train(Path(sys.argv[1]), sys.argv[2], Slow())
