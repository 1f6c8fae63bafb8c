r"""Sample a model on problems that can be checked, and count what is right.

    python evaluate.py --samples 8                            both models of a toy world
    python evaluate.py --model out/student --toy horizon      one model on the toy problems
    python evaluate.py --model Qwen/Qwen3-0.6B --problems math.jsonl --out result.json

    mean@n     accuracy: mean over problems of the share of n samples that are right
    pass@k     chance that one of k samples is right, unbiased (Chen et al., arXiv 2107.03374)
    low, high  95% percentile bootstrap over problems, whose samples are tied. When all problems
               score alike it has no width; that is no certainty.
    problem file   JSONL: "problem", "question", "prompt" (text) or "messages" (chat), and "answer"
               (text or number) or "solution" (text); other keys are ignored

`answers.py` decides what is right; --out records whether `math-verify` is installed.
"""

import json
import math
import sys
import time

import numpy as np
import torch
import transformers
from tqdm import tqdm

import answers
import harness
import rollout
import toy
from harness import MANY, MOST_THREADS, TINY, number, path_name


# --------------------------------------------------------------------------------------- figures
def pass_at_k(n, correct, k):
    """Unbiased chance that at least one of k samples is right, after `correct` of n were:
    1 - C(n - c, k) / C(n, k). ValueError unless 0 <= correct <= n and 1 <= k <= n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"need 0 <= correct <= n and 1 <= k <= n; got {n=}, {correct=}, {k=}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap_interval(values_P, *, level=0.95, resamples=2000, seed=0):
    """(low, high) of the mean over problems, by the percentile bootstrap over problems.

    values_P: one finite number per problem; level: coverage, in (0, 1). ValueError otherwise.
    """
    values_P = np.asarray(values_P, dtype=np.float64)
    if values_P.ndim != 1 or values_P.size == 0 or not np.isfinite(values_P).all():
        raise ValueError(f"values_P must be finite numbers in one axis; got {values_P}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    rng, P = np.random.default_rng(seed), len(values_P)
    chunk = max(1, 1_000_000 // P)  # resamples at a time: 8 MB of indices
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    means = np.concatenate([values_P[rng.integers(P, size=(R, P))].mean(axis=1) for R in sizes])
    return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist())


def summarise(records, *, level=0.95, resamples=2000, seed=0, uncertain=""):
    """Figures of what `sample_answers` returned, all problems together.

    accuracy (mean@n), accuracy_low, accuracy_high, pass_at_n, "pass@k": [value, low, high] for
    k = 1, 2, 4, .. <= n, samples (n), problems, truncated and unparseable (shares of all
    responses), mean_tokens (per response); with the `uncertain` wording of a toy world, the share
    of moves that have it. ValueError when empty or of uneven sample counts.
    """
    counts = {len(samples) for samples in records}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"need the same number of samples for every problem; got {sorted(counts)}")
    n, correct_P = counts.pop(), [sum(r["correct"] for r in samples) for samples in records]
    flat = [r for samples in records for r in samples]
    intervals = {}
    for k in (2**i for i in range(n.bit_length())):
        passed_P = [pass_at_k(n, c, k) for c in correct_P]
        interval = bootstrap_interval(passed_P, level=level, resamples=resamples, seed=seed)
        intervals[f"pass@{k}"] = [float(np.mean(passed_P)), *interval]
    accuracy, low, high = intervals["pass@1"]  # mean@n is pass@1
    summary = {
        "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high,
        "pass_at_n": float(np.mean([pass_at_k(n, c, n) for c in correct_P])),
        **intervals,
        "samples": n, "problems": len(records),
        "truncated": sum(r["truncated"] for r in flat) / len(flat),
        "unparseable": sum(not (r["answer"] or "").strip() for r in flat) / len(flat),
        "mean_tokens": sum(r["tokens"] for r in flat) / len(flat),
    }  # fmt: skip
    if uncertain:
        summary["uncertain_wording"] = toy.wording_share([r["text"] for r in flat], uncertain)
    return summary


# -------------------------------------------------------------------------------------- sampling
class SamplingBar(tqdm):
    """Responses; `rollout.generate` calls it as its `progress`, and it moves with every token."""

    def __init__(self, rows: int, hidden=False, **more):
        self.tokens, how = 0, {"unit": "response", "leave": False, "miniters": 0}
        super().__init__(total=rows, disable=hidden, **how | more)

    def __call__(self, drawn: int, ended: int) -> None:
        self.tokens += drawn
        self.set_postfix_str(f"{self.tokens} tokens", refresh=False)
        self.update(ended)


def sample_answers(
    model, tokenizer, problems, prompts, *, samples, max_new_tokens, stop_ids, pad_id,
    temperature=1.0, batch_size=64, generator=None, progress=True, vocab_size=None, decode=None,
):  # fmt: skip
    """Sample every problem `samples` times and check the answers.

    problems, prompts   from `load_problems`/`from_records` and `render_prompts`; may be empty
    batch_size          responses in flight at once, refilled; the results do not depend on it
    temperature, generator, vocab_size, decode   as in `rollout.generate`
    Returns, per problem, a list of `samples` records of `check_answer`: plain data.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples and batch_size must be at least 1: {samples=}, {batch_size=}")
    rows = [row for row in zip(problems, prompts, strict=True) for _ in range(samples)]
    records, stops = [], sorted(set(stop_ids))
    options = dict(max_new_tokens=max_new_tokens, eos_ids=stops, pad_id=pad_id, decode=decode)
    options |= dict(temperature=temperature, generator=generator, vocab_size=vocab_size, top_k=1)
    with SamplingBar(len(rows), hidden=not progress) as options["progress"]:
        for first in range(0, len(rows), 4 * batch_size):
            part = rows[first : first + 4 * batch_size]
            out = rollout.generate(model, [p for _, p in part], batch_size=batch_size, **options)
            ids_BT, mask_BT = out.ids_BT.cpu(), out.response_mask_BT.cpu()
            for (problem, _), ids_T, mask_T in zip(part, ids_BT, mask_BT, strict=True):
                records.append(check_answer(tokenizer, ids_T[mask_T].tolist(), problem, stops))
    return [records[i : i + samples] for i in range(0, len(records), samples)]


