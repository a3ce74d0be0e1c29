"""What the loggers get beside numbers: plans and moments of pictures by hand, and a network that must not be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from torch import nn

from lightning_cpna import (
    CPNAPruning,
    Geometric,
    NeuronPruning,
    OneShot,
    SETRewiring,
    SparseLinear,
    TicketRewind,
    connectivity,
)
from lightning_cpna.callbacks import board
from lightning_cpna.callbacks.board import ConnectivityPictures
from lightning_cpna.sparsity import Sparsity
from lightning_cpna.tracing import trace
from tests.helpers import N_FEATURES, Classifier, TwoSteps, checkpoint, checkpoints, data, trainer


class Experiment:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.figures: list[tuple[str, int]] = []

    def add_text(self, tag: str, text: str, global_step: int) -> None:
        self.texts[tag] = text

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        self.figures.append((tag, global_step))


class Board(DummyLogger):
    """A logger that takes texts and figures."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = Experiment()

    @property
    def experiment(self) -> Any:
        return self.taken


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def fitted(*callbacks: pl.Callback, module: Any = None, epochs: int = 5) -> Experiment:
    logger = Board()
    trainer(*callbacks, logger=logger, log_every_n_steps=1, epochs=epochs).fit(module or Classifier(), data())
    return logger.taken


def test_the_plan_of_the_default_recipe_by_hand() -> None:
    size = Classifier().net[2].weight.numel()
    (hidden, inputs) = rows(fitted(CPNAPruning({"net.2.weight": 5, "net.0.weight": 9})).texts["cpna/plan"])
    assert hidden[:3] == ["`net.2.weight`", f"{size} connections", "5"]
    assert "optimizer steps: Annealing(start=5, end=" in hidden[3]
    assert hidden[3].endswith(
        "score: Score(kind='path', exponent=0.0, seed=0); the units of `net.0.weight` are normalised"
    )
    assert "Geometric(start=" in inputs[3]
    assert "normalised" not in inputs[3]


def test_the_plans_of_the_other_callbacks_by_hand() -> None:
    neurons = NeuronPruning({"net.0.weight": 4}, schedule=Geometric(2, 9), compensate=None)
    taken = fitted(neurons, SETRewiring({"net.0.weight": 20}, every=4))
    width = Classifier().net[0].weight.shape[0]
    assert rows(taken.texts["neurons/plan"]) == [
        [
            "`net.0.weight`",
            f"{width} units",
            "4",
            "optimizer steps: Geometric(start=2, end=9, every=1); score: " + str(neurons._score),
        ]
    ]
    (rewired,) = rows(taken.texts["rewiring/plan"])
    assert rewired[:3] == ["`net.0.weight`", "20 connections", "20"]
    assert rewired[3].startswith("every 4 optimizer steps, zeta: 0.3; Growth(kind='random'")
    tickets = TicketRewind({"net.0.weight": 20}, epochs=2, levels=2, controls=["reinit"])
    (ticket,) = rows(fitted(tickets, epochs=tickets.n_epochs).texts["ticket/plan"])
    assert ticket[3].startswith("2 levels, rounds of 2 epochs: init, reinit; Rewind(to='init'")


def test_a_plan_names_functions() -> None:
    def halves(step: int, n_start: int, n_end: int) -> int:
        return max(n_end, n_start >> step)

    texts = fitted(CPNAPruning({"net.2.weight": 2}, schedule=halves, score="magnitude", normalize=False)).texts
    assert "halves; score: Score(kind='magnitude'" in texts["cpna/plan"]


def drawn_at(counts: list[int]) -> list[int]:
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    sparsity, logger = Sparsity(net), Board()
    sparsity.graph = trace(net, torch.randn(2, 8))
    pictures = ConnectivityPictures("tag")
    for step, n in enumerate(counts):
        dead = torch.zeros(64, dtype=torch.bool)
        dead[n:] = True
        sparsity.remove_("0.weight", dead.view(8, 8))
        pictures.draw([logger], sparsity, step, last=step == len(counts) - 1)
    return [step for _, step in logger.taken.figures]


def test_pictures_are_drawn_first_when_a_quarter_is_left_and_last_by_hand() -> None:
    assert drawn_at([64, 33, 17, 16, 5, 4, 3, 3]) == [0, 3, 5, 7]


@pytest.mark.parametrize(("limit", "expected"), [("MAX_CONNECTIONS", [1, 4]), ("MAX_UNITS", []), ("MAX_LAYERS", [])])
def test_a_network_that_is_too_large_is_not_drawn(
    monkeypatch: pytest.MonkeyPatch, limit: str, expected: list[int]
) -> None:
    monkeypatch.setattr(board, limit, {"MAX_CONNECTIONS": 40, "MAX_UNITS": 15, "MAX_LAYERS": 0}[limit])
    assert drawn_at([64, 33, 32, 17, 16]) == expected


def test_what_a_small_layer_lost_is_drawn_and_no_step_twice() -> None:
    for step, expected in ((7, [0, 6, 19]), (20, [0, 19])):
        net = nn.Sequential(nn.Linear(N_FEATURES, 40), nn.ReLU(), nn.Linear(40, 1))
        pruning = CPNAPruning({"net.2.weight": 4}, schedule=OneShot(step))
        assert [drawn for _, drawn in fitted(pruning, module=Classifier(net)).figures] == expected


