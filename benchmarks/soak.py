r"""Kill runs of `train.py` at random moments, resume them, and compare with uninterrupted runs.

    python benchmarks/soak.py                   50 kills, about ten minutes on 2 cores
    python benchmarks/soak.py --kills 500 --seed 1

Short toy runs, of the CASES in turn, are started with `--resume` and ended at a random moment: most
with SIGKILL, sent to every process at once; the rest with SIGTERM, Ctrl-C or SIGHUP.  The same
command starts them again, and so on until they finish.  A finished run must have the same lines in
its log (times aside), the same files in student/ and the same last checkpoint, byte for byte, as an
uninterrupted run of the same command.  After every kill, whatever has its final name must be whole:
checkpoints must have their checksums, and every line of the log but the last one must be an object.

The last line is JSON:

    kills        of running processes; a run that had finished before it was to die does not count
    mismatches   finished runs that differ, and files that were not whole after a kill
    resumes      starts that found a run to go on with
    runs         finished runs
    where        what the killed runs were doing, by the files they left:
                   starting   no folder yet
                   loading    a config, no checkpoint or log yet
                   writing    a checkpoint or result is half written
                   training   anything else, evaluations included
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness import checkpoint  # noqa: E402

COMMON = (
    "--difficulty 6 --steps 24 --prompts-per-step 16 --eval-every 4 --eval-count 16 "
    "--eval-samples 2 --checkpoint-every 2"
)
CASES = {  # flags, processes
    "release": ("--method release --checkpoint-every 1", 1),
    "lgr": ("--method lgr --toy fork --sample-batch 5", 1),
    "two updates": ("--method release --updates-per-rollout 2 --warmup-steps 9 --eval-every 1", 1),
    "two processes": ("--method opd", 2),
}
SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def command(case: str, out: Path) -> list[str]:
    """The command of a case, writing to `out`."""
    flags, processes = CASES[case]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", f"{processes}"]
    flags = f"{COMMON} {flags} --threads 1 --resume --out {shlex.quote(str(out))}"
    return [*start, str(ROOT / "train.py"), *shlex.split(flags)]


def start(case: str, out: Path) -> subprocess.Popen:
    """The command running in a session of its own, its output appended to <out>.txt."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(f"{out}.txt", "a") as output:
        return subprocess.Popen(command(case, out), stdout=output, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)  # fmt: skip


def processes_of(out: Path) -> list[int]:
    """All processes with that run folder on their command line; torchrun's have own sessions."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # gone
                continue
            if str(out).encode() in arguments:
                found.append(int(entry.name))
    return found


def end(process: subprocess.Popen, out: Path, number: int) -> None:
    """Send a signal: SIGKILL to every process of the run, others to the one that was started, as a
    user or a queueing system would; then wait until all are gone."""
    targets = processes_of(out) if number == signal.SIGKILL else [process.pid]
    for pid in targets:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    process.wait(timeout=120)
    deadline = time.monotonic() + 60
    while processes_of(out):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of {out} do not end: {processes_of(out)}")
        time.sleep(0.05)


def lines_of(out: Path) -> list[dict]:
    """The log without its times."""
    times = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in times} for line in lines]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for a checkpoint's facts, which know the log's length."""
    files = [p for p in folder.iterdir() if p.name not in ("facts.json", "checksums.json")]
    return {path.name: path.read_bytes() for path in files}


def differences(out: Path, reference: Path) -> list[str]:
    """In what a finished run differs from the reference."""
    found = ["log.jsonl"] if lines_of(out) != lines_of(reference) else []
    pairs = [("student", out / "student", reference / "student")]
    pairs.append(("checkpoint", checkpoint.newest(out), checkpoint.newest(reference)))
    for name, *folders in pairs:
        ours, theirs = (bytes_of(folder) for folder in folders)
        odd = [file for file in {**ours, **theirs} if ours.get(file) != theirs.get(file)]
        found += [f"{name}/{file}" for file in sorted(odd)]
    return found


