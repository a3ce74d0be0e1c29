"""Networks that do not all run in every batch, or not through one forward."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_cpna import Annealing, CPNAPruning, sparsity_of
from tests.helpers import data, mlp, trainer, weights


class Adversaries(pl.LightningModule):
    """A generator (forward) and a discriminator; ``turns``: one a batch, else both in every batch."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.turns = turns
        self.discriminator, self.generator = mlp(), nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, z: Tensor) -> Tensor:
        made: Tensor = self.generator(z)
        return made

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        for turn, optimizer in enumerate(optimizers):
            if self.turns and turn != batch_idx % 2:
                continue
            optimizer.zero_grad()
            made = self.discriminator(self(torch.randn(16, 3)))
            real = self.discriminator(batch[0]) if turn == 0 else made.new_zeros(1)
            self.manual_backward(made.square().mean() + (real - 1).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.discriminator, self.generator)]


@pytest.mark.parametrize("turns", [False, True], ids=["both in a batch", "in turns"])
def test_a_generator_and_a_discriminator_are_pruned_each_by_its_own_steps(turns: bool) -> None:
    model, schedule = Adversaries(turns), Annealing(2, 6)
    callbacks = [
        CPNAPruning({"generator.2.weight": 30}, schedule=schedule, score="magnitude", name="generator"),
        CPNAPruning({"discriminator.2.weight": 5}, schedule=schedule, normalize=True, name="discriminator"),
        CPNAPruning({"generator.0.weight": 12}, schedule=Annealing(8, 9), normalize=False, name="inputs"),
    ]
    trainer(*callbacks).fit(model, data())
    layers = {layer.name: layer for layer in callbacks[0].report(model).layers}
    counts = [layers[f"{name}.weight"].connections for name in ("generator.2", "discriminator.2", "generator.0")]
    assert counts == [30, 5, 12]
    assert [callback.state_dict()["step"] for callback in callbacks] == 3 * [10 if turns else 20]
    assert layers["discriminator.0.weight"].live_units == 5, "inputs of dead units are gone"
    norms = weights(model)["discriminator.0.weight"].norm(dim=1)
    assert int((norms > 0).sum()) == 5


def test_what_a_generator_feeds_through_another_call_is_not_known() -> None:
    targets: dict[str, int | float] = {"generator.2.weight": 30, "discriminator.0.weight": 12}
    callback = CPNAPruning(targets, schedule=Annealing(2, 6), score="path", normalize=False)
    with pytest.raises(ValueError, match="'discriminator' is called by itself, with what another call computed"):
        trainer(callback).fit(Adversaries(turns=False), data())


class Routes(pl.LightningModule):
    """One forward with two routes from shared units, taken in turns, an optimizer each."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.shared, self.activation = nn.Linear(6, 16), activation()
        self.heads = nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])

    def forward(self, x: Tensor, route: int) -> Tensor:
        hidden = self.shared(x)
        out: Tensor = self.heads[route](self.activation(hidden) if route else hidden.relu())
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        optimizer = optimizers[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward((self(batch[0], batch_idx % 2) - batch[1]).square().mean())
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam([*self.shared.parameters(), *head.parameters()], lr=1e-2) for head in self.heads]


def routes() -> list[CPNAPruning]:
    return [CPNAPruning({f"heads.{i}.weight": 5}, schedule=Annealing(2, 6), name=f"head {i}") for i in (0, 1)]


def test_two_routes_in_turns_are_one_graph() -> None:
    model = Routes(nn.ReLU)
    trainer(*routes()).fit(model, data())
    masks = sparsity_of(model).masks
    live = [masks[f"heads.{i}.weight"].live.flatten() for i in (0, 1)]
    assert [int(mask.sum()) for mask in live] == [5, 5]
    assert torch.equal(masks["shared.weight"].live.any(1), live[0] | live[1]), "a unit lives while one head reads it"


def test_an_obstacle_on_a_route_that_runs_later_is_found_when_it_runs() -> None:
    with pytest.raises(ValueError, match=r"'shared\.weight'.*cannot be rescaled.*Tanh"):
        trainer(routes()[0], CPNAPruning({"heads.1.weight": 5}, normalize=False, name="later")).fit(
            Routes(nn.Tanh), data()
        )


def test_a_batch_that_is_skipped_leaves_no_hooks() -> None:
    class Skips(Routes):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.trainer.current_epoch == 0 else None

    model = Skips(nn.ReLU)
    trainer(*routes()).fit(model, data())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert sparsity_of(model).masks["heads.0.weight"].n_live == 5
