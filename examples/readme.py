"""Tables of results in the README, between two marks."""

from __future__ import annotations

END = "<!-- end of results -->"


def fill(text: str, name: str, table: str) -> str:
    """Put a table between the marks that have a name.

    Args:
        text: The README.
        name: Whose results they are: the first mark is ``<!-- results of NAME -->``.
        table: The table, in Markdown.
    """
    start = f"<!-- results of {name} -->"
    before, rest = text.split(start)
    _, after = rest.split(END, 1)
    return f"{before}{start}\n{table}\n{END}{after}"
