"""TicketRewind with the masks of other callbacks, on sparse layers, in loggers and command lines, and what it refuses."""

from __future__ import annotations

import copy
import csv
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Cubic,
    EpochFraction,
    Geometric,
    NeuronPruning,
    OneShot,
    Rewind,
    SETRewiring,
    SparseLinear,
    TicketRewind,
    plot_tickets,
    sparsity_of,
)
from tests.helpers import (
    Classifier,
    OtherClassifier,
    RankSpy,
    Spy,
    checkpoint,
    data,
    live_masks,
    loaders,
    mlp,
    tensorboard,
    trainer,
    two_processes,
)

HIDDEN, LAST = "net.0.weight", "net.2.weight"


class Starts(pl.Callback):
    """Notes what the first step of every round begins with."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.weights = epochs, list[dict[str, Tensor]]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch % self.epochs == 0 and batch_idx == 0:
            self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


class Watched(Classifier):
    """Has a validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))


def fit(module: Any, *callbacks: Any, epochs: int, **options: Any) -> Any:
    run = trainer(*callbacks, epochs=epochs, **options)
    run.fit(module, data(), data())
    return run


@pytest.mark.parametrize("first", [True, False])
def test_what_cpna_pruned_goes_back_to_the_beginning(first: bool) -> None:
    prune = [
        CPNAPruning({LAST: 5}, schedule=Annealing(2, 6), name="hidden"),
        CPNAPruning({HIDDEN: 12}, schedule=Geometric(7, 11), normalize=False, name="input"),
    ]
    ticket, starts = TicketRewind(epochs=3, controls=["reinit", "shuffle"]), Starts(3)
    module = Classifier()
    begin = copy.deepcopy(module.state_dict())
    fit(module, *([ticket, *prune] if first else [*prune, ticket]), starts, epochs=ticket.n_epochs)
    assert [report.counts for report in ticket.reports] == [{LAST: 5, HIDDEN: 12}] * 4
    masks = live_masks(module)
    for name, value in begin.items():
        assert torch.equal(starts.weights[3][name], value * masks[name] if name in masks else value), name
    assert int((starts.weights[1][HIDDEN] != 0).sum()) == int((starts.weights[2][HIDDEN] != 0).sum()) == 12


@pytest.mark.parametrize("schedule", [Cubic(2, 8), EpochFraction(0.3, 0, 1)])
def test_units_that_neuron_pruning_took_stay_away(schedule: Any) -> None:
    ticket, starts, module = TicketRewind(epochs=3), Starts(3), Classifier()
    begin = copy.deepcopy(module.state_dict())
    pruning = NeuronPruning(
        [HIDDEN] if isinstance(schedule, EpochFraction) else {HIDDEN: 5}, schedule=schedule, score="norm"
    )
    fit(module, pruning, ticket, starts, epochs=ticket.n_epochs)
    masks = live_masks(module)
    units = masks[HIDDEN].all(1)
    assert torch.equal(masks[HIDDEN].any(1), units)
    assert torch.equal(masks[LAST][0], units)
    assert int(units.sum()) == (5 if isinstance(schedule, Cubic) else 16 - 4 - 3)
    for name, value in begin.items():
        assert torch.equal(starts.weights[1][name], value * masks[name] if name in masks else value), name


def test_units_go_in_levels_and_random_ones_are_as_many() -> None:
    ticket = TicketRewind({HIDDEN: 4}, epochs=2, levels=2, granularity="unit", controls=["reinit", "shuffle"])
    starts, module = Starts(2), Classifier()
    fit(module, ticket, starts, epochs=ticket.n_epochs)
    units = [weights[HIDDEN].any(1) for weights in starts.weights]
    assert [int(unit.sum()) for unit in units] == [16, *[8] * 3, *[4] * 3]
    assert torch.equal(units[1], units[3])
    assert not torch.equal(units[2], units[3])
    assert [report.counts[LAST] for report in ticket.reports[1:]] == [8, 8, 8, 4, 4, 4]


def test_rewiring_goes_on_after_a_rewind_and_new_connections_begin_at_zero() -> None:
    ticket, starts, module = TicketRewind(epochs=3), Starts(3), Classifier()
    fit(module, SETRewiring([HIDDEN], epsilon=2), ticket, starts, epochs=ticket.n_epochs)
    first, second = starts.weights
    there = first[HIDDEN] != 0
    assert torch.equal(second[HIDDEN][there] != 0, (second[HIDDEN] == first[HIDDEN])[there])
    assert bool((second[HIDDEN][~there] == 0).all())
    assert int((second[HIDDEN] != 0).sum()) < int(there.sum())
    assert ticket.reports[0].counts == ticket.reports[1].counts == {HIDDEN: 44}


