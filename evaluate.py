r"""Problems in, figures out: sample a model on checkable problems and count what is right.

    python evaluate.py --toy horizon --samples 8              student and teacher of a toy world
    python evaluate.py --model out/student --toy horizon      one model on the toy problems
    python evaluate.py --model Qwen/Qwen3-0.6B --problems math.jsonl --out result.json

Reading key
    mean@n     accuracy: mean over problems of the share of n samples that are right
    pass@k     chance that one of k samples is right, unbiased (Chen et al., arXiv 2107.03374)
    low, high  95% percentile bootstrap over problems (samples of one problem are tied). When all
               problems score alike it has no width; that is no certainty.
    problem file   JSONL, per line exactly one of "problem", "prompt" (text) or "messages" (chat),
               and "answer" (text or number); other keys are ignored
An answer is the last \boxed{} of a response, else its last number. Comparison is exact after
normalisation; an installed `math-verify` is asked about the rest, so figures from machines with and
without it can differ (--out records which).
"""

import atexit
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import math
import numbers
import operator
import os
import platform
import re
import subprocess
import sys
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import harness
import rollout
import toy
from harness import MANY, MOST_THREADS, TINY, number, path_name

# -------------------------------------------------------------------------------------- answers

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(
    # a minus after a digit, letter or bracket is an operation or a range: 10-7 ends in 7
    rf"(?:(?<![0-9A-Za-z)\]}}])[-+\u2212])?"
    rf"(?:\\[dt]?frac\{{-?{_UNSIGNED}\}}\{{{_UNSIGNED}\}}|{_UNSIGNED}(?:\s?/\s?{_UNSIGNED})?)"
)


def extract_answer(text):
    r"""The inside of the last closed \boxed{} or \fbox{}, else the last number, else None.

    Braces balance, escaped ones do not count, of nested boxes the outer one wins. Linear time.

    >>> extract_answer(r"So \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("It costs $1,234.50. \\boxed{"), extract_answer("none")
    ('1,234.50', None)
    """
    opened, last = [], None  # start of a box's inside, or None for any other brace
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            start = opened.pop() if opened else None
            last = last if start is None else slice(start, match.start())
        elif match[0] == "{" or len(match[0]) > 2:
            opened.append(None if match[0] == "{" else match.end())
    if last:
        return text[last]
    found = _NUMBER.findall(text)
    return found[-1] if found else None


_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\u2212", "-"),
        (r"\\?\$|(?<!\\)\\[()\[\]]|\\[!,;:]", ""),  # math delimiters, dollars, thin spaces
        (r"\{,\}", ","),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed)\s*\{([^{}]*)\}", r"\1"),
        (r"~|\\ |\\q?quad(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))", r"\\frac{\1\2}{\3\4}"),
        (r"([0-9])\s*\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1 \2/\3"),  # one and a half, not 11/2
        (r"\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*\{?\s*([-+]?[0-9]+)\s*\}?$", r"e\1"),
        (r"^\s+|\s*\.?\s*$", ""),
        (r"(?<=[0-9])\s*(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|°|\\degrees?)$", ""),
        (r"^\+\s*(?=[0-9.\\])", ""),
        (r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", ""),  # a space between words stays
    )
]
_FRACTION = re.compile(r"(?<![\w)}\]])\\frac\{([^{}]*)\}\{([^{}]*)\}(?![\w({\\])")
_THOUSANDS = re.compile(r"\s*[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?\s*")
_PLAIN = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"  # no exponent of a billion
_RATIO = re.compile(rf"([-+]?)(?:([0-9]+) (?=[0-9]+/[0-9]))?({_PLAIN})(?:/({_PLAIN}))?")
LONGEST_ANSWER = 1000  # characters; longer ones are compared as they are


def _normalise(text):
    text = re.sub(r"\s+", " ", text)
    for pattern, replacement in _REWRITES:
        if _THOUSANDS.fullmatch(text):  # not after the last one: "1, 234" is a list
            text = text.replace(",", "")
        text = pattern.sub(replacement, text)
    return _FRACTION.sub(lambda m: "/".join(map(_atom, m.groups())), text)


def _atom(text):
    return text if re.fullmatch(r"[-+]?[\w.]+|\\[A-Za-z]+", text) else f"({text})"


