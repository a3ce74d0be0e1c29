"""What NeuronPruning does in a fit: exact counts of units, nothing left of a removed one, the scores as they are."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Cubic,
    EpochFraction,
    Linear,
    OneShot,
    Score,
    UnitInputs,
    UnitScore,
    mean_replacement_penalties,
    sparsity_of,
    trace,
)
from lightning_cpna.callbacks import NeuronPruning
from tests.helpers import (
    Classifier,
    OtherClassifier,
    RankSpy,
    Spy,
    checkpoint,
    data,
    mlp,
    trainer,
    two_processes,
    weights,
)

KINDS = [
    "norm", "path", "in_degree", "out_degree", "activation", "gradient", "mean_replacement", "penalty",
    "frame_potential", "raw_frame_potential", "inner_product", "random",
]  # fmt: skip


def deep() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 1))


def units(module: nn.Module, name: str = "net.0.weight") -> int:
    return int(sparsity_of(module).masks[name].live.flatten(1).any(1).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_after_every_step_is_the_schedules_and_nothing_is_left_of_a_removed_unit(kind: Any) -> None:
    schedule = Cubic(0, 12)

    def count(trainer: Any, module: Any) -> int:
        sparsity = sparsity_of(module)
        gone = sparsity.masks["net.0.weight"].dead.all(1)
        assert torch.equal(sparsity.masks["net.2.weight"].dead[0] if "net.2.weight" in sparsity.masks else gone, gone)
        assert not module.net[0].weight[gone].any()
        assert not module.net[2].weight[:, gone].any()
        return units(module)

    spy = Spy(count)
    callback = NeuronPruning({"net.0.weight": 3}, schedule=schedule, score=UnitScore(kind))
    trainer(callback, spy).fit(Classifier(), data())
    assert spy.answers == [schedule.n_remaining(step, 16, 3) for step in range(1, 21)]


def test_a_shared_budget_is_exact_and_no_layer_loses_its_last_unit() -> None:
    model = Classifier(deep())
    trainer(NeuronPruning({"net.[02].weight": 4}, schedule=Cubic(1, 15), scope="shared", score="norm")).fit(
        model, data()
    )
    counts = [units(model, f"net.{i}.weight") for i in (0, 2)]
    assert sum(counts) == 4
    assert min(counts) >= 1
    with pytest.raises(ValueError, match="2 layers keep one each"):
        trainer(NeuronPruning({"net.[02].weight": 1}, scope="shared")).fit(Classifier(deep()), data())


def test_filters_of_a_convolution_go_with_the_columns_that_read_them() -> None:
    net = nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 5, 2), nn.Flatten(), nn.Linear(15, 1)
    )
    model = Classifier(net)
    targets: dict[str, int | float] = {"net.1.weight": 3, "net.3.weight": 0.4}
    trainer(NeuronPruning(targets, schedule=Linear(0, 10))).fit(model, data())
    assert [units(model, f"net.{i}.weight") for i in (1, 3)] == [3, 2]
    gone = sparsity_of(model).masks["net.3.weight"].live.flatten(1).any(1).logical_not()
    assert not model.get_parameter("net.5.weight").view(1, 5, 3)[:, gone].any()


@pytest.mark.parametrize("largest_first", [False, True])
def test_the_units_that_go_are_those_of_the_smallest_or_largest_norm(largest_first: bool) -> None:
    norms: list[Tensor] = []

    class Before(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                norms.append(pl_module.net[0].weight.detach().norm(dim=1))

    model = Classifier()
    score = UnitScore("norm", largest_first=largest_first)
    trainer(Before(), NeuronPruning({"net.0.weight": 6}, schedule=OneShot(5), score=score)).fit(model, data())
    kept = norms[0].topk(6, largest=not largest_first).indices.sort().values
    assert sparsity_of(model).masks["net.0.weight"].live.any(1).nonzero().flatten().tolist() == kept.tolist()


def test_the_exact_penalty_is_that_of_the_pure_function_on_the_steps_batch() -> None:
    found: list[tuple[Tensor, Tensor]] = []

    def score(inputs: UnitInputs) -> Tensor:
        found.append((inputs.penalties(), inputs.saliency("activation")))
        return found[-1][0][None]

    class Noting(UnitScore):
        def __call__(self, inputs: UnitInputs) -> Tensor:
            return score(inputs)

    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", 1.0)
            return super().training_step(batch, batch_idx)

    model = Logs()
    loader = data()
    expected: list[Tensor] = []

    class Before(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                self.means = {"net.2.weight": pl_module.net[:2](batch[0]).double().mean(0)}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                twin = Classifier(copy.deepcopy(pl_module.net))
                graph = trace(twin, batch[0])
                expected.append(
                    mean_replacement_penalties(
                        twin, graph, "net.0.weight", [batch], lambda net, batch: net.training_step(batch, 0), self.means
                    )
                )

    trainer(Before(), NeuronPruning({"net.0.weight": 6}, schedule=OneShot(3), score=Noting("penalty"))).fit(
        model, loader
    )
    assert len(found) == 1
    torch.testing.assert_close(found[0][0], expected[0], rtol=1e-5, atol=1e-7)
    assert "log" not in vars(model)


def test_nodewise_cpna_removes_the_same_set_as_connectionwise_on_the_4d_xor() -> None:
    x = torch.rand(1000, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    y = (x[:, :4].prod(1, keepdim=True) > 0).float()
    loader = DataLoader(TensorDataset(x, y), batch_size=250)

    def run(callback: Any) -> tuple[list[list[bool]], dict[str, Tensor]]:
        torch.manual_seed(3)
        model = Classifier(nn.Sequential(nn.Linear(40, 512), nn.ReLU(), nn.Linear(512, 1)))
        spy = Spy(lambda trainer, module: (module.net[2].weight != 0)[0].tolist())
        trainer(callback, spy, epochs=15).fit(model, loader)
        return spy.answers, weights(model)

    schedule = Annealing(10, 40)
    single, a = run(CPNAPruning({"net.2.weight": 5}, schedule=schedule))
    nodes, b = run(NeuronPruning({"net.0.weight": 5}, schedule=schedule, score="path", normalize=True, compensate=None))
    assert single == nodes
    alive = a["net.2.weight"][0] != 0  # the biases of units that are gone train on, and feed nothing
    assert int(alive.sum()) == 5
    for name in ("net.0.weight", "net.2.weight", "net.2.bias"):
        assert torch.equal(a[name], b[name]), name
    assert torch.equal(a["net.0.bias"][alive], b["net.0.bias"][alive])


def test_a_fraction_goes_after_each_epoch_and_the_count_is_npsets() -> None:
    counts: list[int] = []

    class Epochs(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            counts.append(units(pl_module))

    model = Classifier(mlp(100))
    schedule = EpochFraction(0.04, first=2, last=5)
    trainer(NeuronPruning(["net.0.weight"], schedule=schedule, score="out_degree"), Epochs(), epochs=8).fit(
        model, data()
    )
    assert counts == [100, 100, 100, 96, 93, 90, 87, 87]


def test_a_second_fit_takes_its_fraction_of_what_the_first_left() -> None:
    model = Classifier(mlp(100))
    schedule = EpochFraction(0.04, first=0, last=1)
    for n in (93, 87):
        callback = NeuronPruning(["net.0.weight"], schedule=schedule, score="norm", compensate=None)
        trainer(callback, epochs=4).fit(model, data())
        assert units(model) == n


def test_a_fraction_stops_at_a_count() -> None:
    model = Classifier(mlp(100))
    callback = NeuronPruning({"net.0.weight": 91}, schedule=EpochFraction(0.04, first=0, last=5), score="norm")
    trainer(callback, epochs=8).fit(model, data())
    assert units(model) == 91


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": Cubic(2, 13)},
        {"schedule": Cubic(2, 13, every=4), "score": "penalty"},
        {"schedule": Linear(1, 12), "score": UnitScore("random", seed=4)},
        {"schedule": EpochFraction(0.2, first=0, last=3)},
        {"schedule": EpochFraction(0.2, first=0, last=3), "score": "activation", "compensate": None},
        {"schedule": Annealing(1, 9), "score": "path", "normalize": True},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_resuming_from_any_checkpoint_equals_not_having_stopped(
    tmp_path: Path, options: dict[str, Any], combined: bool
) -> None:
    epochwise = isinstance(options["schedule"], EpochFraction)
    # The Trainer replays an epoch that it resumes in the middle: resume between epochs.
    loader, epochs = (data(), 6) if epochwise else (data(batch_size=64), 20)

    def callbacks() -> list[Any]:
        more = [CPNAPruning({"net.0.weight": 9}, schedule=Cubic(1, 18), normalize=False)] if combined else []
        return [NeuronPruning(["net.0.weight"] if epochwise else {"net.0.weight": 5}, **options), *more]

    whole = Classifier()
    saver = checkpoint(tmp_path)
    trainer(*callbacks(), saver, enable_checkpointing=True, epochs=epochs).fit(whole, loader)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == epochs
    for file in files[:-1:2]:
        resumed = Classifier()
        trainer(*callbacks(), epochs=epochs).fit(resumed, loader, ckpt_path=file)
        for name, value in weights(whole).items():
            assert torch.equal(resumed.state_dict()[name], value), (file.name, name)


def test_the_trainers_of_both_packages_take_it() -> None:
    import lightning.pytorch

    model = OtherClassifier()
    callback = NeuronPruning({"net.0.weight": 4}, schedule=Cubic(0, 9))
    trainer(callback, package=lightning.pytorch).fit(model, data())
    assert units(model) == 4


def test_two_processes_remove_the_same_units_and_add_the_same_means(tmp_path: Path) -> None:
    callback = NeuronPruning({"net.0.weight": 4}, schedule=Cubic(1, 9))
    trainer(callback, RankSpy(tmp_path), epochs=8, **two_processes()).fit(Classifier(), data())
    (masks, first), (others, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert int(masks["net.0.weight"].any(1).sum()) == 4
    for name, live in masks.items():
        assert torch.equal(live, others[name])
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_topologies_of_npset_keep_its_neurons() -> None:
    """Masks of Erdos-Renyi topologies, as on Lung-discrete: 41 epochs leave 66 of 300 in each hidden layer."""
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(325, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 7))
    sparsity = sparsity_of(net)
    sparsity.graph = trace(net, torch.zeros(2, 325))
    for name in ("0.weight", "2.weight", "4.weight"):
        sparsity.masks.add(name, sparsity.tensors[name])
        density = 10 * sum(sparsity.tensors[name].shape) / sparsity.tensors[name].numel()
        mask = sparsity.masks[name]
        mask.dead = torch.rand(mask.dead.shape, generator=generator) >= density  # may be regrown
        mask.n_live = int((~mask.dead).sum())
    schedule = EpochFraction(0.04, first=10, last=50)
    names = ["0.weight", "2.weight"]
    budgets = sparsity.add_budgets(net, {name: schedule.n_remaining(50, 300) for name in names}, "unit")
    score = UnitScore("out_degree")
    for epoch in range(60):
        for budget in budgets:
            [name] = budget.names
            inputs = UnitInputs(sparsity.targets[name], sparsity.targets, sparsity.masks, sparsity.graph, generator)
            degrees, gone = inputs.out_degree[0], sparsity.masks[name].removed.all(1)
            sparsity.prune_units_(budget, schedule.n_remaining(epoch, 300), {name: score(inputs)})
            went = sparsity.masks[name].removed.all(1) & ~gone
            stayed = ~sparsity.masks[name].removed.all(1)
            assert not went.any() or degrees[went].max() <= degrees[stayed].min()
    assert 325 + sum(sparsity.n_remaining(budget) for budget in budgets) == 457


def test_torch_compile_is_watched_and_pruned() -> None:
    model = Classifier(torch.compile(mlp(), backend="eager"))
    trainer(NeuronPruning({"net.0.weight": 4}, schedule=OneShot(3))).fit(model, data())
    assert units(model) == 4


def test_accumulated_batches_count_as_one_step_and_the_last_is_watched() -> None:
    spy = Spy(lambda trainer, module: units(module))
    callback = NeuronPruning({"net.0.weight": 4}, schedule=OneShot(2))
    trainer(callback, spy, accumulate_grad_batches=2).fit(Classifier(), data())
    assert spy.answers[:5] == [16, 16, 16, 4, 4]


def test_manual_optimisation_is_pruned_and_the_penalty_refused() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
            return loss

    model = Manual()
    trainer(NeuronPruning({"net.0.weight": 4}, schedule=Cubic(0, 9))).fit(model, data())
    assert units(model) == 4
    with pytest.raises(ValueError, match="score is 'penalty', which repeats training_step"):
        trainer(NeuronPruning({"net.0.weight": 4}, score="penalty")).fit(Manual(), data())


def test_every_parameter_trains_on_and_hooks_are_gone() -> None:
    model = Classifier(deep())
    callback = NeuronPruning({"net.0.weight": 4, "net.2.weight": 3}, schedule=OneShot(5))
    before: list[dict[str, Tensor]] = []
    spy = Spy(lambda trainer, module: before.append(weights(module)))
    runner = trainer(callback, spy)
    runner.fit(model, data())
    owned = {id(p) for optimizer in runner.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters()}
    for name in before[5]:
        mask = sparsity_of(model).masks.get(name)
        live = torch.ones_like(before[5][name], dtype=torch.bool) if mask is None else mask.live
        moved = before[6][name] != before[5][name]
        assert bool(moved[live].any()), name
        assert not bool(moved[~live].any()), name
    for part in model.modules():
        assert not part._forward_pre_hooks
    assert pickle.loads(pickle.dumps(callback)).name == copy.deepcopy(callback).name == "neurons"


def test_an_error_in_a_watched_batch_leaves_no_hooks() -> None:
    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 3:
                raise ZeroDivisionError
            return loss

    model = Breaks()
    with pytest.raises(ZeroDivisionError):
        trainer(NeuronPruning({"net.0.weight": 4}, schedule=Cubic(0, 9))).fit(model, data())
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_what_is_logged_agrees_with_a_count_by_hand() -> None:
    seen: list[tuple[float, int]] = []

    class Metrics(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append((float(trainer.callback_metrics["neurons/net.0.weight/remaining"]), units(pl_module)))

    callback = NeuronPruning({"net.0.weight": 4}, schedule=Cubic(0, 9))
    runner = trainer(callback, Metrics(), log_every_n_steps=1)
    runner.fit(Classifier(), data())
    assert all(logged == counted for logged, counted in seen)
    assert runner.callback_metrics["neurons/net.0.weight/target"] == 4
    assert runner.callback_metrics["neurons/at_target"] == 1


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ({}, {}, "targets is empty"),
        ({"net.0.weight": 0}, {}, "'net.0.weight' is 0; allowed is a count"),
        (["net.0.weight"], {}, "allowed is a dict from name to what should remain, or, with an EpochFraction"),
        ([], {"schedule": EpochFraction()}, "targets is \\[\\]"),
        (
            ["net.0.weight"],
            {"schedule": EpochFraction(), "scope": "shared"},
            "scope is 'shared'; allowed with an Epoch",
        ),
        ({"net.0.weight": 4}, {"score": "nonsense"}, "score is 'nonsense'; allowed is one of norm"),
        ({"net.0.weight": 4}, {"score": 3}, "score is 3; allowed"),
        ({"net.0.weight": 4}, {"compensate": "median"}, "compensate is 'median'; allowed is one of 'mean', None"),
        ({"net.0.weight": 4}, {"normalize": "reset"}, "normalize is 'reset'; allowed is one of True, False"),
        ({"net.0.weight": 4}, {"scope": "all"}, "scope is 'all'"),
        ({"net.0.weight": 4}, {"schedule": 7}, "schedule is 7"),
        ({"net.0.weight": 4}, {"name": ""}, "name is ''"),
        ({"net.0.weight": 4}, {"score": Score("magnitude")}, "allowed is the name of a unit's score, a UnitScore"),
        (
            ["net.0.weight"],
            {"schedule": EpochFraction(), "normalize": True},
            "normalize is True; allowed with an Epoch",
        ),
    ],
)
def test_a_bad_argument_is_refused_by_name(targets: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronPruning(targets, **options)


@pytest.mark.parametrize(
    ("net", "targets", "options", "message"),
    [
        (mlp(), {"net.2.weight": 1}, {}, "they are the output of the network"),
        (mlp(), {"net.9.weight": 1}, {}, "net.9.weight"),
        (mlp(), {"net.0.weight": 99}, {}, "99"),
        (mlp(), {"net.0.bias": 3}, {}, "no Linear or Conv weight"),
        (
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1, bias=False)),
            {"net.0.weight": 3},
            {},
            "'net.2.weight', which reads the units of 'net.0.weight', has no bias",
        ),
        (
            nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)),
            {"net.0.weight": 3},
            {},
            "'net.0.weight' cannot be removed: LayerNorm",
        ),
        (
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1)),
            {"net.0.weight": 3},
            {"normalize": True},
            "'net.0.weight' cannot be rescaled.*GELU",
        ),
    ],
)
def test_what_a_module_does_not_allow_is_refused_and_nothing_is_lost(
    net: nn.Module, targets: Any, options: dict[str, Any], message: str
) -> None:
    model = Classifier(net)
    with pytest.raises(ValueError, match=message):
        trainer(NeuronPruning(targets, schedule=OneShot(3), **options)).fit(model, data())
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_units_after_gelu_and_batchnorm_are_removed_where_nothing_is_normalised() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 1))
    model = Classifier(net)
    trainer(NeuronPruning({"net.0.weight": 3}, schedule=Cubic(0, 9))).fit(model, data())
    assert units(model) == 3


def test_compensation_keeps_the_outputs_mean_where_removal_alone_shifts_it() -> None:
    class Still(Classifier):  # so that the weights are those with which the means were seen
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Mean(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            found.append(float(pl_module(batch[0]).mean()))

    def shift(compensate: Any) -> float:
        torch.manual_seed(1)
        callback = NeuronPruning({"net.0.weight": 10}, schedule=OneShot(4), score="random", compensate=compensate)
        trainer(Mean(), callback, Mean(), epochs=6).fit(Still(mlp(30)), data(batch_size=64))
        return abs(found[-5] - found[-6])

    found: list[float] = []
    assert shift("mean") < 1e-6 < 1e-3 < shift(None)


CLI_CONFIG = """
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  max_epochs: 5
  callbacks:
    - class_path: lightning_cpna.NeuronPruning
      init_args:
        targets: {net.0.weight: 8}
        schedule: {class_path: lightning_cpna.Cubic, init_args: {start: 2, end: 9}}
        score: {class_path: lightning_cpna.UnitScore, init_args: {kind: norm, largest_first: true}}
        compensate: null
        shrink: true
        name: units
    - class_path: lightning_cpna.NeuronPruning
      init_args:
        targets: [net.0.weight]
        schedule: {class_path: lightning_cpna.EpochFraction, init_args: {alpha: 0.3, first: 2, last: 3}}
        score: out_degree
        compensate: null
    - class_path: lightning_cpna.DeadUnitLogger
    - class_path: lightning_cpna.AlignmentLogger
      init_args: {layers: [net.0.weight], n_clusters: 2, every_n_epochs: 2}
