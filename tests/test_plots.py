from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_cpna import (
    Annealing,
    Cubic,
    Geometric,
    Linear,
    OneShot,
    Schedule,
    SparseLinear,
    Sparsity,
    connectivity,
    plot_connectivity,
    plot_schedule,
    trace,
)
from lightning_cpna.plots import MAX_LINES, NEGATIVE, POSITIVE, Connectivity, log_figure

FIRST = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [-3.0, 0.5, 0.0], [0.0, 1.0, 0.0]])  # (unit, feature)
LAST = torch.tensor([[-1.0, 4.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]])  # (output, unit)


def sparse_net(first: Tensor = FIRST, last: Tensor = LAST) -> Sparsity:
    net = nn.Sequential(nn.Linear(first.shape[1], len(first)), nn.ReLU(), nn.Linear(len(first), len(last)))
    net.load_state_dict({**net.state_dict(), "0.weight": first, "2.weight": last})
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, torch.randn(2, first.shape[1]))
    for name, weight in [("0.weight", first), ("2.weight", last)]:
        sparsity.remove_(name, weight == 0)
    return sparsity


def edges(result: Connectivity) -> list[tuple[str, list[tuple[int, int, float]]]]:
    return [
        (name, sorted(zip(sources.tolist(), units.tolist(), weight.tolist(), strict=True)))
        for name, sources, units, weight in result.layers
    ]


def lines(figure: Figure) -> list[LineCollection]:
    return [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]


@pytest.mark.parametrize(
    "schedule",
    [Annealing(2, 6), Cubic(0.1, 0.5), Geometric(0, 8, every=3), Linear(2, 6), OneShot(0.5)],
)
def test_a_schedules_line_has_its_numbers(schedule: Schedule) -> None:
    figure = plot_schedule(schedule, 1000, 10, total_steps=12)
    assert isinstance(figure, Figure)
    [axes] = figure.axes
    curve, floor = axes.get_lines()
    steps = list(range(13))
    resolved = schedule.resolved(12)
    assert list(np.asarray(curve.get_xdata())) == steps
    assert list(np.asarray(curve.get_ydata())) == [resolved.n_remaining(step, 1000, 10) for step in steps]
    assert set(np.asarray(floor.get_ydata())) == {10}
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("optimizer step", "remaining", repr(schedule))


def test_a_schedule_plots_itself_the_same_way() -> None:
    curve = Linear(0, 1.0).plot(20, 4, total_steps=4).axes[0].get_lines()[0]
    assert list(np.asarray(curve.get_ydata())) == [20, 16, 12, 8, 4]


def test_connectivity_of_two_layers_equals_one_drawn_by_hand() -> None:
    result = connectivity(sparse_net())
    assert result.sizes == (3, 4, 2)
    assert edges(result) == [
        ("0.weight", [(0, 2, -3.0), (1, 0, 2.0), (1, 2, 0.5), (1, 3, 1.0)]),
        ("2.weight", [(0, 0, -1.0), (1, 0, 4.0), (2, 1, 5.0)]),
    ]


def test_a_live_weight_of_zero_is_a_connection() -> None:
    sparsity = sparse_net()
    with torch.no_grad():
        sparsity.tensors["0.weight"][0, 1] = 0
    assert edges(connectivity(sparsity))[0] == ("0.weight", [(0, 2, -3.0), (1, 0, 0.0), (1, 2, 0.5), (1, 3, 1.0)])


def test_connectivity_of_a_convolution_has_channels_and_kernel_norms_by_hand() -> None:
    net = nn.Sequential(nn.Conv1d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    weights = {
        "0.weight": torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, -2.0], [0.0, 0.0]]]),
        "3.weight": torch.tensor([[1.0, 2.0, 0.0, -5.0]]),  # two cells of channel 0, two of channel 1
    }
    net.load_state_dict({**net.state_dict(), **weights})
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, torch.randn(2, 2, 3))
    for name, weight in weights.items():
        sparsity.remove_(name, weight == 0)
    result = connectivity(sparsity)
    assert result.sizes == (2, 2, 1)
    assert edges(result) == [
        ("0.weight", [(0, 0, 5.0), (0, 1, 2.0)]),
        ("3.weight", [(0, 0, 1.0), (0, 0, 2.0), (1, 0, -5.0)]),
    ]


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.cat([x, self.a(x).relu()], dim=1))
        return out


