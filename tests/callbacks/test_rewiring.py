"""What SETRewiring does in a fit: counts that never change, the same on both storages, and when it acts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_cpna import (
    CPNAPruning,
    Cubic,
    Decay,
    EpochFraction,
    Growth,
    NeuronPruning,
    OneShot,
    SETRewiring,
    SparseLinear,
    compact,
    sparsity_of,
)
from lightning_cpna.callbacks.capture import is_compiled
from tests.helpers import Classifier, OtherClassifier, RankSpy, Spy, checkpoint, data, trainer, two_processes

NAMES = ["net.0.weight", "net.2.weight", "net.4.weight"]
NOTHING = torch.empty(0, dtype=torch.int64)


class Double(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step((batch[0].double(), batch[1].double()), batch_idx)


def sparse(width: int = 20, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = SparseLinear(6, width, 2), nn.ReLU(), SparseLinear(width, width, 2), nn.ReLU(), SparseLinear(width, 1, 0.5)
    return nn.Sequential(*layers).double()


def masked(net: nn.Sequential) -> Double:
    """Return a module of dense layers with masks that computes the same."""
    layers = [part.to_dense() if isinstance(part, SparseLinear) else part for part in net]
    module = Double(nn.Sequential(*layers))
    sparsity = sparsity_of(module)
    for index, part in enumerate(net):
        if isinstance(part, SparseLinear):
            sparsity.add_mask(f"net.{index}.weight")
            sparsity.masks[f"net.{index}.weight"].move_((~part.live).flatten().nonzero().flatten(), NOTHING)
    return module


def dense_state(module: Any) -> dict[str, Tensor]:
    """Return weights and masks in dense shapes, whichever storage there is."""
    state: dict[str, Tensor] = {}
    for index, part in enumerate(module.net):
        if isinstance(part, SparseLinear):
            state |= {f"{index}.w": part.to_dense().weight.detach(), f"{index}.live": part.live}
        elif isinstance(part, nn.Linear):
            live = sparsity_of(module).masks[f"net.{index}.weight"].live
            state |= {f"{index}.w": part.weight.detach(), f"{index}.live": live}
        if isinstance(part, nn.Linear | SparseLinear) and part.bias is not None:
            state[f"{index}.bias"] = part.bias.detach()
    return state


def counts(module: nn.Module) -> list[int]:
    return [sparsity_of(module).masks[name].n_live for name in NAMES]


WAYS: dict[str, dict[str, Any]] = {
    "SET": {},
    "SET, N(0, .1)": {"growth": Growth(std=0.1)},
    "SET, as at first": {"growth": Growth(std="initial", seed=5)},
    "every 3 steps": {"every": 3, "zeta": Decay(0.5)},
    "RigL": {"growth": "gradient"},
    "RigL every 5 steps": {"growth": "gradient", "every": 5},
    "momentum": {"growth": "momentum"},
    "momentum every 7 steps": {"growth": "momentum", "every": 7},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=["", "accumulated"])
def test_a_sparse_layer_trains_as_a_dense_one_with_the_same_mask(way: str, options: dict[str, Any]) -> None:
    net = sparse()
    first, second = Double(copy.deepcopy(net)), masked(net)
    n = [len(net[index].weight) for index in (0, 2, 4)]  # type: ignore[arg-type]
    for module in (first, second):
        spy = Spy(lambda _, module: counts(module))
        trainer(SETRewiring(NAMES, **WAYS[way]), spy, epochs=7, **options).fit(module, data())
        assert spy.answers == [n] * len(spy.answers)
    before, ours, dense = dense_state(Double(net)), dense_state(first), dense_state(second)
    assert not torch.equal(before["2.live"], ours["2.live"])
    for name, value in dense.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, ours[name]), name
        else:
            torch.testing.assert_close(value, ours[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("storage", "way"), [*(("sparse", way) for way in WAYS), ("masks", "SET"), ("masks", "RigL"), ("masks", "momentum")]
)
def test_resuming_from_any_checkpoint_equals_not_having_stopped(tmp_path: Path, way: str, storage: str) -> None:
    def module() -> Double:
        return Double(sparse()) if storage == "sparse" else masked(sparse())

    pl.seed_everything(0)
    model, batches = module(), data(batch_size=64)  # the Trainer replays an epoch that it resumes in the middle
    files = checkpoint(tmp_path, every_n_train_steps=3, save_on_train_epoch_end=False)
    options: dict[str, Any] = {"enable_checkpointing": True, "epochs": 12}
    trainer(SETRewiring(NAMES, **WAYS[way]), files, **options).fit(model, batches)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 4
    for file in saved:
        torch.load(file, weights_only=True)
        resumed = Double(sparse(seed=3)) if storage == "sparse" else module()
        trainer(SETRewiring(NAMES, **WAYS[way]), epochs=12).fit(resumed, batches, ckpt_path=file, weights_only=True)
        for name, value in dense_state(model).items():
            assert torch.equal(value, dense_state(resumed)[name]), (file.name, name)


def test_dense_layers_begin_with_erdos_renyi_connections_and_keep_that_many() -> None:
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 1))
    model = Classifier(net)
    spy = Spy(lambda _, module: [int(layer.weight.count_nonzero()) for layer in module.net[::2]])
    trainer(SETRewiring(NAMES, epsilon=2, growth=Growth(std=1.0)), spy, epochs=6).fit(model, data())
    assert spy.answers == [[92, 140, 30]] * len(spy.answers)  # 2 * 46, 2 * 70, and all of the last
    assert counts(model) == [92, 140, 30]


@pytest.mark.parametrize(
    ("distribution", "expected"),
    # Of 147 connections together, the layers' shares are 46, 70 and 31 of 147; the last one has but 30.
    [("uniform", [24, 120, 3]), ("er", [46, 71, 30]), ("erk", [46, 71, 30])],
)
def test_a_density_is_that_of_each_layer_or_shared_out(distribution: Any, expected: list[int]) -> None:
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 1))
    model = Classifier(net)
    trainer(SETRewiring({"net.*.weight": 0.1}, distribution=distribution), epochs=2).fit(model, data())
    assert counts(model) == expected


def test_convolutions_are_rewired_and_erk_counts_the_kernel() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3, bias=False), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(self.b(self.a(x[:, :1, None, None].expand(-1, 1, 6, 6)).relu()).relu().amax((2, 3)))
            return out

    model = Classifier(Images())
    callback = SETRewiring({"net.[ab].weight": 0.2}, distribution="erk", growth=Growth("gradient"))
    trainer(callback, epochs=5).fit(model, data())
    masks = sparsity_of(model).masks
    assert sum(mask.n_live for mask in masks.values()) == round(0.2 * (72 + 1152))
    # All of the small layer would be sum(1, 8, 3, 3) / sum(1, 8, 3, 3, 8, 16, 3, 3) of the total.
    assert masks["net.a.weight"].n_live == min(72, round(0.2 * 1224 * 15 / 45))


def test_it_acts_between_epochs_and_never_before_the_first_or_after_the_last() -> None:
    patterns: list[Tensor] = []

    class Watcher(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            patterns.append(pl_module.net[2].live)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            patterns.append(pl_module.net[2].live)

    model = Double(sparse())
    before = model.net[2].live
    trainer(SETRewiring(NAMES), Watcher(), epochs=3).fit(model, data())
    assert len(patterns) == 6
    for start, end in zip(patterns[::2], patterns[1::2], strict=True):
        assert torch.equal(start, end)
    assert torch.equal(before, patterns[0])
    assert not torch.equal(patterns[1], patterns[2])
    assert not torch.equal(patterns[3], patterns[4])
    assert torch.equal(patterns[5], model.net[2].live)


@pytest.mark.parametrize("sized", [True, False])
def test_after_so_many_steps_it_acts_but_not_after_the_last_one(sized: bool) -> None:
    batches = data() if sized else torch.utils.data.DataLoader(Stream(), batch_size=None)
    model = Double(sparse())
    spy = Spy(lambda _, module: module.net[2].live)
    before = model.net[2].live
    trainer(SETRewiring(NAMES, every=4), spy, epochs=5).fit(model, batches)  # 20 steps
    changed = [
        step for step, (old, new) in enumerate(zip([before, *spy.answers], spy.answers, strict=False), start=1)
        if not torch.equal(old, new)
    ]  # fmt: skip
    assert changed == [4, 8, 12, 16]


@pytest.mark.parametrize("neurons_first", [True, False])
@pytest.mark.parametrize("storage", ["sparse", "masks"])
def test_npset_removes_neurons_before_connections_and_regrows_among_the_others(
    storage: str, neurons_first: bool
) -> None:
    net = sparse(40)
    model = Double(net) if storage == "sparse" else masked(net)
    neurons = NeuronPruning(
        NAMES[:2], schedule=EpochFraction(0.2, 1, 4), score="out_degree", compensate=None, name="neurons"
    )
    callbacks = [neurons, SETRewiring(NAMES, growth=Growth(std=0.1))]
    trainer(*(callbacks if neurons_first else callbacks[::-1]), epochs=8).fit(model, data())
    n = EpochFraction(0.2, 1, 4).n_remaining(4, 40)
    assert [sparsity_of(model).n_units(name) for name in NAMES[:2]] == [n, n]
    state = dense_state(model)
    for index in (0, 2):
        target = sparsity_of(model).targets[f"net.{index}.weight"]
        gone = sparsity_of(model).masks[target.name].closed_units(target.axes)[0]
        assert int(gone.sum()) == 40 - n
        assert not state[f"{index}.live"][gone].any()
        assert not state[f"{index + 2}.live"][:, gone].any()
    assert counts(model) == [int(state[f"{index}.live"].sum()) for index in (0, 2, 4)]


def test_npset_is_the_same_on_both_storages_and_whichever_callback_stands_first() -> None:
    results = []
    for storage, neurons_first in (("sparse", True), ("sparse", False), ("masks", True), ("shrunk", True)):
        net = sparse(40)
        model = masked(net) if storage == "masks" else Double(net)
        neurons = NeuronPruning(
            NAMES[:2],
            schedule=EpochFraction(0.2, 1, 4),
            score="out_degree",
            compensate=None,
            shrink=storage == "shrunk",
        )
        callbacks = [neurons, SETRewiring(NAMES, growth=Growth(std=0.1))]
        trainer(*(callbacks if neurons_first else callbacks[::-1]), epochs=8).fit(model, data())
        results.append(dense_state(model))
    alive = {f"{index}.bias": results[0][f"{index}.live"].any(1) for index in (0, 2)}
    for other in results[1:]:
        for name, value in results[0].items():
            if name in alive:  # the biases of dead units are nobody's
                torch.testing.assert_close(value[alive[name]], other[name][alive[name]], rtol=0, atol=1e-12)
            else:
                torch.testing.assert_close(value, other[name], rtol=0, atol=1e-12, msg=name)


def test_removed_neurons_take_their_connections_out_of_memory_and_out_of_the_optimizer() -> None:
    model = Double(sparse(40))
    sizes: list[tuple[int, int]] = []

    def look(trainer: Any, module: Any) -> None:
        weight = module.net[2].weight
        sizes.append((len(weight), len(trainer.optimizers[0].state[weight]["exp_avg"])))

    neurons = NeuronPruning({"net.0.weight": 10}, schedule=OneShot(5), score="norm", compensate=None)
    trainer(neurons, SETRewiring(NAMES), Spy(look), epochs=3).fit(model, data())
    assert sizes[0] == (160, 160)
    assert sizes[-1][0] == sizes[-1][1] < 80
    small = compact(model.net, torch.rand(5, 6, dtype=torch.float64), batch_sizes=()).module
    assert small[0].out_features == small[2].in_features <= 10  # type: ignore[index]


@pytest.mark.parametrize("storage", ["sparse", "masks"])
def test_connections_that_cpna_removed_do_not_come_back(storage: str) -> None:
    net = sparse(40)
    model = Double(net) if storage == "sparse" else masked(net)
    removed: list[Tensor] = []

    def look(_: Any, module: Any) -> None:
        removed.append(dense_state(module)["2.live"])

    pruning = CPNAPruning({"net.2.weight": 50}, schedule=OneShot(3), score="magnitude", normalize=False)
    trainer(pruning, Spy(look), SETRewiring(["net.2.weight"], every=5), epochs=10).fit(model, data())
    gone = removed[1] & ~removed[3]
    assert int(gone.sum()) == 110
    assert all(int(live.sum()) == 50 for live in removed[3:])
    assert not any((live & gone).any() for live in removed[3:])


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("storage", ["sparse", "masks"])
def test_two_processes_have_the_same_pattern(tmp_path: Path, growth: Any, storage: str) -> None:
    model = Double(sparse()) if storage == "sparse" else Double(masked(sparse()).net)
    callbacks = [
        NeuronPruning(["net.0.weight"], schedule=EpochFraction(0.2, 1, 3), score="out_degree", compensate=None),
        SETRewiring(NAMES, growth=growth, epsilon=2),
        RankSpy(tmp_path),
    ]
    trainer(*callbacks, epochs=6, **two_processes()).fit(model, data())
    (_, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_step_that_broke_the_weights_stops_the_run_by_name() -> None:
    class Broken(Double):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 4:
                self.net[2].weight.data[3] = torch.nan

    with pytest.raises(
        ValueError, match=r"rewiring: at step \d+, rewiring 'net.2.weight': 1 of 80 weights are not finite"
    ):
        trainer(SETRewiring(NAMES), epochs=3).fit(Broken(sparse()), data())


def test_a_second_fit_goes_on_with_the_pattern_and_another_trainer_begins_anew() -> None:
    model, callback = Double(sparse()), SETRewiring(NAMES)
    trainer(callback, epochs=3).fit(model, data())
    n, first = counts(model), model.net[2].live
    spy = Spy(lambda _, module: module.net[2].live)
    trainer(callback, spy, epochs=2).fit(model, data())
    assert torch.equal(spy.answers[0], first)
    assert counts(model) == n
    other = Double(sparse())
    trainer(callback, epochs=3).fit(other, data())
    assert torch.equal(other.net[2].live, first)


def test_module_and_callback_are_copied_and_pickled_while_training() -> None:
    callback = SETRewiring(NAMES, growth="momentum")

    def clone(_: Any, module: Any) -> None:
        twin = copy.deepcopy(module.net)
        assert torch.equal(twin[2].live, module.net[2].live)
        pickle.loads(pickle.dumps((copy.deepcopy(callback), module.net)))

    trainer(callback, Spy(clone), epochs=3).fit(Double(sparse()), data())


def test_compiled_modules_are_rewired() -> None:
    model = Double(sparse())
    model.net = torch.compile(model.net, backend="eager")
    assert is_compiled(model.net)
    eager = Double(sparse())
    for module in (model, eager):
        trainer(SETRewiring(NAMES, growth="gradient"), epochs=4).fit(module, data())
    for index in (0, 2, 4):
        assert torch.equal(model.net._orig_mod[index].live, eager.net[index].live)


def test_the_other_package_and_amp_take_it() -> None:
    import lightning.pytorch

    model = OtherClassifier(sparse().float())
    trainer(SETRewiring(NAMES), package=lightning.pytorch, epochs=3, precision="bf16-mixed").fit(model, data())
    before, after = dense_state(Double(sparse())), dense_state(model)
    for index in (0, 2, 4):
        assert int(before[f"{index}.live"].sum()) == int(after[f"{index}.live"].sum())
    assert not torch.equal(before["2.live"], after["2.live"])


CONFIG = """
trainer:
  max_epochs: 4
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_cpna.SETRewiring
      init_args:
        targets: ["net.0.weight"]
        epsilon: 1
        every: 3
        zeta: {class_path: lightning_cpna.Decay, init_args: {zeta: 0.4, kind: linear}}
        growth: {class_path: lightning_cpna.Growth, init_args: {kind: gradient, std: 0.1}}