def where(out: Path) -> str:
    """What a run that has just been killed was doing."""
    if not (out / "config.json").exists():
        return "starting"
    if list(out.glob("**/*.partial")):
        return "writing"
    if not (out / "log.jsonl").exists() or not (out / "log.jsonl").stat().st_size:
        return "loading"
    return "training"


def broken(out: Path) -> list[str]:
    """What is not whole, but under its final name, after a kill."""
    found = []
    for path in (out / "checkpoints").glob("step-*"):
        if path.suffix != ".partial" and checkpoint.what_is_torn(path):
            found.append(f"{path.name}: {checkpoint.what_is_torn(path)}")
    if (out / "log.jsonl").exists():
        for line in (out / "log.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n") and not isinstance(json.loads(line), dict):
                found.append("log.jsonl")
    return found


def reference_run(case: str, out: Path) -> float:
    """An uninterrupted run; returns the seconds that its loop took."""
    process = start(case, out)
    wait_for_loop(process, out, 0)
    began = time.monotonic()
    if process.wait():
        sys.exit(f"{' '.join(command(case, out))}\n{Path(f'{out}.txt').read_text()[-3000:]}")
    return time.monotonic() - began


def wait_for_loop(process: subprocess.Popen, out: Path, seen: int) -> None:
    """Until the progress bar appears in the output, after its first `seen` bytes, or the end."""
    while process.poll() is None and b"step/s" not in Path(f"{out}.txt").read_bytes()[seen:]:
        time.sleep(0.01)


def wait_for_moment(process, out: Path, seen: int, loop: float, rng) -> None:
    """Until the random moment at which a run shall die: one in six while it loads, which takes long
    and little can happen there; the others within the time of an uninterrupted loop."""
    loading = rng.random() < 1 / 6
    if not loading:
        wait_for_loop(process, out, seen)
    try:
        process.wait(rng.uniform(0, 4 if loading else loop))
    except subprocess.TimeoutExpired:
        pass


def soak(kills: int, seed: int, folder: Path) -> dict:
    """Kill, resume, compare, until there were so many kills; returns the figures."""
    rng, counts, doing, mismatches = random.Random(seed), Counter(), Counter(), []
    references = {case: folder / f"reference-{n}" for n, case in enumerate(CASES)}
    times, bar = {}, tqdm(total=kills, unit="kill")
    while counts["kills"] < kills:
        case = list(CASES)[counts["runs"] % len(CASES)]
        if case not in times:
            bar.set_description(f"{case}: reference")
            times[case] = reference_run(case, references[case])
        out, code = folder / f"run-{counts['runs']}", None
        bar.set_description(case)
        while code != 0 or not (out / "student").exists():
            counts["resumes"] += (out / "config.json").exists()
            seen = os.path.getsize(f"{out}.txt") if os.path.exists(f"{out}.txt") else 0
            process, number = start(case, out), rng.choice(SIGNALS)
            if counts["kills"] < kills:
                wait_for_moment(process, out, seen, times[case], rng)
                if process.poll() is None:
                    end(process, out, number)
                    counts["kills"] += 1
                    bar.update()
                    doing[where(out)] += 1
                    mismatches += [f"{out.name}, {case}: {what}" for what in broken(out)]
                    continue
            code = process.wait(600)
            if code:
                sys.exit(f"exit {code}: {Path(f'{out}.txt').read_text()[-3000:]}")
        counts["runs"] += 1
        found = differences(out, references[case])
        mismatches += [f"{out.name}, {case}: {what} differs" for what in found]
        if not found:
            shutil.rmtree(out)
    bar.close()
    for text in mismatches:
        print(text)
    return {
        "kills": counts["kills"], "mismatches": len(mismatches), "resumes": counts["resumes"],
        "runs": counts["runs"], "where": dict(doing), "seed": seed,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    """The command; exit code 1 when something differed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error(f"--kills must be at least 1, not {args.kills}")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a checkpoint with wrong checksums is warned of
        result = soak(args.kills, args.seed, folder)
    result["seconds"] = round(time.monotonic() - began)
    print(json.dumps(result))
    if result["mismatches"]:
        sys.exit(f"what differed is kept in {folder}")
    shutil.rmtree(folder)
    return result


if __name__ == "__main__":
    main()
