"""What TicketRewind does in a fit: rounds that equal fits of their own, exact counts, controls, and runs that resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpna import (
    Rewind,
    SparseLinear,
    TicketRewind,
    sparsity_of,
)
from tests.helpers import (
    Classifier,
    Spy,
    checkpoint,
    checkpoints,
    data,
    loaders,
    same,
    trainer,
)

NAMES = ["net.0.weight", "net.4.weight"]
TARGETS: dict[str, int | float] = {"net.0.weight": 20, "net.4.weight": 5}
EPOCHS, STEPS = 3, 12  # of a round of data(): 4 batches an epoch


class Module(Classifier):
    """BatchNorm, dropout, momentum and a learning rate that falls: all that a rewind must put back."""

    def __init__(self, sparse: bool = False, dropout: float = 0.2) -> None:
        first: nn.Module = SparseLinear(6, 16, 3) if sparse else nn.Linear(6, 16)
        super().__init__(nn.Sequential(first, nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", super().training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}]


def noted(trainer: Any, module: Any) -> dict[str, Any]:
    """Note all that trains, in dense shapes."""
    optimizer = trainer.optimizers[0]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for index, parameter in enumerate(module.parameters()):
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        state[f"momentum {index}"] = torch.zeros_like(parameter) if momentum is None else momentum.clone()
    return state | {"lr": torch.tensor(optimizer.param_groups[0]["lr"])}


def make(seed: int = 0, sparse: bool = False, dropout: float = 0.2) -> Module:
    pl.seed_everything(seed, verbose=False)
    module = Module(sparse, dropout)
    pl.seed_everything(seed + 100, verbose=False)  # what a fit begins with
    return module


class Hold(pl.Callback):
    """Multiplies weights and gradients by masks: our own words for a fit of a masked network."""

    def __init__(self, live: dict[str, Tensor]) -> None:
        self.live = live

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, live in self.live.items():
            pl_module.get_parameter(name).grad.mul_(live)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            for name, live in self.live.items():
                pl_module.get_parameter(name).mul_(live)


class Starts(pl.Callback):
    """Notes what every round begins with; it stands behind the ticket's callback."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch % EPOCHS == 0:
            self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})
            masks = sparsity_of(pl_module).masks
            self.masks.append({name: masks[name].live.clone() for name in NAMES})


@pytest.mark.parametrize("kind", ["torch's generator", "its own", "workers"])
def test_a_round_that_went_back_equals_a_fit_of_the_masked_network_step_by_step(kind: str) -> None:
    ticket = TicketRewind(TARGETS, epochs=EPOCHS, levels=2, controls=["reinit", "shuffle"])
    spy, starts, module = Spy(noted), Starts(), make()
    trainer(ticket, starts, spy, epochs=ticket.n_epochs).fit(module, loaders()[kind]())
    assert len(spy.answers) == 7 * STEPS
    for index, (state, live) in enumerate(zip(starts.weights, starts.masks, strict=True)):
        alone = make()
        alone.load_state_dict(state)
        pl.seed_everything(100, verbose=False)
        other = Spy(noted)
        trainer(Hold(live), other, epochs=EPOCHS).fit(alone, loaders()[kind]())
        for step, expected in enumerate(other.answers):
            assert same(spy.answers[index * STEPS + step], expected), (index, step)