def test_the_last_picture_is_of_what_is_left_after_all_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, int]] = []

    def noted(sparsity: Sparsity) -> Figure:
        drawn.append(sparsity.live_counts())
        return Figure()

    monkeypatch.setattr(board, "_picture", noted)
    common: dict[str, Any] = {"schedule": OneShot(20), "score": "magnitude", "normalize": False}
    fitted(
        CPNAPruning({"net.2.weight": 4}, name="first", **common),
        CPNAPruning({"net.0.weight": 5}, name="second", **common),
    )
    assert drawn[-1] == {"net.0.weight": 5, "net.2.weight": 4}


class InTurns(pl.LightningModule):
    """Two networks, of which the second runs from the third batch of an epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = Classifier().net, Classifier().net

    def training_step(self, batch: Any, batch_idx: int) -> None:
        place = int(batch_idx >= 2)
        optimizer: Any = self.optimizers()[place]  # type: ignore[index]
        optimizer.zero_grad()
        self.manual_backward((self.a, self.b)[place](batch[0]).square().mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=1e-2) for net in (self.a, self.b)]


def test_a_network_of_which_more_is_seen_later_is_drawn() -> None:
    first = CPNAPruning({"a.0.weight": 10}, schedule=Geometric(2, 9), score="magnitude", normalize=False, name="first")
    second = CPNAPruning({"b.2.weight": 3}, schedule=Geometric(2, 5), score="magnitude", normalize=False, name="second")
    assert len(fitted(first, second, module=InTurns()).figures) > 2


class Plain(Logger):
    """A logger that has what a logger must have, and nothing else."""

    name = version = "plain"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics = metrics

    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        raise AssertionError


def test_a_logger_without_an_experiment_gets_numbers() -> None:
    plain, taken = Plain(), Board()
    callback = CPNAPruning({"net.2.weight": 5}, schedule=Geometric(2, 9), normalize=False)
    trainer(callback, logger=[plain, taken], log_every_n_steps=1).fit(Classifier(), data())
    assert plain.metrics["cpna/connections"] == 5
    assert taken.taken.texts
    assert taken.taken.figures


def test_of_several_callbacks_one_draws_and_each_tells_its_plan() -> None:
    taken = fitted(
        CPNAPruning({"net.2.weight": 5}, schedule=Geometric(2, 9), normalize=False, name="first"),
        CPNAPruning({"net.0.weight": 9}, schedule=Geometric(4, 12), normalize=False, name="second"),
    )
    assert set(taken.texts) == {"first/plan", "second/plan"}
    assert {tag for tag, _ in taken.figures} == {"first/connectivity"}
    assert len({step for _, step in taken.figures}) == len(taken.figures)


def test_pictures_have_the_steps_of_the_counts_where_a_batch_takes_two() -> None:
    steps = {1, *range(3, 20, 2)}  # batches, from 0, that take steps, after which there is something new
    pruning = CPNAPruning({"net.2.weight": 2}, schedule=Geometric(1, 8), normalize=False)
    drawn = [step for _, step in fitted(pruning, module=TwoSteps()).figures]
    assert drawn == sorted(set(drawn))
    assert drawn[0] == 0
    assert drawn[-1] == 19
    assert set(drawn[1:-1]) < steps


def test_a_resumed_fit_tells_what_is_left_to_do(tmp_path: Path) -> None:
    def pruning() -> CPNAPruning:
        return CPNAPruning({"net.2.weight": 2}, schedule=Geometric(1, 12), normalize=False)

    logger = Board()
    first = trainer(pruning(), checkpoint(tmp_path, every_n_train_steps=5), enable_checkpointing=True)
    first.fit(Classifier(), data())
    file = next(path for path in checkpoints(tmp_path) if path.stem == "step=5")
    n_live = int(torch.load(file, weights_only=True)["state_dict"]["net.2.weight"].count_nonzero())
    resumed = Classifier()
    trainer(pruning(), logger=logger, log_every_n_steps=1).fit(resumed, data(), ckpt_path=file)
    (row,) = rows(logger.taken.texts["cpna/plan"])
    assert row[1:3] == [f"{n_live} connections", "2"]
    assert min(step for _, step in logger.taken.figures) == 5


def test_processes_but_the_first_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "is_global_zero", False)
    taken = fitted(CPNAPruning({"net.2.weight": 5}, schedule=Geometric(2, 9), normalize=False))
    assert (taken.texts, taken.figures) == ({}, [])


def test_a_fast_dev_run_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(board, "_picture", never)
    callback = CPNAPruning({"net.2.weight": 5}, schedule=OneShot(1), normalize=False)
    trainer(callback, logger=True, fast_dev_run=True).fit(Classifier(), data())


def test_a_network_that_is_shrunk_is_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []

    def noted(sparsity: Sparsity) -> Figure:
        sizes.append(connectivity(sparsity).sizes)
        return Figure()

    monkeypatch.setattr(board, "_picture", noted)
    features = CPNAPruning({"net.0.weight": 2}, schedule=Geometric(2, 15), granularity="feature", shrink=True)
    fitted(features)
    assert len(sizes) > 1
    assert set(sizes) == {(N_FEATURES, Classifier().net[0].out_features, 1)}


def test_layers_that_store_their_connections_are_drawn() -> None:
    net = nn.Sequential(SparseLinear(N_FEATURES, 12, 4.0), nn.ReLU(), nn.Linear(12, 1))
    prune = NeuronPruning({"net.0.weight": 3}, schedule=Geometric(2, 9), compensate=None)
    assert {tag for tag, _ in fitted(prune, module=Classifier(net)).figures} == {"neurons/connectivity"}
