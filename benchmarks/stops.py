"""A teacher that ends by another token than its student: training with and without --stop-class.

    python benchmarks/stops.py                    ten minutes on 2 cores

As with a base student and a chat teacher, both models know both tokens, and each ends by its own.
The pair is made of the toy world `clean`. The teacher's rows of `<|end|>` and `<|pad|>` are
exchanged, so that it ends by `<|pad|>` where it ended by `<|end|>` before. The student's row of
`<|end|>` is multiplied by 0.3, so that it is not always sure where to end: what happens with
probability 1 cannot be unlearned from samples. `opd` trains this student with `--stop-class` on and
off, and on the unchanged teacher.

The table has means over seeds with 95% t intervals: accuracy on held-out problems, tokens per
response (of the last evaluation) and the share of responses that the length limit ended, before
(step 0) and after. The last line is JSON: every seed's accuracy and length.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import toy  # noqa: E402
from benchmarks import tables  # noqa: E402
from benchmarks.intervals import mean_and_half  # noqa: E402

CASES = {  # name: what the teacher ends by, flags
    "the same stop token": ("own", ()),
    "stop class on": ("other", ("--stop-class", "on")),
    "stop class off": ("other", ("--stop-class", "off")),
}


def write_pair(folder: Path) -> None:
    """student/, which is not always sure to end, and other/, the teacher that ends by `<|pad|>`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = toy.world("clean")
    for name, source in (("student", world.student), ("other", world.teacher)):
        shutil.copytree(source, folder / name)
        model = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        weight_VD = model.get_output_embeddings().weight  # tied: the embedding's, too
        with torch.no_grad():
            if name == "student":
                weight_VD[end] *= 0.3
            else:
                weight_VD[[end, pad]] = weight_VD[[pad, end]].clone()
                model.config.eos_token_id = model.generation_config.eos_token_id = pad
        model.save_pretrained(folder / name)


def train(student: Path, teacher: Path, flags, seed: int, steps: int, out: Path) -> dict:
    """First and last evaluation of a run."""
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "toy", "--method", "opd",
               "--student", student, "--teacher", teacher, "--toy", "clean",
               "--difficulty", 6, "--steps", steps, "--eval-every", 0, "--eval-count", 100,
               "--seed", seed, "--out", out, *flags]  # fmt: skip
    done = subprocess.run([*map(str, command)], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "accuracy" in line]
    names = "accuracy", "mean_tokens", "truncated"
    return {f"{name}_{when}": line[name] for name in names
            for when, line in zip(("before", "after"), evaluations, strict=True)}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="per run (default %(default)s)")
    args = parser.parse_args(argv)
    if args.seeds < 2 or args.steps < 1:
        parser.error(f"--seeds {args.seeds} must be at least 2, --steps {args.steps} at least 1")
    results = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        teachers = {"own": toy.world("clean").teacher, "other": Path(folder, "other")}
        todo = [(name, seed) for seed in range(args.seeds) for name in CASES]
        for name, seed in tqdm(todo, unit="run"):
            kind, flags = CASES[name]
            out = Path(folder, f"{name.replace(' ', '-')}-{seed}")
            how = flags, seed, args.steps, out
            results[name].append(train(Path(folder, "student"), teachers[kind], *how))
    names = list(results[next(iter(CASES))][0])
    rows = []
    for name, runs in results.items():
        cells = [mean_and_half([run[key] for run in runs]) for key in names]
        rows.append([name, *(f"{mean:.3g} ± {half:.2g}" for mean, half in cells)])
    print(tables.table(["opd", *(key.replace("_", " ") for key in names)], rows))
    print(json.dumps({name: {key: [round(run[key], 4) for run in runs] for key in names}
                      for name, runs in results.items()}))  # fmt: skip


if __name__ == "__main__":
    main()
