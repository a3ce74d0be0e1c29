"""The code of the README and the site runs, links and pictures are there, tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from examples.page import END, fill

ROOT = Path(__file__).parents[1]
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]


def blocks(page: str) -> list[str]:
    """Return a page's code, less what begins with a model that is not there."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return [block for block in found if "trainer.fit(model, loader)  # any" not in block]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for position, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, block {position}", "exec"), space)
    if page in ("README.md", "docs/start.md"):
        layers = {layer.name: layer for layer in space["pruning"].report(space["model"]).layers}
        assert (layers["net.0.weight"].connections, layers["net.2.weight"].connections) == (12, 6)
        assert layers["net.0.weight"].live_features == 2


def test_a_table_is_put_between_its_marks_or_nothing_is_lost() -> None:
    page = f"A\n<!-- results of a -->\nold\n{END}\nPROSE\n<!-- results of b -->\nkept\n{END}\nZ\n"
    assert fill(page, "a", "NEW") == page.replace("old", "NEW")
    for broken in (page.replace(f"old\n{END}", "old"), page.split(END)[0]):
        with pytest.raises(
            ValueError, match="text has no '<!-- end of results -->' between '<!-- results of a -->' and"
        ):
            fill(broken, "a", "NEW")
    for broken, n in ((page.replace("results of a", ""), 0), (page + page, 2)):
        with pytest.raises(ValueError, match=f"text has '<!-- results of a -->' {n} times; allowed is once"):
            fill(broken, "a", "NEW")


def test_the_table_is_made_from_the_committed_results() -> None:
    table = pytest.importorskip("examples.xor.table", reason="the extra 'examples' is not installed")
    files = sorted((ROOT / "examples" / "xor" / "results").glob("*.json"))
    assert fill(README, "examples.xor", table.markdown(table.load(files))) == README


@pytest.mark.parametrize("name", ["removable", "smaller"])
def test_the_tables_of_saliencies_are_made_from_the_committed_results(name: str) -> None:
    figures = pytest.importorskip("examples.saliency.figures", reason="the extra 'examples' is not installed")
    rows = figures.load(ROOT / "examples" / "saliency" / "results", name)
    assert fill(RESULTS, f"examples.saliency {name}", figures.TABLES[name](rows)) == RESULTS


def anchors(text: str) -> set[str]:
    return {
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "RESULTS"])
def test_pictures_files_and_sections_that_are_linked_are_there(text: str) -> None:
    for link in re.findall(r"\[.*?\]\(([^)#]*#?[^)]*)\)", text):
        file, _, section = link.partition("#")
        if file.startswith("http"):
            continue
        path = ROOT / file if file else None
        assert path is None or path.exists(), link
        if section:
            assert section in anchors(text if path is None else path.read_text()), link
