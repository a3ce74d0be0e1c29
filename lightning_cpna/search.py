"""Features found by restarts: many tries on random subsets of the features, until one is certainly no chance find."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lightning_cpna._lightning import Callback, LightningModule, Trainer
from lightning_cpna.callbacks import CPNAPruning
from lightning_cpna.compact import compact
from lightning_cpna.layers import evaluating
from lightning_cpna.mask import Mask
from lightning_cpna.member_batches import member_loader, mixed_seed
from lightning_cpna.moments import replace_
from lightning_cpna.schedules import Geometric, OneShot
from lightning_cpna.sparsity import sparsity_of
from lightning_cpna.stacked import member, stack
from lightning_cpna.sweeps import Backend, Row, n_workers, sweep
from lightning_cpna.tracing import trace

MAX_ROWS = 1024  # chosen: examples at a time, of all members, when losses are measured
SUBSETS = (1.0, 0.75, 0.5, 0.35)  # the fractions of the features that are drawn in turn if nothing is said
FURTHER = 6  # each further count has this fraction of the epochs of the first: one sixth


@dataclass(frozen=True)
class Tries:
    """How features are searched.

    Attributes:
        n: How many tries there are at most.
        subset: How many features a try draws; several are used in turn. None: all, .75, .5 and .35 of them.
        together: How many tries are trained as one stack.
        null: How many tries on permuted labels the others are judged by, for each size of subset.
        pretraining: Epochs before the features are annealed.
        annealing: Epochs in which they are; a sixth as many for each further count.
        refit: Epochs for which a network is trained on the features found.
        batch_size: Examples a step.
        level: How probable it may be that a search without anything to find ends with a certificate.
    """

    n: int = 200
    subset: int | Sequence[int] | None = None
    together: int = 8
    null: int = 16
    pretraining: int = 20
    annealing: int = 60
    refit: int = 30
    batch_size: int = 256
    level: float = 0.001

    def __post_init__(self) -> None:
        for name in ("n", "together", "pretraining", "annealing", "refit", "batch_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed is an int >= 1")
        if type(self.null) is not int or self.null < 4:
            raise ValueError(f"null is {self.null!r}; allowed is an int >= 4, as their spread must be known")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}; allowed is a float in (0, 1)")


@dataclass(frozen=True)
class Certificate:
    """Whether a try's training loss can be chance.

    Attributes:
        loss: The loss.
        limit: What it must be below.
        null_loss: The mean of the losses on permuted labels, for subsets and counts of the same sizes.
        null_spread: Their standard deviation.
    """

    loss: float
    limit: float
    null_loss: float
    null_spread: float

    @property
    def holds(self) -> bool:
        """Whether it cannot."""
        return self.loss < self.limit

    @property
    def margin(self) -> float:
        """By how many standard deviations of the losses on permuted labels the loss is below their mean."""
        return (self.null_loss - self.loss) / self.null_spread if self.null_spread else 0.0


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        features: The columns of ``x``, ascending.
        certificate: Whether they can be a chance find.
        tries: How many tries there were.
        network: A network trained on these features alone: call it with ``x[:, features]``.
        rows: Every try and count: ``chunk``, ``subset``, ``place``, ``is_null``, ``count``, ``loss``, ``features``.
    """

    features: tuple[int, ...]
    certificate: Certificate
    tries: int
    network: LightningModule
    rows: list[Row]

    def __str__(self) -> str:
        it = self.certificate
        verdict = "certified" if it.holds else "NOT certified: no loss is below what permuted labels may give"
        return (
            f"{len(self.features)} features after {self.tries} tries, {verdict}: {list(self.features)}\n"
            f"training loss {it.loss:.4g}, limit {it.limit:.4g}; permuted labels {it.null_loss:.4g} +- {it.null_spread:.2g}"
        )


