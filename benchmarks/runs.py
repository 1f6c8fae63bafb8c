"""Runs of `train.py` for compare.py and verdicts.py: worlds, methods and seeds in, results out."""

import json
import multiprocessing
import os
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import toy


@dataclass(frozen=True)
class Cell:
    """What is run once per seed. `curve`: evaluate every 10 steps, not only first and last."""

    world: str
    method: str
    flags: tuple[str, ...] = ()
    moves: int = 0  # 0: the world's own difficulty
    curve: bool = False

    @property
    def name(self) -> str:
        """Of its run folders, without the seed."""
        words = [self.method, *(flag.lstrip("-") for flag in self.flags), f"n{self.difficulty}"]
        return f"{self.world}/{'-'.join(words)}"

    @property
    def difficulty(self) -> int:
        """Moves per problem."""
        return self.moves or toy.world(self.world).moves


def cells(worlds: str, methods: str, *variants: str, moves=(0,), curve=False) -> list[Cell]:
    """All combinations of names and flag variants, each written as words in a string."""
    return [
        Cell(world, method, tuple(variant.split()), n, curve)
        for world in worlds.split()
        for n in moves
        for method in methods.split()
        for variant in variants or ("",)
    ]


def build_worlds(names) -> None:
    """Train the models of the worlds that are not here yet."""
    from toy.__main__ import main as build_models  # loads PyTorch, which nothing else here needs

    for name in dict.fromkeys(names):
        world = toy.world(name)
        if not all((folder / "config.json").exists() for folder in (world.student, world.teacher)):
            print(f"building the world {name}", flush=True)
            if build_models(["--world", name]):
                sys.exit(f"could not build the world {name}")


def flags_of(cell: Cell, seed: int, folder: Path, extra: list[str]) -> list[str]:
    """The command line of `train.py` for one run."""
    argv = ["--toy", cell.world, "--method", cell.method, "--difficulty", str(cell.difficulty)]
    argv += [] if cell.curve else ["--eval-every", "0"]
    return [*argv, "--seed", str(seed), "--out", str(folder), *cell.flags, *extra]


def finished(folder: Path, cell: Cell) -> bool:
    """Whether the run is there, evaluated as often as the cell wants it."""
    if not (folder / "student").exists():
        return False
    every = json.loads((folder / "config.json").read_text())["flags"]["eval_every"]
    return every > 0 or not cell.curve


def train_here(argv: list[str], log: Path) -> None:
    """In a process of its own: `train.py` with these flags, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import train

    train.main(argv)
    if not (log.with_suffix("") / "student").exists():  # a signal ends a run with exit code 0
        raise RuntimeError("told to stop before its last step")


def run_folder(root: Path, cell: Cell, seed: int) -> Path:
    """Where a run writes."""
    return root / f"{cell.name}-seed{seed}"


def run_all(todo: list[tuple[Cell, int]], root: Path, jobs: int, extra: list[str]) -> None:
    """Run what is not finished, `jobs` processes at a time, with one progress bar.

    The processes are forked from one that has imported `train` and done nothing else: importing
    PyTorch and transformers anew would take a fifth of the time.
    """
    missing = []
    for cell, seed in todo:
        folder = run_folder(root, cell, seed)
        if not finished(folder, cell):
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
            argv = flags_of(cell, seed, folder, extra)
            missing.append((argv, folder.with_name(folder.name + ".txt")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "transformers.models.qwen3.modeling_qwen3"])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(train_here, *task): task for task in missing}
        bar = tqdm(as_completed(running), total=len(running), unit="run", smoothing=0)
        for future in bar:
            argv, log = running[future]
            try:
                future.result()
            except BaseException as error:
                pool.shutdown(cancel_futures=True)
                tail = log.read_text()[-3000:] if log.exists() else ""
                sys.exit(f"train.py {' '.join(argv)}\n{tail}\n{type(error).__name__}: {error}")


def summary(cell: Cell, seed: int, root: Path) -> dict:
    """An entry of compare.json from the log of a finished run."""
    folder = run_folder(root, cell, seed)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "accuracy" in line]
    rollouts = config["flags"]["prompts_per_step"] * config["flags"]["rollouts_per_prompt"]

    def mean(key: str) -> float | None:
        values = [line[key] for line in training if line.get(key) is not None]
        return round(statistics.mean(values), 5) if values else None

    return {
        "world": cell.world,
        "method": cell.method,
        "flags": list(cell.flags),
        "moves": cell.difficulty,
        "seed": seed,
        "steps": [line["step"] for line in evaluations],
        **{
            key: [round(line[key], 5) for line in evaluations]
            for key in ("accuracy", "accuracy_low", "accuracy_high")
        },
        "ood": [line["ood"]["accuracy"] for line in evaluations if "ood" in line],
        "uncertain_wording": evaluations[-1].get("uncertain_wording"),
        **{k: mean(k) for k in ("kept", "fired", "release_at", "bic_gain_over_6", "triggered")},
        "supervised_tokens": round(mean("kept_tokens") / rollouts, 2),
        "flat_groups": mean("flat_groups"),
        "repeated_4grams": training[-1]["repeated_4grams"],
        "response_tokens": training[-1]["response_tokens"],
        "truncated": training[-1]["truncated"],
        "seconds": round(sum(x["seconds"].get("total") or x["seconds"]["evaluate"] for x in lines)),
        "commit": config["commit"],
    }
