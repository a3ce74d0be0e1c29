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
        ValueError: If the mark is not there, or more than once, or its end is not before the next mark.
    """
    start = f"<!-- results of {name} -->"
    if text.count(start) != 1:
        raise ValueError(f"text has {start!r} {text.count(start)} times; allowed is once")
    before, rest = text.split(start)
    old, end, after = rest.partition(END)
    if not end or "<!-- results of " in old:
        raise ValueError(f"text has no {END!r} between {start!r} and the next mark; allowed is one behind each table")
    return f"{before}{start}\n{table}\n{END}{after}"