def find_features(
    network: Callable[[int], LightningModule],
    trainer: Callable[..., Trainer],
    x: Tensor,
    y: Tensor,
    n_features: int | Sequence[int],
    *,
    tries: Tries | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    n_jobs: int = 1,
    backend: Backend = "loky",
    console: Console | None = None,
) -> Found:
    """Find the few features among many that a network needs, where a single training would miss them.

    A try draws a random subset of the features, trains a network on it and anneals its input features, by the norm of their
    columns, down to the number that is wanted. Where labels depend on features only together (XOR), most tries fail; one
    that draws them all, and is lucky, learns. Tries are trained side by side, as a stack.

    The search ends at a certificate: a try whose training loss is lower than it could be if the labels had nothing to do with
    the features. What could be is known from tries on permuted labels, with subsets and counts of the same sizes: the limit
    is the lower prediction limit for one more normal variable (Student's t), at the level divided by the number of tries and
    counts that the search may come to. Where networks fit permuted labels as well (few examples, many features), nothing is
    certified, and the features are no more than a guess.

    Args:
        network: From a number of features to a network, whose ``training_step`` takes batches ``(x, y)`` and returns their
            mean loss; `stack` says what it may do.
        trainer: ``Trainer``, or a function that takes its arguments: ``partial(Trainer, accelerator="gpu")``.
        x: The examples, ``(n, p)``.
        y: Their labels, ``(n, ...)``.
        n_features: How many features are wanted. Several: the number for which the margin is largest.
        tries: How many there are, and how long they train; None: as ``Tries()`` says.
        seed: Of subsets, permutations, initial weights and batches.
        folder: Where finished tries are kept, so that a search that was killed goes on; None: nowhere. A search with other
            data or arguments finds nothing of its own there; one with another network must have another folder.
        n_jobs: How many stacks are trained at a time, as in ``sweep``; what is found does not depend on it.
        backend: As in ``sweep``.
        console: Where the progress bar is drawn, as in ``sweep``.

    Returns:
        What the first certified stack found; if there is none, what had the largest margin.

    Raises:
        ValueError: If an argument is out of range, or it cannot be told which layer of the network reads the features.

    Reference:
        The annealing of features: Barbu, She, Ding, Gramajo: Feature Selection with Annealing for Computer Vision and Big
        Data Learning, Algorithm 1.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("searches need SciPy and joblib: pip install 'lightning-cpna[search]'")
    tries = tries or Tries()
    counts = tuple(sorted({n_features} if isinstance(n_features, int) else set(n_features), reverse=True))
    _check(x, y, counts)
    subsets = _subsets(tries.subset, x.shape[1], counts)
    weight, can_drop = _first_weight(network(subsets[0]), x[:4, : subsets[0]])
    search = _Search(network, trainer, x, y, weight, can_drop, counts, tries, seed)
    chance = tries.level / (tries.n * len(counts))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for settings in _rounds(search.chunks(subsets), n_workers(n_jobs, backend)):
            done = (settings[-1]["chunk"] + 1) * tries.together
            found = sweep(
                partial(_chunk_of_tries, search),
                settings,
                folder or temporary,
                n_jobs=n_jobs,
                backend=backend,
                title=f"tries until {min(done, tries.n)} of {tries.n}",
                console=console,
            )
            for setting in settings:
                rows += [row for row in found if row["chunk"] == setting["chunk"]]
                best, certificate = _best(rows, chance)
                if certificate.holds:
                    break
            if certificate.holds:
                break
    n_tries = len({(row["chunk"], row["place"]) for row in rows if not row["is_null"]})
    return Found(tuple(best["features"]), certificate, n_tries, search.refit(best["features"]), rows)


@dataclass(frozen=True)
class _Search:
    """What all tries of a search share."""

    network: Callable[[int], LightningModule]
    trainer: Callable[..., Trainer]
    x: Tensor
    y: Tensor
    weight: str
    can_drop: bool
    counts: tuple[int, ...]
    tries: Tries
    seed: int

    def chunks(self, subsets: Sequence[int]) -> list[dict[str, Any]]:
        """Divide the tries into stacks; the first of each size of subset has those on permuted labels, too."""
        data = hashlib.sha256()
        for tensor in (self.x, self.y):
            data.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        recipe = {key: value for key, value in vars(self.tries).items() if key not in ("n", "refit", "level", "subset")}
        shared = {"data": data.hexdigest(), "counts": list(self.counts), "seed": self.seed, **recipe}
        firsts = range(0, self.tries.n, self.tries.together)
        return [
            {
                **shared,
                "chunk": chunk,
                "subset": subsets[chunk % len(subsets)],
                "n_tries": min(self.tries.together, self.tries.n - first),
                "n_null": self.tries.null if chunk < len(subsets) else 0,
            }
            for chunk, first in enumerate(firsts)
        ]

    def run(self, chunk: int, subset: int, n_tries: int, n_null: int) -> list[Row]:
        """Train a stack of tries."""
        tries, (n, p) = self.tries, self.x.shape
        seeds = [mixed_seed(self.seed, chunk, place) for place in range(n_tries + n_null)]
        columns, x, y = [], [], []
        for place, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            columns.append(torch.randperm(p, generator=generator)[:subset].sort().values)
            x.append(self.x[:, columns[-1]])
            y.append(self.y[torch.randperm(n, generator=generator)] if place >= n_tries else self.y)
        data = [torch.stack(x), torch.stack(y)]  # (member, n, subset), (member, n, ...)
        stacked = stack([_seeded(seed, partial(self.network, subset)) for seed in seeds], seeds)
        loader = member_loader(data, batch_size=min(tries.batch_size, n), seeds=seeds)
        ends = [tries.pretraining + tries.annealing + tries.annealing // FURTHER * i for i in range(len(self.counts))]
        measure = _Features(self.weight, torch.stack(columns), data, ends, self.can_drop)
        n_steps = len(loader)
        schedules = [
            Geometric(tries.pretraining * n_steps, ends[0] * n_steps),
            *(OneShot(end * n_steps + 1, end * n_steps + 1) for end in ends[:-1]),
        ]
        pruning = [
            CPNAPruning({self.weight: count}, granularity="feature", schedule=schedule, name=f"features_{count}")
            for count, schedule in zip(self.counts, schedules, strict=True)
        ]
        self._fit(stacked, loader, ends[-1], [*pruning, measure])
        return [
            {
                "place": place,
                "is_null": place >= n_tries,
                "count": count,
                "loss": float(losses[place]),
                "features": features[place].tolist(),
            }
            for place in range(len(seeds))
            for count, (features, losses) in zip(self.counts, measure.found, strict=True)
        ]

    def refit(self, features: list[int]) -> LightningModule:
        """Train a network on some features alone."""
        seed = mixed_seed(self.seed)
        stacked = stack([_seeded(seed, partial(self.network, len(features)))], [seed])
        data = [self.x[None, :, features], self.y[None]]
        loader = member_loader(data, batch_size=min(self.tries.batch_size, len(self.y)), seeds=[seed])
        self._fit(stacked, loader, self.tries.refit, [])
        return member(stacked, 0)

    def _fit(self, module: LightningModule, loader: Iterable[Any], epochs: int, callbacks: list[Callback]) -> None:
        with _quiet():
            trainer = self.trainer(
                max_epochs=epochs,
                callbacks=callbacks,
                logger=False,
                log_every_n_steps=0,  # there is no logger
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader)
        module.to(self.x.device)


class _Features(Callback):
    """Notes, after some epochs, which features the members have left, and their losses on all examples.

    As features die, they are dropped from the weight and from the examples, where the network allows that.

    Args:
        weight: Which parameter reads the features.
        columns: Which features each member reads, int64 ``(member, feature)``.
        data: The loader's examples, ``(member, n, feature)``, and labels.
        epochs: After how many epochs it is noted.
        can_drop: Whether the network can do with fewer features.

    Attributes:
        found: What was noted: the features, int64 ``(member, count)``, and the losses, ``(member,)``.
    """

    def __init__(self, weight: str, columns: Tensor, data: list[Tensor], epochs: Sequence[int], can_drop: bool) -> None:
        self.weight, self.columns, self.data, self.epochs, self.can_drop = weight, columns, data, epochs, can_drop
        self.found: list[tuple[Tensor, Tensor]] = []

    def _live(self, module: LightningModule) -> Tensor:
        """Return the places of the features that are left, int64 ``(member, n)``."""
        sparsity = sparsity_of(module)
        closed = sparsity.masks[self.weight].closed_inputs(sparsity.targets[self.weight].axes).cpu()
        return (~closed).nonzero()[:, 1].view(len(closed), -1)

    @torch.no_grad()
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what died, once that is half of the features."""
        live = self._live(pl_module)
        if not self.can_drop or 2 * live.shape[1] > self.columns.shape[1]:
            return
        sparsity = sparsity_of(pl_module)
        parameter, mask = sparsity.tensors[self.weight], sparsity.masks[self.weight]
        along = live.to(parameter.device)[:, None, :].expand(-1, parameter.shape[1], -1)

        def cut(tensor: Tensor) -> Tensor:
            return tensor.gather(2, along)  # (member, unit, feature)

        replace_(parameter, cut, trainer.optimizers)
        sparsity.masks.replace({self.weight: Mask(cut(mask.dead), cut(mask.removed))})
        assert sparsity.graph is not None
        sparsity.graph = sparsity.graph.cut({}, {self.weight: torch.arange(live.shape[1])})
        self.columns = self.columns.gather(1, live)
        self.data[0] = self.data[0].gather(2, live[:, None, :].expand(-1, self.data[0].shape[1], -1))

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if it is time."""
        if trainer.current_epoch + 1 not in self.epochs:
            return
        n = self.data[0].shape[1]
        total = torch.zeros(len(self.columns))
        with evaluating(pl_module):
            for rows in torch.split(torch.arange(n), MAX_ROWS):
                batch = tuple(part[:, rows].to(pl_module.device) for part in self.data)
                total += len(rows) * pl_module(batch, 0, method="training_step").cpu()
        self.found.append((self.columns.gather(1, self._live(pl_module)), total / n))


def _chunk_of_tries(search: _Search, *, chunk: int, subset: int, n_tries: int, n_null: int, **_: Any) -> list[Row]:
    """Run one stack of a search; the rest of the setting says of which search."""
    return search.run(chunk, subset, n_tries, n_null)


def _rounds(settings: list[dict[str, Any]], n: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(settings), n):
        yield settings[start : start + n]


def _best(rows: list[Row], chance: float) -> tuple[Row, Certificate]:
    """Return the try with the largest margin, of those whose certificates hold if there are any."""
    null: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["is_null"]:
            null.setdefault((row["subset"], row["count"]), []).append(row["loss"])
    judged = [
        (row, _certificate(row["loss"], null[row["subset"], row["count"]], chance))
        for row in rows
        if not row["is_null"]
    ]
    return max(judged, key=lambda pair: (pair[1].holds, pair[1].margin))


def _certificate(loss: float, null: list[float], chance: float) -> Certificate:
    mean, spread = statistics.fmean(null), statistics.stdev(null)
    from scipy.stats import t as student

    below = float(student.isf(chance, len(null) - 1)) * spread * math.sqrt(1 + 1 / len(null))
    return Certificate(loss, mean - below, mean, spread)


def _check(x: Tensor, y: Tensor, counts: Sequence[int]) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x has shape {tuple(x.shape)} and type {x.dtype}; allowed are floats, (n, p)")
    if y.ndim < 1 or len(y) != len(x):
        raise ValueError(f"y has shape {tuple(y.shape)}; allowed is one label for each of the {len(x)} rows of x")
    if not counts or not all(1 <= count < x.shape[1] for count in counts):
        raise ValueError(f"n_features is {list(counts)}; allowed are 1 to {x.shape[1] - 1}, fewer than x has columns")


def _subsets(subset: int | Sequence[int] | None, p: int, counts: Sequence[int]) -> list[int]:
    if subset is None:
        return sorted({max(counts[0] + 1, round(fraction * p)) for fraction in SUBSETS}, reverse=True)
    sizes = [subset] if isinstance(subset, int) else list(subset)
    if not sizes or not all(counts[0] < size <= p for size in sizes):
        raise ValueError(f"subset is {subset}; allowed is more than the {counts[0]} features wanted, up to {p}")
    return sizes


def _first_weight(network: LightningModule, x: Tensor) -> tuple[str, bool]:
    """Find the one weight that reads the features, and tell whether the network can do with fewer."""
    graph = trace(network, x)
    first = [name for name, layer in graph.items() if layer.unknown_source is None and bool((layer.sources < 0).all())]
    if len(first) != 1 or network.get_parameter(first[0]).ndim != 2:
        raise ValueError(
            f"network: {', '.join(first) or 'no traced layer'} read the features; allowed is one Linear layer that does"
        )
    half = network.get_parameter(first[0]).detach()
    half[:, ::2] = 0
    return first[0], compact(network, x, batch_sizes=()).features is not None


def _seeded(seed: int, build: Callable[[], LightningModule]) -> LightningModule:
    """Build a network whose initialisation depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from announcing each of many fits."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    loggers += [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message="You defined a `validation_step`")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
