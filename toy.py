"""The offline toy world: tiny problems, tiny teachers and a tinier student.

Everything that on-policy distillation needs, in 1.5 megabytes and without a network: a task whose
answers can be checked, a tokenizer, a student that is right now and then, and teachers whose
competence as a function of position can be set. Where a teacher can be trusted is what both papers
are about (release rule, arXiv 2605.13643; lookahead group reward, arXiv 2605.30833).

Reading key
    dial     16 marks, n moves of plus/minus 1..5; `moves` = n sets difficulty and length:
             11n + 17 response tokens in n + 2 sentences, chance accuracy 1/16
    reverse  second task, only there to notice forgetting
    H        horizon: the last move that the teacher knows how to make (`horizon`); in `varied` the
             problem's start mark decides which of HORIZONS it is
    c        corruption: share of the sentences after move H that the teacher's training data
             garbled, the closing one included
    F        fidelity: the probability of the teacher's favourite next token, max_v p_T(v | prefix)
    cut      the hasty teacher (`confident`) stops after that move, sure of itself
    drift    the confidently wrong teacher (`off-by-one`) is one mark off in every move after that
             one, and as sure as before
    student  smaller than the teachers, from its own seed, on data with wrong moves in it
    fork     a world with two wordings of a move, "so" and "thus", equally likely, after one of
             which the teacher goes wrong: nothing tells them apart but its confidence one token
             later. In `fork` the uncertain wording is the bad one; in `fork-mirror` it is the
             good one, and the confident one is always wrong.
    mire     a fork in which a teacher that has slipped twice is lost for the rest of the response:
             its confidence fades along a prefix by what the prefix says, and not by where
    graded   `horizon-C` and `fork-S` turn c and the share of slips S between `clean` and
             `horizon`, and around `fork`; their weights are built when wanted, not shipped.

By construction the student is better than the horizon teacher beyond H: the distilled student can
only gain there if the supervision stops in time. This is a demonstration, not a benchmark.

Rebuild (one CPU thread, minutes):   python toy.py --force
Look at what is there:               python toy.py --table
What one world needs and --out lacks:  python toy.py --world fork-0.1
Another horizon teacher:             python toy.py --horizon 4 --corruption 0.2 --out my_teachers
`--world` keeps the models that exist; with --force it trains the world's teacher anew, and nothing
else. A clean teacher to start from is taken from --out, else from the repository.
The weights depend on the seed and, through float32 rounding, on the machine; the problems and the
texts depend on the seed only.
"""

import math
import random
import re
import shlex
import sys
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import harness

ASSETS = Path(__file__).resolve().parent / "assets" / "toy"
MARKS, MAX_AMOUNT, MAX_MOVES = 16, 5, 12
OPENING_TOKENS, MOVE_TOKENS = 6, 11  # of a response's first sentence, and of every move in it
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


# --------------------------------------------------------------------------------------- worlds


@dataclass(frozen=True)
class World:
    """A student and a teacher that belong together.

    noise      what the teacher's data suffered from: arguments of `dial_response`
    moves      the difficulty that shows what the world is about
    uncertain  of two wordings the one after which the teacher is unsure ("": one wording only)
    shipped    the weights come with the repository; otherwise `python toy.py --world NAME`
    """

    about: str
    teacher: Path
    student: Path = ASSETS / "student"
    noise: dict = field(default_factory=dict)
    moves: int = MAX_MOVES
    uncertain: str = ""
    shipped: bool = True


def fork_wordings(slips):
    """{word: (share of slips, the mark slipped to, None for any)} of a fork where "thus" slips."""
    return {"so": (0.0, None), "thus": (slips, None)}


