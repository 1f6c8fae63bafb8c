"""Where the value of every flag comes from: defaults, presets, methods, the command line."""

import json

import pytest
from runs import parse, read_log

import harness
import toy
import train
from harness import flags


def table(*argv):
    """(namespace, origins) of a command line."""
    tables = train.FLAGS, train.METHODS, train.PRESETS
    return flags.parse("train.py", *tables, [*argv])[1:]


def test_no_default_depends_on_another_flag_in_silence():
    """With a student named nothing of the preset toy remains; without one, all of it is said to be
    the preset's."""
    args, origins = table("--student", "mine")
    defaults = flags.defaults(sum((train.FLAGS | flags.MACHINE).values(), []))
    left_open = {"device", "dtype", "difficulty", "max_new_tokens", "out"}
    for name, value in defaults.items():
        if name not in left_open | {"student", "objective", "mask", "lookahead"}:
            assert getattr(args, name) == value and origins[name] == "default", name
    toys, origins = table()
    for name, value in train.PRESETS["toy"].items():
        assert getattr(toys, name) == value and origins[name] == "--preset toy"
    assert origins["preset"] == "no --student" and toys.toy == "varied"
    assert set(origins) == set(vars(toys))


def test_later_ones_override_earlier_ones():
    args, origins = table("--preset", "toy", "--lr", "0.5", "--method", "lgr", "--lookahead", "off")
    assert (args.lr, origins["lr"]) == (0.5, "command line")
    assert (args.mask, origins["mask"]) == ("none", "--method lgr")
    assert (args.lookahead, origins["lookahead"]) == ("off", "command line")
    assert (args.beta2, origins["beta2"]) == (0.95, "--preset toy")
    args, origins = table("--preset", "lgr-script", "--student", "s", "--method", "release")
    assert (args.method, args.objective, args.mask) == ("release", "pg", "release")
    assert args.lgr_normalize == "mean" and origins["lgr_normalize"] == "--preset lgr-script"


@pytest.mark.parametrize("preset", list(train.PRESETS))
def test_every_preset_is_a_command_line_that_passes(preset):
    """Its names are flags, its values within their limits: as if typed."""
    typed = []
    for name, value in train.PRESETS[preset].items():
        typed += [f"--{name.replace('_', '-')}", str(value)]
    named = ["--student", "mine", "--problems", "mine.jsonl"]
    by_hand, by_name = parse([*typed, *named]), parse(["--preset", preset, *named])
    assert {**vars(by_hand), "preset": preset} == vars(by_name)
    train.needs(by_name)


def test_the_papers_settings():
    """PAPERS: 0, 2.6, 2.7 and the recipe of the release paper."""
    named = ["--student", "mine", "--problems", "mine.jsonl"]
    release, lgr, script = (
        parse(["--preset", name, *named]) for name in ("release-paper", "lgr-paper", "lgr-script")
    )
    assert (release.prompts_per_step, release.steps, release.max_new_tokens) == (1024, 100, 16384)
    assert (release.margin_top_k, release.bic_eps, release.lr) == (4, 1e-12, 1e-5)
    for args in (lgr, script):
        assert (args.prompts_per_step, args.max_new_tokens, args.lr) == (128, 9216, 1e-5)
        assert (args.weight_decay, args.beta1, args.beta2, args.clip_grad) == (0.1, 0.9, 0.98, 1.0)
        assert (args.lgr_top_k, args.lgr_tau, args.union_top_k) == (8, 0.2, 20)
    assert (lgr.method, lgr.lgr_gamma, lgr.lgr_normalize) == ("lgr", 1.0, "std")
    assert (script.method, script.lgr_normalize, script.lgr_alternate) == ("lgr_topk", "mean", 2)
    assert script.loss_mean == "response"


def test_the_effective_table_is_said_and_stored(tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--toy", "clean", "--difficulty", "1", "--steps", "1", "--prompts-per-step", "2",
                "--eval-count", "1", "--eval-samples", "1", "--method", "opd", "--out", str(out)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert any(line.startswith("train.py: --preset toy: lr 0.001, ") for line in said)
    (typed,) = [line for line in said if line.startswith("train.py: command line: method opd, ")]
    assert ", steps 1," in typed and f"out {out}" in typed
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["lr"] == 0.001 and config["origins"]["lr"] == "--preset toy"
    assert config["origins"]["steps"] == "command line"
    assert set(config["origins"]) == set(config["flags"])
    assert read_log(out)[0][0]["step"] == 1


def test_what_toy_problems_need_is_worked_out_unless_it_is_given():
    for world, moves in (("horizon", 12), ("fork", 6)):
        args, origins = table("--toy", world)
        assert (args.difficulty, args.max_new_tokens) == (moves, toy.response_limit(moves))
        assert origins["max_new_tokens"] == "worked out"
    assert table("--max-new-tokens", "9")[0].max_new_tokens == 9
    assert table("--preset", "lgr-paper")[0].max_new_tokens == 9216  # refused later: too long
    assert parse(["--student", "s", "--problems", "p"]).max_new_tokens == 8192


def test_help_names_every_flag_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for flag, default, *_ in sum((train.FLAGS | harness.MACHINE).values(), []):
        assert shown.count(f"\n  {flag} ") + shown.count(f"\n  {flag}\n") == 1, flag
        if isinstance(default, int | float | str) and default is not False:
            assert f"(default {default})" in " ".join(shown.split()), flag
