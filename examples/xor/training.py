"""One training run: a method on one seed's data, through the Trainer and the callbacks."""

from __future__ import annotations

import itertools
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torchmetrics.functional.classification import binary_auroc

from examples.quiet import quiet_trainer
from examples.results import Row
from examples.xor.problem import Phases, XORDataModule, XORNet
from examples.xor.recipes import HIDDEN, INPUT, callbacks, recipe
from lightning_cpna import Connectivity, connectivity, sparsity_of, trace

VALIDATIONS = 60  # chosen: enough points for a curve
MAX_TRIES = 5  # chosen: about one run in ten starts anew
OF_WEIGHTS = (
    1_000_000  # added to the data's seed, lest the first weights be the first inputs, drawn from the same stream
)
# The training AUC that a run with annealed features must have after that annealing, and in the end. Chosen on seeds 200 to
# 305 of the 4-D problem with 3000 samples: 0.60 to 0.63 where the wrong features were left, 0.94 or more where the right
# ones were; 0.98 or more in the end.
ACCEPTED_FEATURES, ACCEPTED_END = 0.85, 0.95


@dataclass(frozen=True)
class Job:
    """What to train: the problem, the method, the seed of data and initialisation."""

    k: int
    p: int
    n: int
    hidden: int
    method: str
    seed: int


@dataclass
class Run:
    """What a job came to.

    Attributes:
        job: The job.
        test_auc: Test AUC at the end, in percent.
        train_auc: Training AUC at the end, in percent.
        connections: Live connections by layer.
        live_features: Inputs with a live connection.
        tries: How often the run began: it starts anew if even the training set is not learned.
        seconds: Wall time of the fits.
        history: The curves: one list of values for each name, ``step`` among them.
        boundaries: The steps at which the phases end.
        connectivity: What is connected to what in the end.
    """

    job: Job
    test_auc: float
    train_auc: float
    connections: dict[str, int]
    live_features: int
    tries: int
    seconds: float
    history: dict[str, list[float]]
    boundaries: list[int]
    connectivity: Connectivity

    def as_dict(self) -> dict[str, Any]:
        """Return what belongs into ``results.json``."""
        return {
            **asdict(self.job),
            "test_auc": round(self.test_auc, 4),
            "train_auc": round(self.train_auc, 4),
            "connections": self.connections,
            "live_features": self.live_features,
            "tries": self.tries,
            "seconds": round(self.seconds, 2),
        }

    def row(self) -> Row:
        """Return everything as JSON values."""
        return {
            **self.as_dict(),
            "history": self.history,
            "boundaries": self.boundaries,
            "layers": [[name, *(part.tolist() for part in parts)] for name, *parts in self.connectivity.layers],
            "sizes": list(self.connectivity.sizes),
        }

    @classmethod
    def of_row(cls, row: Row) -> Run:
        """Read what `row` returned."""
        found = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        layers = tuple((name, *map(torch.tensor, parts)) for name, *parts in row["layers"])
        return cls(
            **found,
            job=Job(**{field.name: row[field.name] for field in fields(Job)}),
            connectivity=Connectivity(layers, tuple(row["sizes"])),
        )


@dataclass
class History(pl.Callback):
    """Keeps the curves of a run.

    Attributes:
        curves: The values at every validation.
    """

    curves: dict[str, list[float]] = field(default_factory=dict)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the values of this moment."""
        if trainer.sanity_checking:
            return
        masks = sparsity_of(pl_module).masks
        values: dict[str, float] = {"step": trainer.global_step}
        names = [f"{quantity}/{split}" for quantity in ("loss", "auc") for split in ("train", "test")]
        values |= {name: float(trainer.callback_metrics[name]) for name in names}
        for label, name in (("connections/hidden", HIDDEN), ("connections/input", INPUT)):
            values[label] = masks[name].n_live if name in masks else pl_module.get_parameter(name).numel()
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)


class TrainingCheck(pl.Callback):
    """Stops a run that does not learn even its training set.

    Args:
        accepted: The training AUC that it must have, by optimizer step.
    """

    def __init__(self, accepted: dict[int, float]) -> None:
        self.accepted, self.failed = accepted, False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Judge."""
        if trainer.global_step in self.accepted:
            data = trainer.datamodule.train  # type: ignore[attr-defined]
            with torch.no_grad():
                logits = pl_module(data.x)
            auc = float(binary_auroc(logits, data.y.int()))
            if not auc >= self.accepted[trainer.global_step]:
                self.failed = trainer.should_stop = True
                warnings.filterwarnings("ignore", message=".*training ended with.*")