def test_tickets_begin_with_snapshot_times_mask_and_controls_as_they_should() -> None:
    ticket = TicketRewind(TARGETS, epochs=EPOCHS, levels=2, controls=["reinit", "shuffle"])
    starts, module = Starts(), make()
    trainer(ticket, starts, epochs=ticket.n_epochs).fit(module, data())
    first = starts.weights[0]
    counts = [[int(live.sum()) for live in masks.values()] for masks in starts.masks]
    assert counts == [[96, 16], *[[43, 8]] * 3, *[[20, 5]] * 3]  # 96 (20 / 96)^.5 and 16 (5 / 16)^.5, rounded down
    assert [report.branch for report in ticket.reports] == ["init", *["reinit", "shuffle", "init"] * 2]
    assert [list(report.counts.values()) for report in ticket.reports] == counts
    assert [report.steps for report in ticket.reports] == [STEPS] * 7
    for level in (1, 2):
        reinit, shuffle, init = range(3 * level - 2, 3 * level + 1)
        for name in NAMES:
            masks = [starts.masks[index][name] for index in (reinit, shuffle, init)]
            assert torch.equal(masks[0], masks[2])
            assert not torch.equal(masks[1], masks[2])
            for index, mask in ((shuffle, masks[1]), (init, masks[2])):
                assert torch.equal(starts.weights[index][name], first[name] * mask)
            fresh = starts.weights[reinit][name]
            assert torch.equal(fresh != 0, masks[0])
            assert not torch.equal(fresh, first[name] * masks[0])
        for index in (reinit, shuffle, init):
            assert torch.equal(starts.weights[index]["net.1.running_var"], torch.ones(16))
    assert bool((starts.masks[6]["net.0.weight"] <= starts.masks[3]["net.0.weight"]).all())


def test_masks_keep_the_largest_weights_at_the_end_of_the_round_before() -> None:
    ticket = TicketRewind(TARGETS, epochs=EPOCHS, levels=1, controls=["reinit"])
    spy, starts, module = Spy(noted), Starts(), make()
    trainer(ticket, starts, spy, epochs=ticket.n_epochs).fit(module, data())
    for name, n in TARGETS.items():
        trained = spy.answers[STEPS - 1][name].abs().flatten()
        kept = starts.masks[1][name].flatten()
        assert int(kept.sum()) == n
        assert trained[kept].min() > trained[~kept].max()


def test_a_shared_budget_prunes_globally() -> None:
    ticket = TicketRewind({"net.[04].weight": 0.25}, epochs=EPOCHS, scope="shared")
    spy, starts, module = Spy(noted), Starts(), make()
    trainer(ticket, starts, spy, epochs=ticket.n_epochs).fit(module, data())
    trained = torch.cat([spy.answers[STEPS - 1][name].abs().flatten() for name in NAMES])
    kept = torch.cat([starts.masks[1][name].flatten() for name in NAMES])
    assert int(kept.sum()) == 112 // 4
    assert trained[kept].min() > trained[~kept].max()


@pytest.mark.parametrize("step", [1, 6, STEPS])
def test_rewound_to_a_step_the_network_is_what_it_was_then(step: int) -> None:
    class Start(pl.Callback):
        found: Any = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == STEPS and self.found is None:
                self.found = noted(trainer, pl_module)

    ticket = TicketRewind(TARGETS, epochs=EPOCHS, rewind_to=step)
    spy, start, module = Spy(noted), Start(), make()
    trainer(ticket, start, spy, epochs=ticket.n_epochs).fit(module, data())
    then, masks = spy.answers[step - 1], {name: sparsity_of(module).masks[name].live for name in NAMES}
    parameters = [name for name, _ in module.named_parameters()]
    for name, value in start.found.items():
        about = parameters[int(name.split()[1])] if name.startswith("momentum") else name
        assert torch.equal(value, then[name] * masks[about] if about in masks else then[name]), name


def test_kept_weights_go_on_and_learning_rates_begin_again() -> None:
    ticket = TicketRewind(TARGETS, epochs=EPOCHS, levels=2, rewind_to="keep", controls=["reinit"])
    spy, starts, module = Spy(noted), Starts(), make()
    trainer(ticket, starts, spy, epochs=ticket.n_epochs).fit(module, data())
    ends = [spy.answers[index * STEPS - 1] for index in range(1, 6)]
    for index, before in ((2, 0), (4, 2)):  # the tickets; between them stand the controls
        for name, value in starts.weights[index].items():
            mask = starts.masks[index].get(name, torch.tensor(1))
            assert torch.equal(value, ends[before][name] * mask), name
    rates = [float(answer["lr"]) for answer in spy.answers]
    assert rates == rates[:STEPS] * 5


SWITCHES = {
    "weights": ("net.0.weight", lambda start, end, first: torch.equal(start, end * (start != 0))),
    "buffers": ("net.1.running_var", lambda start, end, first: torch.equal(start, end)),
}


