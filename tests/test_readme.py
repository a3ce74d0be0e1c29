"""The README's code runs and its table is the one that the committed results give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from examples.readme import fill

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("position", [i for i, block in enumerate(BLOCKS) if "trainer.fit(model, loader)" not in block])
def test_a_block_of_code_runs(position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(compile(BLOCKS[position], f"README.md, block {position}", "exec"), space)
    if "pruning" in space:
        layers = {layer.name: layer for layer in space["pruning"].report(space["model"]).layers}
        assert (layers["net.0.weight"].connections, layers["net.2.weight"].connections) == (12, 6)
        assert layers["net.0.weight"].live_features == 2


def test_the_table_is_made_from_the_committed_results() -> None:
    table = pytest.importorskip("examples.xor.table", reason="the extra 'examples' is not installed")
    files = sorted((ROOT / "examples" / "xor" / "results").glob("*.json"))
    assert fill(README, "examples.xor", table.markdown(table.load(files))) == README


@pytest.mark.parametrize("name", ["removable", "smaller"])
def test_the_tables_of_saliencies_are_made_from_the_committed_results(name: str) -> None:
    figures = pytest.importorskip("examples.saliency.figures", reason="the extra 'examples' is not installed")
    rows = figures.load(ROOT / "examples" / "saliency" / "results", name)
    assert fill(README, f"examples.saliency {name}", figures.TABLES[name](rows)) == README


def test_the_pictures_are_there() -> None:
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()
