"""The commands behind the README's tables run, and end with one line of JSON.  No times here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def last_line(*command):
    """Run a benchmark; its last line, as JSON, and all of its standard output."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_lgr():
    figures, shown = last_line("benchmarks/lgr.py", "--lengths", "48", "64", "--candidates", "3",
                               "--rates", "0.2", "--repeats", "1", "--slices", "2")
    assert set(figures) >= {"vs_naive", "vs_reprefill", "over_opd", "over_flop_limit"}
    assert all(value > 0 for value in figures.values())
    rows = [line for line in shown.splitlines() if line.startswith(("| 48 |", "| 64 |"))]
    # naive is timed at the last length only
    assert len(rows) == 2 and rows[0].endswith("| - |") and not rows[1].endswith("| - |")


def test_compare(tmp_path):
    """Two values of a flag, one seed; a second call finds the runs and repeats the table."""
    command = ["benchmarks/compare.py", "--worlds", "fork", "--methods", "lgr", "--seeds", "3",
               "--vary", "lgr-gamma", "0", "2", "--runs", tmp_path / "runs", "--out",
               tmp_path / "new" / "table", "--", "--steps", "1", "--difficulty", "1",
               "--eval-count", "4", "--eval-samples", "1", "--prompts-per-step", "2"]
    figures, shown = last_line(*command)
    assert list(figures) == ["fork/lgr --lgr-gamma 0/3", "fork/lgr --lgr-gamma 2/3"]
    folders = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert folders == ["fork-lgr-lgr-gamma-0-seed3", "fork-lgr-lgr-gamma-2-seed3"]
    table = (tmp_path / "new" / "table.md").read_text()
    assert table.count("\n") == 4 and "uncertain wording" in table and table.strip() in shown
    record = json.loads((tmp_path / "new" / "table.json").read_text())
    assert [run["method"] for run in record["runs"]] == ["lgr --lgr-gamma 0", "lgr --lgr-gamma 2"]
    assert last_line(*command)[0] == figures
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == folders