def _value(text):
    """The exact value of a plain number, a ratio or a mixed number; None for anything else."""
    match = _RATIO.fullmatch(text)
    if not match or (match[4] and Fraction(match[4]) == 0):
        return None
    value = int(match[2] or 0) + Fraction(match[3]) / Fraction(match[4] or 1)
    return -value if match[1] == "-" else value


def is_correct(answer, reference, *, timeout=5.0):
    r"""Whether an answer (text or None) equals the reference (text or number).

    Exact after normalisation of LaTeX spelling, and by value for integers, decimals and fractions.
    What differs is put to `math-verify` where that is installed, in another process and for at most
    `timeout` seconds: it can hang. Nothing is ever evaluated here, and no failure raises.

    >>> is_correct(r"\dfrac12", "0.5"), is_correct("$1{,}000.$", "1000"), is_correct("2", "3")
    (True, True, False)
    """
    if answer is None:
        return False
    try:
        answer, reference = str(answer).strip(), str(reference).strip()
    except ValueError:  # a number of thousands of digits
        return False
    if answer == reference or not answer or not reference:
        return answer == reference != ""
    if max(len(answer), len(reference)) > LONGEST_ANSWER:
        return False
    ours, theirs = _normalise(answer), _normalise(reference)
    if ours == theirs != "":
        return True
    if _value(ours) is not None and _value(ours) == _value(theirs):
        return True
    try:
        installed = importlib.util.find_spec("math_verify") is not None
        return installed and _verify(answer, reference, float(timeout))
    except (OSError, ValueError):  # no process to be had; a module of that name that is no package
        return False


_JUDGE = r"""
import json, os, sys
out, sys.stdout = sys.stdout, open(os.devnull, "w")
try:  # a tower of powers eats memory faster than time
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
except Exception:
    pass
from math_verify import parse, verify
print("ready", file=out, flush=True)
for line in sys.stdin:
    try:
        answer, reference = (parse("\\boxed{" + text + "}") for text in json.loads(line))
        right = bool(answer and reference and verify(reference, answer))
    except Exception:
        right = False
    print("yes" if right else "no", file=out, flush=True)
"""
_judges, _judge_lock = [], threading.Lock()  # at most one process, kept: importing takes seconds
atexit.register(lambda: [judge.kill() for judge in _judges])


@functools.lru_cache(maxsize=100_000)  # the same wrong answer comes again and again
def _verify(answer, reference, timeout):
    with _judge_lock:
        if not _judges:
            path = os.pathsep.join(p for p in sys.path if p)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            pipes |= {"stderr": subprocess.DEVNULL, "env": os.environ | {"PYTHONPATH": path}}
            _judges.append(subprocess.Popen([sys.executable, "-c", _JUDGE], **pipes))
            if not _exchange("", 60.0):
                return False
        return _exchange(json.dumps([answer, reference]) + "\n", timeout) == "yes\n"


def _exchange(question, timeout):
    """Send text to the judge and read a line; a judge that fails or is late is killed: ""."""
    judge = _judges[0]
    timer = threading.Timer(timeout, judge.kill)  # signal.alarm works on the main thread only
    timer.start()
    try:
        judge.stdin.write(question)
        judge.stdin.flush()
        reply = judge.stdout.readline()
    except OSError:
        reply = ""
    timer.cancel()
    timer.join()  # from here on it has killed or never will
    if not reply or judge.poll() is not None:
        judge.kill()
        judge.wait()
        _judges.clear()
    return reply


# --------------------------------------------------------------------------------------- figures


