"""What the site shows of committed results: pictures, under the same paths as in the README, and what works together."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of the examples' results."""
    for picture in sorted(ROOT.glob("examples/*/results/**/*.png")):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables of what was tried together into the page that has their mark."""
    return markdown.replace("<!-- compatibility -->", "\n\n".join(tables()))


def tables() -> list[str]:
    """Return a table for each callback: how it is trained, by network; then what the errors say."""
    rows = json.loads((ROOT / "docs" / "compatibility.json").read_text())
    callbacks, ways, networks = (list(dict.fromkeys(row[place] for row in rows)) for place in range(3))
    reasons = list(dict.fromkeys(reason for *_, reason in rows if reason))
    cells = {tuple(row[:3]): (row[3], row[4]) for row in rows}
    marks = {"works": "✓", "refused": "error", "skipped": "not tried"}
    found = []
    for callback in callbacks:
        lines = [f"## {callback}", "", f"| | {' | '.join(networks)} |", "| --- |" + " :---: |" * len(networks)]
        for way in ways:
            texts = []
            for network in networks:
                outcome, reason = cells[callback, way, network]
                texts.append(marks[outcome] + (f" ({reasons.index(reason) + 1})" if reason else ""))
            lines.append(f"| {way} | {' | '.join(texts)} |")
        found.append("\n".join(lines))
    notes = [f"{place}. {reason}" for place, reason in enumerate(reasons, start=1)]
    return [*found, "\n".join(["## What the errors say, and why something was not tried", "", *notes])]