"""


def test_lightning_cli_reads_it_from_yaml(tmp_path: Path) -> None:
    cli = pytest.importorskip("pytorch_lightning.cli", reason="the extra 'cli' is not installed")
    (tmp_path / "config.yaml").write_text(CONFIG)
    run = cli.LightningCLI(
        Classifier, run=False, save_config_callback=None, args=["--config", str(tmp_path / "config.yaml")]
    )
    run.trainer.fit(run.model, data())
    callback = run.trainer.callbacks[0]
    assert (callback.zeta, callback.growth) == (Decay(0.4, "linear"), Growth("gradient", std=0.1))
    assert int(sparsity_of(run.model).masks["net.0.weight"].n_live) == 22


def test_it_logs_what_happened() -> None:
    model = Double(sparse())
    running = trainer(SETRewiring(NAMES), epochs=3, log_every_n_steps=1)
    running.fit(model, data())
    logged = running.callback_metrics
    assert logged["rewiring/connections"] == sum(counts(model))
    assert logged["rewiring/zeta"] == pytest.approx(0.3)
    exchanged = sum(int(0.3 * n) for n in counts(model))
    assert exchanged - 6 <= logged["rewiring/exchanged"] <= exchanged
    assert logged["rewiring/net.2.weight/live_units"] <= 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": []}, "targets is .*at least one"),
        ({"targets": {"a": 1.5}}, "'a' is 1.5; allowed is a count"),
        ({"targets": ["a"], "zeta": 1.0}, "zeta is 1.0; allowed is a float in"),
        ({"targets": ["a"], "every": 0}, "every is 0; allowed is 'epoch' or an int"),
        ({"targets": ["a"], "growth": "big"}, "growth is 'big'; allowed is one of random, gradient, momentum"),
        ({"targets": ["a"], "epsilon": 0}, "epsilon is 0; allowed is a float > 0"),
        ({"targets": {"a": 5}, "distribution": "even"}, "distribution is 'even'; allowed is one of 'uniform'"),
        (
            {"targets": ["a"], "distribution": "erk"},
            "distribution is 'erk'; allowed with a list of targets is 'uniform'",
        ),
        ({"targets": "a"}, "targets is 'a'; allowed is a list of names, or a dict"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SETRewiring(**arguments)


def test_what_cannot_be_served_is_refused_when_training_starts() -> None:
    with pytest.raises(ValueError, match=r"'net.9.weight' matches no parameter"):
        trainer(SETRewiring(["net.9.weight"])).fit(Classifier(), data())
    with pytest.raises(ValueError, match=r"'net.0.bias' is no weight of a layer"):
        trainer(SETRewiring(["net.0.bias"])).fit(Classifier(), data())
    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match="number of batches is not known; allowed is every=N"):
        trainer(SETRewiring(["net.0.weight"], growth="gradient"), epochs=2).fit(Classifier(), stream)
    with pytest.raises(ValueError, match="number of optimizer steps is not known"):
        trainer(SETRewiring(["net.0.weight"], zeta=Decay()), epochs=2).fit(Classifier(), stream)
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    with pytest.raises(ValueError, match="a SparseLinear, come and go, but EMAWeightAveraging keeps averages"):
        trainer(SETRewiring(["net.0.weight"]), average).fit(Double(sparse()), data())


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from data()


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
@pytest.mark.parametrize("storage", ["sparse", "masks"])
def test_gradients_of_a_step_that_amp_skips_are_forgotten(growth: Any, storage: str) -> None:
    class Exploding(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            factor = torch.inf if batch_idx in (1, 2) else 1.0
            return super().training_step(batch, batch_idx) * factor

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    net = sparse().float()
    before = [int(weight.numel()) for name, weight in net.named_parameters() if name.endswith("weight")]
    if storage == "masks":
        net = nn.Sequential(*[part.to_dense() if isinstance(part, SparseLinear) else part for part in net])
    model = Exploding(net)
    trainer(SETRewiring(NAMES, growth=growth, every=2, epsilon=2), plugins=[precision], epochs=4).fit(model, data())
    state = dense_state(model)
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    if storage == "sparse":
        assert counts(model) == before
        assert not torch.equal(state["2.live"], dense_state(Double(sparse()))["2.live"])


def test_seed_everything_draws_the_connections_and_a_seed_of_growth_does_so_alone() -> None:
    def live(seed: int, **options: Any) -> Tensor:
        pl.seed_everything(seed)
        model = Classifier(nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1)))
        trainer(SETRewiring(["net.0.weight"], epsilon=2, **options), epochs=1).fit(model, data())
        return sparsity_of(model).masks["net.0.weight"].live

    assert torch.equal(live(1), live(1))
    assert not torch.equal(live(1), live(2))
    assert torch.equal(live(1, growth=Growth(seed=5)), live(2, growth=Growth(seed=5)))


@pytest.mark.parametrize("pruning", ["connections", "neurons"])
@pytest.mark.parametrize("storage", ["sparse", "masks"])
def test_a_checkpoint_saved_inside_a_batch_holds_what_its_step_pruned(
    tmp_path: Path, storage: str, pruning: str
) -> None:
    def module() -> Double:
        return Double(sparse(30)) if storage == "sparse" else masked(sparse(30))

    def callbacks() -> list[Any]:
        first = (
            CPNAPruning({"net.2.weight": 40}, schedule=Cubic(1, 9), score="magnitude", normalize=False)
            if pruning == "connections"
            else NeuronPruning({"net.0.weight": 10}, schedule=Cubic(1, 9), score="norm", compensate=None)
        )
        return [first, SETRewiring(NAMES, every=3)]

    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step in (2, 5, 7):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    model, batches = module(), data(batch_size=64)
    trainer(Early(), *callbacks(), epochs=12).fit(model, batches)
    for file in sorted(tmp_path.glob("*.ckpt")):
        resumed = Double(sparse(30, seed=4)) if storage == "sparse" else module()
        trainer(*callbacks(), epochs=12).fit(resumed, batches, ckpt_path=file, weights_only=True)
        for name, value in dense_state(model).items():
            assert torch.equal(value, dense_state(resumed)[name]), (file.name, name)


def test_averages_have_zeros_where_nothing_lives_after_a_rewiring(tmp_path: Path) -> None:
    model, files = masked(sparse()), checkpoint(tmp_path, every_n_train_steps=6)
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    trainer(SETRewiring(NAMES), average, files, epochs=6, enable_checkpointing=True).fit(model, data())
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 4
    for file in saved:
        state = torch.load(file, weights_only=True)["state_dict"]
        for name, n in zip(NAMES, counts(model), strict=True):
            assert int(state[name].count_nonzero()) <= n


@pytest.mark.parametrize("growth", ["gradient", "momentum"])
def test_an_activation_in_place_leaves_the_gradient_what_it_is(growth: Any) -> None:
    results = []
    for inplace in (False, True):
        net = sparse()
        net[1], net[3] = nn.ReLU(inplace), nn.ReLU(inplace)
        model = Double(net)
        trainer(SETRewiring(NAMES, growth=growth), epochs=5).fit(model, data())
        results.append(dense_state(model))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_scale_of_amp_that_changes_does_not_change_what_grows() -> None:
    results = []
    for storage in ("sparse", "masks"):
        model = Double(sparse()) if storage == "sparse" else masked(sparse())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        trainer(SETRewiring(NAMES, growth="momentum", every=5), plugins=[precision], epochs=5).fit(model, data())
        results.append(dense_state(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-9, msg=name)


def test_several_steps_a_batch_miss_no_rewiring() -> None:
    class Twice(Double):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            optimizer: Any = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    model = Twice(sparse())
    spy = Spy(lambda _, module: dense_state(module)["2.live"])
    before = dense_state(model)["2.live"]
    trainer(SETRewiring(NAMES, every=5, growth="gradient"), spy, epochs=4).fit(model, data())  # 16 batches, 32 steps
    changed = [
        batch for batch, (old, new) in enumerate(zip([before, *spy.answers], spy.answers, strict=False), start=1)
        if not torch.equal(old, new)
    ]  # fmt: skip
    assert changed == [3, 5, 8, 10, 13, 15]  # after steps 5, 10, 15, 20, 25, 30


def test_what_does_not_go_together_is_refused_and_what_does_nothing_warns() -> None:
    with pytest.raises(ValueError, match=r"'net.2.weight' is rewired by 'a' and by 'b'"):
        trainer(SETRewiring(NAMES, name="a"), SETRewiring(["net.2.weight"], name="b")).fit(Double(sparse()), data())
    with pytest.raises(ValueError, match=r"'net.2.weight' should begin with 10 connections, but .*with 80"):
        trainer(SETRewiring({"net.2.weight": 10})).fit(Double(sparse()), data())
    neurons = NeuronPruning({"net.0.weight": 10}, schedule=OneShot(5), score="norm", compensate=None, shrink=True)
    with pytest.raises(ValueError, match="growth is 'gradient', which remembers gradients, but shrink is True"):
        trainer(neurons, SETRewiring(NAMES, growth="gradient")).fit(Double(sparse()), data())
    with pytest.warns(UserWarning, match="every is 100, but the run has 8 optimizer steps"):
        trainer(SETRewiring(NAMES, every=100), epochs=2).fit(Double(sparse()), data())


def test_a_layer_that_took_a_file_is_reported_and_trained_on() -> None:
    model = Double(sparse(40))
    start = copy.deepcopy(model.state_dict())
    neurons = NeuronPruning({"net.0.weight": 10}, schedule=OneShot(5), score="norm", compensate=None)
    trainer(neurons, SETRewiring(NAMES), epochs=3).fit(model, data())
    model.load_state_dict(start)
    assert [layer.connections for layer in sparsity_of(model).report().layers] == [92, 160, 20]
    trainer(SETRewiring(NAMES), epochs=2).fit(model, data())
    assert counts(model) == [92, 160, 20]


def test_a_module_is_forgotten_with_its_layer() -> None:
    import gc
    import weakref

    layer = SparseLinear(6, 4, 1)
    sparsity_of(layer).add_mask("weight")
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_gradients_of_a_layer_with_as_many_units_as_rows_are_not_taken_the_wrong_way_round() -> None:
    results = []
    for copied in (False, True):
        net = sparse(16)  # batches have 16 rows
        layer = net[2]
        assert isinstance(layer, SparseLinear)
        if copied:  # so that what comes out is no view
            layer.register_forward_hook(lambda *call: call[-1].clone())
        trainer(SETRewiring(NAMES, growth="gradient", every=3), epochs=4).fit(Double(net), data())
        results.append(layer.live)
    assert torch.equal(*results)