def pass_at_k(n, correct, k):
    """Unbiased chance that at least one of k samples is right, after `correct` of n were:
    1 - C(n - c, k) / C(n, k). ValueError unless 0 <= correct <= n and 1 <= k <= n, whole numbers.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    try:
        n, correct, k = (operator.index(value) for value in (n, correct, k))
    except TypeError as error:
        raise ValueError(f"n, correct and k must be whole numbers: {error}") from error
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"need 0 <= correct <= n and 1 <= k <= n; got {n=}, {correct=}, {k=}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap_interval(values_P, *, level=0.95, resamples=2000, seed=0):
    """(low, high) of the mean over problems, by the percentile bootstrap over problems.

    values_P: one finite number per problem, at least one; level: coverage, between 0 and 1.
    Raises ValueError for anything else.
    """
    values_P = np.asarray(values_P, dtype=np.float64)
    if values_P.ndim != 1 or values_P.size == 0 or not np.isfinite(values_P).all():
        raise ValueError(f"values_P must be finite numbers in one axis; shape {values_P.shape}")
    whole = all(isinstance(value, numbers.Integral) for value in (resamples, seed))
    if not 0 < level < 1 or not whole or resamples < 1 or seed < 0:
        what = "0 < level < 1 and whole numbers resamples >= 1, seed >= 0"
        raise ValueError(f"need {what}; got {level=}, {resamples=}, {seed=}")
    rng, P = np.random.default_rng(seed), len(values_P)
    chunk = max(1, 1_000_000 // P)  # resamples at a time: 8 MB of indices
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    means = np.concatenate([values_P[rng.integers(P, size=(R, P))].mean(axis=1) for R in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sample_answers(
    model, tokenizer, problems, prompts, *, samples, max_new_tokens, stop_ids, pad_id,
    temperature=1.0, batch_size=64, generator=None, progress=True, vocab_size=None,
):  # fmt: skip
    """Sample every problem `samples` times and check the answers.

    problems, prompts   from `load_problems`/`from_records` and `render_prompts`; may be empty
    batch_size          responses in flight at once; the results do not depend on it
    temperature, generator, vocab_size   as in `rollout.generate`
    Returns, per problem, a list of `samples` records {"text", "answer" (str or None), "correct",
    "truncated" (no stop id at the end), "tokens" (response length)}: plain data, to gather over
    ranks. ValueError for bad arguments, or prompts that do not fit.
    """
    if samples < 1 or batch_size < 1 or len(prompts) != len(problems):
        lengths = f"{len(problems)} problems, {len(prompts)} prompts"
        raise ValueError(f"need one prompt per problem: {lengths}; {samples=}, {batch_size=} >= 1")
    rows = [(i, prompt) for i, prompt in enumerate(prompts) for _ in range(samples)]
    records, stops = [[] for _ in problems], sorted(set(stop_ids))
    options = {"max_new_tokens": max_new_tokens, "eos_ids": stops, "pad_id": pad_id, "top_k": 1}
    options |= {"temperature": temperature, "generator": generator, "vocab_size": vocab_size}
    with tqdm(total=len(rows), unit="response", disable=not progress, leave=False) as bar:
        # several batches per call: rows that end early make room for the next ones
        for first in range(0, len(rows), 4 * batch_size):
            part = rows[first : first + 4 * batch_size]
            batch = [prompt for _, prompt in part]
            out = rollout.generate(model, batch, batch_size=batch_size, **options)
            ids_BT, mask_BT = out.ids_BT.cpu(), out.response_mask_BT.cpu()
            for (i, _), ids_T, mask_T in zip(part, ids_BT, mask_BT, strict=True):
                ids = ids_T[mask_T].tolist()
                records[i].append(check_answer(tokenizer, ids, problems[i], stops))
            bar.update(len(part))
    return records


@torch.no_grad()
def check_sampling(path, model, prompts, max_new_tokens):
    """ValueError that begins with `path`, before anything is written, if `rollout.generate` would
    refuse the model for these prompts, or if its tokens see later ones, as an encoder's do."""
    prompt = prompts[0][:8]
    try:
        harness.check_supported(model, max(map(len, prompts)) + max_new_tokens)
        ids_BT = torch.tensor([prompt], device=model.device)
        alone_V, first_V = (model(input_ids=x).logits[0, 0] for x in (ids_BT[:, :1], ids_BT))
        if (alone_V - first_V).abs().max() > 0.05 * alone_V.abs().max():
            raise ValueError(f"{type(model).__name__} is not causal: tokens see later ones")
        new = min(2, max_new_tokens)  # a second token shows whether the cache is used
        rollout.generate(
            model, [prompt], max_new_tokens=new, eos_ids=(), pad_id=0, temperature=0, top_k=1
        )
    except (ValueError, RuntimeError) as error:  # sizes that do not fit together are the latter
        raise ValueError(f"{path}: {harness.first_line(error)}") from error


