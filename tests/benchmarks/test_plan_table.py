"""Memory of the papers' pairs: the page has what the command prints."""

from pathlib import Path

from commands import last_line

from benchmarks import plan

PAGE = Path(plan.__file__).parent.parent / "docs" / "real-models.md"


def test_the_page_shows_what_the_command_prints(capsys):
    last, shown = last_line(capsys, plan.main)
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    page = PAGE.read_text()
    assert len(rows) == 2 + len(plan.ROWS) and "\n".join(rows) in page
    assert last["1.7B from 30B-A3B, 8192, lgr, 1"] > last["1.7B from 4B, 8192, lgr, 1"] > plan.GPUS
    for command, tokens in (("0.6B from 1.7B", 1024), ("1.7B from 4B", 8192)):
        assert f"(#memory) {last[f'{command}, {tokens}, release, 1']:.0f} GiB" in page


def test_the_two_commands_are_those_of_the_page():
    """Flag by flag: a command that is edited there is planned for here."""
    page = PAGE.read_text().replace("\\\n", " ")
    lines = [x for x in page.splitlines() if x.startswith("torchrun train.py") and "Qwen" in x]
    for (*_, words), line in zip(plan.ROWS[-2:], lines[:2], strict=True):
        assert set(words.split()) <= set(line.split()), line
