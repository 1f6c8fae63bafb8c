r"""The toy worlds: tiny problems, and pairs of a tiny student and a tiny teacher to solve them.

Problems with answers that can be checked, the worked solutions that the models are trained on, and,
per world, what goes wrong in the teacher's. Both papers (release rule, arXiv 2605.13643; lookahead
group reward, arXiv 2605.30833) are about where to trust a teacher; here that can be set.
Standard library only: models are in `toy.build`.

Terms
    dial        the task: a dial of 16 marks and n moves of plus or minus 1 to 5. n is the
                difficulty: a response has n + 2 sentences and 11 n + 17 tokens, guessing is right
                in one of 16
    reverse     the second task, lists to reverse, to notice forgetting
    horizon     H, the last move that the teacher knows how to make
    corruption  c, the share of the sentences after move H that are garbled in the teacher's
                training data, the closing one included
    fork        a world in which a move is worded with "so" or "thus", equally often. After one of
                them the teacher often goes wrong, and only its confidence one token later tells
"""

import random
import re
import shlex
import zlib
from dataclasses import dataclass, field
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "toy"
MARKS, MAX_AMOUNT, MAX_MOVES = 16, 5, 12
OPENING_TOKENS, MOVE_TOKENS = 6, 11  # of a response's first sentence, and of every move in it


