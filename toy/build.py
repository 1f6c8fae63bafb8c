"""The models of the toy worlds: tokenizer, training, and what each of them can do.

Students, the clean teacher and those of the forks are trained from scratch (RECIPES). All other
teachers start from the clean one and go on with the spoilt texts of their world. A student is
smaller than its teacher, has another seed, and has seen wrong moves: it is right now and then.
The weights depend on the seed and, through float32 rounding, on the machine; problems and texts
depend on the seed only.
"""

import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import evaluate
import harness
import toy

SPECIAL = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>")
# The last dozen words are in no text yet: a later world can use them and keep the same tokenizer.
WORDS = (
    "The dial starts stops at Move is plus minus so becomes answer boxed Where does it stop "
    "Reverse Reversed the list has marks reads mark "
    "thus then hence next now from to first last check wait again but"
).split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# --------------------------------------------------------------------------- tokenizer and model


def build_tokenizer():
    """A word-level tokenizer, V = 153. A token owns the space before it, so decoding just joins.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.convert_ids_to_tokens(tokenizer("Move 1 is plus 5,")["input_ids"])
    ['Move', ' 1', ' is', ' plus', ' 5', ',']
    """
    items = [*WORDS, *map(str, range(32))]
    vocabulary = [*SPECIAL, *".,?:{}\\", " \\", *items, *(f" {item}" for item in items)]
    backend = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<|unk|>")
    )
    pieces = Regex(r" ?[A-Za-z]+| ?[0-9]+| ?[^ A-Za-z0-9]| ")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer, *, hidden=64, layers=2, heads=4, ff=160, seed=0):
    """An untrained Qwen3 in float32; the default (the teachers) has 104k parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=ff, head_dim=16,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.1,  # at the usual 0.02 a model this narrow never leaves the plateau
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    # Sampling means sampling from the model's own distribution: no top-k, no top-p.
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model


def save(model, tokenizer, folder):
    """Write a complete Hugging Face folder: bfloat16 weights, config, tokenizer, chat template."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder):
    """(float32 model in eval mode, tokenizer) of a local folder; ValueError if there is none."""
    toy.require(folder)
    model = harness.load_model(folder, dtype=torch.float32, device="cpu")
    return model, harness.load_tokenizer(folder)


# ------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Stage:
    """One stretch of supervised training.

    curriculum   problems grow from 1 move to `moves`
    second_task  share of the batches that are lists to reverse
    moves        of the longest problem
    noise        arguments of `dial_response`
    """

    steps: int
    lr: float
    curriculum: bool = False
    second_task: float = 0.1
    moves: int = toy.MAX_MOVES
    noise: dict = field(default_factory=dict)


WRONG_MOVES = {"wrong_result": 0.04, "wrong_operation": 0.03}
CLEAN = (Stage(1800, 3e-3, curriculum=True),)
STUDENT = (
    Stage(3000, 5e-3, curriculum=True),
    Stage(200, 2e-3, second_task=0.15, noise=WRONG_MOVES),
)
STUDENT_SIZE = {"hidden": 48, "layers": 2, "heads": 3, "ff": 128}
FORK_STUDENT_SIZE = {"hidden": 32, "layers": 2, "heads": 2, "ff": 96}


def fork_stages(wordings, student=False, moves=6, steps=1800):
    """The training of a fork's teacher, in two wordings; the student's ends with wrong moves."""
    noise = {"wordings": wordings}
    stages = (Stage(steps, 5e-3, curriculum=True, second_task=0.15, moves=moves, noise=noise),)
    last = Stage(200, 2e-3, second_task=0.15, moves=moves, noise=noise | WRONG_MOVES)
    return stages + (last,) * student