def check_answer(tokenizer, ids, problem, stops):
    """One response, ids with its stop token, as a record of `sample_answers`; wrong, whatever it
    says, where the problem has no answer. `stops`: the ids that end a response."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    answer = extract_answer(text)
    correct = problem["answer"] is not None and is_correct(answer, problem["answer"])
    record = {"text": text, "answer": answer, "correct": correct}
    return record | {"truncated": ids[-1] not in stops, "tokens": len(ids)}


def summarise(records, *, level=0.95, resamples=2000, seed=0):
    """Figures of what `sample_answers` returned, all problems together.

    accuracy (mean@n), accuracy_low, accuracy_high, pass_at_n, "pass@k": [value, low, high] for
    k = 1, 2, 4, .. <= n, samples (n), problems, truncated and unparseable (shares of all
    responses), mean_tokens (per response). ValueError when empty or of uneven sample counts.
    """
    counts = {len(samples) for samples in records}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"need the same number of samples for every problem; got {sorted(counts)}")
    n = counts.pop()
    correct_P = [sum(r["correct"] for r in samples) for samples in records]
    flat = [r for samples in records for r in samples]
    passes = {}
    for k in (2**i for i in range(n.bit_length())):
        passed_P = [pass_at_k(n, c, k) for c in correct_P]
        interval = bootstrap_interval(passed_P, level=level, resamples=resamples, seed=seed)
        passes[f"pass@{k}"] = [float(np.mean(passed_P)), *interval]
    accuracy, low, high = passes["pass@1"]  # mean@n is pass@1
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "pass_at_n": sum(c > 0 for c in correct_P) / len(records),
        **passes,
        "samples": n,
        "problems": len(records),
        "truncated": sum(r["truncated"] for r in flat) / len(flat),
        "unparseable": sum(not (r["answer"] or "").strip() for r in flat) / len(flat),
        "mean_tokens": sum(r["tokens"] for r in flat) / len(flat),
    }


# ------------------------------------------------------------------------------------------- CLI


def make_parser():
    """The flags."""
    parser = harness.Parser(
        prog="evaluate.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add, dtypes = parser.add_argument, ["float32", "bfloat16", "float16"]
    add("--model", type=path_name, metavar="PATH",
        help="folder or hub name; default: both models of --toy")  # fmt: skip
    add("--problems", type=path_name, metavar="FILE", help="JSONL; see the top of this file")
    add("--toy", choices=list(toy.WORLDS), help="a toy world's problems; default horizon")
    add("--difficulty", type=number(int, 1, toy.MAX_MOVES),
        help="moves per toy problem (default: the world's)")  # fmt: skip
    add("--count", type=number(int, 1, MANY),
        help="toy problems (default 200); with a file: its first N")  # fmt: skip
    add("--samples", type=number(int, 1, MANY),
        help="responses per problem (default 4; 1 when greedy)")  # fmt: skip
    add("--max-new-tokens", type=number(int, 1), help="default: what the toy task needs, or 4096")
    add("--temperature", type=number(float, 0), default=1.0, help="0 is greedy")
    add("--batch-size", type=number(int, 1), default=64, help="responses in flight")
    add("--seed", type=number(int, 0), default=0, help="of the sampling; problems stay the same")
    add("--thinking", action="store_true", help="render prompts in the template's thinking mode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=dtypes, help="default float32 on a CPU, else bfloat16")
    add("--threads", type=number(int, 1, MOST_THREADS),
        help="CPU threads; one is best for toy models")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    add("--allow-bin", action="store_true", help="read pickled weights where there are no others")
    add("--out", type=path_name, metavar="FILE", help="JSON with everything; must not exist")
    return parser


def parse_arguments(argv=None):
    """The command line, checked as far as that goes without opening anything."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.problems and (args.toy or args.difficulty):
        parser.error("--problems excludes --toy and --difficulty")
    if args.problems and not args.model:
        parser.error("--problems needs --model")
    if 0 < args.temperature < TINY:  # logits over less are infinite
        parser.error(f"--temperature {args.temperature} is neither 0 nor at least {TINY}")
    if args.temperature == 0 and (args.samples or 1) > 1:
        parser.error("--temperature 0 is greedy: all samples are the same, use --samples 1")
    args.samples = args.samples or (1 if args.temperature == 0 else 4)
    args.dtype = args.dtype or ("float32" if args.device.startswith("cpu") else "bfloat16")
    if not args.problems:
        args.toy = args.toy or "horizon"
        args.difficulty = args.difficulty or toy.world(args.toy).moves
        args.count = args.count or 200
    limit = 4096 if args.problems else toy.response_limit(args.difficulty)
    args.max_new_tokens = args.max_new_tokens or limit
    return args


