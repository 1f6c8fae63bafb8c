"""Time and memory of a step by its length."""

import pytest
from commands import last_line

from benchmarks import long, memory, shapes


def test_growth_is_over_that_of_the_length(capsys, monkeypatch):
    """Seconds grow with the length, MiB with its square: 1.00 and 4.00 at four times the length."""

    def measured(step, words):
        T = int(words[words.index("--max-new-tokens") + 1])
        return {name: (T / 1000, T * T / 1000) for name in long.PHASES}

    monkeypatch.setattr(memory, "in_a_process", measured)
    monkeypatch.setattr(shapes, "write_pair", lambda *_: None)
    last, shown = last_line(capsys, long.main, "--lengths", "100", "400")
    rows = [line for line in shown.splitlines() if line.startswith("| 400 |")]
    assert len(rows) == 1 and rows[0].count("(1.00)") == rows[0].count("(4.00)") == 4
    assert last["update 400 s"] == 0.4 and last["update 400 MiB"] == 160


@pytest.mark.parametrize("T", [64, 16384])
def test_the_share_of_attention_is_that_of_the_products(T):
    """Of a token: four matrices of attention, three of the gated part, the head; and two products
    with half of the columns in each layer."""
    layers, D, heads, kv, d, inner, V = shapes.PAIRS["small"][1]
    matrices = 2 * layers * (D * d * (2 * heads + 2 * kv) + 3 * D * inner) + 2 * V * D
    attention = layers * 4 * heads * d * T / 2
    assert long.attention_share(T) == pytest.approx(attention / (attention + matrices))


def test_a_step_is_measured_in_every_phase(tmp_path):
    shapes.write_pair(tmp_path, "small", 256, 1, 16, 48)
    words = long.our_side.pair_flags(tmp_path, long.parse(["--lengths", "48"], tokens=48))
    found = long.step([*words, "--method", "lgr"])
    assert set(found) == set(long.PHASES)
    assert all(seconds > 0 for seconds, _ in found.values())