FORK = fork_wordings(0.5)
MIRROR = {"so": (0.3, None), "thus": (1.0, 0)}
HORIZONS = (2, 5, 8, 11)  # the world `varied`: H is the one at start mark mod 4
WORLDS = {
    "horizon": World(
        "the teacher knows moves 1..6 and garbles 70% of the later ones",
        ASSETS / "horizon",
        noise={"horizon": 6, "corruption": 0.7},
    ),
    "clean": World("the teacher is right at every move", ASSETS / "clean"),
    "fork": World(
        'after "so" the teacher copies the mark, after "thus" it forgets it half of the time',
        ASSETS / "fork",
        ASSETS / "fork-student",
        noise={"wordings": FORK},
        moves=6,
        uncertain="thus",
    ),
    "fork-mirror": World(
        'after "so" the teacher copies the mark 70% of the time, after "thus" it always takes 0',
        ASSETS / "fork-mirror",
        ASSETS / "fork-mirror-student",
        noise={"wordings": MIRROR},
        moves=2,
        uncertain="so",
    ),
    "varied": World(
        "the teacher garbles 70% of the moves after 2, 5, 8 or 11; the start mark decides which",
        ASSETS / "varied",
        noise={"horizon": HORIZONS, "corruption": 0.7},
    ),
    "confident": World(
        "the teacher surely stops after move 6, right or not",
        ASSETS / "confident",
        noise={"cut": 6},
    ),
}
WORLDS["off-by-one"] = World(
    "after move 6 the teacher is surely one mark off, move by move",
    ASSETS / "off-by-one",
    noise={"drift": 6},
    shipped=False,
)
WORLDS["mire"] = World(
    'after "thus" the teacher forgets the mark half of the time; when that has happened twice, it '
    "garbles 70% of what follows",
    ASSETS / "mire",
    ASSETS / "mire-student",
    noise={"wordings": FORK, "mire": 0.7},
    uncertain="thus",
    shipped=False,
)
WORLDS |= {
    f"horizon-{c}": World(
        f"the teacher knows moves 1..6 and garbles {c:.0%} of the later ones",
        ASSETS / f"horizon-{c}",
        noise={"horizon": 6, "corruption": c},
        shipped=False,
    )
    for c in (0.05, 0.1, 0.2, 0.3)
}
WORLDS |= {
    f"fork-{slips}": World(
        'after "so" the teacher copies the mark, after "thus" it forgets it '
        f"{slips:.0%} of the time",
        ASSETS / f"fork-{slips}",
        ASSETS / "fork-student",
        noise={"wordings": fork_wordings(slips)},
        moves=6,
        uncertain="thus",
        shipped=False,
    )
    for slips in (0.1, 0.25, 1.0)
}
SHIPPED = tuple(name for name, w in WORLDS.items() if w.shipped)