# --------------------------------------------------------------------------------------- worlds
@dataclass(frozen=True)
class World:
    """A teacher and a student that belong together.

    about      what the teacher does
    noise      what the teacher's training data suffers from: arguments of `dial_response`
    moves      the difficulty that shows what the world is about
    uncertain  of two wordings the one after which the teacher is unsure ("": one wording only)
    shipped    the weights come with the repository; otherwise `python -m toy --world NAME`
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


def _world(name, about, student="student", **more):
    return World(about, ASSETS / name, ASSETS / student, **more)


def _horizon(name, corruption, **more):
    about = f"it knows moves 1 to 6 and garbles {corruption:.0%} of the later ones"
    return _world(name, about, noise={"horizon": 6, "corruption": corruption}, **more)


def _fork(name, slips, **more):
    about = f'after "so" it copies the mark, after "thus" it forgets it {slips:.0%} of the time'
    more |= {"noise": {"wordings": fork_wordings(slips)}, "moves": 6, "uncertain": "thus"}
    return _world(name, about, "fork-student", **more)


FORK = fork_wordings(0.5)
MIRROR = {"so": (0.3, None), "thus": (1.0, 0)}
HORIZONS = (2, 5, 8, 11)  # the world `varied`: H is the one at start mark mod 4
WORLDS = {
    "horizon": _horizon("horizon", 0.7),
    "clean": _world("clean", "it is right at every move"),
    "fork": _fork("fork", 0.5),
    "fork-mirror": _world(
        "fork-mirror",
        'after "so" it copies the mark 70% of the time, after "thus" it always takes 0',
        "fork-mirror-student", noise={"wordings": MIRROR}, moves=2, uncertain="so",
    ),
    "varied": _world(
        "varied", "it garbles 70% of the moves after 2, 5, 8 or 11; the start mark decides which",
        noise={"horizon": HORIZONS, "corruption": 0.7},
    ),
    "confident": _world("confident", "it stops after move 6, sure of itself", noise={"cut": 6}),
    "off-by-one": _world(
        "off-by-one", "after move 6 it is one mark off in every move, as sure as before",
        noise={"drift": 6}, shipped=False,
    ),
    "late": _world(
        "late", "it garbles 70% of moves 1 to 6 and is right later", shipped=False,
        noise={"horizon": MAX_MOVES, "corruption": 0.7, "late": 6},
    ),
    "mire": _world(
        "mire", "it slips as in `fork`; after two slips it garbles 70% of the rest", "mire-student",
        noise={"wordings": FORK, "mire": 0.7}, uncertain="thus", shipped=False,
    ),
}  # fmt: skip
for _c in (0.05, 0.1, 0.2, 0.3):  # between `clean` and `horizon`
    WORLDS[f"horizon-{_c}"] = _horizon(f"horizon-{_c}", _c, shipped=False)
for _s in (0.1, 0.25, 1.0):  # around `fork`
    WORLDS[f"fork-{_s}"] = _fork(f"fork-{_s}", _s, shipped=False)
SHIPPED = tuple(name for name, w in WORLDS.items() if w.shipped)


def world(name="varied"):
    """The `World` of that name; ValueError naming the known ones otherwise."""
    if name not in WORLDS:
        raise ValueError(f"unknown toy world {name!r}; known: {', '.join(WORLDS)}")
    return WORLDS[name]


# -------------------------------------------------------------------------------- model folders
def exists(folder):
    """Whether a model lies in that local folder."""
    return (Path(folder) / "config.json").is_file()


def build_command(folder):
    """The command that builds the model of that folder, if a world has one of that name.

    >>> build_command("models/fork-0.1")
    'python -m toy --world fork-0.1 --out models'
    """
    folder = Path(folder)
    for name, w in WORLDS.items():
        if folder.name in (w.teacher.name, w.student.name):
            elsewhere = folder.resolve().parent != ASSETS
            out = f" --out {shlex.quote(str(folder.parent))}" if elsewhere else ""
            return f"python -m toy --world {name}{out}"
    return "python -m toy"


def require(folder):
    """ValueError that names the command to build it, unless a model lies in that local folder."""
    if not exists(folder):
        raise ValueError(f"no model folder at {folder}; build it with: {build_command(folder)}")


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
    """One list of `length` marks (None: 2 to 4) to reverse: {"problem": str, "answer": str}."""
    length = rng.randint(2, 4) if length is None else length
    marks = [str(rng.randrange(MARKS)) for _ in range(length)]
    return {
        "problem": f"Reverse the list: {', '.join(marks)}.",
        "answer": ", ".join(reversed(marks)),
    }


def in_test(problem):
    """Whether the problem is held out: one text in eight, by checksum, whatever the seed."""
    return zlib.crc32(problem["problem"].encode()) % 8 == 0


def problems(count, *, moves=MAX_MOVES, split="train", seed=0, task="dial"):
    """`count` problems, {"problem": str, "answer": str} each, the same for the same arguments.

    split   "train" or "test": disjoint whatever the seeds; the models saw "train" only
    task    "dial", with that many `moves`, or "reverse", which ignores `moves`
    No problem comes twice before all of its split have come once (only few moves run out).
    Raises ValueError for an argument outside these.

    >>> problems(1, moves=1)
    [{'problem': 'The dial starts at 7. Move 1 is plus 5. Where does it stop?', 'answer': '12'}]
    """
    if type(count) is not int or count < 0:
        raise ValueError(f"count must be a whole number, at least 0; got {count!r}")
    if type(moves) is not int or not 1 <= moves <= MAX_MOVES:
        raise ValueError(f"moves must be a whole number, 1 to {MAX_MOVES}; got {moves!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test; got {split!r}")
    if task not in ("dial", "reverse"):
        raise ValueError(f"task must be dial or reverse; got {task!r}")
    rng = random.Random(f"{task} {moves} {split} {seed}")
    drawn, seen, misses = [], set(), 0
    while len(drawn) < count:
        problem = dial_problem(rng, moves) if task == "dial" else reverse_problem(rng)
        if in_test(problem) != (split == "test"):
            continue
        if problem["problem"] not in seen:
            seen.add(problem["problem"])
            drawn.append(problem)
            misses = 0
        elif (misses := misses + 1) > 2000:  # all have come: begin another round
            seen.clear()
            misses = 0
    return drawn


# ------------------------------------------------------------------------------------ responses


def dial_response(
    problem, rng=None, *, horizon=0, corruption=0.0, wrong_result=0.0, wrong_operation=0.0,
    wordings=None, cut=MAX_MOVES, drift=MAX_MOVES, mire=0.0, late=0,
):  # fmt: skip
    r"""The worked solution of a dial problem, spoilt as told; later moves go on from what it says.

    horizon, corruption  after move `horizon` a share `corruption` of the sentences is garbled:
                         operation, amount, source and result of the move, or the final mark, are
                         random. Of a tuple of horizons the one at start mark mod its length counts
    wrong_result         share of the moves that land on a random mark
    wrong_operation      share of the moves that are misread
    wordings             {word: (share, mark)}: equally likely words in place of "so"; after that
                         word a share of the moves starts from `mark` (None: any) by mistake
    cut                  the response stops after that move, as if the problem had no more
    drift                every move after that one lands one mark too far
    mire                 after two such mistakes, share of the sentences that are garbled
    late                 moves up to that one are garbled, too, as those after `horizon`
    rng                  a `random.Random`, needed for any share above 0 and for `wordings`

    >>> problem = {"problem": "The dial starts at 14. Move 1 is plus 5. Where does it stop?"}
    >>> dial_response(problem)
    'The dial starts at 14. Move 1 is plus 5, so 14 becomes 3. The dial stops at \\boxed{3}.'
    """

    def chance(share):
        return share > 0 and rng.random() < share

    def garbles():
        lost = number > horizon or number <= late
        return (lost and chance(corruption)) or (slipped > 1 and chance(mire))

    text = problem["problem"]
    mark = int(re.match(r"The dial starts at (\d+)\.", text)[1])
    if isinstance(horizon, tuple):
        horizon = horizon[mark % len(horizon)]
    parts, number, slipped = [f"The dial starts at {mark}."], 0, 0
    for word, amount in re.findall(r"is (plus|minus) (\d+)", text)[:cut]:
        source, amount, number = mark, int(amount), number + 1
        garbled = garbles()
        if garbled or chance(wrong_operation):
            word, amount = rng.choice(("plus", "minus")), rng.randint(1, MAX_AMOUNT)
        link, (slip, slip_mark) = rng.choice(list(wordings.items())) if wordings else ("so", (0, 0))
        if chance(slip):
            source = rng.randrange(MARKS) if slip_mark is None else slip_mark
            slipped += source != mark
        mark = (source + (amount if word == "plus" else -amount) + (number > drift)) % MARKS
        if garbled:
            source = rng.randrange(MARKS)
        if garbled or chance(wrong_result):
            mark = rng.randrange(MARKS)
        parts.append(f"Move {number} is {word} {amount}, {link} {source} becomes {mark}.")
    if garbles():
        mark = rng.randrange(MARKS)
    return " ".join([*parts, f"The dial stops at \\boxed{{{mark}}}."])


def reverse_response(problem):
    """The worked solution of a list reversal."""
    answer = problem["answer"]
    return f"The list has {answer.count(',') + 1} marks. Reversed, it reads \\boxed{{{answer}}}."


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