def test_connectivity_of_listed_connections_equals_that_of_the_same_masks() -> None:
    dense = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    masked = Sparsity(dense)
    for name in ("0.weight", "2.weight"):
        masked.remove_(name, torch.rand_like(masked.tensors[name]) < 0.5)
    sparse = nn.Sequential(*(SparseLinear.from_dense(part) if isinstance(part, nn.Linear) else part for part in dense))
    listed = Sparsity(sparse)
    for sparsity in (masked, listed):
        sparsity.graph = trace(sparsity.module, torch.randn(3, 5))
    assert edges(connectivity(listed)) == edges(connectivity(masked))
    assert connectivity(listed).sizes == connectivity(masked).sizes == (5, 4, 2)


def test_connections_that_skip_a_layer_are_left_out_by_hand() -> None:
    net = Skip()
    weights = {"a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b.weight": torch.tensor([[5.0, 6.0, 7.0, 8.0]])}
    net.load_state_dict({**net.state_dict(), **weights})
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, torch.randn(3, 2))
    assert edges(connectivity(sparsity))[1] == ("b.weight", [(0, 0, 7.0), (1, 0, 8.0)])


def test_the_lowest_row_is_of_features_only_where_the_network_reads_them() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    broken = nn.Sequential(nn.Linear(4, 6), nn.Softmax(dim=1), nn.Linear(6, 1))
    for module, inputs in ((net, "features"), (broken, "inputs of 2.weight")):
        sparsity = Sparsity(module)
        sparsity.add_budgets(module, {"2.weight": 3})
        sparsity.graph = trace(module, torch.rand(2, 4))
        drawn = connectivity(sparsity)
        assert drawn.inputs == inputs
        assert plot_connectivity(drawn).axes[0].get_yticklabels()[0].get_text().startswith(inputs)


