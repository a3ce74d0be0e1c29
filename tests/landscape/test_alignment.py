"""Alignment of weight vectors: closed forms of angles and frame potentials, scipy, and a real TensorBoard."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_cpna import AlignmentLogger, CPNAPruning, OneShot, SparseLinear
from lightning_cpna.landscape import (
    alignment,
    angles_between,
    filters_of,
    frame_potential,
    frame_potential_bounds,
    plot_alignment,
    similarity_graph,
)
from tests.helpers import Classifier, checkpoint, data, mlp, tensorboard, trainer

pytest.importorskip("sklearn", reason="the extra 'analysis' is not installed")


def rays(degrees: list[float], lengths: list[float] | None = None) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    return vectors * torch.tensor(lengths or [1.0] * len(degrees), dtype=torch.float64)[:, None]


def test_angles_to_the_centres_are_those_of_the_construction() -> None:
    result = alignment(rays([-4, 4, 86, 94, 180], [1, 2, 3, 4, 0.5]), n_clusters=3)
    assert result.angles.tolist() == pytest.approx([4, 4, 4, 4, 0], abs=1e-9)
    assert sorted(result.sizes.tolist()) == [1, 2, 2]
    assert result.norms.tolist() == pytest.approx([1, 2, 3, 4, 0.5])
    assert result.angle() == pytest.approx(4)
    assert result.angle(0) == pytest.approx(0, abs=1e-9)
    assert result.share_within(1) == pytest.approx(0.2)
    assert result.share_within(1, by_norm=True) == pytest.approx(0.5 / 10.5)
    assert result.angle(0.04, by_norm=True) == pytest.approx(0, abs=1e-9)
    assert result.angle(0.05, by_norm=True) == pytest.approx(4)
    assert result.angle(1, by_norm=True) == pytest.approx(4)


def test_directions_count_and_lengths_do_not() -> None:
    vectors = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    scaled = vectors * torch.rand(20, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    a, b = alignment(vectors), alignment(scaled)
    assert torch.allclose(a.angles, b.angles, atol=1e-4)
    assert a.frame_potential == pytest.approx(b.frame_potential, abs=1e-6)


def test_vectors_that_are_zero_are_left_out() -> None:
    result = alignment(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), n_clusters=2)
    assert result.units.tolist() == [1, 3]


def test_small_angles_are_exact() -> None:
    tiny = angles_between(rays([0.0]), rays([1e-7]))
    assert float(tiny) == pytest.approx(1e-7, rel=1e-8)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_the_frame_potential_is_within_its_bounds(n: int, d: int, seed: int) -> None:
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, _ = frame_potential_bounds(n, d)
    assert low - 1e-12 <= frame_potential(vectors) <= 1 + 1e-12
    loop = sum(float(a @ b) ** 2 for a in vectors for b in vectors) / n**2
    assert frame_potential(vectors, normalize=False) == pytest.approx(loop)


@pytest.mark.parametrize(("n", "d"), [(3, 2), (5, 2), (8, 2), (2, 3), (3, 3)])
def test_tight_frames_have_the_lowest_potential(n: int, d: int) -> None:
    frame = rays([180 * i / n for i in range(n)]) if d == 2 else torch.eye(3)[:n]
    assert frame_potential(frame) == pytest.approx(frame_potential_bounds(n, d)[0], abs=1e-12)


def test_random_directions_have_the_expected_potential() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [frame_potential(torch.randn(20, 5, generator=generator)) for _ in range(300)]
    assert sum(values) / 300 == pytest.approx(frame_potential_bounds(20, 5)[1], abs=2e-3)
    assert frame_potential(torch.ones(7, 4)) == pytest.approx(1)
    assert frame_potential(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])) == pytest.approx(0.5)
    result = alignment(rays([0, 60]), n_clusters=1)
    assert result.mean_inner_product == pytest.approx((1 + 1 + 2 * 0.5) / 4)


def test_the_similarity_graph_is_that_of_the_formula() -> None:
    vectors = rays([0, 10, 100, 200], [1, 5, 2, 3])
    found = similarity_graph(vectors, threshold=0.5)
    distance = [[(1 - math.cos(math.radians(a - b))) / 2 for b in (0, 10, 100, 200)] for a in (0, 10, 100, 200)]
    mean = sum(map(sum, distance)) / 12
    for i in range(4):
        for j in range(4):
            weight = math.exp(-((distance[i][j] / mean) ** 2))
            expected = weight if i != j and weight >= 0.5 else 0
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-12)
    assert not similarity_graph(torch.zeros(3, 2)).any()
    assert similarity_graph(torch.ones(2, 2)).tolist() == [[0, 1], [1, 0]]


def test_filters_are_the_rows_of_every_storage() -> None:
    linear = nn.Linear(6, 4)
    assert torch.equal(filters_of(linear, "weight"), linear.weight.detach().double())
    conv = nn.Conv1d(2, 3, 5)
    assert torch.equal(filters_of(conv, "weight"), conv.weight.detach().double().flatten(1))
    sparse = SparseLinear(6, 4, epsilon=1)
    assert torch.equal(filters_of(sparse, "weight"), sparse.to_dense().weight.detach().double())
    for name in ("bias", "nothing"):
        with pytest.raises(ValueError, match=name):
            filters_of(linear, name)


def test_bad_arguments_are_named() -> None:
    for call, message in (
        (lambda: alignment(torch.ones(2, 2), n_clusters=3), "n_clusters is 3; allowed is an int from 1 to 2"),
        (lambda: alignment(torch.ones(2)), r"filters has shape \(2,\)"),
        (lambda: alignment(torch.full((2, 2), math.nan)), "finite"),
        (lambda: alignment(rays([0, 9]), 1).angle(2), "quantile is 2"),
        (lambda: similarity_graph(torch.ones(2, 2), 2), "threshold is 2"),
        (lambda: AlignmentLogger([]), "layers is empty"),
        (lambda: AlignmentLogger(["a"], n_clusters=0), "n_clusters is 0"),
        (lambda: AlignmentLogger(["a"], every_n_epochs=0), "every_n_epochs is 0"),
        (lambda: AlignmentLogger(["a"], name=""), "name is ''"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"net\.7\.weight"):
        trainer(AlignmentLogger(["net.7.weight"])).fit(Classifier(), data())


def test_pictures_show_before_and_after() -> None:
    before, after = alignment(torch.randn(9, 3)), alignment(rays([0, 1, 90, 91, 180, 181, 270, 271]))
    assert len(plot_alignment(after).axes) == 2
    titles = [axes.get_title() for axes in plot_alignment(after, before).axes]
    assert titles[1].startswith("initialisation")
    assert titles[2].startswith("trained")


def test_tensorboard_shows_the_filters_over_training(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callback = AlignmentLogger("net.0.weight", n_clusters=2, every_n_epochs=2)
    module = Classifier(mlp(8))
    trainer(callback, CPNAPruning({"net.0.weight": 24}), epochs=4, logger=logger).fit(module, data())
    ask = tensorboard(tmp_path)
    points = ask("scalars/scalars?run=run&tag=alignment/net.0.weight/median_angle")
    assert [point[1] for point in points] == [0, 7, 15]
    assert points[-1][2] == pytest.approx(alignment(filters_of(module, "net.0.weight"), 2).angle(), rel=1e-5)
    trained = alignment(filters_of(module, "net.0.weight"), 2)
    for name, value in (("within_15", trained.share_within(15)), ("frame_potential", trained.frame_potential)):
        assert ask(f"scalars/scalars?run=run&tag=alignment/net.0.weight/{name}")[-1][2] == pytest.approx(
            value, rel=1e-5
        )
    [table] = tmp_path.glob("run/00015/**/metadata.tsv")
    expected = [f"{unit}\t{cluster}" for unit, cluster in zip(trained.units, trained.clusters, strict=True)]
    assert table.read_text().splitlines()[1:] == expected
    assert len(ask("images/images?run=run&tag=alignment/net.0.weight")) == 3
    embeddings = ask("projector/info?run=run")["embeddings"]
    assert [one["tensorName"] for one in embeddings] == [f"alignment/net.0.weight:{step:05d}" for step in (0, 7, 15)]


def test_a_layer_that_is_pruned_below_its_clusters_or_breaks_does_not_end_the_fit(tmp_path: Path) -> None:
    class Break(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                pl_module.net[0].weight.data[0, 0] = math.nan

    logger = CSVLogger(tmp_path)
    pruning = CPNAPruning({"net.0.weight": 3}, granularity="unit", schedule=OneShot(4), normalize=False)
    module = Classifier(mlp(8))
    trainer(pruning, Break(), AlignmentLogger("net.0.weight"), epochs=4, logger=logger).fit(module, data())
    rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())
    measured = [row for row in rows if row["alignment/net.0.weight/median_angle"]]
    assert len(measured) == 3  # at the start, and after the first two epochs; then the layer is broken


def test_a_resumed_fit_compares_with_the_beginning_of_the_first(tmp_path: Path) -> None:
    module = Classifier()
    start = filters_of(module, "net.0.weight")
    first = AlignmentLogger(["net.0.weight"])
    other = AlignmentLogger(["net.2.weight"], n_clusters=1, name="other")
    runner = trainer(first, other, checkpoint(tmp_path), epochs=2, enable_checkpointing=True)
    runner.fit(module, data())
    second: list[Any] = [
        AlignmentLogger(["net.0.weight"]),
        AlignmentLogger(["net.2.weight"], n_clusters=1, name="other"),
    ]
    resumed = trainer(*second, epochs=3, logger=CSVLogger(tmp_path))
    resumed.fit(Classifier(), data(), ckpt_path=tmp_path / "step=8.ckpt")
    assert torch.equal(second[0]._first["net.0.weight"], start)
    assert list(second[1]._first) == ["net.2.weight"]
    trainer(second[0], epochs=1).fit(module, data())
    assert not torch.equal(second[0]._first["net.0.weight"], start)
