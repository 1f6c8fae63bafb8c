"""Memory of the papers' pairs: the page has what the command prints."""

from pathlib import Path

from commands import last_line

from benchmarks import plan

PAGE = Path(plan.__file__).parent.parent / "docs" / "real-models.md"


def test_the_page_shows_what_the_command_prints(capsys):
    last, shown = last_line(capsys, plan.main)
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(plan.PAIRS) and "\n".join(rows) in PAGE.read_text()
    assert last["1.7B from 30B-A3B, 8192, 1"] > last["1.7B from 4B, 8192, 1"] > plan.GPUS
