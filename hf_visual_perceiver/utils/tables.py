"""Tables in Markdown and for the terminal. (tabulate and pandas write Markdown without escaping.)"""

from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Format a table in Markdown; the first `left` columns are aligned to the left, the others to the right.

    Example:
        >>> print(markdown_table(["K", "accuracy"], [["1", "0.5"]]))
        | K | accuracy |
        | --- | ---: |
        | 1 | 0.5 |
    """
    rule = ["---"] * left + ["---:"] * (len(headers) - left)
    lines = ([cell.replace("|", "\\|") for cell in row] for row in (headers, *rows))
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"| {' | '.join(rule)} |", *body])


def terminal_table(
    title: str | None, headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, ends: Collection[int] = ()
) -> Table:
    """Create a table for the terminal, with the same alignment as `markdown_table`.

    Args:
        title: Text above the table.
        headers: Headers of the columns.
        rows: Cells, without markup.
        left: Number of columns that are aligned to the left.
        ends: Indices of the rows after which a line is drawn.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        if number < left:
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), end_section=number in ends)
    return table
