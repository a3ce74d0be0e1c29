"""Features found by restarts: many tries on random subsets of the features, until one is certainly no chance find."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import operator
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cpna._lightning import Callback, LightningModule, Trainer
from lightning_cpna.callbacks import CPNAPruning
from lightning_cpna.certificate import Certificate, certify, failed, n_orders
from lightning_cpna.layers import evaluating
from lightning_cpna.mask import Mask
from lightning_cpna.member_batches import member_loader, mixed_seed
from lightning_cpna.moments import replace_
from lightning_cpna.schedules import Geometric, OneShot
from lightning_cpna.search_inputs import check, counts_of, first_weight, subset_sizes, tensor_of, try_out
from lightning_cpna.sparsity import sparsity_of
from lightning_cpna.stacked import describe, member, stack
from lightning_cpna.sweeps import Backend, Row, SweepError, n_workers, sweep
from lightning_cpna.words import fingerprint

MAX_HELD = 2000  # chosen: with more the certificate is hardly surer, and takes minutes at the default level
MAX_CELLS = 40_000  # chosen: held-out examples times labels, at most; a file of eight tries then has some megabytes
FURTHER = 6  # each further count takes a sixth of the epochs of the first
_SUBSET, _WEIGHTS, _ORDER, _REFIT, _HELD_OUT, _PERMUTATIONS = range(6)  # what a seed is for


@dataclass(frozen=True)
class Restarts:
    """How features are searched.

    Attributes:
        n: How many tries there are at most.
        subset: How many features a try draws: an int is the number, a float in (0, 1] the fraction; several are used in turn.
        together: How many tries are trained as one stack.
        held_out: The fraction of the examples that no try is trained on: the certificate is theirs. No more than 2000, nor,
            where labels are many (regression), than 40,000 divided by the number of labels, or 200.
        pretraining: Epochs before the features are annealed.
        annealing: Epochs in which they are; a sixth as many for each further count.
        refit: Epochs for which a network is trained on the features found, with all examples.
        batch_size: Examples a step; where a last step of an epoch would have one alone, it is left out.
        level: How probable it may be that a search ends with a certificate if no label depends on any feature.
    """

    n: int = 200
    subset: float | Sequence[float] = (1.0, 0.75, 0.5, 0.35)
    together: int = 8
    held_out: float = 0.2
    pretraining: int = 20
    annealing: int = 60
    refit: int = 30
    batch_size: int = 256
    level: float = 1e-4  # chosen: two hundred searches of noise should not have one

    def __post_init__(self) -> None:
        for name in ("n", "together", "pretraining", "annealing", "refit", "batch_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed is an int >= 1")
        for name in ("held_out", "level"):
            if not (isinstance(value := getattr(self, name), float) and 0 < value < 1):
                raise ValueError(f"{name} is {value!r}; allowed is a float in (0, 1)")

    @property
    def n_stacks(self) -> int:
        """How many stacks the tries are at most."""
        return math.ceil(self.n / self.together)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        features: The columns of ``x``, ascending.
        names: What they are called, if ``x`` is a DataFrame.
        certificate: Whether their loss on the held-out examples can be chance; it cannot if ``certificate.holds``.
        n_tries: How many tries there were.
        network: A network trained on these features alone, in eval mode: call it with ``x[:, features]``,
            a tensor of the type of its weights.
        rows: Every try and count: ``stack``, ``place``, ``subset``, ``count``, ``features``, and the held-out ``loss``.
    """

    features: tuple[int, ...]
    names: tuple[Any, ...] | None
    certificate: Certificate
    n_tries: int
    network: LightningModule
    rows: list[Row]

    def __str__(self) -> str:
        it, features = self.certificate, list(self.names or self.features)
        found = f"{len(features)} features after {self.n_tries} tries: {features}"
        if not it.holds:
            found = f"nothing is certain after {self.n_tries} tries; the lowest loss is that of {features}"
        verdict = "labels depend on some of them" if it.holds else "it can be chance"
        return (
            f"{found}\nheld-out loss {it.loss:.4g}, by chance {it.chance_loss:.4g} +- {it.chance_spread:.2g} "
            f"(margin {it.margin:.1f}); p = {it.p_value:.2g}, needed {it.level:.2g} or less: {verdict}"
        )