@pytest.mark.parametrize("part", SWITCHES)
def test_what_shall_not_go_back_stays(part: str) -> None:
    name, stays = SWITCHES[part]
    for goes in (True, False):
        spy, starts, module = Spy(noted), Starts(), make()
        ticket = TicketRewind(TARGETS, epochs=EPOCHS, rewind_to=Rewind(**{part: goes}))
        trainer(ticket, starts, spy, epochs=ticket.n_epochs).fit(module, data())
        end, first = spy.answers[STEPS - 1][name], starts.weights[0][name]
        assert stays(starts.weights[1][name], end, first) is not goes


def test_the_order_of_batches_goes_back_only_if_it_shall() -> None:
    for goes in (True, False):
        order = Spy(lambda *_: None)
        seen: list[Tensor] = []
        order.on_train_batch_start = lambda trainer, module, batch, index, seen=seen: seen.append(batch[0])  # type: ignore[method-assign,misc]
        ticket = TicketRewind(TARGETS, epochs=EPOCHS, rewind_to=Rewind(sampler=goes))
        trainer(ticket, order, epochs=ticket.n_epochs).fit(make(), data(shuffle=True))
        again = [torch.equal(a, b) for a, b in zip(seen[:STEPS], seen[STEPS:], strict=True)]
        assert all(again) if goes else not any(again)


def test_steps_go_on_and_the_fit_ends_with_the_last_round() -> None:
    ticket = TicketRewind(TARGETS, epochs=EPOCHS, levels=2, controls=["shuffle"])
    spy = Spy(lambda trainer, _: trainer.global_step)
    fit = trainer(ticket, spy, epochs=-1)
    fit.fit(make(), data())
    assert spy.answers == list(range(1, 5 * STEPS + 1))
    assert fit.current_epoch == ticket.n_epochs == 15
    assert len(ticket.reports) == 5


WAYS: dict[str, dict[str, Any]] = {
    "init": {"controls": ["reinit", "shuffle"]},
    "step": {"rewind_to": 2, "controls": ["shuffle"]},
    "keep": {"rewind_to": "keep", "controls": ["reinit"]},
    "units": {"granularity": "unit", "controls": ["shuffle"]},
    "weights only": {"rewind_to": Rewind(optimizer=False, buffers=False, schedule=False)},
}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("way", WAYS)
def test_resuming_in_any_round_equals_not_having_stopped(tmp_path: Path, way: str, sparse: bool) -> None:
    def ticket() -> TicketRewind:
        targets = {"net.0.weight": 4} if way == "units" else {"net.0.weight": 20}
        return TicketRewind(targets, epochs=EPOCHS, levels=2, monitor="loss", **WAYS[way])  # type: ignore[arg-type]

    # A file has no dropout's state, and an epoch that is resumed in the middle begins with its first batch again.
    model, whole = make(sparse=sparse, dropout=0.0), ticket()
    x, y = next(iter(data(batch_size=16)))
    batches = DataLoader(TensorDataset(x.repeat(2, 1), y.repeat(2, 1)), batch_size=16)
    files = checkpoint(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False)
    fit = trainer(whole, files, enable_checkpointing=True, epochs=whole.n_epochs)
    fit.fit(model, batches, batches)
    saved = checkpoints(tmp_path)
    assert len(saved) == 2 * whole.n_epochs
    for path in saved[:: 3 if way == "init" else 7]:
        other, resumed = make(seed=1, sparse=sparse, dropout=0.0), ticket()
        torch.manual_seed(5)
        again = trainer(resumed, epochs=whole.n_epochs)
        again.fit(other, batches, batches, ckpt_path=path, weights_only=True)
        assert [report.counts for report in resumed.reports] == [report.counts for report in whole.reports], path.stem
        step = int(
            path.stem.split("=")[1]
        )  # the file is written before validation: at the end of a round it lacks the metric
        expected = [None if step == 2 * EPOCHS * (i + 1) else report.value for i, report in enumerate(whole.reports)]
        assert [report.value for report in resumed.reports] == expected, path.stem
        for name, mask in sparsity_of(model).masks.items():
            assert torch.equal(mask.live, sparsity_of(other).masks[name].live), (path.stem, name)
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), (path.stem, name)