def check_answer(tokenizer, ids, problem, stops):
    """A response, ids with its stop token, as a record {"text", "answer" (str or None), "correct",
    "truncated" (its last id is not in `stops`), "tokens" (its length)}. Wrong, whatever it says,
    where the problem has no answer."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    answer = answers.extract_answer(text)
    correct = problem["answer"] is not None and answers.is_correct(answer, problem["answer"])
    record = {"text": text, "answer": answer, "correct": correct}
    return record | {"truncated": ids[-1] not in stops, "tokens": len(ids)}


def on_held_out(run, step: int) -> dict:
    """The log line of an evaluation: mean@n of a training run's student on its held-out problems,
    sampled by all processes; before the first step and after the last out of domain, too.
    Every evaluation uses the same uniform numbers, so that two of them differ by the student only.
    """
    args, start = run.args, time.perf_counter()

    def answers_to(kind: str, stream: int) -> list:
        problems, prompts = run.problems[kind], run.prompts[kind]
        mine = harness.my_share(len(problems), run.rank, run.world)
        mine, first_row = slice(mine.start, mine.stop), mine.start * args.eval_samples
        generator = harness.row_generator(0, stream, first_row, args.max_new_tokens)
        with run.autocast():
            records = sample_answers(
                run.model, run.tokenizer, problems[mine], prompts[mine], samples=args.eval_samples,
                max_new_tokens=args.max_new_tokens, stop_ids=run.stop_ids, pad_id=run.pad_id,
                batch_size=args.sample_batch, generator=generator, vocab_size=run.vocab_size,
                decode=run.decode, progress=run.rank == 0,
            )  # fmt: skip
        return sum(harness.gather_objects(records), [])

    toys = args.problems is None and args.eval_problems is None
    uncertain = toy.world(args.toy).uncertain if toys else ""
    line = summarise(answers_to("eval", harness.EVALUATION_STREAM), uncertain=uncertain)
    if run.problems["ood"] and step in (0, args.steps):
        ood = summarise(answers_to("ood", harness.EVALUATION_STREAM + 1))
        line["ood"] = {k: ood[k] for k in "accuracy accuracy_low accuracy_high problems".split()}
    return {"step": step, **line, "seconds": {"evaluate": round(time.perf_counter() - start, 4)}}


# ----------------------------------------------------------------------------------- the command
def make_parser():
    """The flags."""
    description = __doc__.splitlines()[0]
    parser = harness.Parser(prog="evaluate.py", description=description, allow_abbrev=False)
    add, many = parser.add_argument, number(int, 1, MANY)
    add("--model", type=path_name, metavar="PATH", help="folder or hub name; default: the toy's")
    add("--problems", type=path_name, metavar="FILE", help="JSONL; see the top of this file")
    add("--toy", choices=list(toy.WORLDS), help="a toy world's problems; default varied")
    add("--difficulty", type=number(int, 1, toy.MAX_MOVES), help="moves; default: the world's")
    add("--count", type=many, help="toy problems (default 200); with a file: its first N")
    add("--samples", type=many, help="responses per problem (default 4; 1 when greedy)")
    add("--max-new-tokens", type=number(int, 1), help="default: what the toy task needs, or 4096")
    add("--temperature", type=number(float, 0), default=1.0, help="0 is greedy")
    add("--batch-size", type=number(int, 1), default=64, help="responses in flight")
    add("--seed", type=number(int, 0), default=0, help="of the sampling; problems stay the same")
    add("--thinking", action="store_true", help="render prompts in the template's thinking mode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default float32; GPU bfloat16")
    add("--threads", type=number(int, 1, MOST_THREADS), help="CPU threads; one is best for toys")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    add("--allow-bin", action="store_true", help="read pickled weights where there are no others")
    add("--skip-bad-problems", action="store_true", help="leave out what of a file is no use")
    add("--out", type=path_name, metavar="FILE", help="JSON with everything; must not exist")
    return parser


def parse_arguments(argv=None):
    """The command line, checked as far as that goes without opening anything."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.problems and (args.toy or args.difficulty or not args.model):
        parser.error("--problems needs --model, and excludes --toy and --difficulty")
    if 0 < args.temperature < TINY:  # logits over less are infinite
        parser.error(f"--temperature {args.temperature} is neither 0 nor at least {TINY}")
    if args.temperature == 0 and (args.samples or 1) > 1:
        parser.error("--temperature 0 is greedy: all samples are the same, use --samples 1")
    args.samples = args.samples or (1 if args.temperature == 0 else 4)
    args.dtype = args.dtype or ("float32" if args.device.startswith("cpu") else "bfloat16")
    if not args.problems:
        args.toy = args.toy or "varied"
        args.difficulty = args.difficulty or toy.world(args.toy).moves
        args.count = args.count or 200
    limit = 4096 if args.problems else toy.response_limit(args.difficulty)
    args.max_new_tokens = args.max_new_tokens or limit
    return args


