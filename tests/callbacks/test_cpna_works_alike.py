"""One promise a test: CPNAPruning works alike whatever the Trainer does around it."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Cubic,
    Geometric,
    Linear,
    Masks,
    OneShot,
    Score,
    infer_masks,
    keep_top,
    sparsity_of,
)
from tests.helpers import (
    Classifier,
    OtherClassifier,
    RankSpy,
    checkpoint,
    checkpoints,
    data,
    live_masks,
    mlp,
    trainer,
    two_processes,
    weights,
)

HIDDEN = Annealing(start=2, end=6)
INPUT = Geometric(start=8, end=16)


def two_callbacks() -> list[CPNAPruning]:
    return [
        CPNAPruning({"net.2.weight": 5}, schedule=HIDDEN, name="hidden"),
        CPNAPruning({"net.0.weight": 9}, schedule=INPUT, normalize=False, name="input"),
    ]


def live_counts(module: nn.Module) -> dict[str, int]:
    return {name: mask.n_live for name, mask in sparsity_of(module).masks.items()}


@pytest.mark.parametrize(
    ("package", "module"),
    [(pl, Classifier), (lightning.pytorch, OtherClassifier)],
    ids=["pytorch_lightning", "lightning"],
)
def test_the_trainers_of_both_packages_take_it(package: Any, module: Any) -> None:
    model = module()
    trainer(*two_callbacks(), package=package).fit(model, data())
    assert live_counts(model) == {"net.2.weight": 5, "net.0.weight": 9}
    model = module()
    package.Trainer(
        callbacks=CPNAPruning({"net.2.weight": 5}, schedule=HIDDEN),
        logger=False,
        accelerator="cpu",
        max_epochs=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(model, data())
    assert live_counts(model)["net.2.weight"] == 5


CLI_CONFIG = """
trainer:
  max_epochs: 5
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_cpna.CPNAPruning
      init_args:
        targets: {net.2.weight: 8}
        schedule: {class_path: lightning_cpna.Annealing, init_args: {start: 2, end: 6, mu: 5.0}}
        name: hidden
    - class_path: lightning_cpna.CPNAPruning
      init_args:
        targets: {net.0.weight: 0.25}
        schedule: {class_path: lightning_cpna.Geometric, init_args: {start: 0.5, end: 0.9, every: 2}}
        score: {class_path: lightning_cpna.Score, init_args: {kind: path, exponent: 2.0}}
        normalize: false
        name: input
    - class_path: lightning_cpna.CPNAPruning
      init_args:
        targets: {net.0.weight: 4}
        granularity: feature
        schedule: tests.callbacks.test_cpna_works_alike.four_at_once
        score: tests.callbacks.test_cpna_works_alike.column_sums
        name: features