def find_features(
    network: Callable[[int], LightningModule],
    trainer: Callable[..., Trainer],
    x: Any,
    y: Any,
    n_features: int | Sequence[int],
    *,
    restarts: Restarts | None = None,
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

    After each stack the lowest loss of all tries so far, on examples that none of them was trained on, is compared with what
    it is if the labels of these are permuted. The search ends when that cannot be chance, which is the certificate. Its
    level, divided by the number of times that this is asked, is exact for any network and any number of tries, if examples
    are independent of each other, and their labels did not help to choose or encode the columns (``certify``). It says that
    labels depend on what was found, not that every one of the features is needed.

    Args:
        network: From a number of features to a network, whose ``training_step`` takes batches ``(x, y)`` and returns their
            mean loss; `stack` says what it may do.
        trainer: ``Trainer``, or a function that takes its arguments, as ``partial(Trainer, accelerator="gpu")`` does; its
            epochs, callbacks, logger and checkpoints are those of the search.
        x: The examples, ``(n, p)``, a tensor, array or DataFrame of numbers; its columns must be alike in scale
            (standardised, say), as features are ranked by the norms of their columns of weights. It gets the network's type.
        y: Their labels, ``(n, ...)``, likewise; floats get the network's type, ints stay classes.
        n_features: How many features are wanted. Several: the number with the lowest held-out loss.
        restarts: How many tries there are, and how long they train; None: as ``Restarts()`` says.
        seed: Of everything that is random.
        folder: Where finished tries are kept, so that a search that was killed goes on; None: nowhere. A search for other
            features of other data, or with another network or trainer, finds nothing of its own there; where only the code
            of methods has changed, or what they read from outside, take another folder.
        n_jobs: How many stacks are trained at a time, as in ``sweep``; what is found does not depend on it.
        backend: As in ``sweep``.
        console: Where the progress bar is drawn, as in ``sweep``.

    Returns:
        The features with the lowest loss on the held-out examples. That loss is the lowest of many tries, so it is no
        estimate for new examples: keep a test set of your own.

    Raises:
        ValueError: If an argument is out of range, or it cannot be told which layer of the network reads the features.
        RuntimeError: If a stack of tries cannot be trained.

    Reference:
        The annealing of features: Barbu, She, Ding, Gramajo: Feature Selection with Annealing for Computer Vision and Big
        Data Learning, Algorithm 1.
    """
    restarts = Restarts() if restarts is None else restarts
    if not isinstance(restarts, Restarts):
        raise ValueError(f"restarts is {restarts!r}; allowed is a Restarts, or None")
    indices = [table.index for table in (x, y) if hasattr(table, "iloc")]
    if len(indices) == 2 and not indices[0].equals(indices[1]):
        raise ValueError("y has another index than x; allowed are rows in the same order, as y.loc[x.index] has them")
    columns = list(getattr(x, "columns", ())) or None
    x, y = tensor_of("x", x), tensor_of("y", y)
    counts = counts_of(n_features)
    if not hasattr(seed, "__index__") or seed < 0:
        raise ValueError(f"seed is {seed!r}; allowed is an int >= 0")
    seed = operator.index(seed)
    check(network, trainer, x, y, counts, columns)
    subsets = subset_sizes(restarts.subset, x.shape[1], counts[0])
    first = _seeded(0, partial(network, subsets[0]))
    dtype = next(first.parameters()).dtype
    x, y = x.to(dtype), y.to(dtype) if y.is_floating_point() else y.long()
    for n in (4, 1):  # losses on held-out examples are those of one
        try_out(first, x[:n, : subsets[0]], y[:n])
    try_out(_seeded(0, partial(network, counts[-1])), x[:4, : counts[-1]], y[:4])
    description = " ".join(
        [describe(first), fingerprint(first.state_dict()), fingerprint(network), fingerprint(trainer)]
    )
    weight, can_drop = first_weight(first, x[:4, : subsets[0]], y[:4])
    search = _Search(network, trainer, x, y, weight, can_drop, counts, restarts, seed, description)
    _warn_of_few_orders(search)
    console = console or Console()
    with tempfile.TemporaryDirectory() as temporary:
        options: dict[str, Any] = {"n_jobs": n_jobs, "backend": backend, "console": console}
        try:
            rows, losses, certificate = _try_until_certified(
                search, search.stacks(subsets), folder or temporary, options
            )
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the latter of the former
            where = f"kept in {folder}, and the same call goes on" if folder else "lost, as there is no folder"
            console.print(f"The search was stopped; stacks of tries that are complete are {where}.")
            raise
    best = min(itertools.compress(rows, ~failed(losses)), key=lambda row: row["loss"])
    return Found(
        tuple(best["features"]),
        None if columns is None else tuple(columns[feature] for feature in best["features"]),
        certificate,
        len({(row["stack"], row["place"]) for row in rows}),
        search.refit(best["features"]),
        rows,
    )


def _try_until_certified(
    search: _Search, settings: list[dict[str, Any]], folder: str | Path, options: dict[str, Any]
) -> tuple[list[Row], Tensor, Certificate]:
    """Train one stack after the other, several at a time, until the tries are certified; return them, and their losses."""
    restarts, rows, losses = search.restarts, list[Row](), list[Tensor]()
    keys = ("stack", "place", "subset", "count", "features", "loss")
    n_at_once = n_workers(options["n_jobs"], options["backend"])
    for first in range(0, len(settings), n_at_once):
        some = settings[first : first + n_at_once]
        tries = [some[0]["stack"] * restarts.together + 1, min((some[-1]["stack"] + 1) * restarts.together, restarts.n)]
        title = f"tries {tries[0]} to {tries[1]} of at most {restarts.n}"
        try:
            found = sweep(partial(_run_stack, search), some, folder, title=title, **options)
        except SweepError as error:
            raise RuntimeError(f"a stack of tries failed: {error.failures[0].error}") from error
        for setting in some:
            own = [row for row in found if row["stack"] == setting["stack"]]
            losses.append(torch.tensor([row["losses"] for row in own], dtype=torch.float64))
            rows += [{key: row[key] for key in keys} for row in own]
            tested = torch.cat(losses)
            if (certificate := search.certify(tested, setting["stack"])).holds:
                return rows, tested, certificate
    return rows, tested, certificate


class _Parts(NamedTuple):
    """Which examples, int64, tries are trained on and which are held out; the labels that these have, and which each has."""

    fitted: Tensor
    held: Tensor
    labels: Tensor
    which: Tensor


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
    restarts: Restarts
    seed: int
    description: str

    def stacks(self, subsets: Sequence[int]) -> list[dict[str, Any]]:
        """Divide the tries into stacks; the setting of each tells searches apart."""
        words = " ".join([self.description, fingerprint(self.x), fingerprint(self.y)])
        key = hashlib.sha256(words.encode()).hexdigest()
        plan = {key: getattr(self.restarts, key) for key in ("pretraining", "annealing", "batch_size", "held_out")}
        shared = {"key": key, "counts": list(self.counts), "seed": self.seed, **plan}
        together, n = self.restarts.together, self.restarts.n
        return [
            {
                **shared,
                "stack": i,
                "subset": subsets[i % len(subsets)],
                "n_tries": min(together, n - i * together),
            }
            for i in range(self.restarts.n_stacks)
        ]

    def parts(self) -> _Parts:
        """Draw what tries are trained on, and what is held out."""
        n, n_labels = len(self.y), len(torch.unique(self.y, dim=0))
        order = torch.randperm(n, generator=self._generator(_HELD_OUT))
        most = min(MAX_HELD, MAX_CELLS // min(n_labels, math.isqrt(MAX_CELLS)))
        n_held = min(most, max(2, round(self.restarts.held_out * n)))
        if n - n_held < 2:
            raise ValueError(
                f"held_out is {self.restarts.held_out} of {n} examples; allowed is what leaves two or more to train on"
            )
        held = order[:n_held]
        return _Parts(order[n_held:], held, *torch.unique(self.y[held], dim=0, return_inverse=True))

    def _generator(self, *purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.seed, *purpose))

    def certify(self, losses: Tensor, number: int) -> Certificate:
        """Ask, after each stack, whether the lowest held-out loss, of ``(try, example, label)``, can be chance."""
        level = self.restarts.level / self.restarts.n_stacks
        return certify(losses, self.parts().which, level, self._generator(_PERMUTATIONS, number))

    def run(self, number: int, subset: int, n_tries: int) -> list[Row]:
        """Train a stack of tries."""
        restarts, p = self.restarts, self.x.shape[1]
        purposes = [[mixed_seed(self.seed, number, place, it) for place in range(n_tries)] for it in range(3)]
        columns = torch.stack(
            [
                torch.randperm(p, generator=torch.Generator().manual_seed(seed))[:subset].sort().values
                for seed in purposes[_SUBSET]
            ]
        )  # (member, subset)
        fitted, held, labels, which = self.parts()
        stacked = stack([_seeded(seed, partial(self.network, subset)) for seed in purposes[_WEIGHTS]], purposes[_ORDER])
        data = [self._columns(fitted, columns), self.y[fitted].expand(n_tries, *self.y[fitted].shape)]
        loader = self._loader(data, purposes[_ORDER])
        further = max(2, restarts.annealing // FURTHER)
        ends = [restarts.pretraining + restarts.annealing + further * i for i in range(len(self.counts))]
        total = ends[-1]
        schedules = [
            Geometric(restarts.pretraining / total, ends[0] / total),
            *(OneShot((end + 1) / total) for end in ends[:-1]),
        ]
        pruning = [
            CPNAPruning({self.weight: count}, granularity="feature", schedule=schedule, name=f"features_{count}")
            for count, schedule in zip(self.counts, schedules, strict=True)
        ]
        counts = dict(zip(ends, self.counts, strict=True))
        measure = _Features(self.weight, columns, self._columns(held, columns), labels, counts, self.can_drop)
        self._fit(stacked, loader, total, [*pruning, measure])
        if not measure.found:
            raise ValueError(
                "trainer: it left out its argument callbacks; allowed is one that has those that it is given"
            )
        return [
            {
                "place": place,
                "count": count,
                "features": features[place].tolist(),
                "loss": float(losses[place].gather(1, which[:, None]).mean()),
                "losses": [[float(f"{loss:.7g}") for loss in example] for example in losses[place].tolist()],
            }
            for place in range(n_tries)
            for count, (features, losses) in measure.found.items()
        ]

    def _columns(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Take each member's columns of some rows, ``(member, row, column)``."""
        return torch.stack([self.x[rows][:, own] for own in columns])

    def refit(self, features: list[int]) -> LightningModule:
        """Train a network on some features alone."""
        seed = mixed_seed(self.seed, _REFIT)
        network = _seeded(seed, partial(self.network, len(features)))
        stacked = stack([network], [seed])
        self._fit(stacked, self._loader([self.x[None, :, features], self.y[None]], [seed]), self.restarts.refit, [])
        fitted = member(stacked, 0).eval()
        for ours, theirs in zip(_tensors(fitted), _tensors(network), strict=True):
            ours.data = ours.data.to(theirs.dtype)  # a trainer of precision="64-true" changed it
        return fitted

    def _loader(self, tensors: list[Tensor], seeds: list[int]) -> DataLoader[tuple[Tensor, ...]]:
        """Make batches for a stack; a last one of a single example, which BatchNorm refuses, is left out."""
        n = tensors[0].shape[1]
        size = min(self.restarts.batch_size, n)
        return member_loader(tensors, batch_size=size, seeds=seeds, drop_last=size > 1 and n % size == 1)

    def _fit(self, module: LightningModule, loader: Iterable[Any], epochs: int, callbacks: list[Callback]) -> None:
        with _quiet():
            trainer = self.trainer(
                max_epochs=epochs,
                callbacks=[_Examples(), *callbacks],
                logger=False,
                log_every_n_steps=0,  # there is no logger
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader)
        if trainer.current_epoch < epochs:
            raise ValueError(
                f"trainer: it ended after {trainer.current_epoch} epochs; allowed is one that trains {epochs}"
            )
        module.to("cpu")


class _Examples(Callback):
    """Puts the examples where the network is, so that no step waits for them."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move them."""
        tensors = trainer.train_dataloader.dataset.tensors  # type: ignore[union-attr]
        tensors[:] = [tensor.to(pl_module.device) for tensor in tensors]


class _Features(Callback):
    """Notes, when counts are reached, which features the members have left, and their losses on the held-out examples.

    As features die, they are dropped from the weight and from the examples, where the network allows that.

    Args:
        weight: Which parameter reads the features.
        columns: Which features each member reads, int64 ``(member, feature)``.
        held: The held-out examples, ``(member, example, feature)``.
        labels: The labels that an example can have, ``(label, ...)``.
        counts: How many features should be left, by the number of epochs after which it is noted.
        can_drop: Whether the network can do with fewer features.

    Attributes:
        found: By count: the features, int64 ``(member, count)``, and the losses, ``(member, example, label)``.
    """

    def __init__(
        self, weight: str, columns: Tensor, held: Tensor, labels: Tensor, counts: dict[int, int], can_drop: bool
    ) -> None:
        self.weight, self.columns, self.held, self.labels = weight, columns, held, labels
        self.counts, self.can_drop = counts, can_drop
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

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

        def cut(tensor: Tensor) -> Tensor:
            """Keep what is left of ``(member, other, feature)``."""
            return tensor.gather(2, live.to(tensor.device)[:, None, :].expand(-1, tensor.shape[1], -1))

        replace_(parameter, cut, trainer.optimizers)
        sparsity.masks.replace({self.weight: Mask(cut(mask.dead), cut(mask.removed))})
        assert sparsity.graph is not None
        sparsity.graph = sparsity.graph.cut({}, {self.weight: torch.arange(live.shape[1])})
        self.columns, self.held = self.columns.gather(1, live), cut(self.held)
        tensors = trainer.train_dataloader.dataset.tensors  # type: ignore[union-attr]
        tensors[0] = cut(tensors[0])

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if a count should be reached."""
        if (count := self.counts.get(trainer.current_epoch + 1)) is None:
            return
        live = self._live(pl_module)
        if live.shape[1] != count:
            raise ValueError(
                f"trainer: after {trainer.current_epoch + 1} epochs {live.shape[1]} features are left where {count} should "
                "be; allowed is one that makes as many optimizer steps as it estimates"
            )
        self.found[count] = (self.columns.gather(1, live), self._losses(trainer, pl_module))

    def _losses(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """Return the loss of each held-out example with each label, ``(member, example, label)``."""
        x = self.held[:, :, None].to(module.device)  # (member, example, batch of one, feature)
        plugin: Any = trainer.precision_plugin
        losses_of: Callable[..., Tensor] = module.member_losses  # type: ignore[assignment]

        def of_examples(y: Tensor) -> Tensor:
            labels = y.to(module.device).expand(len(x), 1, *y.shape)  # (member, batch of one, ...)
            batch = plugin.convert_input((x, labels))
            losses: Tensor = torch.vmap(
                lambda own: losses_of((own, batch[1]), 0), in_dims=1, out_dims=1, chunk_size=256
            )(batch[0])
            return losses.cpu()

        with evaluating(module), plugin.forward_context():
            return torch.stack([of_examples(y) for y in self.labels], dim=2)


def _run_stack(search: _Search, *, stack: int, subset: int, n_tries: int, **_: Any) -> list[Row]:
    """Run one stack of a search; the rest of the setting says of which search."""
    return search.run(stack, subset, n_tries)


def _warn_of_few_orders(search: _Search) -> None:
    """Warn if the certificate hardly can hold, whatever is found."""
    restarts, which = search.restarts, search.parts().which
    needed, possible = restarts.n_stacks / restarts.level, n_orders(which)
    if possible < needed:
        warnings.warn(
            f"the labels of {len(which)} held-out examples can stand in {possible:.3g} orders, fewer than the {needed:.3g} "
            f"that a certificate compares with ({restarts.n_stacks} stacks / level {restarts.level}), so it will hardly ever "
            "hold; hold out more (held_out), ask less often (a smaller n, or more tries together), or raise the level",
            stacklevel=3,
        )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Go through all parameters and buffers."""
    return itertools.chain(module.parameters(), module.buffers())


def _seeded(seed: int, build: Callable[[], LightningModule]) -> LightningModule:
    """Build a network whose initialisation depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            network = build()
        except TypeError as error:
            error.add_note("network: it is called with a number of features, network(n_features)")
            raise
    if not (isinstance(network, nn.Module) and hasattr(network, "training_step")):
        raise ValueError(f"network returned a {type(network).__name__}; allowed is one that returns a LightningModule")
    return network


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
            for message in (".*does not have many workers", ".*LeafSpec", "You defined a `validation_step`"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