class Double(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch[0].double(), batch[1].double()), batch_idx)

    validation_step = None  # type: ignore[assignment]


@pytest.mark.parametrize("to", ["init", 5, "keep"])
def test_a_sparse_layer_and_a_mask_make_the_same_tickets(to: Any) -> None:
    torch.manual_seed(0)
    first: Any = SparseLinear(6, 16, 3)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 1)).double()
    dense = nn.Sequential(first.to_dense(), nn.ReLU(), copy.deepcopy(net[2]))
    modules = Double(net), Double(dense)
    sparsity = sparsity_of(modules[1])
    sparsity.add_mask(HIDDEN)
    sparsity.remove_(HIDDEN, ~first.live)
    ends = []
    for module in modules:
        ticket = TicketRewind({HIDDEN: 20, LAST: 8}, epochs=2, levels=2, rewind_to=to)
        trainer(ticket, epochs=ticket.n_epochs).fit(module, data())
        layer = module.net[0]
        ends.append((layer.to_dense() if isinstance(layer, SparseLinear) else layer).weight.detach())
        assert [report.counts for report in ticket.reports][1:] == [{HIDDEN: 36, LAST: 11}, {HIDDEN: 20, LAST: 8}]
    assert int((ends[0] != 0).sum()) == 20
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_tensors_that_shrank_go_back_too() -> None:
    ends, starts = [], []
    for shrink in (False, True):
        pl.seed_everything(0, verbose=False)
        module, start = Classifier(mlp(24)), Starts(3)
        pruning = NeuronPruning({HIDDEN: 6}, schedule=OneShot(5), score="norm", compensate=None, shrink=shrink)
        ticket = TicketRewind(epochs=3, controls=["reinit"])
        fit(module, pruning, ticket, start, epochs=ticket.n_epochs)
        ends.append(module.state_dict())
        starts.append(start.weights)
    for index in range(3):
        for name, value in starts[0][index].items():
            small = starts[1][index][name]
            if index == 0 or name == LAST.replace("weight", "bias"):
                assert torch.equal(value, small)
    for name, value in ends[0].items():
        if name == "net.0.bias":  # of dead units: cut, or trained by weight decay alone
            continue
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-6)
    assert int((ends[1][HIDDEN] != 0).any(1).sum()) == 6