"""


def four_at_once(step: int, n_start: int, n_end: int) -> int:
    return n_start if step < 7 else n_end


def column_sums(inputs: Any) -> Tensor:
    scores: Tensor = inputs.weight.abs()
    return scores


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_cli_reads_it_from_yaml(tmp_path: Path, package: str) -> None:
    cli = pytest.importorskip(f"{package}.cli", reason="the extra 'cli' is not installed")
    (tmp_path / "config.yaml").write_text(CLI_CONFIG)
    module = Classifier if package == "pytorch_lightning" else OtherClassifier
    run = cli.LightningCLI(
        module, run=False, save_config_callback=None, args=["--config", str(tmp_path / "config.yaml")]
    )
    run.trainer.fit(run.model, data())
    assert live_counts(run.model) == {"net.2.weight": 8, "net.0.weight": 24}
    hidden = run.trainer.callbacks[0]
    assert (hidden.schedule, hidden.name) == (Annealing(2, 6, mu=5.0), "hidden")


@pytest.mark.parametrize("options", [{}, {"score": "random", "normalize": False}, {"normalize": "transform"}])
def test_resuming_from_any_checkpoint_equals_not_having_stopped(tmp_path: Path, options: dict[str, Any]) -> None:
    def callbacks() -> list[CPNAPruning]:
        return [
            CPNAPruning({"net.2.weight": 5}, schedule=Annealing(2, 12), name="hidden", **options),
            two_callbacks()[1],
        ]

    pl.seed_everything(0)
    model = Classifier()
    start = weights(model)
    whole_batches = data(batch_size=64)  # the Trainer itself replays an epoch that it resumes in the middle
    files_callback = checkpoint(tmp_path, every_n_train_steps=3)
    trainer(*callbacks(), files_callback, enable_checkpointing=True, epochs=20).fit(model, whole_batches)
    files = checkpoints(tmp_path)
    assert len(files) == 6
    for file in files:
        resumed = Classifier()
        resumed.load_state_dict(start)
        trainer(*callbacks(), epochs=20).fit(resumed, whole_batches, ckpt_path=file)
        for name, value in weights(model).items():
            assert torch.equal(value, weights(resumed)[name]), (file.name, name)
        assert live_counts(resumed) == live_counts(model)


def test_a_checkpoint_loads_without_unsafe_pickle_and_into_the_plain_module(tmp_path: Path) -> None:
    trainer(*two_callbacks(), checkpoint(tmp_path, every_n_train_steps=5), enable_checkpointing=True).fit(
        Classifier(), data()
    )
    for file in checkpoints(tmp_path):
        content = torch.load(file, weights_only=True)
        Classifier().load_state_dict(content["state_dict"], strict=True)
        assert set(content["lightning_cpna"]["masks"]) >= {"net.0.weight", "net.2.weight"}


def test_resuming_without_its_state_warns(tmp_path: Path) -> None:
    trainer(checkpoint(tmp_path, every_n_train_steps=4), enable_checkpointing=True, epochs=1).fit(Classifier(), data())
    with pytest.warns(UserWarning, match="hidden: training goes on from step 4.*starts from step 0"):
        trainer(two_callbacks()[0]).fit(Classifier(), data(), ckpt_path=checkpoints(tmp_path)[0])


def test_a_file_with_weights_only_has_the_zeros_from_which_masks_are_inferred(tmp_path: Path) -> None:
    model = Classifier()
    files = checkpoint(tmp_path, save_weights_only=True, every_n_train_steps=10)
    trainer(*two_callbacks(), files, enable_checkpointing=True).fit(model, data())
    plain = Classifier()
    plain.load_state_dict(torch.load(checkpoints(tmp_path)[-1], weights_only=True)["state_dict"], strict=True)
    masks = infer_masks(plain, ["net.*.weight"])
    for name, mask in sparsity_of(model).masks.items():
        assert torch.equal(masks[name].live, mask.live)


def test_a_second_and_a_third_fit_keep_the_masks_and_train_on() -> None:
    model, callbacks = Classifier(), two_callbacks()
    trainer(*callbacks).fit(model, data())
    masks = live_masks(model)
    for _ in range(2):
        before = weights(model)
        trainer(*callbacks).fit(model, data())
        for name, live in masks.items():
            assert torch.equal(sparsity_of(model).masks[name].live, live)
            assert torch.equal(model.get_parameter(name) != 0, live)
            assert not torch.equal(before[name], weights(model)[name])


def test_the_same_callback_serves_another_module_from_its_start() -> None:
    callback = CPNAPruning({"net.2.weight": 5}, schedule=OneShot(9))
    counts = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append(live_counts(pl_module)["net.2.weight"])

    for _ in range(2):
        trainer(callback, Watch(), epochs=3).fit(Classifier(), data())
    assert counts == 2 * ([16] * 8 + [5] * 4)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_score_draws_from_its_seed_also_where_training_goes_on(seed: int) -> None:
    kept = []
    for dense_steps in (0, 4):
        model, score = Classifier(), Score("random", seed=seed)
        callback = CPNAPruning({"net.2.weight": 5}, schedule=OneShot(1), score=score)
        fitting = trainer(epochs=dense_steps // 4)
        fitting.fit(model, data())
        fitting.callbacks.append(callback)
        fitting.fit_loop.max_epochs = 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitting.fit(model, data())
        kept.append(sparsity_of(model).masks["net.2.weight"].live_cells)
    expected = keep_top(torch.rand(1, 1, 16, generator=torch.Generator().manual_seed(seed)), 5)
    assert all(cells.tolist() == expected.flatten().nonzero().flatten().tolist() for cells in kept)


def test_the_same_trainer_fitting_longer_goes_on_where_it_was() -> None:
    model, callback = Classifier(), CPNAPruning({"net.2.weight": 5}, schedule=OneShot(9))
    fitting = trainer(callback, epochs=2)
    fitting.fit(model, data())
    assert live_counts(model)["net.2.weight"] == 16
    fitting.fit_loop.max_epochs = 3
    fitting.fit(model, data())
    assert live_counts(model)["net.2.weight"] == 5


def test_two_named_instances_share_the_masks_and_two_of_one_name_are_refused() -> None:
    model, (hidden, inputs) = Classifier(), two_callbacks()
    trainer(hidden, inputs).fit(model, data())
    assert hidden.report(model) == inputs.report(model)
    assert hidden.state_key != inputs.state_key
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(CPNAPruning({"net.0.weight": 3}), CPNAPruning({"net.2.weight": 3}))


def test_module_and_callback_are_copied_and_pickled_while_training() -> None:
    copies: list[tuple[Any, Any]] = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            copies.append((copy.deepcopy(pl_module), copy.deepcopy(callback)))
            pickle.loads(pickle.dumps(callback))
            pickle.loads(pickle.dumps(pl_module))

    callback = two_callbacks()[0]
    model = Classifier()
    trainer(callback, Copy()).fit(model, data())
    assert torch.equal(copies[-1][0].net[2].weight, model.net[2].weight)
    assert copies[-1][1].state_dict()["step"] == 20


def test_accumulated_batches_count_as_one_step() -> None:
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append((trainer.global_step, live_counts(pl_module)["net.2.weight"]))

    schedule = Linear(start=0, end=4)
    callback = CPNAPruning({"net.2.weight": 4}, schedule=schedule)
    trainer(callback, Watch(), accumulate_grad_batches=3, epochs=2).fit(Classifier(), data(96))
    assert [n for _, n in seen] == [schedule.n_remaining(step, 16, 4) for step, _ in seen]
    assert [step for step, _ in seen] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_a_checkpoint_that_an_earlier_callback_saves_inside_a_batch_holds_what_its_step_pruned(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    trainer(Save(), *two_callbacks()).fit(Classifier(), data())
    for step in (1, 3, 4, 6, 11, 15, 16):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        model = Classifier()
        model.load_state_dict(saved["state_dict"])
        masks = Masks()
        masks.load_state_dict(saved["lightning_cpna"])
        moment = saved["optimizer_states"][0]["state"]
        for position, name, wanted in (
            (2, "net.2.weight", HIDDEN.n_remaining(step, 16, 5)),
            (0, "net.0.weight", INPUT.n_remaining(step, 6 * (16 if step < 4 else 5), 9)),
        ):
            live = masks[name].live
            assert int(live.sum()) == wanted, (step, name)
            assert torch.equal(model.get_parameter(name) != 0, live)
            assert torch.equal(moment[position]["exp_avg"] != 0, live)


def test_a_checkpoint_saved_inside_the_first_batch_of_a_fit_holds_what_its_step_pruned(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def live(step: int) -> int:
        masks = Masks()
        masks.load_state_dict(torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["lightning_cpna"])
        return masks["net.2.weight"].n_live

    schedule = Linear(start=0, end=8)
    trainer(Save(), CPNAPruning({"net.2.weight": 8}, schedule=schedule), epochs=1).fit(Classifier(), data())
    assert [live(step) for step in (1, 2, 3, 4)] == [15, 14, 13, 12]
    resumed = CPNAPruning({"net.2.weight": 8}, schedule=schedule)
    trainer(Save(), resumed, epochs=2).fit(Classifier(), data(), ckpt_path=tmp_path / "4.ckpt")
    assert [live(step) for step in (5, 6, 7, 8)] == [11, 10, 9, 8]


def test_a_step_whose_batch_broke_off_counts_and_the_next_one_prunes_for_both(tmp_path: Path) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("out of luck")

    callback, model = CPNAPruning({"net.2.weight": 8}, schedule=Linear(0, 8)), Classifier()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(Breaks(), callback).fit(model, data())
    assert (callback.state_dict()["step"], live_counts(model)["net.2.weight"]) == (3, 14)
    saver = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    broken = CPNAPruning({"net.2.weight": 8}, schedule=Linear(0, 8))
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(Breaks(), broken, saver, enable_checkpointing=True).fit(Classifier(), data())
    counts: list[int] = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append(live_counts(pl_module)["net.2.weight"])

    resumed = CPNAPruning({"net.2.weight": 8}, schedule=Linear(0, 8))
    trainer(resumed, Counts()).fit(Classifier(), data(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert counts[0] == Linear(0, 8).n_remaining(4, 16, 8)


@pytest.mark.parametrize("same_trainer", [False, True])
def test_a_callback_that_resumes_a_foreign_checkpoint_counts_from_zero(tmp_path: Path, same_trainer: bool) -> None:
    callback, model = CPNAPruning({"net.2.weight": 5}, schedule=OneShot(9)), Classifier()
    first = trainer(callback, epochs=3)
    first.fit(Classifier(), data())
    trainer(checkpoint(tmp_path), epochs=1, enable_checkpointing=True).fit(model, data())
    second = first if same_trainer else trainer(callback, epochs=3)
    with pytest.warns(UserWarning, match="there is no state of a CPNAPruning"):
        second.fit(model, data(), ckpt_path=tmp_path / "step=4.ckpt")
    assert callback.state_dict()["step"] == 8
    assert live_counts(model)["net.2.weight"] == 16


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_amp_skips_does_not_count(fused: bool) -> None:
    class Exploding(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            factor = torch.inf if batch_idx in (1, 2) else 1.0
            return super().training_step(batch, batch_idx) * factor

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net.parameters(), lr=1e-2, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    callback = CPNAPruning({"net.2.weight": 5}, schedule=OneShot(3), score="magnitude", normalize=False)
    steps = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            steps.append((trainer.global_step, callback.state_dict()["step"], live_counts(pl_module)["net.2.weight"]))

    model = Exploding()
    trainer(callback, Watch(), plugins=[precision], epochs=2).fit(model, data())
    assert steps == [(1, 1, 16), (2, 1, 16), (3, 1, 16), (4, 2, 16), (5, 3, 5), (6, 3, 5), (7, 3, 5), (8, 4, 5)]
    assert bool(torch.isfinite(model.net[2].weight).all())


def test_manual_optimisation_counts_the_optimizer_that_owns_the_first_target() -> None:
    class TwoOptimizers(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            optimizers: Any = self.optimizers()
            first, second = optimizers
            for optimizer, times in ((first, 2), (second, 1)):
                for _ in range(times):
                    optimizer.zero_grad()
                    self.manual_backward(super().training_step(batch, batch_idx))
                    optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[2])]

    model = TwoOptimizers()
    first, second = CPNAPruning({"net.2.weight": 5}, schedule=OneShot(5), name="a"), two_callbacks()[1]
    trainer(first, second).fit(model, data())
    assert first.state_dict()["step"] == 20
    assert second.state_dict()["step"] == 40
    assert live_counts(model) == {"net.2.weight": 5, "net.0.weight": 9}
    assert int((model.net[0].weight != 0).sum()) == 9


def test_a_model_built_in_configure_model_is_pruned() -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.net, nn.Identity):
                self.net = mlp()

    model = Late()
    trainer(*two_callbacks()).fit(model, data())
    assert live_counts(model) == {"net.2.weight": 5, "net.0.weight": 9}


@pytest.mark.parametrize(("score", "start"), [("path", "spawn"), ("random", "fork"), ("gradient", "fork")])
def test_two_processes_have_the_same_masks(tmp_path: Path, score: Any, start: Any) -> None:
    callbacks = [
        CPNAPruning({"net.2.weight": 5}, schedule=HIDDEN, score=score, name="hidden"),
        CPNAPruning({"net.0.weight": 9}, schedule=INPUT, score=score, normalize=False, name="input"),
    ]
    trainer(*callbacks, RankSpy(tmp_path), epochs=10, **two_processes(start)).fit(Classifier(), data())
    (masks, first), (others, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert {name: int(live.sum()) for name, live in masks.items()} == {"net.2.weight": 5, "net.0.weight": 9}
    for name, live in masks.items():
        assert torch.equal(live, others[name])
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name] != 0, live)


@pytest.mark.parametrize("compiled", ["module", "submodule"])
def test_torch_compile_does_not_recompile_when_masks_change(compiled: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    net = mlp()
    model: Any = Classifier(torch.compile(net, backend=counting) if compiled == "submodule" else net)
    fitting = torch.compile(model, backend=counting) if compiled == "module" else model
    counts = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append((graphs, live_counts(pl_module)["net.2.weight"]))

    callback = CPNAPruning({"net.2.weight": 5}, schedule=Cubic(2, 12))
    trainer(callback, Watch()).fit(fitting, data())
    assert len({n for _, n in counts}) > 5
    assert counts[1][0] > 0, "nothing was compiled"
    assert len({made for made, _ in counts[1:]}) == 1, "a mask change compiled something anew"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])
        return out


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Linear(1, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unsqueeze(-1))
        out: Tensor = self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))
        return out


@pytest.mark.parametrize(
    ("net", "targets"),
    [
        (Recurrent, {"net.lstm.weight_hh_l0": 0.2, "net.lstm.weight_ih_l0": 20}),
        (Attentive, {"net.attention.in_proj_weight": 40, "net.attention.out_proj.weight": 0.5}),
    ],
)
def test_recurrent_and_attention_weights_are_pruned(net: type[nn.Module], targets: dict[str, int | float]) -> None:
    model = Classifier(net())
    callback = CPNAPruning(targets, schedule=Cubic(1, 10), score="magnitude", normalize=False)
    trainer(callback).fit(model, data())
    for name, wanted in targets.items():
        size = model.get_parameter(name).numel()
        n = wanted if isinstance(wanted, int) else int(wanted * size + 0.5)
        assert live_counts(model)[name] == n
        assert int((model.get_parameter(name) != 0).sum()) == n


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_split_parameters_are_refused_by_name(strategy: str) -> None:
    fitting = trainer(two_callbacks()[0])
    fitting.strategy.__class__ = type(strategy, (type(fitting.strategy),), {})
    with pytest.raises(NotImplementedError, match=f"{strategy}.*strategy='ddp'"):
        fitting.fit(Classifier(), data())


def test_validation_between_steps_leaves_the_masks_alone() -> None:
    class Validated(Classifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]))

    model = Validated()
    fitting = trainer(*two_callbacks(), val_check_interval=2)
    fitting.fit(model, data(), data())
    fitting.validate(model, data())
    assert live_counts(model) == {"net.2.weight": 5, "net.0.weight": 9}


def test_a_datamodule_with_a_tensor_batch_works() -> None:
    class Tensors(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self(batch[0]).square().mean()
            return loss

    loader = DataLoader(TensorDataset(torch.randn(20, 6)), batch_size=5)
    model = Tensors()
    trainer(two_callbacks()[0], epochs=2).fit(model, loader)
    assert live_counts(model)["net.2.weight"] == 5