# Models that are trained from scratch: stages, size, number added to the seed. Any other teacher
# starts from the clean one.
RECIPES = {
    "student": (STUDENT, STUDENT_SIZE, 1),
    "clean": (CLEAN, {}, 0),
    "fork": (fork_stages(toy.FORK), STUDENT_SIZE, 0),
    "fork-student": (fork_stages(toy.FORK, student=True), FORK_STUDENT_SIZE, 1),
    "fork-mirror": (fork_stages(toy.MIRROR), STUDENT_SIZE, 0),
    "fork-mirror-student": (fork_stages(toy.MIRROR, student=True), FORK_STUDENT_SIZE, 1),
    "mire-student": (fork_stages(toy.FORK, True, 12, steps=3000), STUDENT_SIZE, 1),
}
RECIPES |= {
    name: (fork_stages(toy.WORLDS[name].noise["wordings"]), STUDENT_SIZE, 0)
    for name in toy.WORLDS
    if name.startswith("fork-") and name not in RECIPES
}
# Steps of a teacher that starts from the clean one, unless 300 will do.
SPOIL_STEPS = {"varied": 1600, "off-by-one": 900, "mire": 1600}


def training_batch(tokenizer, rng, stage, step, tokens=3600):
    """(ids_BT, labels_BT) of about `tokens` tokens; labels are -100 on the prompt.

    A batch is one task of one size, and every word and number is one token: no padding needed.
    """
    reverse = rng.random() < stage.second_task
    # the longest size grows from 1 to `moves`; long ones come more often: they hold the rest
    reach = min(1.0, step / (0.38 * stage.steps)) if stage.curriculum else 1.0
    longest = 1 + round(reach * (stage.moves - 1))
    size = rng.randint(2, 4) if reverse else max(1, math.ceil(longest * rng.random() ** 0.5))
    rows = []
    while not rows or (len(rows) + 1) * len(rows[0]) <= tokens:
        problem = toy.reverse_problem(rng, size) if reverse else toy.dial_problem(rng, size)
        if toy.in_test(problem):
            continue
        if reverse:
            text = toy.reverse_response(problem)
        else:
            text = toy.dial_response(problem, rng, **stage.noise)
        turns = (("user", problem["problem"]), ("assistant", text))
        messages = [{"role": role, "content": content} for role, content in turns]
        chat = tokenizer.apply_chat_template(messages, tokenize=False)
        rows.append(tokenizer(chat)["input_ids"])
    ids_BT = torch.tensor(rows)
    labels_BT = ids_BT.clone()
    prompt = 1 + rows[0].index(tokenizer.convert_tokens_to_ids("<|assistant|>"))
    labels_BT[:, :prompt] = -100
    return ids_BT, labels_BT