def _open_model(args, path, problems, skipped):
    """A model and what `sample_answers` needs with it; the weights are read last."""
    trust = {"trust_remote_code": args.trust_remote_code}
    tokenizer, config = harness.load_tokenizer(path, **trust), harness.load_config(path, **trust)
    how = {"configs": {path: config}, "skipped": skipped}
    problems, prompts = harness.open_prompts(args, tokenizer, problems, **how)
    harness.check_tokens({path: config}, tokenizer)
    how = {"dtype": getattr(torch, args.dtype), "device": args.device, "allow_bin": args.allow_bin}
    model = harness.load_model(path, **how, **trust)
    harness.check_sampling(path, model, prompts, args.max_new_tokens)
    return {
        "model": model, "tokenizer": tokenizer, "problems": problems, "prompts": prompts,
        "stop_ids": harness.stop_ids(model, tokenizer), "pad_id": harness.pad_id(tokenizer),
        "decode": harness.fast_decode,
        "vocab_size": min(len(tokenizer), config.get_text_config(decoder=True).vocab_size),
    }  # fmt: skip


def run(args):
    """Evaluate as told and print the table; returns the object that --out writes."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.out:
        harness.check_new_file("--out", args.out)
    harness.check_device(args.device)
    world = toy.world(args.toy) if args.toy else None
    paths, skipped = {"model": args.model}, [] if args.skip_bad_problems else None
    if args.problems:
        problems = harness.load_problems(args.problems, skipped=skipped)[: args.count]
    else:
        records = toy.problems(args.count, moves=args.difficulty, split="test")
        problems = harness.from_records(records, f"toy {args.toy}")
    if not args.model:
        paths = {"student": world.student, "teacher": world.teacher}
        for path in paths.values():
            toy.require(path)  # not all come with the repository
    opened = {name: _open_model(args, path, problems, skipped) for name, path in paths.items()}
    harness.tell_skipped("evaluate.py", skipped)
    how = {"samples": args.samples, "max_new_tokens": args.max_new_tokens,
           "temperature": args.temperature, "batch_size": args.batch_size}  # fmt: skip
    result = {"settings": vars(args), **harness.surroundings(args.device), "models": {}}
    result["skipped_problems"] = len(skipped or ())
    result["hardware"] = result.pop("device")  # the settings have a device, too
    print("model    mean@n           95%  pass@n  truncated  unparseable  tokens")
    row = "{:8} {accuracy:6.3f}  {accuracy_low:.3f}-{accuracy_high:.3f}  {pass_at_n:6.3f}  "
    row += "{truncated:9.3f}  {unparseable:11.3f}  {mean_tokens:6.1f}"
    for name, path in paths.items():
        how["generator"] = torch.Generator().manual_seed(args.seed)
        problems = opened[name]["problems"]
        records = sample_answers(**opened.pop(name), **how)
        summary = summarise(records, seed=args.seed, uncertain=world.uncertain if world else "")
        answered = [p | {"samples": r} for p, r in zip(problems, records, strict=True)]
        result["models"][name] = {"path": str(path), "summary": summary, "problems": answered}
        print(row.format(name, **summary))
    if args.out:
        harness.write_new_file(args.out, json.dumps(result, indent=1))
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
