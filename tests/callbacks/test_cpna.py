"""What CPNAPruning does in a fit: exact counts, zeros that stay, what it logs, what it refuses."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Cubic,
    Geometric,
    Linear,
    OneShot,
    Score,
    ScoreInputs,
    infer_masks,
    sparsity_of,
)
from tests.helpers import (
    Classifier,
    SinglePrecision,
    Spy,
    TwoSteps,
    data,
    live_masks,
    tensorboard,
    trainer,
    weights,
)


def live(module: nn.Module, name: str) -> int:
    return sparsity_of(module).masks[name].n_live


@pytest.mark.parametrize("schedule", [Annealing(3, 11), Cubic(3, 11, every=3), Geometric(3, 11), OneShot(5)])
def test_the_count_after_every_step_is_the_schedules(schedule: Any) -> None:
    spy = Spy(lambda trainer, module: live(module, "net.2.weight"))
    trainer(CPNAPruning({"net.2.weight": 5}, schedule=schedule), spy).fit(Classifier(), data())
    assert spy.answers == [schedule.n_remaining(step, 16, 5) for step in range(1, 21)]


def test_zeros_are_exact_and_final_after_every_step() -> None:
    def zeros(trainer: Any, module: Any) -> Tensor:
        mask = sparsity_of(module).masks["net.0.weight"]
        weight = module.net[0].weight
        moments = trainer.optimizers[0].state[weight]
        for tensor in (weight.detach(), weight.grad, moments["exp_avg"], moments["exp_avg_sq"]):
            assert bool((tensor[mask.dead] == 0).all())
        return mask.dead.clone()

    spy = Spy(zeros)
    callback = CPNAPruning({"net.0.weight": 9}, schedule=Cubic(1, 15), normalize=False)
    trainer(callback, spy, gradient_clip_val=0.5).fit(Classifier(), data())
    for before, after in zip(spy.answers, spy.answers[1:], strict=False):
        assert bool((after | ~before).all()), "a removed connection came back"
    assert int((~spy.answers[-1]).sum()) == 9


def test_gradients_are_masked_before_they_are_clipped() -> None:
    norms = []

    class Clipped(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            mask = sparsity_of(self).masks["net.0.weight"]
            norms.append(float(self.net[0].weight.grad[mask.dead].abs().sum()))

    trainer(CPNAPruning({"net.0.weight": 9}, schedule=OneShot(2), normalize=False)).fit(Clipped(), data())
    assert norms == [0.0] * 20


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Muon])
def test_an_optimizer_with_dense_updates_does_not_revive_what_is_removed(optimizer: Any) -> None:
    class Net(nn.Sequential):
        pass

    class Dense(Classifier):
        def configure_optimizers(self) -> Any:
            return optimizer(self.net.parameters(), lr=0.02)

    net = Net(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 1, bias=False))
    model = Dense(net)
    spy = Spy(lambda trainer, module: int((module.net[0].weight != 0).sum()) - live(module, "net.0.weight"))
    trainer(CPNAPruning({"net.0.weight": 9}, schedule=Cubic(1, 8), normalize=False), spy).fit(model, data())
    assert spy.answers == [0] * 20


HOOKS = [
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_end",
    "on_train_epoch_end", "on_train_end",
]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_a_checkpoint_saved_at_any_hook_loads_strictly_and_has_the_exact_zeros(tmp_path: Path, hook: str) -> None:
    class Validated(Classifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self(batch[0])

    def save(self: Any, trainer: Any, pl_module: Any, *_: Any) -> None:
        file = tmp_path / f"{len(saved)}.ckpt"
        trainer.save_checkpoint(file)
        saved.append((file, live_masks(pl_module)))

    saved: list[tuple[Path, dict[str, Tensor]]] = []
    saver = type("Saver", (pl.Callback,), {hook: save})()
    callback = CPNAPruning({"net.2.weight": 5}, schedule=Cubic(2, 15))
    trainer(callback, saver, val_check_interval=3).fit(Validated(), data(), data())
    assert saved
    for file, masks in saved:
        plain = Validated()
        plain.load_state_dict(torch.load(file, weights_only=True)["state_dict"], strict=True)
        for name, alive in masks.items():
            assert bool((plain.get_parameter(name)[~alive] == 0).all())
    assert len({int(masks["net.2.weight"].sum()) for _, masks in saved}) > 1 or hook in (
        "on_train_start",
        "on_train_end",
    )


def test_a_connection_that_happens_to_be_zero_stays_alive() -> None:
    model = Classifier()
    with torch.no_grad():
        model.net[2].weight.zero_()
    spy = Spy(lambda trainer, module: live(module, "net.2.weight"))
    trainer(CPNAPruning({"net.2.weight": 12}, schedule=OneShot(1)), spy).fit(model, data())
    assert spy.answers == [12] * 20


def test_three_hidden_layers_are_pruned_by_a_pattern_with_one_shared_budget() -> None:
    layers = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1)]
    model = Classifier(nn.Sequential(*layers))
    callback = CPNAPruning({"net.[024].weight": 60, "net.6.weight": 0.5}, schedule=Annealing(2, 12), scope="shared")
    trainer(callback).fit(model, data())
    counts = {layer.name: layer.connections for layer in callback.report(model).layers}
    assert sum(counts[f"net.{i}.weight"] for i in (0, 2, 4)) == 60
    assert min(counts.values()) >= 1
    assert counts["net.6.weight"] == 8


class Images(Classifier):
    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
                *(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 1)),
            )
        )


def test_a_small_cnn_is_pruned_by_a_pattern() -> None:
    loader = DataLoader(TensorDataset(torch.randn(32, 1, 12, 12), torch.rand(32, 1).round()), batch_size=8)
    model = Images()
    callback = CPNAPruning({"net.[379].weight": 0.1}, schedule=Annealing(2, 12))
    trainer(callback).fit(model, loader)
    sizes = {"net.3.weight": 86, "net.7.weight": 77, "net.9.weight": 2}
    assert {layer.name: layer.connections for layer in callback.report(model).layers if layer.name in sizes} == sizes


def test_units_of_a_hidden_layer_are_removed_with_what_they_feed() -> None:
    model = Classifier()
    callback = CPNAPruning({"net.0.weight": 3}, schedule=Cubic(2, 12), granularity="unit")
    trainer(callback).fit(model, data())
    rows = (model.net[0].weight != 0).any(1)
    columns = (model.net[2].weight != 0).any(0)
    assert int(rows.sum()) == 3
    assert torch.equal(rows, columns)


def test_features_are_removed_by_the_norm_of_their_column() -> None:
    model = Classifier()
    with torch.no_grad():
        model.net[0].weight[:, [1, 4]] *= 10
    callback = CPNAPruning({"net.0.weight": 2}, schedule=OneShot(1), granularity="feature")
    trainer(callback, epochs=1).fit(model, data())
    columns = (model.net[0].weight != 0).any(0)
    assert columns.nonzero().flatten().tolist() == [1, 4]


def test_a_function_scores_and_a_function_schedules() -> None:
    def backwards(inputs: ScoreInputs) -> Tensor:
        return -torch.arange(16.0).view(1, 1, 16)

    callback = CPNAPruning(
        {"net.2.weight": 5}, schedule=lambda step, n_start, n_end: n_start - step, score=backwards, normalize=False
    )
    model = Classifier()
    spy = Spy(lambda trainer, module: live(module, "net.2.weight"))
    trainer(callback, spy).fit(model, data())
    assert spy.answers == [max(5, 16 - step) for step in range(1, 21)]
    assert torch.equal(sparsity_of(model).masks["net.2.weight"].live[0], torch.arange(16) < 5)


def xor(k: int, p: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(2 * n, p, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, (x[:, :k].prod(1, keepdim=True) > 0).float()


def test_the_default_reaches_95_auc_on_the_3d_xor_in_60_dimensions() -> None:
    pl.seed_everything(7)
    x, y = xor(3, 60, 3000, seed=7)
    net = nn.Sequential(nn.Linear(60, 1024), nn.ReLU(), nn.Linear(1024, 1))
    model = Classifier(net)
    dataset = TensorDataset(x[:3000], y[:3000])
    batches = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(dataset), 256, drop_last=False)
    callback = CPNAPruning({"net.0.weight": 24, "net.2.weight": 12})
    trainer(callback, epochs=200).fit(model, DataLoader(dataset, sampler=batches, batch_size=None))
    with torch.no_grad():
        auc = float(binary_auroc(model(x[3000:]).squeeze(1), y[3000:].int().squeeze(1)))
    layers = {layer.name: layer for layer in callback.report(model).layers}
    assert (layers["net.0.weight"].connections, layers["net.2.weight"].connections) == (24, 12)
    assert auc >= 0.95


def test_at_target_lets_early_stopping_and_checkpoints_wait(tmp_path: Path) -> None:
    stop = pl.callbacks.EarlyStopping(
        "cpna/at_target", mode="max", stopping_threshold=0.5, patience=1000, check_on_train_epoch_end=True
    )
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="cpna/at_target", mode="max", save_on_train_epoch_end=True)
    callback = CPNAPruning({"net.2.weight": 5}, schedule=OneShot(10))
    fitting = trainer(callback, stop, best, epochs=20, enable_checkpointing=True)
    fitting.fit(Classifier(), data())
    assert fitting.current_epoch == 3
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]["net.2.weight"]
    assert int((saved != 0).sum()) == 5


def test_what_is_logged_agrees_with_a_count_by_hand() -> None:
    model = Classifier()
    callback = CPNAPruning({"net.2.weight": 5, "net.0.weight": 9}, schedule=Cubic(1, 10), normalize=False, name="both")
    fitting = trainer(callback)
    fitting.fit(model, data())
    logged = {name: float(value) for name, value in fitting.callback_metrics.items()}
    w, v = (model.get_parameter(name) != 0 for name in ("net.0.weight", "net.2.weight"))
    assert logged["both/connections"] == 14
    assert logged["both/density"] == pytest.approx(14 / (16 * 6 + 16))
    assert logged["both/at_target"] == 1
    assert logged["both/net.0.weight/connections"] == int(w.sum()) == 9
    assert logged["both/net.0.weight/target"] == 9
    assert logged["both/net.0.weight/live_features"] == int(w.any(0).sum())
    assert logged["both/net.0.weight/live_units"] == int((w.any(1) & v.any(0)).sum())
    assert logged["both/net.0.weight/effective"] == int(w[v.any(0)].sum())
    assert logged["both/net.2.weight/effective"] == int(v[:, w.any(1)].sum())
    assert logged["both/net.0.weight/threshold"] > 0


def test_the_progress_bar_shows_the_remaining_connections() -> None:
    spy = Spy(lambda trainer, module: dict(trainer.progress_bar_metrics).get("cpna/connections"))
    callback = CPNAPruning({"net.2.weight": 5}, schedule=Cubic(1, 10))
    trainer(callback, spy, enable_progress_bar=True, log_every_n_steps=1).fit(Classifier(), data())
    assert spy.answers[-1] == 5


def test_a_real_tensorboard_serves_scalars_pictures_the_plan_and_hyperparameters(tmp_path: Path) -> None:
    class Recorded(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 16})

    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    callback = CPNAPruning({"net.2.weight": 5, "net.0.weight": 9}, schedule=Cubic(1, 10), normalize=False)
    trainer(callback, logger=logger, log_every_n_steps=1).fit(Recorded(), data())
    logger.log_hyperparams({"width": 16}, {"final/connections": 14})
    logger.finalize("success")
    ask = tensorboard(tmp_path)
    scalars = ask("scalars/tags")["run"]
    assert {"cpna/connections", "cpna/at_target", "cpna/net.0.weight/threshold"} <= set(scalars)
    values = ask("scalars/scalars?tag=cpna/connections&run=run")
    assert values[-1][2] == 14
    assert list(ask("images/tags")["run"]) == ["cpna/connectivity"]
    pictures = [picture["step"] for picture in ask("images/images?tag=cpna/connectivity&run=run&sample=0")]
    assert (pictures[0], pictures[-1]) == (0, 19)
    assert len(pictures) >= 3  # of the first, one in between where a quarter of a layer is left, and the last
    assert ask("text/tags")["run"] == ["cpna/plan/text_summary"]
    assert "Cubic(start=1, end=10, every=1)" in ask("text/text?tag=cpna/plan/text_summary&run=run")[0]["text"]
    experiment = ask("hparams/experiment", {})
    assert [info["name"] for info in experiment["hparamInfos"]] == ["width"]
    assert [info["name"]["tag"] for info in experiment["metricInfos"]] == ["final/connections"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"targets": {}}, "targets is empty"),
    ({"targets": {"net.0.weight": 0}}, r"'net.0.weight' is 0; allowed is a count \(int >= 1\) or a density"),
    ({"targets": {"net.0.weight": 1.5}}, r"'net.0.weight' is 1.5; allowed"),
    ({"targets": {"net.0.weight": True}}, r"'net.0.weight' is True; allowed"),
    ({"granularity": "row"}, "granularity is 'row'; allowed is one of 'connection', 'feature', 'unit'"),
    ({"scope": "global"}, "scope is 'global'; allowed is one of 'layer', 'shared'"),
    ({"normalize": "yes"}, "normalize is 'yes'; allowed"),
    ({"score": "hessian"}, "score is 'hessian'; allowed is one of magnitude, normalized"),
    ({"name": ""}, "name is ''"),
    ({"schedule": "linear"}, "schedule is 'linear'; allowed is an instance of Annealing, .*, or a function"),
    ({"schedule": Linear}, "schedule is <class .*Linear'>; allowed is an instance"),
    ({"schedule": lambda step, n_start: 1}, r"schedule is .*; allowed is a function of 3 argument\(s\)"),
    ({"score": lambda: 1}, r"score is .*; allowed is a function of 1 argument\(s\)"),
    ({"score": 3}, "score is 3; allowed"),
    ({"schedule": 100}, "schedule is 100; allowed"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_bad_argument_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPNAPruning(**({"targets": {"net.2.weight": 5}} | arguments))


REFUSED_AT_START: list[tuple[CPNAPruning, str]] = [
    (CPNAPruning({"net.7.weight": 5}), "'net.7.weight' matches no parameter; did you mean net.2.weight"),
    (CPNAPruning({"net.2.weight": 17}), "17 should remain of 'net.2.weight', which has 16"),
    (CPNAPruning({"net.*.weight": 1}, scope="shared"), "2 layers keep one each"),
    (CPNAPruning({"net.*": 5, "net.2.weight": 4}), r"'net.2.weight' is matched by both"),
    (CPNAPruning({"net.*": 5}, normalize=False), "'net.*' matches 'net.0.bias' too, which is no weight of a layer"),
    (
        CPNAPruning({"net.0.weight": 5}, normalize=True),
        "'net.0.weight': it reads the input of the network; use normalize=False",
    ),
    (
        CPNAPruning({"net.2.weight": 1}, granularity="unit", schedule=OneShot(1)),
        "cannot be removed: they are the output",
    ),
]


@pytest.mark.parametrize(("callback", "message"), REFUSED_AT_START)
def test_a_target_that_does_not_fit_the_module_is_refused_and_nothing_is_lost(
    callback: CPNAPruning, message: str
) -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=message):
        trainer(callback).fit(model, data())
    assert all(mask.n_live == mask.dead.numel() for mask in sparsity_of(model).masks.values())


def test_fractions_of_a_run_of_unknown_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start=0.0 is a fraction of the run.*give start as a step"):
        trainer(CPNAPruning({"net.2.weight": 5}), epochs=-1).fit(Classifier(), data())


def test_a_target_without_an_optimizer_is_refused() -> None:
    class Frozen(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net[0].parameters())

    with pytest.raises(ValueError, match=r"'net.2.weight' is in no optimizer"):
        trainer(CPNAPruning({"net.2.weight": 5})).fit(Frozen(), data())


def test_a_nan_weight_stops_pruning_and_names_the_step() -> None:
    class Broken(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 2 else 1.0)

    with pytest.raises(ValueError, match="cpna: at step 3"):
        trainer(CPNAPruning({"net.2.weight": 5}, schedule=Cubic(1, 10))).fit(Broken(), data())


def test_hooks_are_gone_after_a_fit_and_after_an_exception() -> None:
    class Failing(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    model, callback = Classifier(), CPNAPruning({"net.2.weight": 5}, schedule=Cubic(1, 10))
    fitting = trainer(callback)
    fitting.fit(model, data())
    failing, failed = Failing(), trainer(callback)
    with pytest.raises(RuntimeError, match="out of luck"):
        failed.fit(failing, data())
    for module in [*model.modules(), *failing.modules()]:
        assert not module._forward_pre_hooks
    for optimizer in [*fitting.optimizers, *failed.optimizers]:
        assert not optimizer._optimizer_step_post_hooks


def test_a_gradient_score_without_gradients_is_refused() -> None:
    class Cleared(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            pass

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    callback = CPNAPruning({"net.2.weight": 5}, schedule=Cubic(1, 10), score=Score("gradient"), normalize=False)
    with pytest.raises(ValueError, match=r"'net.2.weight' has no gradient at the end of the batch"):
        trainer(callback).fit(Cleared(), data())


def test_a_module_that_cannot_be_traced_is_pruned_by_magnitude_with_a_warning_and_refused_otherwise() -> None:
    name = "net.inner.2.weight"
    by_magnitude = CPNAPruning({name: 5}, schedule=Cubic(1, 10), score="magnitude", normalize=False)
    with pytest.warns(UserWarning, match="could not be traced.*single precision only"):
        trainer(by_magnitude).fit(Classifier(SinglePrecision()), data())
    with pytest.raises(ValueError, match=r"could not be traced.*single precision only.*use normalize=False"):
        trainer(CPNAPruning({name: 5})).fit(Classifier(SinglePrecision()), data())


def test_weights_that_are_no_target_train_on() -> None:
    model = Classifier()
    before = weights(model)
    trainer(CPNAPruning({"net.2.weight": 5}, schedule=Cubic(1, 10))).fit(model, data())
    assert not torch.equal(before["net.0.bias"], model.net[0].bias)


def test_monitors_are_told_once_of_counts_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, str]] = []
    log = Classifier.log

    def note(self: Classifier, name: str, value: Any, **how: Any) -> None:
        told.append((self.global_step, name))
        log(self, name, value, **how)

    monkeypatch.setattr(Classifier, "log", note)
    pruning = CPNAPruning({"net.0.weight": 10}, schedule=OneShot(6), normalize=False)
    own = trainer(pruning, epochs=6)
    own.fit(Classifier(), data())
    names = [f"{pruning.name}/{key}" for key in ("connections", "density", "at_target")]
    assert [told_of for told_of in told if told_of[1] in names] == [(step, name) for step in (1, 6) for name in names]
    assert [float(own.callback_metrics[name]) for name in names] == pytest.approx([10, 10 / 96, 1])


def test_connections_are_logged_as_they_are_at_the_end_of_every_epoch_whatever_the_logging_interval() -> None:
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            names = ("connections", "density", "at_target")
            seen.append([float(trainer.callback_metrics[f"cpna/{name}"]) for name in names])

    schedule = Linear(0, 12)
    trainer(CPNAPruning({"net.2.weight": 4}, schedule=schedule), Watch(), log_every_n_steps=50).fit(
        Classifier(), data()
    )
    live = [schedule.n_remaining(4 * epoch, 16, 4) for epoch in range(1, 6)]
    assert seen == [[n, n / 16, float(n == 4)] for n in live]


@pytest.mark.parametrize(
    ("every", "steps"), [(50, [1, 4, 8, 10, 12, 16, 18]), (7, [1, 4, 7, 8, 10, 12, 14, 16, 18]), (0, [])]
)
def test_loggers_get_counts_at_the_target_and_at_the_ends_of_epochs_and_fit_whatever_the_logging_interval(
    tmp_path: Path, every: int, steps: list[int]
) -> None:
    schedule, logger = Linear(0, 10), CSVLogger(tmp_path)
    callback = CPNAPruning({"net.2.weight": 4}, schedule=schedule)
    trainer(callback, logger=logger, log_every_n_steps=every, max_steps=18).fit(Classifier(), data())
    file = Path(logger.log_dir) / "metrics.csv"
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    seen = [row for row in rows if row.get("cpna/connections")]
    assert [int(row["step"]) + 1 for row in seen] == steps
    for step, row in zip(steps, seen, strict=True):
        n = schedule.n_remaining(step, 16, 4)
        assert [float(row[f"cpna/{key}"]) for key in ("connections", "at_target")] == [n, n == 4]
    every_target = {int(row["step"]) + 1: row["cpna/net.2.weight/remaining"] for row in rows}
    for step in {1, 7, 10, 14, 18} & set(steps):
        assert float(every_target[step]) == schedule.n_remaining(step, 16, 4)
    assert all(int(row["epoch"]) == int(row["step"]) // 4 for row in rows)


@pytest.mark.parametrize(
    ("module", "every", "accumulated", "expected"),
    [
        (Classifier, 50, 2, {1: 13, 2: 10, 4: 4, 6: 4, 8: 4, 10: 4}),
        (Classifier, 3, 2, {1: 13, 2: 10, 3: 7, 4: 4, 6: 4, 8: 4, 9: 4, 10: 4}),
        (Classifier, 1, 2, {1: 13, 2: 10, 3: 7, **dict.fromkeys(range(4, 11), 4)}),
        (TwoSteps, 50, 1, {1: 16, 4: 10, 8: 4, 12: 4, 16: 4, 20: 4}),
        (TwoSteps, 3, 1, {1: 16, 3: 13, 4: 10, 6: 7, 8: 4, 9: 4, 12: 4, 15: 4, 16: 4, 18: 4, 20: 4}),
    ],
)
def test_loggers_get_each_count_once_where_a_batch_is_no_step(
    tmp_path: Path, module: type[Classifier], every: int, accumulated: int, expected: dict[int, int]
) -> None:
    logger, callback = CSVLogger(tmp_path), CPNAPruning({"net.2.weight": 4}, schedule=Linear(0, 4))
    fitting = trainer(callback, logger=logger, log_every_n_steps=every, accumulate_grad_batches=accumulated)
    fitting.fit(module(), data())
    assert given(logger) == list(expected.items())


def given(logger: CSVLogger) -> list[tuple[int, float]]:
    """Read what a logger was given: after which batch with a step, from 1, how many connections."""
    rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())
    return [(int(row["step"]) + 1, float(row["cpna/connections"])) for row in rows if row.get("cpna/connections")]


class Stop(pl.Callback):
    """Stops the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


