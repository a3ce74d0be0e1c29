"""Seven things that Lightning's own ModelPruning (2.6.6) gets wrong, each right here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_cpna import TicketRewind, infer_masks, sparsity_of
from tests.helpers import Classifier, RankSpy, Spy, checkpoint, data, trainer, two_processes

TARGETS: dict[str, int | float] = {"net.0.weight": 24, "net.2.weight": 4}


def ticket(**options: Any) -> TicketRewind:
    return TicketRewind(TARGETS, **({"epochs": 2} | options))


def n_live(module: nn.Module) -> list[int]:
    return [int((module.get_parameter(name) != 0).sum()) for name in TARGETS]


def test_1_sparsity_survives_a_resume(tmp_path: Path) -> None:
    files = checkpoint(tmp_path, every_n_epochs=1)
    trainer(ticket(), files, epochs=4, enable_checkpointing=True).fit(Classifier(), data())
    for path in tmp_path.glob("*.ckpt"):
        other = Classifier()
        trainer(ticket(), epochs=4).fit(other, data(), ckpt_path=path, weights_only=True)
        assert n_live(other) == [24, 4], path.stem


def test_2_a_file_of_weights_only_is_one_of_the_plain_network_and_is_sparse(tmp_path: Path) -> None:
    files = checkpoint(tmp_path, save_weights_only=True, every_n_epochs=1)
    trainer(ticket(), files, epochs=4, enable_checkpointing=True).fit(Classifier(), data())
    plain = Classifier()
    plain.load_state_dict(torch.load(tmp_path / "step=16.ckpt", weights_only=True)["state_dict"], strict=True)
    assert n_live(plain) == [24, 4]
    sparsity_of(plain).masks = infer_masks(plain, list(TARGETS))
    trainer(TicketRewind(epochs=1), epochs=2).fit(plain, data())
    assert n_live(plain) == [24, 4]


def test_3_the_same_callback_serves_three_fits_and_a_new_one_serves_a_pruned_network() -> None:
    callback, noted = ticket(), []
    for _ in range(3):
        pl.seed_everything(0, verbose=False)
        module = Classifier()
        trainer(callback, epochs=4).fit(module, data())
        noted.append(copy.deepcopy(module.state_dict()))
        assert n_live(module) == [24, 4]
        assert len(callback.reports) == 2
    assert all(torch.equal(value, state[name]) for state in noted[1:] for name, value in noted[0].items())
    trainer(TicketRewind({"net.0.weight": 10}, epochs=2), epochs=4).fit(module, data())
    assert n_live(module) == [10, 4]


def test_4_the_network_can_be_copied_in_every_round() -> None:
    copies = Spy(lambda _, module: copy.deepcopy(module))
    trainer(ticket(controls=["reinit", "shuffle"]), copies, epochs=8).fit(Classifier(), data())
    assert n_live(copies.answers[-1]) == [24, 4]
    assert copies.answers[-1](torch.rand(2, 6)).shape == (2, 1)


def test_5_momentum_running_statistics_and_learning_rate_go_back_with_the_weights() -> None:
    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def state(trainer: Any, module: Any) -> list[Any]:
        optimizer = trainer.optimizers[0]
        return [
            module.net[1].running_mean.clone(),
            optimizer.param_groups[0]["lr"],
            [key for key in optimizer.state if len(optimizer.state[key])],
        ]

    class Starts(Spy):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.answers.append(self.ask(trainer, pl_module))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pass

    starts = Starts(state)
    trainer(TicketRewind({"net.0.weight": 12}, epochs=2), starts, epochs=4).fit(Module(), data())
    first, second, again, _ = starts.answers
    assert second[1] == 0.05
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], again[0])
    assert again[1:] == first[1:] == [0.1, []]


class Unseeded(Classifier):
    def configure_model(self) -> None:
        torch.manual_seed(torch.distributed.get_rank())  # as without seed_everything


class Stop(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch == 3  # in the control's round


@pytest.mark.parametrize("control", ["reinit", "shuffle"])
def test_6_two_processes_draw_the_same_masks_and_weights(tmp_path: Path, control: Any) -> None:
    callbacks = [ticket(controls=[control]), Stop(), RankSpy(tmp_path)]
    trainer(*callbacks, epochs=6, **two_processes()).fit(Unseeded(), data())
    masks, weights = zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)), strict=True)
    for name in TARGETS:
        assert torch.equal(masks[0][name], masks[1][name])
        assert int(masks[0][name].sum()) == TARGETS[name]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_7_a_density_is_what_remains_in_the_end_and_does_not_compound() -> None:
    def live(trainer: Any, module: Any) -> int:
        return sparsity_of(module).masks["net.0.weight"].n_live

    spy = Spy(live)
    trainer(TicketRewind({"net.0.weight": 0.5}, epochs=2, levels=3), spy, epochs=8).fit(Classifier(), data())
    assert spy.answers[::8] == [96, 76, 60, 48]


def test_no_hook_is_left_on_the_network() -> None:
    module = Classifier()
    trainer(ticket(controls=["reinit"]), epochs=6).fit(module, data())

    def hooks(part: nn.Module) -> list[Any]:
        return [*part._forward_hooks, *part._forward_pre_hooks, *part._state_dict_hooks, *part._backward_hooks]

    assert not [hook for part in module.modules() for hook in hooks(part)]
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in Classifier().named_parameters()]


def test_every_unmasked_tensor_is_left_alone() -> None:
    module = Classifier()
    trainer(ticket(), epochs=4).fit(module, data())
    assert set(sparsity_of(module).masks) == set(TARGETS)
    biases: list[Tensor] = [module.get_parameter("net.0.bias"), module.get_parameter("net.2.bias")]
    assert all(bool((bias != 0).all()) for bias in biases)
