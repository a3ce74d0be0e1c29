"""Whatever else writes to weights or to the optimizer, a removed connection does not come back, and nothing is silent."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cpna import CPNAPruning, Cubic, Geometric, OneShot, infer_masks, sparsity_of
from tests.helpers import (
    AVERAGING,
    Classifier,
    SinglePrecision,
    checkpoint,
    data,
    trainer,
)


def pruning(**options: Any) -> CPNAPruning:
    defaults: dict[str, Any] = {"schedule": Cubic(2, 10), "normalize": False}
    return CPNAPruning({"net.0.weight": 9}, **(defaults | options))


def non_zeros(module: nn.Module, name: str = "net.0.weight") -> int:
    return int((module.get_parameter(name) != 0).sum())


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_have_the_zeros_in_the_end_and_in_checkpoints(
    tmp_path: Path, averaging: str, first: bool
) -> None:
    model, files = Classifier(), checkpoint(tmp_path, every_n_train_steps=12)
    callbacks = [pruning(), AVERAGING[averaging]()]
    trainer(*(callbacks if first else callbacks[::-1]), files, epochs=10, enable_checkpointing=True).fit(model, data())
    assert non_zeros(model) == 9
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) == 3
    for file in saved:
        assert int((torch.load(file, weights_only=True)["state_dict"]["net.0.weight"] != 0).sum()) == 9


def test_raw_optimizers_in_manual_optimisation_revive_nothing() -> None:
    class Raw(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    model = Raw()
    trainer(pruning()).fit(model, data())
    assert non_zeros(model) == 9


def test_an_optimizer_state_from_a_dense_run_revives_nothing(tmp_path: Path) -> None:
    model = Classifier()
    trainer(pruning()).fit(model, data())
    trainer(checkpoint(tmp_path), enable_checkpointing=True).fit(Classifier(), data())
    file = next(tmp_path.glob("*.ckpt"))
    with pytest.warns(UserWarning, match="its schedule starts from step 0"):
        trainer(pruning(), epochs=6).fit(model, data(), ckpt_path=file)
    assert non_zeros(model) == 9


def test_inferred_masks_are_held_and_zeros_without_a_mask_are_pointed_out() -> None:
    model = Classifier()
    trainer(pruning()).fit(model, data())
    other, warned = copy.deepcopy(model), copy.deepcopy(model)
    sparsity_of(other).masks = infer_masks(other, ["net.0.weight"])
    trainer(pruning(schedule=OneShot(1))).fit(other, data())
    assert torch.equal(other.net[0].weight != 0, model.net[0].weight != 0)
    with pytest.warns(UserWarning, match=r"'net.0.weight' has 87 exact zeros but no mask.*infer_masks"):
        trainer(pruning()).fit(warned, data())


def test_a_zero_that_an_initialisation_drew_by_chance_is_not_pointed_out() -> None:
    model = Classifier(nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1)))
    with torch.no_grad():
        model.net[0].weight[3, 2] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exact zeros.*")
        trainer(pruning()).fit(model, data())


class InParts(Classifier):
    """Called part by part, as Lightning's autoencoders are."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Linear(16, 1)
        self.net = nn.ModuleList([self.encoder, self.head])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self.head(self.encoder(x)), y)


def test_a_network_called_in_parts_is_not_silently_left_unnormalised() -> None:
    with pytest.raises(ValueError, match=r"is called by itself.*put both into one forward.*score='magnitude'"):
        trainer(CPNAPruning({"net.1.weight": 5}, schedule=Cubic(2, 10))).fit(InParts(), data())
    model = InParts()
    by_magnitude = CPNAPruning({"net.1.weight": 5}, schedule=Cubic(2, 10), score="magnitude", normalize=False)
    trainer(by_magnitude).fit(model, data())
    assert non_zeros(model, "net.1.weight") == 5


def test_a_count_that_is_not_reached_is_said_in_the_end() -> None:
    with pytest.warns(
        UserWarning, match=r"ended with \d+ of 'net.0.weight', where 9 should remain \(20 optimizer steps"
    ):
        trainer(pruning(schedule=Geometric(2, 500))).fit(Classifier(), data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": {"net.0.bias": 5}, "score": "path"}, "'path' must know the neighbours of 'net.0.bias'"),
        ({"targets": {"net.0.bias": 5}, "granularity": "feature"}, "'net.0.bias' has no input axis"),
    ],
)
def test_what_a_score_or_a_granularity_needs_is_asked_at_the_start(options: Any, message: str) -> None:
    targets = options.pop("targets")
    model = Classifier()
    with pytest.raises(ValueError, match=message):
        trainer(CPNAPruning(targets, schedule=OneShot(15), normalize=False, **options)).fit(model, data())


def test_a_frozen_target_is_refused() -> None:
    model = Classifier()
    model.net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'net.0.weight' is frozen"):
        trainer(CPNAPruning({"net.2.weight": 5, "net.0.weight": 9}, schedule=OneShot(3))).fit(model, data())


def test_a_network_that_needs_all_rows_is_traced_on_all_rows() -> None:
    class Graphs(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            out: Tensor = self(batch[0], torch.ones(3, len(batch[0])))
            return out.square().mean()

        def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
            assert adjacency is not None
            assert adjacency.shape[1] == len(x)
            out: Tensor = self.net(x)
            return adjacency @ out

    model = Graphs()
    trainer(CPNAPruning({"net.2.weight": 5}, schedule=Cubic(2, 10))).fit(model, data())
    assert non_zeros(model, "net.2.weight") == 5


def test_a_module_that_cannot_be_traced_is_not_kept_alive() -> None:
    def fit() -> weakref.ref[nn.Module]:
        model = Classifier(SinglePrecision())
        callback = CPNAPruning({"net.inner.2.weight": 5}, schedule=Cubic(1, 10), score="magnitude", normalize=False)
        with pytest.warns(UserWarning, match="could not be traced"):
            trainer(callback).fit(model, data())
        return weakref.ref(model)

    alive = fit()
    gc.collect()
    assert alive() is None
