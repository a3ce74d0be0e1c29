"""Every callback with every kind of training and network: it ends at its exact counts, or is refused by a clear error."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from lightning_cpna.pattern import rows_of
from tests.compatibility.callbacks import CALLBACKS
from tests.compatibility.circumstances import CIRCUMSTANCES
from tests.compatibility.networks import NETWORKS, module

RECORD = Path(__file__).parents[2] / "docs" / "compatibility.json"

REFUSED = {
    (
        "CPNAPruning, normalising",
        ".*",
        "CNN with BatchNorm",
    ): r"BatchNorm2d 'net.features.1' \(batch_norm\) does not scale",
    ("CPNAPruning, normalising", ".*", "LSTM"): r"LSTM 'net.lstm' \(lstm\) mixes units; use normalize=False",
    ("CPNAPruning, normalising", ".*", "Transformer encoder"): "MultiheadAttention .* mixes units; use normalize=False",
    (
        ".*",
        "EMA|SWA",
        "SparseLinear",
    ): "connections of 'net.0.weight', a SparseLinear, come and go, but .* keeps averages",
    (".*TicketRewind", "EMA|SWA", ".*"): "keeps averages of the weights, which would not go back",
}
"""Callback, circumstance and network, each a regular expression, to what the error says."""


def refusal(callback: str, circumstance: str, network: str) -> str | None:
    """Return what the error must say, if there must be one."""
    for patterns, message in REFUSED.items():
        if all(re.fullmatch(p, it) for p, it in zip(patterns, (callback, circumstance, network), strict=True)):
            return message
    return None


def expected_counts(callback: str, network: str) -> dict[str, int]:
    """Return how many connections of the weights must live, or units, where units are removed."""
    it = NETWORKS[network]
    if "Neuron" in callback:
        return it.units
    if "normalising" in callback:
        return dict([list(it.connections.items())[-1]])
    if "SETRewiring" in callback and it.is_sparse:  # it keeps what it has
        return {name: module(network, pl).get_parameter(name).numel() for name in it.connections}
    return it.connections


def live_rows(name: str, live: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Return the unit of each live connection of a weight, which may be a list of connections."""
    if live.ndim > 1:
        return live.flatten(1).nonzero()[:, 0]
    return rows_of(weights[name.replace("weight", "crow_indices")], len(live))[weights[name] != 0]


def cells() -> list[Any]:
    found = []
    for callback in CALLBACKS:
        for circumstance in CIRCUMSTANCES:
            for network in NETWORKS:
                fast = circumstance == "one process" or network == "MLP"
                marks = [] if fast else [pytest.mark.slow]
                found.append(pytest.param(callback, circumstance, network, marks=marks))
    return found


@pytest.mark.parametrize(("callback", "circumstance", "network"), cells())
def test_a_cell_holds_its_counts_or_says_why_not(
    callback: str, circumstance: str, network: str, tmp_path: Path, record_property: Any
) -> None:
    message = refusal(callback, circumstance, network)
    configs = CALLBACKS[callback](NETWORKS[network])
    record_property("cell", (callback, circumstance, network))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if message is not None:
            with pytest.raises((ValueError, ProcessRaisedException), match=message) as error:
                CIRCUMSTANCES[circumstance](network, configs, tmp_path)
            record_property("refused", str(error.value).strip().splitlines()[-1].removeprefix("ValueError: "))
            return
        live, weights = CIRCUMSTANCES[circumstance](network, configs, tmp_path)
    for name, count in expected_counts(callback, network).items():
        if "Neuron" not in callback:
            assert int(live[name].sum()) == count, name
            continue
        n_units = len(live_rows(name, live[name], weights).unique())
        assert n_units <= count, name
        assert n_units == count or "SETRewiring" in callback, "rewiring may leave a unit without a connection"
    for name, mask in live.items():
        assert not weights[name][~mask].any(), name


def test_the_recorded_table_is_complete_and_agrees_with_what_is_refused() -> None:
    recorded = {tuple(row[:3]): row[3:] for row in json.loads(RECORD.read_text())}
    assert set(recorded) == {tuple(cell.values) for cell in cells()}
    for cell, (outcome, reason) in recorded.items():
        message = refusal(*cell)
        if outcome != "skipped":
            assert outcome == ("refused" if message else "works"), cell
            assert re.search(message or "", reason), cell