class Branches(nn.Module):
    """A deep and a wide way to the output; the wide one runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.wide = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu()) + self.wide(x)
        return out


@pytest.mark.parametrize(("masked", "chain"), [([], ["a.weight", "b.weight"]), (["wide.weight"], ["wide.weight"])])
def test_the_chain_has_the_most_masks_and_then_the_most_layers(masked: list[str], chain: list[str]) -> None:
    net = Branches()
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, torch.rand(2, 4))
    for name in masked:
        sparsity.add_mask(name)
    assert [name for name, *_ in connectivity(sparsity).layers] == chain


def test_channels_of_a_grouped_convolution_are_features_of_their_own() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 1, groups=4, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, torch.rand(2, 4, 1, 1))
    drawn = connectivity(sparsity)
    assert drawn.sizes == (4, 8, 1)
    _, channels, units, weight = drawn.layers[0]
    assert list(zip(channels.tolist(), units.tolist(), strict=True)) == [(unit // 2, unit) for unit in range(8)]
    torch.testing.assert_close(weight, net.get_parameter("0.weight").detach().flatten())


def test_too_few_feature_names_are_refused() -> None:
    drawn = Connectivity((("w", torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0])),), (3, 1))
    with pytest.raises(ValueError, match="feature_names has 2 names; allowed are 3, one for each input"):
        plot_connectivity(drawn, ["a", "b"])


def test_connectivity_of_an_untraced_module_raises() -> None:
    with pytest.raises(ValueError, match="not traced"):
        connectivity(Sparsity(nn.Linear(2, 1)))


def test_a_picture_has_a_line_for_each_live_connection_and_no_other() -> None:
    figure = plot_connectivity(connectivity(sparse_net()))
    assert isinstance(figure, Figure)
    first, last = lines(figure)
    assert (len(first.get_segments()), len(last.get_segments())) == (4, 3)
    assert {float(y) for segment in first.get_segments() for y in segment[:, 1]} == {0.0, 1.0}
    assert {float(y) for segment in last.get_segments() for y in segment[:, 1]} == {1.0, 2.0}
    assert figure.axes[0].get_title() == "4 + 3 connections; blue is positive, red negative, the width is the magnitude"


def test_lines_join_the_places_of_their_ends_in_the_color_of_their_sign() -> None:
    figure = plot_connectivity(connectivity(sparse_net()))
    # Features 0 and 1 are used, units 0, 1, 2, 3 and both outputs; each row spreads over (0, 1).
    features, units = {0: 0.25, 1: 0.75}, {0: 0.125, 1: 0.375, 2: 0.625, 3: 0.875}
    expected = {  # from the widest, with the color of the sign
        (features[0], units[2]): NEGATIVE,
        (features[1], units[0]): POSITIVE,
        (features[1], units[3]): POSITIVE,
        (features[1], units[2]): POSITIVE,
    }
    first = lines(figure)[0]
    drawn = {
        (float(segment[0, 0]), float(segment[1, 0])): to_hex(color)
        for segment, color in zip(first.get_segments(), np.asarray(first.get_colors()), strict=True)
    }
    assert drawn == expected
    widths = list(np.asarray(first.get_linewidth()))
    assert widths == sorted(widths, reverse=True)
    assert widths == pytest.approx([0.3 + 2.7 * w / 3 for w in (3, 2, 1, 0.5)])


def test_removed_connections_and_unused_features_are_not_drawn() -> None:
    sparsity = sparse_net()
    sparsity.remove_("0.weight", torch.tensor([[True] * 3, [True] * 3, [False] * 3, [True] * 3]))
    figure = plot_connectivity(connectivity(sparsity), ["x", "y", "z"])
    assert [len(collection.get_segments()) for collection in lines(figure)] == [2, 3]
    assert [text.get_text() for text in figure.axes[0].texts] == ["x", "y"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [
        "features\n2 of 3 connected",
        "units of 0.weight\n3 of 4 connected",
        "units of 2.weight\n2 of 2 connected",
    ]


@pytest.mark.parametrize("make", [list, tuple, np.array, iter])
def test_feature_names_of_every_kind_are_written_under_the_used_features(make: Callable[[list[str]], Any]) -> None:
    figure = plot_connectivity(connectivity(sparse_net()), make(["age", "height", "weight"]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["age", "height"]


def test_features_without_names_are_numbered() -> None:
    figure = plot_connectivity(connectivity(sparse_net()))
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1"]


def test_of_very_many_connections_the_largest_are_drawn() -> None:
    weight = torch.randn(60, 50)
    figure = plot_connectivity(connectivity(sparse_net(weight, torch.randn(1, 60))))
    first, last = lines(figure)
    assert len(first.get_segments()) == MAX_LINES < 3000
    assert len(last.get_segments()) == 60
    widths, largest = np.asarray(first.get_linewidth()), weight.abs().flatten().sort(descending=True).values
    np.testing.assert_allclose(widths, 0.3 + 2.7 * largest[:MAX_LINES] / largest[0], rtol=1e-5)


def test_a_network_without_any_connection_is_drawn_empty() -> None:
    figure = plot_connectivity(connectivity(sparse_net(torch.zeros(4, 3), torch.zeros(2, 4))))
    assert [len(collection.get_segments()) for collection in lines(figure)] == [0, 0]
    figure.draw_without_rendering()


class Experiment:
    def __init__(self) -> None:
        self.figures: list[tuple[str, Figure, int]] = []

    def add_figure(self, tag: str, figure: Figure, global_step: int) -> None:
        self.figures.append((tag, figure, global_step))


class Logger:
    def __init__(self, experiment: object) -> None:
        self.experiment = experiment


def test_figures_go_to_loggers_that_take_them_and_are_drawn_for_no_other() -> None:
    def never() -> Figure:
        raise AssertionError

    log_figure([Logger(object())], "tag", never, 3)
    experiment, figure = Experiment(), Figure()
    log_figure([Logger(object()), Logger(experiment)], "tag", lambda: figure, 3)
    assert experiment.figures == [("tag", figure, 3)]
