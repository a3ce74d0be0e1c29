"""Tables of results in a page (README.md, RESULTS.md), between two marks."""

from __future__ import annotations

END = "<!-- end of results -->"


def fill(text: str, name: str, table: str) -> str:
    """Put a table between the marks that have a name.

    Args:
        text: The page.
        name: Whose results they are: the first mark is ``<!-- results of NAME -->``.
        table: The table, in Markdown.

    Raises:
        ValueError: If the mark is not there, or more than once.
    """
    start = f"<!-- results of {name} -->"
    if text.count(start) != 1:
        raise ValueError(f"text has {start!r} {text.count(start)} times; allowed is once")
    before, rest = text.split(start)
    _, after = rest.split(END, 1)
    return f"{before}{start}\n{table}\n{END}{after}"