def _versions():
    versions = {"python": platform.python_version(), "math-verify": None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["math-verify"] = importlib.metadata.version("math-verify")
    return versions | {m.__name__: m.__version__ for m in (torch, transformers, np)}


def _prepare(args):
    """Problems and, by model name, (path, tokenizer, prompts, vocabulary size): every check that
    needs no weights."""
    if args.out and os.path.lexists(args.out):
        raise ValueError(f"--out {args.out}: exists already; nothing is overwritten")
    if args.out:
        harness.check_creatable("--out", args.out)
        if not os.path.basename(args.out) or not Path(args.out).absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: needs a folder that is there and a name in it")
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=args.device).item()
    except Exception as error:  # what a missing back end raises is its own affair
        raise ValueError(f"--device {args.device}: {harness.first_line(error)}") from error
    if args.problems:
        problems = harness.load_problems(args.problems)[: args.count]
    else:
        records = toy.problems(args.count, moves=args.difficulty, split="test")
        problems = harness.from_records(records, f"toy {args.toy}")
    world = None if args.model else toy.world(args.toy)
    paths = {"student": world.student, "teacher": world.teacher} if world else {"model": args.model}
    models, trust = {}, {"trust_remote_code": args.trust_remote_code}
    for name, path in paths.items():
        if world:
            toy.require(path)  # not all come with the repository
        tokenizer = harness.load_tokenizer(path, **trust)
        prompts = harness.render_prompts(tokenizer, problems, thinking=args.thinking)
        config = harness.load_config(path, **trust)
        harness.check_fit(config, problems, prompts, args.max_new_tokens)
        vocab_size = min(len(tokenizer), config.get_text_config(decoder=True).vocab_size)
        models[name] = path, tokenizer, prompts, vocab_size
    return problems, models


def _load(args, path, tokenizer, prompts, vocab_size):
    """(model, what sampling needs to know about it); ValueError if it cannot answer a prompt."""
    dtype, trust = getattr(torch, args.dtype), args.trust_remote_code
    model = harness.load_model(
        path, dtype=dtype, device=args.device, trust_remote_code=trust, allow_bin=args.allow_bin
    )
    stop_ids, pad_id = harness.stop_ids(model, tokenizer), harness.pad_id(tokenizer)
    options = {"stop_ids": stop_ids, "pad_id": pad_id, "vocab_size": vocab_size}
    check_sampling(path, model, prompts, args.max_new_tokens)
    return model, options


def run(args):
    """Evaluate as told and print the table; returns the object that --out writes."""
    if args.threads:
        torch.set_num_threads(args.threads)
    problems, models = _prepare(args)
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
    result = {"settings": vars(args), "versions": _versions(), "models": {}}
    result["hardware"] = gpu or platform.processor() or platform.machine()
    options = {"samples": args.samples, "max_new_tokens": args.max_new_tokens}
    options |= {"temperature": args.temperature, "batch_size": args.batch_size}
    loaded = {name: _load(args, *model) for name, model in models.items()}  # before any output
    print("model    mean@n           95%  pass@n  truncated  unparseable  tokens")
    for name, (path, tokenizer, prompts, _) in models.items():
        model, own = loaded.pop(name)
        own["generator"] = torch.Generator().manual_seed(args.seed)
        records = sample_answers(model, tokenizer, problems, prompts, **options, **own)
        s = summarise(records, seed=args.seed)
        if args.toy and (uncertain := toy.world(args.toy).uncertain):
            texts = [record["text"] for samples in records for record in samples]
            s["uncertain_wording"] = toy.wording_share(texts, uncertain)
        answers = [p | {"samples": r} for p, r in zip(problems, records, strict=True)]
        result["models"][name] = {"path": str(path), "summary": s, "problems": answers}
        print(
            f"{name:8} {s['accuracy']:6.3f}  {s['accuracy_low']:.3f}-{s['accuracy_high']:.3f}"
            f"  {s['pass_at_n']:6.3f}  {s['truncated']:9.3f}  {s['unparseable']:11.3f}"
            f"  {s['mean_tokens']:6.1f}"
        )
    if args.out:
        with open(args.out, "x", encoding="utf-8") as file:  # never over one that came meanwhile
            try:
                file.write(json.dumps(result, indent=1))
                file.flush()
            except OSError:  # a full disk: rather none than half of one
                os.unlink(args.out)
                raise
    return result


def main(argv=None):
    """The command; exit status 2 and one line on stderr for what the user can put right."""
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result = run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        harness.complain("evaluate.py", error)
        return 2
    print(json.dumps({name: part["summary"] for name, part in result["models"].items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