def world(name="horizon"):
    """The `World` of that name; ValueError naming the known ones otherwise."""
    if name not in WORLDS:
        raise ValueError(f"unknown toy world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name]


# ------------------------------------------------------------------------------------- problems


def dial_problem(rng, moves):
    """One dial problem with that many moves: {"problem": str, "answer": str}."""
    start = mark = rng.randrange(MARKS)
    text = f"The dial starts at {start}."
    for i in range(1, moves + 1):
        sign, amount = rng.choice((1, -1)), rng.randint(1, MAX_AMOUNT)
        mark = (mark + sign * amount) % MARKS
        text += f" Move {i} is {'plus' if sign > 0 else 'minus'} {amount}."
    return {"problem": text + " Where does it stop?", "answer": str(mark)}


def reverse_problem(rng, length=None):
    """One list to reverse, of 2 to 4 marks unless told: {"problem": str, "answer": str}."""
    length = rng.randint(2, 4) if length is None else length
    marks = [str(rng.randrange(MARKS)) for _ in range(length)]
    return {
        "problem": f"Reverse the list: {', '.join(marks)}.",
        "answer": ", ".join(reversed(marks)),
    }


def dial_response(
    problem,
    rng=None,
    *,
    horizon=0,
    corruption=0.0,
    wrong_result=0.0,
    wrong_operation=0.0,
    wordings=None,
    cut=MAX_MOVES,
    drift=MAX_MOVES,
    mire=0.0,
):
    r"""The worked solution of a dial problem, spoilt as told.

    After move `horizon` a share `corruption` of the moves is garbled: operation, amount, source
    and result are all random, so that nothing of the move can be predicted; the closing sentence
    after such moves names a random mark just as often. Of a tuple of horizons the problem's is the
    one at the start mark, modulo their number. Anywhere, a share `wrong_result` lands on a random
    mark and a share `wrong_operation` misreads the move. `wordings` maps words that may stand in
    the place of "so", all equally likely, to (share, mark): after that word a share of the moves
    starts from `mark`, or from any mark (None), in place of the one before. Later moves go on from
    the mark that was written. `rng` is needed for any of these. The response stops after move
    `cut`, as if the problem had no more; every move after `drift` lands one mark too far. After two
    moves that have slipped to another mark, a share `mire` of all that follows is garbled as beyond
    a horizon.

    >>> problem = {"problem": "The dial starts at 14. Move 1 is plus 5. Where does it stop?"}
    >>> dial_response(problem).split(". ")[1:]
    ['Move 1 is plus 5, so 14 becomes 3', 'The dial stops at \\boxed{3}.']
    """
    text = problem["problem"]
    mark = int(re.match(r"The dial starts at (\d+)\.", text)[1])
    if isinstance(horizon, tuple):
        horizon = horizon[mark % len(horizon)]
    parts, number, slipped = [f"The dial starts at {mark}."], 0, 0
    for number, word, amount in re.findall(r"Move (\d+) is (plus|minus) (\d+)", text)[:cut]:
        source, amount = mark, int(amount)
        garbled = int(number) > horizon and corruption and rng.random() < corruption
        garbled = garbled or (mire and slipped > 1 and rng.random() < mire)
        if garbled or (wrong_operation and rng.random() < wrong_operation):
            word, amount = rng.choice(("plus", "minus")), rng.randint(1, MAX_AMOUNT)
        link, (slip, slip_mark) = "so", (0.0, None)
        if wordings:
            link, (slip, slip_mark) = rng.choice(list(wordings.items()))
        if slip and rng.random() < slip:
            source = rng.randrange(MARKS) if slip_mark is None else slip_mark
            slipped += source != mark
        mark = (source + (amount if word == "plus" else -amount)) % MARKS
        mark = (mark + (int(number) > drift)) % MARKS
        if garbled:
            source = rng.randrange(MARKS)
        if garbled or (wrong_result and rng.random() < wrong_result):
            mark = rng.randrange(MARKS)
        parts.append(f"Move {number} is {word} {amount}, {link} {source} becomes {mark}.")
    beyond = int(number) > horizon and corruption and rng.random() < corruption
    if beyond or (mire and slipped > 1 and rng.random() < mire):
        mark = rng.randrange(MARKS)
    return " ".join([*parts, f"The dial stops at \\boxed{{{mark}}}."])


def wording_share(texts, word):
    """Share of the moves in some responses that are worded with `word`; None without moves.

    >>> wording_share(["Move 1 is plus 5, so 14 becomes 3. Move 2 is plus 1, thus 3"], "thus")
    0.5
    """
    links = [link for text in texts for link in re.findall(r"\d, ([a-z]+) \d", text)]
    return links.count(word) / len(links) if links else None


def response_limit(moves):
    """Longest response worth sampling, tokens: half as long again as the right one, 11 n + 17."""
    return 3 * (MOVE_TOKENS * moves + 17) // 2


def reverse_response(problem):
    """The worked solution of a list reversal."""
    answer = problem["answer"]
    return f"The list has {answer.count(',') + 1} marks. Reversed, it reads \\boxed{{{answer}}}."


def in_test(problem):
    """True when the problem is held out: one text in eight, by checksum, whatever the seed."""
    return zlib.crc32(problem["problem"].encode()) % 8 == 0


def problems(count, *, moves=MAX_MOVES, split="train", seed=0, task="dial"):
    """`count` problems, {"problem": str, "answer": str} each, the same for the same arguments.

    split   "train" or "test": disjoint whatever the seeds; the models saw "train" only
    task    "dial", with that many `moves`, or "reverse", which ignores `moves`
    No problem comes twice before all of its split have come once (only few moves run out).
    Raises ValueError for an argument outside these.
    """
    for name, value, low, high in (("count", count, 0, None), ("moves", moves, 1, MAX_MOVES)):
        bad = isinstance(value, bool) or not isinstance(value, int)
        if bad or value < low or (high is not None and value > high):
            limit = f"{low} to {high}" if high is not None else f"at least {low}"
            raise ValueError(f"{name} must be a whole number, {limit}; got {value!r}")
    for name, value, known in (
        ("split", split, ("train", "test")),
        ("task", task, ("dial", "reverse")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    rng = random.Random(f"{task} {moves} {split} {seed}")
    found, seen, misses = [], set(), 0
    while len(found) < count:
        problem = dial_problem(rng, moves) if task == "dial" else reverse_problem(rng)
        if in_test(problem) != (split == "test"):
            continue
        if problem["problem"] in seen:
            misses += 1
            if misses > 2000:  # the space is used up: begin another round
                seen.clear()
                misses = 0
            continue
        seen.add(problem["problem"])
        found.append(problem)
        misses = 0
    return found


# --------------------------------------------------------------------------- tokenizer and model


def build_tokenizer():
    """A word-level tokenizer, V = 153. A token owns the space before it, so pieces just join up."""
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
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.1,  # at the usual 0.02 a model this narrow never leaves the plateau
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    # Sampling means sampling from the model's own distribution: no top-k, no top-p.
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model


def prompt_ids(tokenizer, problem):
    """The prompt of a problem as a list of token ids, ready for sampling."""
    messages = [{"role": "user", "content": problem["problem"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Stage:
    """One stretch of supervised training. `noise`: arguments of `dial_response`."""

    steps: int
    lr: float
    curriculum: bool = False
    second_task: float = 0.1
    moves: int = MAX_MOVES  # of the longest problem
    noise: dict = field(default_factory=dict)


CLEAN = (Stage(1800, 3e-3, curriculum=True),)
STUDENT = (
    Stage(3000, 5e-3, curriculum=True),
    Stage(200, 2e-3, second_task=0.15, noise={"wrong_result": 0.04, "wrong_operation": 0.03}),
)
STUDENT_SIZE = {"hidden": 48, "layers": 2, "heads": 3, "ff": 128}
FORK_STUDENT_SIZE = {"hidden": 32, "layers": 2, "heads": 2, "ff": 96}


def fork_stages(wordings, student=False, moves=6, steps=1800):
    """Supervised training on problems of up to 6 moves in two wordings; the student's ends with
    wrong moves, as in STUDENT."""
    noise, slips = {"wordings": wordings}, {"wrong_result": 0.04, "wrong_operation": 0.03}
    stages = (Stage(steps, 5e-3, curriculum=True, second_task=0.15, moves=moves, noise=noise),)
    last = Stage(200, 2e-3, second_task=0.15, moves=moves, noise=noise | slips)
    return stages + (last,) * student


# Models that are trained from scratch: stages, size, number added to the seed.  Any other teacher
# starts from the clean one.
RECIPES = {
    "student": (STUDENT, STUDENT_SIZE, 1),
    "clean": (CLEAN, {}, 0),
    "fork": (fork_stages(FORK), STUDENT_SIZE, 0),
    "fork-student": (fork_stages(FORK, student=True), FORK_STUDENT_SIZE, 1),
    "fork-mirror": (fork_stages(MIRROR), STUDENT_SIZE, 0),
    "fork-mirror-student": (fork_stages(MIRROR, student=True), FORK_STUDENT_SIZE, 1),
    "mire-student": (
        fork_stages(FORK, student=True, moves=MAX_MOVES, steps=3000), STUDENT_SIZE, 1
    ),
}  # fmt: skip
RECIPES |= {
    name: (fork_stages(w.noise["wordings"]), STUDENT_SIZE, 0)
    for name, w in WORLDS.items()
    if "wordings" in w.noise and "mire" not in w.noise and name not in RECIPES
}
# Steps of a teacher that starts from the clean one, unless 300 will do.
SPOIL_STEPS = {"varied": 1600, "off-by-one": 900, "mire": 1600}


def training_batch(tokenizer, rng, stage, step, tokens=3600):
    """(ids_BT, labels_BT) of about `tokens` tokens; labels are -100 on the prompt.

    A batch is one task of one size, and every word and number is one token: no padding needed.
    """
    reverse = rng.random() < stage.second_task
    # the longest size grows from 1 to MAX_MOVES; long ones come more often, for they hold the rest
    reach = min(1.0, step / (0.38 * stage.steps)) if stage.curriculum else 1.0
    longest = 1 + round(reach * (stage.moves - 1))
    size = rng.randint(2, 4) if reverse else max(1, math.ceil(longest * rng.random() ** 0.5))
    rows, length = [], 0
    while len(rows) < 1 or (len(rows) + 1) * length <= tokens:
        problem = reverse_problem(rng, size) if reverse else dial_problem(rng, size)
        if in_test(problem):
            continue
        text = reverse_response(problem) if reverse else dial_response(problem, rng, **stage.noise)
        prompt = prompt_ids(tokenizer, problem)
        rows.append(prompt + tokenizer(text + "<|end|>")["input_ids"])
        length = len(rows[-1])
    ids_BT = torch.tensor(rows)
    labels_BT = ids_BT.clone()
    labels_BT[:, : len(prompt)] = -100
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


def save(model, tokenizer, folder):
    """Write a complete Hugging Face folder: bfloat16 weights, config, tokenizer, chat template."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exists(folder):
    """Whether a model lies in that local folder."""
    return (Path(folder) / "config.json").is_file()


def build_command(folder):
    """The command that builds the model of that folder, if a world has one of that name."""
    folder = Path(folder)
    elsewhere = folder.resolve().parent != ASSETS
    for name, w in WORLDS.items():
        if folder.name in (w.teacher.name, w.student.name):
            out = f" --out {shlex.quote(str(folder.parent))}" if elsewhere else ""
            return f"python toy.py --world {name}{out}"
    return "python toy.py"


def require(folder):
    """ValueError that names the command to build it, unless a model lies in that local folder."""
    if not exists(folder):
        raise ValueError(f"no model folder at {folder}; build it with: {build_command(folder)}")


def load(folder):
    """(float32 model in eval mode, tokenizer) of a local folder; ValueError if there is none."""
    require(folder)
    model = harness.load_model(folder, dtype=torch.float32, device="cpu")
    return model, harness.load_tokenizer(folder)


def spoil(base, noise, folder, *, seed=0, steps=None):
    """Train a copy of the teacher in `base` on texts with that noise; save it in `folder`."""
    model, tokenizer = load(base)[0], build_tokenizer()  # a reloaded one saves its load options
    name = Path(folder).name
    stage = Stage(steps or SPOIL_STEPS.get(name, 300), 3e-3, noise=noise)
    save(fit(model.train(), tokenizer, stage, seed=seed, name=name), tokenizer, folder)


def build(out, *, names=SHIPPED, seed=0, steps=None, force=False):
    """Train the students and teachers of the named worlds from scratch into the folder `out`.

    `steps` replaces the length of every stage, for smoke tests. A teacher that is not in RECIPES
    starts from the clean one, which is then built too. Raises FileExistsError, before any training,
    if a model folder exists and `force` is not set.
    """
    out = Path(out)
    chosen = map(world, names)
    needed = {folder.name for w in chosen for folder in (w.student, w.teacher)}
    if not needed <= set(RECIPES):
        needed.add("clean")
    refuse_overwrite([out / name for name in in_order(needed)], force)
    train_models(out, needed, out / "clean", seed=seed, steps=steps)


def build_world(out, name, *, seed=0, steps=None, force=False):
    """Train those models of one world that `out` lacks; with `force` the world's teacher anyway.

    Models that exist are kept, and named. The clean teacher that others start from is `out`'s, else
    the repository's, and is trained only if neither is there.
    """
    out, chosen = Path(out), world(name)
    folders = dict.fromkeys(out / folder.name for folder in (chosen.student, chosen.teacher))
    needed = {f.name for f in folders if not exists(f) or (force and f.name == chosen.teacher.name)}
    for folder in folders:
        if folder.name not in needed:
            print(f"kept {folder}")
    if not needed:
        print(f"nothing to build for {name}; --force trains its teacher anew")
    base = next((f for f in (out / "clean", ASSETS / "clean") if exists(f)), None)
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
    refuse_overwrite([out / name for name in names], force=True)
    tokenizer, noise = build_tokenizer(), {w.teacher.name: w.noise for w in WORLDS.values()}
    for name in in_order(names):
        if name not in RECIPES:
            spoil(base, noise[name], out / name, seed=seed, steps=steps)
            continue
        stages, size, more = RECIPES[name]
        model = build_model(tokenizer, seed=seed + more, **size)
        for number, stage in enumerate(stages):
            if steps:
                stage = replace(stage, steps=steps)
            fit(model, tokenizer, stage, seed=seed + more, name=f"{name} {number}")
        save(model, tokenizer, out / name)


def refuse_overwrite(folders, force):
    """FileExistsError naming the first of the folders that exists, unless `force`, or is a file."""
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file; name another --out")
        if folder.exists() and not force:
            raise FileExistsError(f"{folder} exists; pass --force to overwrite it")


# ------------------------------------------------------------------------------- accuracy table


def accuracy(model, tokenizer, items, *, samples=4, temperature=1.0, seed=0):
    """Share of right final answers (the last \\boxed) over `samples` responses to each problem."""
    from rollout import generate  # only the table samples; the rest of this file stands alone

    items = [item for item in items for _ in range(samples)]
    prompts = [prompt_ids(tokenizer, item) for item in items]
    rollout = generate(
        model,
        prompts,
        max_new_tokens=11 * MAX_MOVES + 40,
        eos_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
        temperature=temperature,
        batch_size=200,
        generator=torch.Generator().manual_seed(seed),
    )
    right = 0
    for ids_T, mask_T, item in zip(rollout.ids_BT, rollout.response_mask_BT, items, strict=True):
        boxed = re.findall(r"\\boxed\{(.*?)\}", tokenizer.decode(ids_T[mask_T]))
        right += bool(boxed) and boxed[-1] == item["answer"]
    return right / len(items)


@torch.no_grad()
def fidelity_by_move(model, tokenizer, items, responses):
    """F_BN: fidelity, averaged over the tokens of each sentence of responses to problems of one n.

    Column 0 is the opening sentence, column i is move i, the last one is the closing sentence.
    Every move has 11 tokens, right or wrong, so all rows are equally long and need no padding.
    """
    texts = [tokenizer(text)["input_ids"] for text in responses]
    prompts = [prompt_ids(tokenizer, item) for item in items]
    ids_BT = torch.tensor([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    F_BT = model(ids_BT).logits[:, len(prompts[0]) - 1 : -1].softmax(-1).amax(-1)
    sizes = [6, *[11] * (len(texts[0]) // 11 - 1), 10]  # 11 n + 16 tokens
    return torch.stack([sentence.mean(1) for sentence in F_BT.split(sizes, dim=1)], dim=1)


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
            items = problems(count, split="test", **options)
            sampled = accuracy(model, tokenizer, items)
            greedy = accuracy(model, tokenizer, items, samples=1, temperature=0)
            cells.append(f"{sampled:.3f} / {greedy:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- main


def make_parser():
    """The flags."""
    parser = harness.Parser(
        prog="toy.py", allow_abbrev=False,
        description="Rebuild the offline toy world (tiny students and teachers), or look at it.",
    )  # fmt: skip
    add, number = parser.add_argument, harness.number
    add("--out", type=harness.path_name, metavar="FOLDER", default=str(ASSETS),
        help="folder of the model folders (%(default)s)")  # fmt: skip
    add("--world", metavar="NAME", choices=list(WORLDS), help="build what this world needs and "
        "--out lacks: " + ", ".join(WORLDS))  # fmt: skip
    add("--horizon", type=number(int, 0, MAX_MOVES), metavar="H", help="build one more teacher "
        f"from the clean one: the last move it knows, 0 to {MAX_MOVES}")  # fmt: skip
    add("--corruption", type=number(float, 0, 1), metavar="C", help="with --horizon: share of the "
        "moves after H that are garbled in its training data, 0 to 1")  # fmt: skip
    add("--table", action="store_true", help="build nothing, print the accuracy table of --out")
    add("--seed", type=number(int, 0, 2**31), metavar="N", default=0,
        help="seed of weights and data (%(default)s)")  # fmt: skip
    add("--steps", type=number(int, 1), metavar="N",
        help="training steps of every stage, for smoke tests")  # fmt: skip
    add("--threads", type=number(int, 1, harness.MOST_THREADS), metavar="N", default=1,
        help="CPU threads; 1 is fastest here (%(default)s)")  # fmt: skip
    add("--force", action="store_true", help="overwrite model folders that exist; with "
        "--world: train its teacher anew")  # fmt: skip
    return parser


def parse(argv):
    """The command line, checked as far as that goes without opening anything."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.out, another = Path(args.out), args.horizon is not None
    if args.table and (args.world or another or args.steps or args.force):
        parser.error("--table builds nothing: --world, --horizon, --steps, --force exclude it")
    if args.world and (another or args.corruption is not None):
        parser.error("--world and --horizon/--corruption exclude each other")
    if another != (args.corruption is not None):
        parser.error("--horizon and --corruption go together; one of them is missing")
    return args


def run(args):
    """Build or print what the arguments ask for; ValueError or OSError names what is wrong."""
    torch.set_num_threads(args.threads)
    if args.table:
        parts = []
        for forks, moves in ((False, (2, 6, 9, 12)), (True, (1, 2, 4, 6))):
            chosen = [w for w in map(world, SHIPPED) if bool(w.uncertain) == forks]
            names = dict.fromkeys(f.name for w in chosen for f in (w.student, w.teacher))
            parts.append(([args.out / name for name in names], moves))
        for folder in sum((folders for folders, _ in parts), []):
            load(folder)  # all of them before minutes of sampling
        for i, part in enumerate(parts):
            print(table(*part), end="\n\n" * (i == 0))
        print()
        return
    harness.check_creatable("--out", args.out)  # not after minutes of training
    h, c = args.horizon, args.corruption
    if h is None:
        options = {"seed": args.seed, "steps": args.steps, "force": args.force}
        build_world(args.out, args.world, **options) if args.world else build(args.out, **options)
        return
    folder = args.out / f"horizon-H{h}-c{c:g}"
    refuse_overwrite([folder], args.force)
    noise = {"horizon": h, "corruption": c}
    spoil(ASSETS / "clean", noise, folder, seed=args.seed, steps=args.steps)
    print(folder)


def main(argv=None):
    """The command; exit code 2 and one line on stderr for what the user can put right."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        run(args)
    except (ValueError, OSError) as error:
        harness.complain("toy.py", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
