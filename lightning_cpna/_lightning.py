"""The one file that imports Lightning: a Callback that both `lightning` and `pytorch_lightning` accept as theirs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    # `lightning` and `pytorch_lightning` are two copies of the same source: a Trainer accepts only its own Callback
    # class, so ours inherits from every copy that is installed.
    _flavours = []
    for _package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            _flavours.append(importlib.import_module(_package).Callback)
        except ModuleNotFoundError as error:
            if not _package.startswith(error.name or ""):
                raise
    if not _flavours:
        raise ImportError("lightning_cpna needs Lightning: pip install lightning, or pip install pytorch-lightning")
    Callback = type("Callback", tuple(_flavours), {"__doc__": "The Callback of every installed Lightning."})
    LightningModule = Trainer = object

__all__ = ["Callback", "LightningModule", "Trainer"]
