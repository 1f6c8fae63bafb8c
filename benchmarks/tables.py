"""What every command prints: Markdown tables and a last line of JSON."""

import json


def row(cells: list) -> str:
    """A row of a Markdown table, - for None.

    >>> row(["a", 1, None])
    '| a | 1 | - |'
    """
    return "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "\n".join(map(row, [head, ["---"] * len(head), *rows]))


def print_head(*names: str) -> None:
    """The first two lines of a table whose rows follow one by one."""
    print(row(names) + "\n" + "|---" * len(names) + "|", flush=True)


def print_row(*cells) -> None:
    """One more row."""
    print(row(cells), flush=True)


def print_json(figures: dict[str, float | None], digits: int) -> None:
    """The last line of a command."""
    print(json.dumps({key: value and round(value, digits) for key, value in figures.items()}))
