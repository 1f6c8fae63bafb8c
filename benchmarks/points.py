"""Points of the figures: arithmetic on the runs of results/compare.json.

A run is one entry of the record's "runs": a dict with world, method, flags (a list of strings),
moves, seed, steps, accuracy (one per step), supervised_tokens. A point is (x, mean over seeds,
half the width of the 95% t interval of that mean; nan for a single seed).
"""

import numpy as np

from benchmarks.intervals import mean_and_half

CONTROLS = ["opd", "release", "prefix", "shuffled", "random", "std"]
# flag: world, method, default, unit, and whether its values are numbers
SENSITIVITY = {
    "margin-top-k": ("varied", "release", "4", "candidates", True),
    "min-segments": ("varied", "release", "2", "sentences", True),
    "rescale": ("varied", "release", "batch", "scope", False),
    "lgr-gamma": ("fork", "lgr", "1", "weight γ of the group reward", True),
    "lgr-tau": ("fork", "lgr", "0.2", "nats", True),
    "lgr-normalize": ("fork", "lgr", "std", "of a group's rewards", False),
}
COMPANIONS = {"lgr-normalize": {"--lgr-gamma": "γ", "--lgr-eps": "ε"}}  # flags varied along with it


def settings(flags: list[str]) -> dict[str, str]:
    """Flags as a dict, so that their order does not matter.

    >>> settings(["--lgr-normalize", "mean", "--lgr-gamma", "4"])
    {'--lgr-normalize': 'mean', '--lgr-gamma': '4'}
    """
    found, name = {}, ""
    for word in flags:
        if word.startswith("--"):
            name, word = word, ""
        found[name] = f"{found.get(name, '')} {word}".strip()
    return found


def usual_moves(world: str) -> int:
    """The difficulty at which the worlds are compared: what train.py takes without --difficulty."""
    if world == "fork-mirror":
        return 2
    return 6 if world.startswith("fork") else 12


def select(runs, world, method, flags=(), moves=None) -> list[dict]:
    """The runs (seeds) of one setting; `moves` None for the world's usual difficulty."""
    return [
        run
        for run in runs
        if (run["world"], run["method"]) == (world, method)
        and settings(run["flags"]) == settings(flags)
        and run["moves"] == (moves or usual_moves(world))
    ]


def series(runs, world, method, flags=(), moves=None) -> list[tuple]:
    """Points (step, mean, half width) of one setting, at the steps where all seeds were evaluated.

    >>> run = {"world": "clean", "method": "opd", "flags": [], "moves": 12, "seed": 0}
    >>> runs = [run | {"steps": [0, 10, 30], "accuracy": [0.25, 0.5, 0.75]}]
    >>> runs += [run | {"seed": 1, "steps": [0, 30], "accuracy": [0.25, 0.75]}]
    >>> series(runs, "clean", "opd")
    [(0, 0.25, 0.0), (30, 0.75, 0.0)]
    """
    curves = [dict(zip(r["steps"], r["accuracy"], strict=True))
              for r in select(runs, world, method, flags, moves)]  # fmt: skip
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, *mean_and_half([curve[step] for curve in curves])) for step in shared]


def against(runs, x_of, when: int = -1) -> list[tuple]:
    """Points (x, mean, half width) of the accuracy at the end (`when` 0: before) by `x_of(run)`.

    Runs whose `x_of` is None are left out.

    >>> runs = [{"moves": 6, "accuracy": [0.5, 0.9]}, {"moves": 2, "accuracy": [0.7, 0.8]}]
    >>> against(runs, lambda run: run["moves"], when=0)
    [(2, 0.7, nan), (6, 0.5, nan)]
    """
    groups: dict[float, list[float]] = {}
    for run in runs:
        if (x := x_of(run)) is not None:
            groups.setdefault(x, []).append(run["accuracy"][when])
    return [(x, *mean_and_half(groups[x])) for x in sorted(groups)]


def difficulty_lines(runs, world, methods) -> dict[str, list[tuple]]:
    """{method or "untrained": points (moves, ...)} of a world, other flags at their defaults."""
    plain = [r for r in runs if r["world"] == world and r["method"] in methods and not r["flags"]]
    lines = {
        method: against([run for run in plain if run["method"] == method], lambda run: run["moves"])
        for method in methods
    }
    lines["untrained"] = against(plain, lambda run: run["moves"], when=0)
    return {name: points for name, points in lines.items() if points}


def grade_of(world: str, named: dict[str, float]) -> float | None:
    """How bad a world's teacher is: by name, or the number in the name; None for other worlds.

    >>> [grade_of(world, {"fork": 0.5}) for world in ("fork", "fork-0.1", "fork-mirror", "clean")]
    [0.5, 0.1, None, None]
    """
    if world in named:
        return named[world]
    family, _, number = world.rpartition("-")
    try:
        return float(number) if family in named else None
    except ValueError:
        return None


def grade_lines(runs, named, wanted) -> dict[str, list[tuple]]:
    """{line or "untrained": points (grade, ...)}, every world at its usual difficulty."""
    usual = [run for run in runs if run["moves"] == usual_moves(run["world"])]
    lines, used = {}, []
    for name, (method, flags) in wanted.items():
        same = [run for run in usual if run["method"] == method
                and settings(run["flags"]) == settings(flags)]  # fmt: skip
        lines[name] = against(same, lambda run: grade_of(run["world"], named))
        used += same
    lines["untrained"] = against(used, lambda run: grade_of(run["world"], named), when=0)
    return {name: points for name, points in lines.items() if points}


def budget_points(runs, world) -> tuple[list[tuple], dict[str, tuple]]:
    """(points of the fixed prefixes, {method: point}); x is the supervised tokens per rollout."""

    def point(group):
        tokens = float(np.mean([run["supervised_tokens"] for run in group]))
        return (tokens, *mean_and_half([run["accuracy"][-1] for run in group]))

    lengths = {tuple(r["flags"]) for r in runs if set(settings(r["flags"])) == {"--prefix-tokens"}}
    fixed = [select(runs, world, "prefix", flags) for flags in sorted(lengths)]
    single = {method: select(runs, world, method) for method in CONTROLS}
    return (
        sorted(point(group) for group in fixed if group),
        {method: point(group) for method, group in single.items() if group},
    )


def sensitivity_values(runs, flag: str) -> dict[str, dict[int, float]]:
    """{value of the flag: {seed: accuracy at the end}}, numbers in order, words as they come.

    The default's runs have no flags. Flags varied along with this one are named in the value.
    """
    world, method, default, _, numeric = SENSITIVITY[flag]
    companions = COMPANIONS.get(flag, {})
    found: dict[str, dict[int, float]] = {default: {}}
    for run in runs:
        given = settings(run["flags"])
        others = [name for name in given if name != f"--{flag}"]
        # alone, --lgr-gamma is another figure's; --lgr-eps is this one's
        ours = f"--{flag}" in given or "--lgr-eps" in given or not given
        if (run["world"], run["method"], run["moves"]) != (world, method, usual_moves(world)):
            continue
        if ours and set(others) <= set(companions):
            value = given.get(f"--{flag}", default)
            value += "".join(f"\n{companions[name]} = {given[name]}" for name in others)
            if numeric:
                value = f"{float(value):g}"
            found.setdefault(value, {})[run["seed"]] = run["accuracy"][-1]
    present = {value: seeds for value, seeds in found.items() if seeds}
    return dict(sorted(present.items(), key=lambda item: float(item[0]))) if numeric else present
