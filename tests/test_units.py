"""Reports of units, against networks whose dead units are known, and the callback that logs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_cpna import DeadUnitLogger, mean_replacement_penalties, observe, plot_units, trace, unit_report
from tests.helpers import Classifier, data, tensorboard, trainer


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return torch.as_tensor(net(x).square().mean())


def network() -> nn.Sequential:
    """Unit 1 is never active, unit 2 constant, unit 3 feeds nothing, unit 4 next to nothing."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    net.get_parameter("0.bias").data.fill_(0.5)
    net.get_parameter("0.weight").data[1] = 0
    net.get_parameter("0.bias").data[1] = -1
    net.get_parameter("0.weight").data[2] = 0
    net.get_parameter("2.weight").data[:, 3] = 0
    net.get_parameter("2.weight").data[:, 4] *= 1e-6
    return net


@pytest.mark.parametrize("penalties", [False, True])
def test_dead_units_are_found_by_what_makes_them_dead(penalties: bool) -> None:
    net, x = network(), torch.randn(50, 3)
    report = unit_report(net, trace(net, x), [x[:25], x[25:]], loss, penalties=penalties)
    [layer] = report.layers
    assert layer.never_active.tolist() == [False, True, False, False, False, False]
    assert layer.constant.tolist() == [False, True, True, False, False, False]
    assert layer.useless.tolist() == [False, True, True, True, True, False]
    assert report.as_dict() == {"0.weight": {"units": 6, "never_active": 1, "constant": 2, "useless": 4}}
    assert report.loss == pytest.approx(float(loss(net, x)))
    assert "never active" in str(report)
    seen = observe(net, trace(net, x), ["0.weight"], [x[:25], x[25:]], loss)["0.weight"]
    assert torch.equal(layer.activity.largest, seen.largest)
    if penalties:
        exact = mean_replacement_penalties(net, trace(net, x), "0.weight", [x[:25], x[25:]], loss, seen.means)
        assert layer.penalties is not None
        assert torch.equal(layer.penalties, exact)


def test_the_plot_has_a_panel_a_layer_and_names_the_dead() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(50, 3)
    figure = plot_units(unit_report(net, trace(net, x), [x], loss))
    assert [axes.get_title() for axes in figure.axes] == ["0.weight: 6 units", "2.weight: 5 units"]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert figure.axes[0].get_ylabel().startswith("mean replacement saliency")
    assert labels == [
        f"{kind}: {n}" for kind, n in zip(("useless", "constant", "never active"), (0, 0, 0), strict=True)
    ]


class Validated(Classifier):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])


def test_the_callback_logs_what_a_report_over_the_validation_set_counts(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    net.get_parameter("0.bias").data[:5] = -100.0
    net.get_parameter("0.weight").data[5:7] = 0.0
    net.get_parameter("0.bias").data[5:7] = 1.0
    for name in ("0.weight", "0.bias"):
        net.get_parameter(name).requires_grad_(False)
    model = Validated(net)
    logger = TensorBoardLogger(tmp_path)
    runner = trainer(DeadUnitLogger(), epochs=2, logger=logger, log_every_n_steps=1)
    runner.fit(model, data(), data())
    x = data().dataset[:][0]
    counts = unit_report(net, trace(net, x), [x], loss).as_dict()["0.weight"]
    logged = {key: runner.callback_metrics[f"dead_units/net.0.weight/{key}"] for key in ("never_active", "constant")}
    assert {key: int(value) for key, value in logged.items()} == {"never_active": 5, "constant": 7}
    assert (counts["never_active"], counts["constant"]) == (5, 7)
    assert not any(part._forward_pre_hooks for part in model.modules())
    ask = tensorboard(tmp_path)
    tags = json.dumps(ask("scalars/tags"))
    assert "dead_units/net.0.weight/never_active" in tags


def test_the_callback_works_beside_shrinking_and_leaves_no_hooks_after_an_error() -> None:
    from lightning_cpna import NeuronPruning, OneShot

    sizes: list[int] = []

    class Sizes(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            sizes.append(int(trainer.callback_metrics["dead_units/net.0.weight/units"]))

    callback = NeuronPruning({"net.0.weight": 4}, schedule=OneShot(5), shrink=True)
    trainer(callback, DeadUnitLogger(), Sizes(), epochs=4, num_sanity_val_steps=0).fit(Validated(), data(), data())
    assert sizes == [16, 4, 4, 4]

    class Breaks(Classifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            raise ZeroDivisionError

    model = Breaks()
    with pytest.raises(ZeroDivisionError):
        trainer(DeadUnitLogger()).fit(model, data(), data())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="name is ''"):
        DeadUnitLogger(name="")


def test_a_network_that_cannot_be_traced_is_warned_about_once_and_trained() -> None:
    from tests.helpers import SinglePrecision

    model = Validated(SinglePrecision())
    with pytest.warns(UserWarning, match="could not be traced, so nothing is logged: TypeError: single precision only"):
        trainer(DeadUnitLogger(), epochs=2).fit(model, data(), data())


def test_the_loss_of_a_report_is_the_mean_over_examples_and_a_module_without_hidden_layers_is_refused() -> None:
    net, x = network(), torch.randn(9, 3)
    report = unit_report(net, trace(net, x), [x[:8], x[8:]], loss)
    assert report.loss == pytest.approx(float(loss(net, x)))
    single = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="no hidden Linear or Conv layer"):
        unit_report(single, trace(single, x), [x], loss)
