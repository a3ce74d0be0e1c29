"""Tensors that shrink while a fit goes on: the oracle is the same fit without."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_cpna import (
    Annealing,
    CPNAPruning,
    Cubic,
    EpochFraction,
    Geometric,
    NeuronPruning,
    OneShot,
    compact,
    sparsity_of,
)
from tests.helpers import Classifier, Net, checkpoint, data, mlp, trainer, two_processes, weights


class Double(Classifier):
    """In float64, so that another order of summation does not show."""

    def __init__(self, net: nn.Module, optimizer: Any = None) -> None:
        super().__init__(net.double())
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].double())

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.optimizer is None else self.optimizer(self.parameters())


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 1))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 6, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(6, 1),
    )  # fmt: skip


def mixed() -> nn.Module:
    """A layer that reads units and features side by side, and features that two layers read."""
    return Net(
        lambda m, x: m.b(torch.cat([x[:, :3], m.a(x).relu()], dim=1)), a=nn.Linear(6, 10), b=nn.Linear(13, 1)
    )  # fmt: skip


def hidden_then_input(shrink: bool) -> list[Any]:
    return [
        CPNAPruning({"net.2.weight": 4}, schedule=Annealing(2, 8), name="hidden", shrink=shrink),
        CPNAPruning({"net.0.weight": 7}, schedule=Geometric(10, 17), score="path", normalize=False, name="input"),
    ]


def features_first(shrink: bool) -> list[Any]:
    return [
        CPNAPruning({"net.0.weight": 3}, schedule=Cubic(1, 6), granularity="feature", name="features"),
        CPNAPruning({"net.2.weight": 5}, schedule=Annealing(7, 14), shrink=shrink),
    ]


def neurons(shrink: bool) -> list[Any]:
    targets: dict[str, int | float] = {"net.0.weight": 5, "net.2.weight": 4}
    return [NeuronPruning(targets, schedule=Cubic(1, 15), shrink=shrink)]


def npset(shrink: bool) -> list[Any]:
    schedule = EpochFraction(0.3, first=0, last=3)
    return [NeuronPruning(["net.0.weight"], schedule=schedule, score="out_degree", compensate=None, shrink=shrink)]


def filters(shrink: bool) -> list[Any]:
    return [NeuronPruning({"net.1.weight": 3, "net.4.weight": 2}, schedule=Cubic(1, 15), shrink=shrink)]


def both(shrink: bool) -> list[Any]:
    return [CPNAPruning({"net.a.weight": 9, "net.b.weight": 4}, schedule=Cubic(1, 12), normalize=False, shrink=shrink)]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[bool], list[Any]], tuple[str, ...]]] = {
    "hidden, then input": (mlp, hidden_then_input, ("net.0.weight", "net.2.weight")),
    "features first": (mlp, features_first, ("net.0.weight",)),
    "neurons of two layers": (deep, neurons, ("net.0.weight", "net.2.weight", "net.4.weight")),
    "a fraction an epoch": (mlp, npset, ("net.0.weight", "net.2.weight")),
    "filters": (conv, filters, ("net.1.weight", "net.4.weight", "net.7.weight")),
    "units beside features": (mixed, both, ("net.a.weight", "net.b.weight")),
}
on_every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
OPTIMIZERS = {
    "Adam": None,
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW, amsgrad, fused": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


class Shapes(pl.Callback):
    """Notes the shape of every parameter, the ids, and which of them moved, after every batch."""

    def __init__(self) -> None:
        self.shapes: list[dict[str, torch.Size]] = []
        self.ids: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.shapes.append({name: p.shape for name, p in pl_module.named_parameters()})
        self.ids.append({name: id(p) for name, p in pl_module.named_parameters()})


def run(make: Any, callbacks: list[Any], *more: Any, optimizer: Any = None, epochs: int = 6) -> Double:
    torch.manual_seed(2)
    model = Double(make(), optimizer)
    trainer(*callbacks, *more, epochs=epochs).fit(model, data())
    return model


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-10) -> None:
    """Compare masks and weights; biases of units that are gone feed nothing, and may be zero or not."""
    first, second = sparsity_of(a).masks, sparsity_of(b).masks
    assert set(first) == set(second)
    for name in first:
        assert torch.equal(first[name].dead, second[name].dead), name
        assert torch.equal(first[name].removed, second[name].removed), name
    for name, value in a.state_dict().items():
        other = b.state_dict()[name]
        weight = name.replace("bias", "weight")
        if name.endswith("bias") and weight in first:
            alive = first[weight].live.flatten(1).any(1)
            value, other = value[alive], other[alive]
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance, msg=name)


@on_every_case
def test_a_fit_that_shrinks_ends_as_one_that_does_not(case: Any) -> None:
    make, callbacks, smaller = case
    spy = Shapes()
    shrunk, whole = run(make, callbacks(True), spy), run(make, callbacks(False))
    same(shrunk, whole)
    for name in smaller:
        assert spy.shapes[-1][name].numel() < spy.shapes[0][name].numel() / 1.4, name
    assert all(ids == spy.ids[0] for ids in spy.ids), "a parameter is another object"
    assert {name: p.shape for name, p in shrunk.named_parameters()} == spy.shapes[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_elementwise_optimizer_goes_on_with_its_moments(optimizer: Any) -> None:
    same(
        run(mlp, hidden_then_input(True), optimizer=optimizer), run(mlp, hidden_then_input(False), optimizer=optimizer)
    )


def test_every_parameter_of_the_optimizer_is_the_models_and_moves_after_every_cut() -> None:
    moved: list[bool] = []

    class Moves(pl.Callback):
        before: dict[str, Tensor] = {}  # noqa: RUF012

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            assert {id(p) for p in owned} == {id(p) for p in pl_module.parameters()}
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for name, p in pl_module.named_parameters() if self.before else ():
                if p.shape == self.before[name].shape:
                    moved.append(not torch.equal(p, self.before[name]))

    run(deep, neurons(True), Moves())
    assert len(moved) > 50
    assert all(moved)


@on_every_case
def test_every_checkpoint_is_full_and_resuming_from_it_ends_alike(case: Any, tmp_path: Path) -> None:
    make, callbacks, _ = case
    saver = checkpoint(tmp_path, every_n_epochs=1)
    torch.manual_seed(2)
    whole = Double(make())
    trainer(*callbacks(True), saver, enable_checkpointing=True, epochs=6).fit(whole, data())
    shapes = {name: value.shape for name, value in Double(make()).state_dict().items()}
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 6
    for file in files[:-1]:
        content = torch.load(file, weights_only=True)
        assert {name: value.shape for name, value in content["state_dict"].items()} == shapes
        Double(make()).load_state_dict(content["state_dict"], strict=True)
        fresh = Double(make())
        optimizer = fresh.configure_optimizers()
        optimizer.load_state_dict(content["optimizer_states"][0])
        for p in fresh.parameters():
            assert optimizer.state[p]["exp_avg"].shape == p.shape
        resumed = Double(make())
        trainer(*callbacks(True), epochs=6).fit(resumed, data(), ckpt_path=file)
        same(resumed, whole, 1e-9)


def test_a_checkpoint_goes_on_without_shrinking_too(tmp_path: Path) -> None:
    torch.manual_seed(2)
    whole = Double(mlp())
    saver = checkpoint(tmp_path, every_n_epochs=1)
    trainer(*hidden_then_input(True), saver, enable_checkpointing=True, epochs=6).fit(whole, data())
    resumed = Double(mlp())
    trainer(*hidden_then_input(False), epochs=6).fit(resumed, data(), ckpt_path=sorted(tmp_path.glob("*.ckpt"))[3])
    same(resumed, whole, 1e-9)


def test_what_is_logged_and_reported_is_what_it_is_without() -> None:
    class Log(pl.Callback):
        def __init__(self) -> None:
            self.values: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.values.append({k: round(float(v), 9) for k, v in trainer.callback_metrics.items() if "/" in k})

    reports, logs = [], []
    for shrink in (True, False):
        torch.manual_seed(2)
        model, log = Double(mlp()), Log()
        callbacks = [NeuronPruning({"net.0.weight": 4}, schedule=Cubic(1, 12), shrink=shrink)]
        trainer(*callbacks, log, epochs=6, log_every_n_steps=1).fit(model, data())
        reports.append(callbacks[0].report(model).as_dict())
        logs.append(log.values)
    assert reports[0] == reports[1]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("at", [9, 15])
def test_after_an_exception_everything_has_its_full_shape_and_no_hooks(at: int) -> None:
    class Breaks(Double):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == at:
                assert self.net[0].weight.shape[0] < 16
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model = Breaks(mlp())
    with pytest.raises(ZeroDivisionError):
        trainer(NeuronPruning({"net.0.weight": 4}, schedule=OneShot(4), shrink=True), epochs=6).fit(model, data())
    assert model.net[0].weight.shape == (16, 6)
    assert (model.net[0].out_features, model.net[2].in_features) == (16, 16)
    for part in model.modules():
        assert not part._forward_pre_hooks
        assert not part._state_dict_hooks
        assert not part._load_state_dict_pre_hooks
    assert sparsity_of(model).masks["net.0.weight"].dead.shape == (16, 6)
    trainer(CPNAPruning({"net.0.weight": 3}, schedule=OneShot(2), normalize=False), epochs=1).fit(model, data())
    assert int(model.net[0].weight.count_nonzero()) == 3


def test_the_module_is_copied_and_pickled_while_it_is_small() -> None:
    copies: list[nn.Module] = []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step in (10, 18):
                copies.extend([copy.deepcopy(pl_module.net), pickle.loads(pickle.dumps(pl_module.net))])
                x = torch.randn(3, 6).double()
                for twin in copies[-2:]:
                    assert torch.equal(twin(x), pl_module.net(x))

    run(mlp, features_first(True), Copies())
    assert len(copies) == 4
    for twin in copies:
        assert twin.state_dict()["0.weight"].shape == (16, 6)


def test_loading_full_weights_into_a_small_module_takes_what_is_left_and_refuses_what_would_be_lost() -> None:
    seen: list[str] = []

    class Loads(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 12:
                assert pl_module.net[0].weight.shape[0] == 4
                files = pl_module.state_dict()
                before = weights(pl_module)
                pl_module.load_state_dict(files)
                assert all(torch.equal(value, before[name]) for name, value in weights(pl_module).items())
                files["net.0.weight"] = torch.ones_like(files["net.0.weight"])
                with pytest.raises(ValueError, match="was made smaller; the file has weights where"):
                    pl_module.load_state_dict(files)
                seen.append("yes")

    callback = NeuronPruning({"net.0.weight": 4}, schedule=OneShot(4), shrink=True)
    run(mlp, [callback], Loads())
    assert seen == ["yes"]


def test_compact_after_the_fit_makes_the_network_that_it_was_in_the_fit() -> None:
    spy = Shapes()
    model = run(mlp, hidden_then_input(True), spy)
    x = torch.randn(8, 6).double()
    compacted = compact(model.net, x, batch_sizes=())
    torch.testing.assert_close(compacted.module(compacted.inputs(x)), model.net(x))
    assert compacted.module.get_parameter("0.weight").shape[0] <= spy.shapes[-1]["net.0.weight"][0]


def test_a_forward_with_its_width_written_in_it_stays_as_large_as_it_is_with_a_warning() -> None:
    def make() -> nn.Module:
        return Net(lambda m, x: m.b(m.a(x).relu().view(-1, 10)), a=nn.Linear(6, 10), b=nn.Linear(10, 1))

    def callbacks(shrink: bool) -> list[Any]:
        return [NeuronPruning({"net.a.weight": 3}, schedule=OneShot(5), shrink=shrink)]

    spy = Shapes()
    with pytest.warns(
        UserWarning, match=r"shrink: net\.a\.weight stays as large as it is while the fit goes on: .*shape '\[-1, 10\]'"
    ):
        shrunk = run(make, callbacks(True), spy)
    same(shrunk, run(make, callbacks(False)))
    assert spy.shapes[-1] == spy.shapes[0]


def test_batch_normalisation_between_stays_as_large_as_it_is_with_a_warning() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 1))

    with pytest.warns(
        UserWarning, match=r"shrink: net\.0\.weight stays as large as it is while the fit goes on: .*running_mean"
    ):
        model = run(make, [NeuronPruning({"net.0.weight": 3}, schedule=OneShot(5), shrink=True)])
    assert int(model.net[0].weight.any(1).sum()) == 3


def tied() -> nn.Module:
    a = nn.Linear(6, 6)
    b = nn.Linear(6, 6)
    b.weight = a.weight
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), a, nn.ReLU(), b, nn.ReLU(), nn.Linear(6, 1))


@pytest.mark.parametrize(
    ("make", "options", "optimizer", "message"),
    [
        (mlp, two_processes, None, "DDPStrategy trains in 2 processes"),
        (lambda: torch.compile(mlp(), backend="eager"), dict, None, "the module is compiled"),
        (tied, dict, None, "tied parameters; allowed is shrink=False"),
        (mlp, dict, lambda p: torch.optim.LBFGS(p), "LBFGS is not known to work element by element"),
    ],
)
def test_what_cannot_change_its_shapes_is_refused(make: Any, options: Any, optimizer: Any, message: str) -> None:
    callback = NeuronPruning({"net.0.weight": 3}, schedule=OneShot(5), score="norm", compensate=None, shrink=True)
    with pytest.raises(Exception, match=message):
        trainer(callback, **options()).fit(Double(make(), optimizer), data())


@pytest.mark.parametrize(
    "average",
    [
        pl.callbacks.StochasticWeightAveraging(1e-2),
        pytest.param(getattr(pl.callbacks, "EMAWeightAveraging", None), id="EMA"),
    ],
)
def test_averages_of_the_weights_are_refused(average: Any) -> None:
    if average is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    average = average() if isinstance(average, type) else average
    callback = NeuronPruning({"net.0.weight": 3}, schedule=OneShot(5), shrink=True)
    with pytest.raises(
        ValueError, match="Averaging keeps averages of the weights; allowed is shrink=False, and compact"
    ):
        trainer(callback, average).fit(Double(mlp()), data())


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="shrink is 'yes'; allowed is True or False"):
        CPNAPruning({"net.0.weight": 3}, shrink="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shrink is True with an EpochFraction"):
        NeuronPruning(["net.0.weight"], schedule=EpochFraction(), shrink=True)


def two_branches() -> nn.Module:
    """One branch whose width is written in the code, and one that can be cut."""
    return Net(
        lambda m, x: m.b(m.a(x).relu().view(-1, 10)) + m.d(m.c(x).relu()),
        a=nn.Linear(6, 10), b=nn.Linear(10, 1), c=nn.Linear(6, 12), d=nn.Linear(12, 1),
    )  # fmt: skip


@pytest.mark.parametrize("steps", [(3, 8), (5, 5)])
def test_a_layer_that_cannot_be_cut_leaves_the_others_and_the_files_alone(steps: tuple[int, int]) -> None:
    files: list[dict[str, torch.Size]] = []

    class Files(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            files.append({name: value.shape for name, value in pl_module.state_dict().items()})

    def callbacks(shrink: bool) -> list[Any]:
        return [
            NeuronPruning({f"net.{name}.weight": 3}, schedule=OneShot(step), name=name, shrink=shrink)
            for name, step in zip("ac", steps, strict=True)
        ]

    spy = Shapes()
    with pytest.warns(UserWarning, match=r"net\.a\.weight stays"):
        shrunk = run(two_branches, callbacks(True), spy, Files())
    same(shrunk, run(two_branches, callbacks(False)))
    assert spy.shapes[-1]["net.a.weight"] == (10, 6)
    assert spy.shapes[-1]["net.c.weight"] == (3, 6)
    assert all(shapes == files[0] for shapes in files)


@pytest.mark.parametrize(
    ("make", "callback", "shape"),
    [
        (mlp, lambda: CPNAPruning({"net.2.weight": 4}, schedule=OneShot(3), shrink=True), (4, 6)),
        (
            lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 100), nn.ReLU(), nn.Linear(100, 1)),
            lambda: NeuronPruning({"net.0.weight": 4}, schedule=OneShot(3), shrink=True),
            (4, 6),
        ),
    ],
    ids=["output layer only", "small layer before a large one"],
)
def test_what_died_beside_unmasked_layers_is_cut_too(make: Any, callback: Any, shape: tuple[int, int]) -> None:
    spy = Shapes()
    run(make, [callback()], spy, epochs=8)
    assert spy.shapes[-1]["net.0.weight"] == shape


@pytest.mark.parametrize("kind", ["units", "units by CPNA", "features"])
def test_random_scores_resume_alike_while_shrinking(kind: str, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        if kind == "units":
            return [NeuronPruning({"net.0.weight": 3}, schedule=Cubic(1, 18), score="random", shrink=True)]
        granularity: Any = "unit" if kind == "units by CPNA" else "feature"
        options: dict[str, Any] = {"granularity": granularity, "score": "random", "shrink": True}
        return [CPNAPruning({"net.0.weight": 3}, schedule=Cubic(1, 18), **options)]

    torch.manual_seed(2)
    whole = Double(mlp())
    saver = checkpoint(tmp_path, every_n_epochs=1)
    trainer(*callbacks(), saver, enable_checkpointing=True, epochs=6).fit(whole, data())
    for file in sorted(tmp_path.glob("*.ckpt"))[1:5]:
        resumed = Double(mlp())
        trainer(*callbacks(), epochs=6).fit(resumed, data(), ckpt_path=file)
        same(resumed, whole, 1e-9)


def test_the_optimizers_state_goes_round_while_it_is_small() -> None:
    class Round(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            [optimizer] = trainer.optimizers
            optimizer.load_state_dict(optimizer.state_dict())

    same(run(mlp, hidden_then_input(True), Round()), run(mlp, hidden_then_input(False)))


def test_transposed_convolutions_keep_their_widths() -> None:
    net = nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Unflatten(1, (4, 2)), nn.ConvTranspose1d(4, 2, 2), nn.Flatten(),
        nn.Linear(6, 1),
    )  # fmt: skip
    model = run(lambda: net, [NeuronPruning({"net.0.weight": 3}, schedule=OneShot(3), shrink=True)])
    assert (model.net[4].in_channels, model.net[4].out_channels) == (4, 2)


def test_adafactor_is_refused_and_a_network_that_shrinks_is_not_compacted() -> None:
    callback = NeuronPruning({"net.0.weight": 3}, schedule=OneShot(3), shrink=True)
    with pytest.raises(ValueError, match="Adafactor is not known to work element by element"):
        run(mlp, [callback], optimizer=lambda p: torch.optim.Adafactor(p))

    class Compacts(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            compact(pl_module.net, batch[0].double())

    with pytest.raises(ValueError, match="made smaller by a running fit"):
        run(mlp, [NeuronPruning({"net.0.weight": 3}, schedule=OneShot(3), shrink=True)], Compacts())