@pytest.mark.parametrize("stop_first", [False, True])
@pytest.mark.parametrize("step", [3, 6, 10])
def test_loggers_get_true_counts_once_where_a_run_is_stopped(tmp_path: Path, step: int, stop_first: bool) -> None:
    schedule, logger = Linear(0, 10), CSVLogger(tmp_path)
    callbacks = [CPNAPruning({"net.2.weight": 4}, schedule=schedule), Stop(step)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training ended with.*")
        trainer(*(callbacks[::-1] if stop_first else callbacks), logger=logger, log_every_n_steps=50).fit(
            Classifier(), data()
        )
    steps = sorted({1, *range(4, step, 4), step})
    assert given(logger) == [(n, schedule.n_remaining(n, 16, 4)) for n in steps]


def test_loggers_get_what_is_left_at_the_end_of_the_fit_though_the_last_batch_had_more(tmp_path: Path) -> None:
    class Loses(Classifier):
        def on_train_epoch_end(self) -> None:
            where = torch.zeros(1, 16, dtype=torch.bool)
            where[0, :2] = True
            sparsity_of(self).remove_("net.2.weight", where)

    logger = CSVLogger(tmp_path)
    callback = CPNAPruning({"net.2.weight": 12}, schedule=OneShot(50), score="magnitude", normalize=False)
    with pytest.warns(UserWarning, match="training ended with 14"):
        trainer(callback, logger=logger, log_every_n_steps=1, epochs=1).fit(Loses(), data())
    assert given(logger) == [(1, 16), (2, 16), (3, 16), (4, 16), (4, 14)]


def test_a_second_fit_that_wants_more_than_the_first_left_says_so() -> None:
    model = Classifier()
    trainer(CPNAPruning({"net.2.weight": 4}, schedule=Linear(0, 10))).fit(model, data())
    message = "cpna: only 4 of 'net.2.weight' are left, where 9 should remain; what is gone does not come back"
    with pytest.warns(UserWarning, match=message):
        trainer(CPNAPruning({"net.2.weight": 9}, schedule=Linear(0, 10))).fit(model, data())


def test_it_says_so_too_where_a_checkpoint_was_tested_before(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    model, file = Tested(), tmp_path / "pruned.ckpt"
    first = trainer(CPNAPruning({"net.2.weight": 4}, schedule=Linear(0, 10)))
    first.fit(model, data())
    first.save_checkpoint(file)
    second = trainer(CPNAPruning({"net.2.weight": 9}, schedule=Linear(0, 10)))
    second.test(model, data(), ckpt_path=file, verbose=False)
    with pytest.warns(UserWarning, match="only 4 of 'net.2.weight' are left, where 9 should remain"):
        second.fit(model, data())


def test_less_than_the_budget_is_at_the_target_and_no_miss() -> None:
    model = Classifier()
    first = CPNAPruning({"net.2.weight": 8}, schedule=OneShot(2), name="first")
    second = CPNAPruning({"net.2.weight": 4}, schedule=OneShot(6), name="second")
    fitting = trainer(first, second)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*training ended with.*")
        fitting.fit(model, data())
    assert (
        float(fitting.callback_metrics["first/at_target"]) == float(fitting.callback_metrics["second/at_target"]) == 1
    )
    assert sparsity_of(model).masks["net.2.weight"].n_live == 4


def test_a_sparse_network_trains_on_without_pruning_more() -> None:
    model = Classifier()
    trainer(CPNAPruning({"net.2.weight": 5}, schedule=OneShot(1))).fit(model, data())
    loaded = Classifier()
    loaded.load_state_dict(model.state_dict())
    zeros = [parameter.detach() == 0 for parameter in loaded.net.parameters()]
    sparsity_of(loaded).masks = infer_masks(loaded, ["net.*.weight"])
    counts: dict[str, int | float] = {name: mask.n_live for name, mask in sparsity_of(loaded).masks.items()}
    trainer(CPNAPruning(counts, schedule=OneShot(), normalize=False)).fit(loaded, data())
    assert all(torch.equal(p == 0, zero) for p, zero in zip(loaded.net.parameters(), zeros, strict=True))
    assert not torch.equal(loaded.net[2].weight, model.net[2].weight)


class Validated(Classifier):
    """Has a validation, which logs what is live in it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("live", float(live(self, "net.2.weight")))


@pytest.mark.parametrize("every_epoch", [True, False])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"max_steps": 6}, {"accumulate_grad_batches": 3}])
def test_checkpoints_are_scored_with_the_count_that_they_hold(
    tmp_path: Path, options: dict[str, Any], every_epoch: bool
) -> None:
    scored = pl.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", monitor="cpna/connections", save_top_k=-1, save_on_train_epoch_end=every_epoch
    )
    pruning = CPNAPruning({"net.2.weight": 4}, schedule=Linear(0, 10))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training ended with.*")
        trainer(scored, pruning, enable_checkpointing=True, log_every_n_steps=50, **options).fit(
            Validated(), data(), data()
        )
    scores = {Path(file): float(score) for file, score in scored.best_k_models.items()}
    assert scores
    for file, score in scores.items():
        assert torch.load(file, weights_only=True)["state_dict"]["net.2.weight"].count_nonzero() == score


@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"val_check_interval": 1}])
def test_early_stopping_waits_for_the_target_where_a_validation_comes_before_the_first_step(
    options: dict[str, Any],
) -> None:
    stop = pl.callbacks.EarlyStopping("cpna/at_target", mode="max", stopping_threshold=0.5, patience=100)
    pruning = CPNAPruning({"net.2.weight": 4}, schedule=Linear(0, 4))
    fitting = trainer(pruning, stop, accumulate_grad_batches=4, **options)
    fitting.fit(Validated(), data(), data())
    assert fitting.global_step == 4


def test_of_two_callbacks_each_logs_what_both_left(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    first = CPNAPruning({"net.2.weight": 8}, schedule=Linear(0, 9), name="cpna")
    second = CPNAPruning({"net.2.weight": 4}, schedule=OneShot(4), name="second")
    watched = Spy(
        lambda trainer, module: float(trainer.callback_metrics["cpna/connections"]) == live(module, "net.2.weight")
    )
    trainer(first, second, watched, logger=logger, log_every_n_steps=1).fit(Classifier(), data())
    counts = [Linear(0, 9).n_remaining(step, 16, 8) for step in (1, 2, 3)]
    assert given(logger) == [*enumerate(counts, 1), *((step, 4) for step in range(4, 21))]
    assert all(watched.answers)


def test_masks_that_were_set_meanwhile_are_counted_at_the_end() -> None:
    class Sets(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            sparsity_of(self).masks = infer_masks(self, ["net.0.weight"])

    with pytest.warns(UserWarning, match="training ended with 16 of 'net.2.weight'"):
        trainer(CPNAPruning({"net.2.weight": 4}, schedule=Linear(8, 10)), max_steps=4).fit(Sets(), data())


def test_loggers_get_counts_at_the_ends_of_epochs_that_have_no_last_batch(tmp_path: Path) -> None:
    class Short(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    schedule, logger = Linear(0, 8), CSVLogger(tmp_path)
    trainer(CPNAPruning({"net.2.weight": 4}, schedule=schedule), logger=logger, log_every_n_steps=50).fit(
        Short(), data()
    )
    assert given(logger) == [(n, schedule.n_remaining(n, 16, 4)) for n in (1, 2, 4, 6, 8, 10)]