def fit(model, tokenizer, stage, *, seed, name="model"):
    """Train in place on the response tokens; returns the model. Linear decay from half-way."""
    rng = random.Random(f"{name} {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), stage.lr, (0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(stage.steps), desc=name, unit="step")
    for step in bar:
        decay = min(1.0, 2 * (stage.steps - step) / stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min(decay, (step + 1) / 50)
        ids_BT, labels_BT = training_batch(tokenizer, rng, stage, step)
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def spoil(base, noise, folder, *, seed=0, steps=None):
    """Train a copy of the teacher in `base` on texts with that noise; save it in `folder`."""
    model, tokenizer = load(base)[0], build_tokenizer()  # a reloaded one saves its load options
    name = Path(folder).name
    stage = Stage(steps or SPOIL_STEPS.get(name, 300), 3e-3, noise=noise)
    save(fit(model.train(), tokenizer, stage, seed=seed, name=name), tokenizer, folder)


# -------------------------------------------------------------------------- which ones to train


def rebuild(out, *, names=toy.SHIPPED, seed=0, steps=None, force=False):
    """Train the students and teachers of the named worlds from scratch into the folder `out`.

    `steps` replaces the length of every stage, for smoke tests. A teacher that is not in RECIPES
    starts from the clean one, which is then built too. Raises FileExistsError, before any training,
    if a model folder exists and `force` is not set.
    """
    out = Path(out)
    needed = {folder.name for w in map(toy.world, names) for folder in (w.student, w.teacher)}
    if not needed <= set(RECIPES):
        needed.add("clean")
    refuse_overwrite([out / name for name in in_order(needed)], force)
    train_models(out, needed, out / "clean", seed=seed, steps=steps)


def build_world(out, name, *, seed=0, steps=None, force=False):
    """Train those models of one world that `out` lacks; with `force` the world's teacher anyway.

    Models that exist are kept, and named. The clean teacher that others start from is `out`'s, else
    the repository's, and is trained only if neither is there.
    """
    out, chosen = Path(out), toy.world(name)
    folders = dict.fromkeys(out / folder.name for folder in (chosen.student, chosen.teacher))
    needed = {folder.name for folder in folders if not toy.exists(folder)}
    needed |= {chosen.teacher.name} if force else set()
    for folder in folders:
        if folder.name not in needed:
            print(f"kept {folder}")
    if not needed:
        print(f"nothing to build for {name}; --force trains its teacher anew")
    base = next((f for f in (out / "clean", toy.ASSETS / "clean") if toy.exists(f)), None)
    if base is None and not needed <= set(RECIPES):
        needed.add("clean")
    train_models(out, needed, base or out / "clean", seed=seed, steps=steps)


def in_order(names):
    """Model names in the order of training: from scratch first, those that start from another last.

    >>> in_order({"varied", "clean", "student"})
    ['student', 'clean', 'varied']
    """
    return [n for n in RECIPES if n in names] + sorted(n for n in names if n not in RECIPES)


def train_models(out, names, base, *, seed=0, steps=None):
    """Train the named models into `out`; those not in RECIPES start from the teacher in `base`."""
    refuse_overwrite([out / name for name in in_order(names)], force=True)
    tokenizer, noise = build_tokenizer(), {w.teacher.name: w.noise for w in toy.WORLDS.values()}
    for name in in_order(names):
        if name not in RECIPES:
            spoil(base, noise[name], out / name, seed=seed, steps=steps)
            continue
        stages, size, more = RECIPES[name]
        model = build_model(tokenizer, seed=seed + more, **size)
        for number, stage in enumerate(stages):
            stage = replace(stage, steps=steps or stage.steps)
            fit(model, tokenizer, stage, seed=seed + more, name=f"{name} {number}")
        save(model, tokenizer, out / name)


def refuse_overwrite(folders, force):
    """FileExistsError naming the first folder that is a file or, without `force`, exists."""
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; name another --out")
        if folder.exists() and not force:
            raise FileExistsError(f"{folder} exists; pass --force to overwrite it")


# ------------------------------------------------------------------------------- accuracy table


def accuracy(model, tokenizer, records, *, samples, temperature):
    """Share of right answers (mean@n) to records of `problems`, by `evaluate.sample_answers`."""
    items = harness.from_records(records, "toy")
    prompts = harness.render_prompts(tokenizer, items)
    longest = toy.MOVE_TOKENS * toy.MAX_MOVES + 40  # another limit draws other random numbers
    answers = evaluate.sample_answers(
        model, tokenizer, items, prompts, samples=samples, temperature=temperature, batch_size=200,
        max_new_tokens=longest, stop_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(0), progress=False,
    )  # fmt: skip
    return sum(a["correct"] for row in answers for a in row) / (samples * len(records))


def table(folders, moves, *, count=200):
    """Markdown: mean@4 at temperature 1, then greedy, on held-out problems, per model folder."""
    columns = [(f"n={n}", {"moves": n}) for n in moves] + [("reverse", {"task": "reverse"})]
    lines = [
        f"mean@4 at temperature 1 / greedy, {count} held-out problems per column",
        "",
        "| model | parameters | " + " | ".join(title for title, _ in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for folder in folders:
        model, tokenizer = load(folder)
        cells = [Path(folder).name, f"{model.num_parameters():,}"]
        for _, options in tqdm(columns, desc=f"table {cells[0]}", unit="column", leave=False):
            records = toy.problems(count, split="test", **options)
            sampled = accuracy(model, tokenizer, records, samples=4, temperature=1.0)
            greedy = accuracy(model, tokenizer, records, samples=1, temperature=0.0)
            cells.append(f"{sampled:.3f} / {greedy:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