def test_a_sampler_that_counts_epochs_begins_again() -> None:
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    for goes in (True, False):
        sampler: Any = DistributedSampler(range(64), num_replicas=2, rank=0, seed=3)  # type: ignore[arg-type]
        loader = DataLoader(list(zip(x, y, strict=True)), batch_size=16, sampler=sampler)  # type: ignore[arg-type,var-annotated]
        seen: list[Tensor] = []

        class Order(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                seen.append(batch[0])  # noqa: B023

        trainer(TicketRewind({HIDDEN: 20}, epochs=3, rewind_to=Rewind(sampler=goes)), Order(), epochs=6).fit(
            Classifier(), loader
        )
        again = [torch.equal(a, b) for a, b in zip(seen[:6], seen[6:], strict=True)]
        assert all(again) if goes else not any(again)
        assert not torch.equal(seen[0], seen[2])


FILES: dict[str, dict[str, Any]] = {
    "after the epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
}


@pytest.mark.parametrize("when", FILES)
@pytest.mark.parametrize("kind", ["torch's generator", "its own", "workers"])
def test_a_file_from_between_two_rounds_goes_on_with_the_same_batches(tmp_path: Path, when: str, kind: str) -> None:
    seen: list[list[Tensor]] = []

    class Order(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen[-1].append(batch[0])

    def module() -> Classifier:
        pl.seed_everything(0, verbose=False)
        return Watched()

    files = checkpoint(tmp_path, **FILES[when])
    seen.append([])
    whole = module()
    trainer(TicketRewind({HIDDEN: 20}, epochs=2), files, Order(), epochs=4, enable_checkpointing=True).fit(
        whole, loaders()[kind](), data()
    )
    seen.append([])
    resumed = module()
    trainer(TicketRewind({HIDDEN: 20}, epochs=2), Order(), epochs=4).fit(
        resumed, loaders()[kind](), data(), ckpt_path=tmp_path / "step=8.ckpt", weights_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(seen[0][8:], seen[1], strict=True))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_rounds_are_logged_drawn_and_monitored(tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path, "", "run")
    ticket = TicketRewind({HIDDEN: 20}, epochs=2, levels=2, rewind_to=3, controls=["shuffle"], monitor="val/loss")
    metrics = Spy(lambda trainer, _: {key: float(value) for key, value in trainer.callback_metrics.items()})
    fit(Watched(), ticket, metrics, epochs=ticket.n_epochs, logger=logger, log_every_n_steps=1)
    ask = tensorboard(tmp_path)
    tags = set(ask("scalars/tags")["run"])
    assert {"ticket/step 3/val/loss", "ticket/shuffle/val/loss", "ticket/shuffle/connections", "ticket/level"} <= {
        tag.replace("_", " ").replace("at target", "at_target") for tag in tags
    }
    assert "ticket/tickets" in ask("images/tags")["run"]
    levels = [answer["ticket/level"] for answer in metrics.answers[7::8]]
    assert levels == [0, 1, 1, 2, 2]
    assert [answer["ticket/at_target"] for answer in metrics.answers[7::8]] == [0, 0, 0, 0, 1]
    figure = plot_tickets(ticket.reports, "val/loss")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"step 3", "shuffle", "dense"}
    shown = torch.tensor(lines["step 3"].get_xydata())
    ours = [(100 * r.density, r.value) for r in ticket.reports if r.branch == "step 3" and r.level]
    torch.testing.assert_close(shown, torch.tensor(ours, dtype=shown.dtype))
    assert ticket.reports[0].density == 1.0
    assert ticket.reports[-1].density == 20 / 96


def test_no_checkpoint_but_the_last_rounds_is_at_target(tmp_path: Path) -> None:
    files = checkpoint(tmp_path, monitor="ticket/at_target", mode="max", save_last=False)
    files.save_top_k = 1
    ticket = TicketRewind({HIDDEN: 20}, epochs=2, controls=["reinit"])
    fit(Classifier(), ticket, files, epochs=ticket.n_epochs, enable_checkpointing=True)
    assert Path(files.best_model_path).stem == "step=20"


def test_callback_and_module_are_pickled_in_the_middle() -> None:
    ticket = TicketRewind({HIDDEN: 20}, epochs=2, controls=["reinit"])
    copies = Spy(lambda *_: pickle.loads(pickle.dumps(ticket)))
    fit(Classifier(), ticket, copies, epochs=ticket.n_epochs)
    assert [len(copied.reports) for copied in copies.answers[7::8]] == [0, 1, 2]


def test_a_snapshot_is_kept_once_in_the_file_and_no_module_is(tmp_path: Path) -> None:
    files = checkpoint(tmp_path, every_n_epochs=1)
    trainer(TicketRewind({HIDDEN: 20}, epochs=2), files, epochs=4, enable_checkpointing=True).fit(
        Classifier(mlp(2000)), data()
    )
    size = (tmp_path / "step=4.ckpt").stat().st_size
    parameters = 4 * (6 * 2000 + 2000 + 2000 + 1)
    assert 4 * parameters < size < 4.8 * parameters  # weights, Adam's two moments, the weights of the snapshot


def test_both_packages_and_a_command_line(tmp_path: Path) -> None:
    import lightning.pytorch
    from pytorch_lightning import cli

    ticket = TicketRewind({HIDDEN: 20}, epochs=1, controls=["reinit"])
    trainer(ticket, epochs=3, package=lightning.pytorch).fit(OtherClassifier(), data())
    assert len(ticket.reports) == 3
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  max_epochs: 4
  callbacks:
    - class_path: lightning_cpna.TicketRewind
      init_args:
        targets: {net.0.weight: 20}
        epochs: 1
        levels: 2
        rewind_to: {class_path: lightning_cpna.Rewind, init_args: {to: 3, buffers: false}}
        controls: [shuffle]
    - class_path: lightning_cpna.TicketRewind
      init_args: {epochs: 1, rewind_to: keep, name: other}
"""
    )
    run = cli.LightningCLI(Classifier, run=False, args=["--config", str(config)], save_config_callback=None)
    first, second = (one for one in run.trainer.callbacks if isinstance(one, TicketRewind))  # type: ignore[attr-defined]
    assert first.rewind_to == Rewind(3, buffers=False)
    assert (first.n_epochs, second.n_epochs, second.rewind_to) == (5, 2, "keep")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"epochs": 0}, "epochs is 0; allowed is an int >= 1"),
    "levels": ({"levels": 2.0}, r"levels is 2\.0; allowed is an int >= 1"),
    "rewind_to": (
        {"rewind_to": "start"},
        r"rewind_to \(or to\) is 'start'; allowed is 'init', 'keep', or an optimizer step",
    ),
    "control": ({"controls": ["retrain"]}, "controls is 'retrain'; allowed is one of 'reinit', 'shuffle'"),
    "a string": ({"controls": "reinit"}, "controls is 'reinit'; allowed is a list"),
    "no list": ({"controls": True}, "controls is True; allowed is a list"),
    "monitor": ({"monitor": 3}, "monitor is 3; allowed is the name of a metric"),
    "the same again": ({"targets": None, "levels": 2, "controls": ["reinit"]}, "levels is 2; allowed without targets"),
    "twice": (
        {"controls": ["reinit", "reinit"]},
        "controls is .*; allowed is a list of 'reinit' and 'shuffle', each once",
    ),
    "fresh from a step": (
        {"controls": ["reinit"], "rewind_to": 5},
        "rewind_to is 5; allowed with it are 'init' and 'keep'",
    ),
    "granularity": ({"granularity": "row"}, "granularity is 'row'; allowed is one of"),
    "targets": ({"targets": {HIDDEN: 1.5}}, r"'net.0.weight' is 1\.5; allowed is a count"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_at_once(what: str) -> None:
    options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        TicketRewind(**{"targets": {HIDDEN: 20}, "epochs": 2, **options})


REFUSED_IN_A_FIT: dict[str, tuple[list[Any], str]] = {
    "nothing is pruned": ([TicketRewind(epochs=1)], "targets is None, but nothing is or will be pruned"),
    "a late step": (
        [TicketRewind({HIDDEN: 20}, epochs=1, rewind_to=5)],
        "rewind_to is 5; allowed is a step of the first round, 1 to 4",
    ),
    "no such metric": (
        [TicketRewind({HIDDEN: 20}, epochs=1, monitor="val_acc")],
        r"monitor is 'val_acc', which was not logged in this round .*; logged were .*ticket/connections",
    ),
    "rewired": (
        [SETRewiring([HIDDEN], epsilon=2), TicketRewind(epochs=1, controls=["reinit"])],
        r"controls is \['reinit'\], but another callback goes on exchanging connections",
    ),
    "pruned after the first round": (
        [CPNAPruning({HIDDEN: 5}, schedule=OneShot(6)), TicketRewind(epochs=1, controls=["reinit"])],
        "the first round ended with step 4, but 'cpna' goes on pruning; allowed with controls are schedules that end before",
    ),
    "two": (
        [TicketRewind({HIDDEN: 20}, epochs=1), TicketRewind({LAST: 5}, epochs=1, name="other")],
        "'other' rewinds this network, too; allowed is one TicketRewind in a Trainer",
    ),
    "a bias": (
        [TicketRewind({"net.0.*": 0.5}, epochs=1)],
        r"'net\.0\.bias' is no weight of a layer, but a bias or the scale of a normalisation",
    ),
    "averaged": (
        [TicketRewind({HIDDEN: 20}, epochs=1), pl.callbacks.StochasticWeightAveraging(1e-2)],
        "StochasticWeightAveraging keeps averages of the weights, which would not go back",
    ),
    "units of the output": (
        [TicketRewind({LAST: 1}, epochs=1, granularity="unit")],
        "they are the output of the network",
    ),
}


@pytest.mark.parametrize("what", REFUSED_IN_A_FIT)
def test_what_does_not_go_together_is_refused(what: str) -> None:
    callbacks, message = REFUSED_IN_A_FIT[what]
    with pytest.raises(ValueError, match=message):
        trainer(*copy.deepcopy(callbacks), epochs=3).fit(Classifier(), data())


def test_a_run_that_is_too_short_says_so_before_and_after() -> None:
    with pytest.warns(UserWarning, match="ticket:") as caught:
        trainer(TicketRewind({HIDDEN: 20}, epochs=2, levels=2), epochs=4).fit(Classifier(), data())
    messages = [str(warning.message) for warning in caught]
    assert any("3 rounds of 2 epochs need 6 epochs, but max_epochs is 4" in message for message in messages)
    assert any(
        "ended after 2 of 3 rounds, with the network of branch 'init' at level 1" in message for message in messages
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ticket:.*")
        trainer(TicketRewind({HIDDEN: 20}, epochs=2, levels=2), epochs=6).fit(Classifier(), data())


class Lost(pl.callbacks.EarlyStopping):
    pass


def test_early_stopping_is_warned_of() -> None:
    stop = Lost("ticket/connections", mode="min", patience=100)
    with pytest.warns(UserWarning, match="ticket: Lost would end the whole fit, not a round"):
        trainer(TicketRewind({HIDDEN: 20}, epochs=1), stop, epochs=2).fit(Classifier(), data())


@pytest.mark.parametrize(
    "changed", [{"epochs": 3}, {"levels": 2}, {"controls": []}, {"rewind_to": 2}, {"targets": {HIDDEN: 9}}]
)
def test_a_fit_is_not_resumed_with_other_arguments(tmp_path: Path, changed: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"targets": {HIDDEN: 20}, "epochs": 1, "controls": ["shuffle"]}
    files = checkpoint(tmp_path, every_n_epochs=1)
    trainer(TicketRewind(**arguments), files, epochs=3, enable_checkpointing=True).fit(Classifier(), data())
    [name] = changed
    with pytest.raises(ValueError, match=f"ticket: {name} is .*; allowed is what it was when the checkpoint was made"):
        trainer(TicketRewind(**arguments | changed), epochs=9).fit(
            Classifier(), data(), ckpt_path=tmp_path / "step=4.ckpt"
        )


def test_a_file_of_the_end_has_all_reports(tmp_path: Path) -> None:
    ticket = TicketRewind({HIDDEN: 20}, epochs=2, monitor="val/loss")
    fit(Watched(), ticket, checkpoint(tmp_path, every_n_epochs=1), epochs=4, enable_checkpointing=True)
    other = TicketRewind({HIDDEN: 20}, epochs=2, monitor="val/loss")
    trainer(other, epochs=4).validate(Watched(), data(), ckpt_path=tmp_path / "step=16.ckpt", verbose=False)
    assert other.reports == ticket.reports
    assert len(other.reports) == 2


def test_random_masks_of_a_network_that_was_pruned_before_have_weights_everywhere() -> None:
    module = Classifier(mlp(100))
    sparsity = sparsity_of(module)
    sparsity.add_mask(HIDDEN)
    sparsity.remove_(HIDDEN, torch.rand(100, 6) < 0.8)
    ticket, starts = TicketRewind(epochs=1, controls=["shuffle"]), Starts(1)
    fit(module, ticket, starts, epochs=3)
    n = sparsity.masks[HIDDEN].n_live
    assert [int(weights[HIDDEN].count_nonzero()) for weights in starts.weights] == [n] * 3


def test_controls_do_not_see_each_other_whatever_stays() -> None:
    class Falling(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    class Rates(Starts):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                optimizer = trainer.optimizers[0]
                state = [value["momentum_buffer"].clone() for value in optimizer.state.values()]
                self.weights.append(
                    {"lr": torch.tensor(optimizer.param_groups[0]["lr"]), "m": state[0] if state else nothing}
                )

    nothing = torch.zeros(0)
    rates = Rates(1)
    what = Rewind("init", optimizer=False, schedule=False)
    ticket = TicketRewind({LAST: 8}, epochs=1, rewind_to=what, controls=["reinit", "shuffle"])
    fit(Falling(), ticket, rates, epochs=4)
    assert [float(noted["lr"]) for noted in rates.weights] == [1.0, 0.5, 0.5, 0.5]
    _, first, second, third = (noted["m"] for noted in rates.weights)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


class Metrics(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("other", 1.0)


def test_a_metric_of_training_is_that_of_the_whole_epoch() -> None:
    ticket, means = TicketRewind({HIDDEN: 20}, epochs=2, monitor="loss"), list[float]()

    class Means(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            means.append(float(trainer.callback_metrics.get("loss_epoch", 0)))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            means.append(float(trainer.callback_metrics["loss_epoch"]))

    fit(Metrics(), ticket, Means(), epochs=4)
    assert [report.value for report in ticket.reports] == [means[2], means[4]]


def test_a_round_that_was_cut_short_is_not_reported() -> None:
    ticket = TicketRewind({HIDDEN: 20}, epochs=1)
    with pytest.warns(UserWarning, match="ended after 1 of 2 rounds, with the network of branch 'init' at level 1"):
        trainer(ticket, epochs=2, max_steps=5).fit(Classifier(), data())
    assert [report.steps for report in ticket.reports] == [4]


def test_a_fit_that_goes_on_after_the_last_round_is_not_stopped_again() -> None:
    ticket, module = TicketRewind({HIDDEN: 20}, epochs=1), Classifier()
    run = trainer(ticket, epochs=2)
    run.fit(module, data())
    run.fit_loop.max_epochs = 5
    run.fit(module, data())
    assert run.current_epoch == 5
    assert len(ticket.reports) == 2


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from iter(data(64, 16))


class ByHand(Classifier):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


@pytest.mark.parametrize(
    ("module", "loader", "options", "steps"),
    [
        (Classifier, lambda: DataLoader(Endless(), batch_size=None), {}, 8),
        (ByHand, data, {}, 24),
        (Classifier, data, {"accumulate_grad_batches": 2}, 4),
        (Classifier, data, {"gradient_clip_val": 0.1}, 8),
    ],
    ids=["iterable", "by hand", "accumulated", "clipped"],
)
def test_rounds_count_real_steps(module: Any, loader: Any, options: dict[str, Any], steps: int) -> None:
    ticket = TicketRewind({HIDDEN: 20}, epochs=2, rewind_to=3, controls=["shuffle"])
    trainer(ticket, epochs=6, **options).fit(module(), loader())
    assert [report.steps for report in ticket.reports] == [steps] * 3
    assert ticket.reports[-1].counts == {HIDDEN: 20}


@pytest.mark.parametrize(
    ("module", "options", "batches"),
    [
        (Classifier, {}, [7, 15, 23]),
        (Watched, {}, [7, 15, 23]),
        (Watched, {"check_val_every_n_epoch": 2}, [7, 15, 23]),
        (ByHand, {}, [7, 15, 23]),
        (Classifier, {"accumulate_grad_batches": 2}, [3, 7, 11]),
        (Classifier, {"log_every_n_steps": 0}, []),
    ],
    ids=["plain", "validated", "validated sometimes", "by hand", "accumulated", "never"],
)
def test_rounds_are_logged_at_their_last_batch(
    tmp_path: Path, module: Any, options: dict[str, Any], batches: list[int]
) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    ticket = TicketRewind({HIDDEN: 20}, epochs=2, rewind_to=3, controls=["shuffle"])
    trainer(ticket, epochs=6, logger=logger, **options).fit(module(), data(), data())
    file = Path(logger.log_dir) / "metrics.csv"
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    branches = [report.branch for report in ticket.reports]
    seen = [
        (int(row["step"]), branch)
        for row in rows
        for branch in dict.fromkeys(branches)
        if row.get(f"ticket/{branch}/connections")
    ]
    assert seen == list(zip(batches, branches, strict=False))


def test_a_dry_run_is_let_pass() -> None:
    with pytest.warns(UserWarning, match="ended after 0 of 2 rounds"):
        trainer(TicketRewind({HIDDEN: 20}, epochs=2, rewind_to=500), fast_dev_run=True).fit(Classifier(), data())


@pytest.mark.parametrize("control", ["reinit", "shuffle"])
def test_a_sparse_layer_is_controlled_in_two_processes(tmp_path: Path, control: Any) -> None:
    torch.manual_seed(0)
    module = Classifier(nn.Sequential(SparseLinear(6, 16, 3), nn.ReLU(), nn.Linear(16, 1)))
    ticket = TicketRewind({HIDDEN: 20}, epochs=1, controls=[control])
    trainer(ticket, RankSpy(tmp_path), epochs=3, **two_processes()).fit(module, data())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)[1] for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert int(first[HIDDEN].count_nonzero()) == 20


def test_the_gradient_scaler_goes_back() -> None:
    class Scaled(pl.plugins.Precision):
        scale = 1

        def state_dict(self) -> dict[str, Any]:
            return {"scale": self.scale}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.scale = state_dict["scale"]

    class Grow(pl.Callback):
        def __init__(self) -> None:
            self.scales: list[int] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.scales.append(trainer.precision_plugin.scale)
            trainer.precision_plugin.scale *= 2

    grow = Grow()
    trainer(TicketRewind({HIDDEN: 20}, epochs=1), grow, epochs=2, plugins=[Scaled()]).fit(Classifier(), data())
    assert grow.scales == [1, 2, 4, 8] * 2