def run(*, board: Path, **job: Any) -> Row:
    """Train a job, given by its fields, and return its `Run` as JSON values.

    Args:
        board: The folder of TensorBoard runs.
        job: The fields of `Job`.
    """
    return train(Job(**job), board).row()


def _failed(folder: Path, tries: int | str) -> Path:
    """Return where the TensorBoard run of a try that was given up is kept."""
    return folder.with_name(f"{folder.name}_failed_{tries}")


def _remove(folder: Path) -> None:
    """Remove what an earlier, perhaps killed, run of the same job has written for TensorBoard."""
    for old in [*folder.parent.glob(folder.name), *folder.parent.glob(_failed(folder, "*").name)]:
        shutil.rmtree(old)


def train(job: Job, board: Path | None = None) -> Run:
    """Train a job; where features are annealed, start anew from another initialisation if the training set is not learned.

    Args:
        job: What to train.
        board: The folder of TensorBoard runs; None: nothing is written.
    """
    torch.set_num_threads(1)
    steps = recipe(job.k, job.method)
    phases = [phase for phase, _ in steps]
    ends = list(itertools.accumulate(phase.steps(job.n) for phase in phases))
    accepted: dict[int, float] = {}
    for end, (_, pruning) in zip(ends, steps, strict=True):
        if pruning is not None and pruning.options.get("granularity") == "feature":
            accepted = {end: ACCEPTED_FEATURES, ends[-1]: ACCEPTED_END}
    started = time.perf_counter()
    for tries in range(1, MAX_TRIES + 1):
        pl.seed_everything(job.seed + OF_WEIGHTS * tries, verbose=False)
        data = XORDataModule(job.k, job.p, job.n, job.seed, phases)
        module = XORNet(job.p, job.hidden, phases, job.n)
        history, check = History(), TrainingCheck(accepted if tries < MAX_TRIES else {})
        logger = board and TensorBoardLogger(
            board,
            name=f"{job.k}d_p{job.p}_{job.method}",
            version=f"seed_{job.seed}",
            default_hp_metric=False,
        )
        if logger and tries == 1:
            _remove(Path(logger.log_dir))
        trainer = quiet_trainer(
            max_epochs=1,
            val_check_interval=max(1, len(data.batches) // VALIDATIONS),
            log_every_n_steps=20,
            accelerator="cpu",
            logger=logger or False,
            callbacks=[Phases(phases, job.n), *callbacks(steps, job.n), history, check],
        )
        with warnings.catch_warnings():
            trainer.fit(module, data)
        if not check.failed:
            break
        if logger:
            logger.finalize("failed")
            folder = Path(logger.log_dir)
            folder.rename(_failed(folder, tries))
    seconds = time.perf_counter() - started
    results: dict[str, float] = {}
    for metrics in trainer.validate(module, data, verbose=False):
        results.update(metrics)
    if logger:
        logger.log_hyperparams(
            asdict(job), {"final/auc_test": results["auc/test"], "final/auc_train": results["auc/train"]}
        )
        logger.finalize("success")
    sparsity = sparsity_of(module)
    sparsity.graph = sparsity.graph or trace(module, data.test.x[:8])
    chain = connectivity(sparsity)
    _, inputs, _, _ = chain.layers[0]
    return Run(
        job=job,
        test_auc=100 * results["auc/test"],
        train_auc=100 * results["auc/train"],
        connections={layer: len(weight) for layer, _, _, weight in chain.layers},
        live_features=len(set(inputs.tolist())),
        tries=tries,
        seconds=seconds,
        history=history.curves,
        boundaries=ends,
        connectivity=chain,
    )
