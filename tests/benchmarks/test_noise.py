"""How much of a group reward is rounding: the figures against loops, and the command."""

import math
import statistics

import torch
from commands import last_line

from benchmarks import noise


def test_figures_equal_loops_over_groups():
    draw = torch.Generator().manual_seed(0)
    exact = torch.rand(40, 4, dtype=torch.float64, generator=draw)
    exact[::2] = 0.5 + exact[::2] * 1e-4  # flat ones
    coarse = exact.float().double()
    found = {torch.float64: exact, torch.float32: coarse, torch.bfloat16: exact.bfloat16().double()}
    got = noise.figures(found, {"eps": 0.01})

    def rewards(groups):
        rows = []
        for group in groups.tolist():
            mean, std = statistics.mean(group), statistics.stdev(group)
            rows.append([(c - mean) / (std + 0.01) for c in group])
        return rows

    right, power, flat, error = rewards(exact), 0.0, 0.0, 0.0
    for group, row, other in zip(exact.tolist(), right, rewards(coarse), strict=True):
        power += sum(r * r for r in row)
        flat += sum(r * r for r in row) if max(group) - min(group) < 1e-3 else 0.0
        error += sum((a - b) ** 2 for a, b in zip(row, other, strict=True))
    assert got["flat"] == 0.5
    assert math.isclose(got["of them"], flat / power, rel_tol=1e-9)
    assert math.isclose(got["float32"], error / power, rel_tol=1e-6)
    assert got["bfloat16"] > 1e3 * got["float32"] > 0


def test_a_larger_eps_leaves_less_to_groups_that_do_not_differ(capsys, tmp_path):
    last, shown = last_line(
        capsys, noise.main, "--worlds", "fork", "--prompts", "4", "--out", tmp_path
    )
    assert set(last) == {f"fork {how}" for how in noise.SETTINGS}
    rows = (tmp_path / "noise.md").read_text()
    assert all(f"| {how} |" in rows for how in noise.SETTINGS) and "## fork" in shown