"""


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_cli_reads_it_from_yaml(tmp_path: Path, package: str) -> None:
    cli = pytest.importorskip(f"{package}.cli", reason="the extra 'cli' is not installed")
    (tmp_path / "config.yaml").write_text(CLI_CONFIG)
    module = Classifier if package == "pytorch_lightning" else OtherClassifier
    run = cli.LightningCLI(
        module, run=False, save_config_callback=None, args=["--config", str(tmp_path / "config.yaml")]
    )
    first, second, third, fourth = run.trainer.callbacks[:4]
    assert (first.schedule, first.score, first.shrink) == (Cubic(2, 9), UnitScore("norm", largest_first=True), True)
    assert (second.targets, second.schedule) == (["net.0.weight"], EpochFraction(0.3, first=2, last=3))
    assert third.name == "dead_units"
    assert (fourth.layers, fourth.n_clusters, fourth.every_n_epochs) == (["net.0.weight"], 2, 2)
    run.trainer.fit(run.model, data())
    assert units(run.model) == 8


def test_layers_that_run_in_turns_lose_their_units_after_a_batch_in_which_they_run() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([mlp(), mlp()])
            self.turn = 0

        def forward(self, x: Tensor) -> Tensor:
            self.turn += 1
            return torch.as_tensor(self.heads[self.turn % 2](x))

    model = Classifier(Heads())
    targets: dict[str, int | float] = {"net.heads.0.0.weight": 4, "net.heads.1.0.weight": 4}
    trainer(NeuronPruning(targets, schedule=Cubic(2, 12))).fit(model, data())
    assert [units(model, name) for name in targets] == [4, 4]


def test_two_steps_a_batch_and_a_batch_without_a_loss_are_no_obstacle() -> None:
    class Twice(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer: Any = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                loss = super().training_step(batch, batch_idx)
                self.manual_backward(loss)
                optimizer.step()
            return loss

    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    cases: list[tuple[Classifier, Any]] = [(Twice(), "mean_replacement"), (Skips(), "norm")]
    for model, score in cases:
        trainer(NeuronPruning({"net.0.weight": 4}, schedule=OneShot(4), score=score)).fit(model, data())
        assert units(model) == 4


def test_the_same_trainer_fitting_longer_goes_on_with_its_fraction() -> None:
    model = Classifier(mlp(100))
    runner = trainer(NeuronPruning(["net.0.weight"], schedule=EpochFraction(0.1, first=0, last=4)), epochs=3)
    runner.fit(model, data())
    assert units(model) == 81
    runner.fit_loop.max_epochs = 7
    runner.fit(model, data())
    assert units(model) == 60


def test_cpna_refuses_what_belongs_to_units() -> None:
    with pytest.raises(ValueError, match="which counts epochs; allowed is a schedule that counts steps"):
        CPNAPruning({"net.0.weight": 4}, schedule=EpochFraction())
    with pytest.raises(ValueError, match="allowed is the name of a connection's score"):
        CPNAPruning({"net.0.weight": 4}, score=UnitScore("norm"))  # type: ignore[arg-type]


def test_a_fraction_whose_last_epoch_the_run_does_not_reach_warns_at_the_start() -> None:
    callback = NeuronPruning(
        ["net.0.weight"], schedule=EpochFraction(0.2, first=1, last=4), score="norm", compensate=None
    )
    with pytest.warns(
        UserWarning, match=r"the schedule's last units go when epoch 5 \(from 0\) starts, but the run has 5"
    ):
        trainer(callback, epochs=5).fit(Classifier(), data())


def test_the_penalty_takes_training_step_as_it_is_written() -> None:
    class Renamed(Classifier):
        def training_step(self, b: Any, i: int) -> Tensor:
            return super().training_step(b, i)

    class BatchOnly(Classifier):
        def training_step(self, b: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(b, 0)

    for model in (Renamed(), BatchOnly()):
        trainer(NeuronPruning({"net.0.weight": 4}, schedule=OneShot(3), score="penalty")).fit(model, data())
        assert units(model) == 4


def test_a_score_of_another_shape_is_refused_with_what_is_allowed() -> None:
    def wrong(inputs: UnitInputs) -> Tensor:
        return torch.ones(3)

    with pytest.raises(
        ValueError, match=r"that of 'net\.0\.weight' has shape \(3,\); allowed is one number a unit, \(1, 16\)"
    ):
        trainer(NeuronPruning({"net.0.weight": 4}, schedule=OneShot(3), score=wrong)).fit(Classifier(), data())
