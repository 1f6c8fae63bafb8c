r"""The answer in a response, and whether it equals the reference. Nothing is ever evaluated.

    extract_answer   the last \boxed{} of a response, else what follows "####", else the last value
    normalise        one spelling for LaTeX that means the same: fractions, roots, thousands, lists
    value            the exact value of a plain number, a ratio, a mixed number or a power
    is_correct       equal as text, in value or item by item; if that is unknown, for `math-verify`

`math-verify` is asked only where it is installed, so figures from machines with and without it can
differ. It can hang and eats memory on towers of powers, so it runs in another process.
"""

import atexit
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction

# ------------------------------------------------------------------------------------ extraction
_BRACES = re.compile(r"(?P<box>\\\\?(?:boxed|fbox)\s*\{)|\\.|(?P<brace>[{}])", re.DOTALL)
_ONE_LIST = re.compile(  # between two boxes: "and", a comma or no word, but no full stop
    r"(?!.*(?:[.!?][\s$\\]|\n\s*\n))(?:\W+|.*(?:[,;&]|\b(?:and|or)\b|quad).*)", re.DOTALL
)
_MARKED = re.compile(r"^[ \t]*####[ \t]*(?:(.+)\Z|([-+$0-9.,/%]+)[ \t]*$)", re.MULTILINE)
_DIGITS = r"(?:(?<![0-9.,])[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])|[0-9]+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(  # a minus after a digit, letter or bracket is an operation: 10-7 ends in 7
    rf"(?:(?<![0-9A-Za-z)\]}}])[-+\u2212])?{_UNSIGNED}(?:\s?/\s?{_UNSIGNED})?"
)
_SIGN = r"[-+*/^_=<>|{}0-9\u2212×·√π∞∪]|[.,](?=[0-9\\}])|\\(?:text\{[^{}]*\}|[A-Za-z]+|[!%{},;:])"
_LETTER = r"(?<=[0-9)}^_{(+*/=-])[A-Za-z](?![A-Za-z])|(?<![A-Za-z])[A-Za-z](?=[\^_(=])"
_ATOM = rf"(?:{_SIGN}|{_LETTER}|[(\[](?:{_SIGN}|[ ,;.]|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))*[)\]]|[()\[\]])"
_MATH = re.compile(  # between dollars, unless there is prose ("$5 and $7"); other delimiters; bare
    r"(?<!\\)(\$\$?)((?:\\text\{[^{}]*\}|(?!\s[A-Za-z]{2,}\s)[^$])+)\1"
    rf"|\\[(\[]((?:[^\\]|\\[^()\[\]])*)\\[)\]]|({_ATOM}(?: ?{_ATOM})*)"
)


def _boxes(text):
    """The last closed box and those joined to it in a list, the last one first, as (start, end,
    slice of the inside); [] without a box, None if the last one is cut off."""
    opened, closed = [], []
    for match in _BRACES.finditer(text):
        if match["box"] or match["brace"] == "{":
            opened.append(match.span() if match["box"] else None)
        elif match["brace"] and opened and (box := opened.pop()):
            closed.append((box[0], match.end(), slice(box[1], match.start())))
    boxes = closed[-1:]
    if any(box and box[0] > (boxes[0][0] if boxes else -1) for box in opened):
        return None
    for box in closed[-2::-1]:
        if box[1] <= (end := boxes[-1][0]):  # else it is inside of that one
            if end - box[1] > 40 or not _ONE_LIST.fullmatch(text, box[1], end):
                break
            boxes.append(box)
    return boxes


def extract_answer(text):
    r"""The inside of the last \boxed{} or \fbox{}; without one the rest of the line after "####";
    without that the last value: a number, or LaTeX after its last "=". None if there is none.

    Several boxes in one statement come as they stand, for `is_correct` to decide. A last box that
    is cut off is no answer, nor is what stands before "</think>". Linear time.

    >>> extract_answer(r"So \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("It costs $1,234.50."), extract_answer(r"$x = \frac34$"), extract_answer("?")
    ('1,234.50', '\\frac34', None)
    """
    thought, _, after = text.rpartition("</think>")
    text = (after if after.strip() else thought or text).rstrip()
    boxes = _boxes(text)
    if boxes is None or len(boxes) == 1:
        return boxes and text[boxes[0][2]]
    if boxes:
        return text[boxes[-1][0] : boxes[0][1]]
    if marked := _MARKED.findall(text):
        return "".join(marked[-1])
    symbols = None
    for match in reversed(list(_MATH.finditer(text))):
        math = _right_side(match[2] or match[3] or match[4])
        if match[4] and not re.search(r"[\\{^√π∞]|^[(\[].*,.*[)\]]$", math):
            if numbers := _NUMBER.findall(match[4]):
                return numbers[-1]
        elif re.search(r"[0-9π∞]|\\(?:pi|infty|emptyset|sqrt)", math):
            return math
        symbols = symbols or (match[2] or match[3]) and math or None
    return symbols


def _right_side(math):
    """What an equation says; all of it if it is a list of equations, or ends in = 0."""
    exact, _, rounded = math.partition(r"\approx")
    math = exact if "=" in exact or not rounded else rounded
    _, *sides = re.split(r"^|(?<![<>!])=(?![^{]*\})", math)  # not the one of \sum_{k=0}
    several = re.search("[,;]|or|and", "".join(sides[1:-1])) or sides[-1].strip() == "0"
    return re.sub(r"^[-+*/<>|]\s|^[\s*:;,.&|]+|[\s*:;,.&|]+$", "", math if several else sides[-1])


# ------------------------------------------------------------------------------------ comparison
_SYMBOLS = str.maketrans({
    "\u2212": "-", "–": "-", "×": "*", "·": "*", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
    "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "°": r"^\circ ",
    "²": "^2", "³": "^3", "€": "", "£": "", "~": " ",
})  # fmt: skip
_SPELLINGS = {
    r"\left": "", r"\right": "", r"\displaystyle": "", r"\quad": " ", r"\qquad": " ", r"\ ": " ",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\times": "*", r"\cdot": "*",
    r"\leq": r"\le ", r"\geq": r"\ge ", r"\neq": r"\ne ", "<=": r"\le ", ">=": r"\ge ",
    "!=": r"\ne ", r"\lt": "<", r"\gt": ">", "pi": r"\pi", "sqrt": r"\sqrt", "and": ",", "or": ",",
    "infinity": r"\infty", "percent": "%", "percentage": "%", "pct": "%", r"\degree": r"^\circ",
}  # fmt: skip
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r",\s*\\!\s*|\{\s*,\s*\}", ","),
        (r"\\?\$|(?<!\\)\\[()\[\]]|\\[!,;:]", ""),  # math delimiters, dollars, thin spaces
        (r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|left|right|text|pi|le|ge)(?![a-z]))", r"\\"),
        (r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|bb)|mbox|boxed)\s*\{([^{}]*)\}", r"\1"),
        (r"\\?[A-Za-z]+|[<>!]=|\\ ", lambda match: _SPELLINGS.get(match[0], match[0])),
        (r"^\*\*|\*\*$|^\s+|\s*\.?\s*$|(?:^|(?<=[(\[,]))\+\s*(?=[0-9.\\])", ""),
        (r"^\{([^{}]*)\}$", r"\1"),
        (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup"),
        (r"\[?\\begin\{array\}\{[a-z|]*\}|\\begin\{bmatrix\}", r"\\begin{pmatrix}"),
        (r"(?:\\\\\s*)?\\end\{(?:array\}\]?|[bp]matrix\})", r"\\end{pmatrix}"),
        (r"\\sqrt\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))", r"\\sqrt(\1\2)"),
        (r"([\^_])\s*\{\s*(-?[0-9]+|[A-Za-z])\s*\}(?![0-9])", r"\1\2"),
        (r"([\^_])\{([^{}]*)\}", r"\1(\2)"),
        (r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))", r"\\frac{\1\2}{\3\4}"),
        (r"([0-9])\s*\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1 \2/\3"),  # one and a half, not 11/2
        (r"(?<![\w)}\]])\\frac\{([^{}]*)\}\{([^{}]*)\}(?![\w({\\])", lambda match: _ratio(*match.groups())),
        (r"(?<=[0-9])\s*\*\s*10\s*\^\s*\(?\s*([-+]?[0-9]+)\s*\)?$", r"e\1"),
        (r"(?<=[0-9)])\s*(?:\\?%|\^\s*\(?\s*\\circ\s*\)?|\\degrees)$", ""),
        (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"),
        (r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])|(?<=[0-9]) (?=[A-Za-z])", ""),
    )
]  # fmt: skip
_THOUSANDS = re.compile(r"\s*[-+]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]*)?\s*")
_PLAIN = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"  # no exponent of a billion
_RATIO = re.compile(
    rf"([-+]?)(?:([0-9]+) (?=[0-9]+/[0-9]))?({_PLAIN})(?:\^(-?[0-9]{{1,3}}))?(?:/({_PLAIN}))?"
)
_UNIT = re.compile(  # after a number: \text{...}, or words of three letters or more
    r"(?<=[\w)}\]])(?:\s|~|\\[ ,;])*(?:\\(?:text\w*|mathrm|mbox)\s*\{(?![^{}]*WORD)[^{}0-9]+\}"
    r"|(?<=[\s0-9])(?!WORD)[a-z]{3,}(?: [a-z]+){0,2})(?:\^\{?[23]\}?)?[.\s$]*$"
    .replace("WORD", r"\b(?:hundred|thousand|[bmtr]+illion|dozen|and|or)\b")
)  # fmt: skip
_NAME = re.compile(  # x=, f(2)=, (x,y)=, x\in; 5+5= before 10
    r"(?:^|(?<=[,;(]))(?:(?:[A-Za-z|\\:/'{}_.\s]|(?<=_)[0-9]|\([^()=]*\))+(?:=|\\in(?![a-z]))"
    r"(?:[-0-9+*/.()^]+=)*|(?:[-0-9+*/.()^]+=)+(?=[-0-9./]+$))"
)
_WORD = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*|[Nn]o")
_COMMA = re.compile(r"[,;](?![^(\[{]*[)\]}])")  # outside of brackets
_BRACKETS = re.compile(r"([(\[{])((?:[^(\[{)\]}]|[(\[{][^(\[{)\]}]*[)\]}])*)([)\]}])")
_CHOICE = re.compile(r"\(?([A-J])[).:]")
LONGEST_ANSWER = 1000  # characters; longer ones are compared as they are


@functools.lru_cache(maxsize=10_000)
def normalise(text):
    r"""One spelling for LaTeX that means the same; text that is no LaTeX stays nearly as it is.

    >>> normalise(r"$1{,}234.$"), normalise(r"\left( \dfrac12, x \right)"), normalise(r"90^\circ")
    ('1234', '(1/2,x)', '90')
    """
    text = re.sub(r"\s+", " ", text.translate(_SYMBOLS))
    for again in (False, True):  # for what stood inside of something
        for pattern, replacement in _REWRITES:
            if not again and _THOUSANDS.fullmatch(text):  # "1, 234" is a list
                text = re.sub("[ ,]", "", text)
            text = pattern.sub(replacement, text)
    return text.replace(r"\{", "{").replace(r"\}", "}")


def _ratio(*parts):
    plain = re.compile(r"[-+]?[\w.]+|\\[A-Za-z]+|\\sqrt\([^()]*\)")
    return "/".join(part if plain.fullmatch(part) else f"({part})" for part in parts)


def value(text):
    """The exact value of a plain number, ratio, mixed number or power; None for anything else.

    >>> value("-1 1/2"), value("0.25"), value("10^3"), value("1/0"), value("x")
    (Fraction(-3, 2), Fraction(1, 4), Fraction(1000, 1), None, None)
    """
    if not (match := _RATIO.fullmatch(text)):
        return None
    try:
        power = Fraction(match[3]) ** int(match[4] or 1)
        exact = int(match[2] or 0) + power / Fraction(match[5] or 1)
    except ZeroDivisionError:
        return None
    return -exact if match[1] == "-" else exact


def _form(text):
    """What is known of a normalised text: its value, a frozenset of the forms of a list or set,
    (brackets, *forms) of a tuple or interval, else the text."""
    if (exact := value(text)) is not None:
        return exact
    whole = _BRACKETS.fullmatch(text)
    items = [item for item in _COMMA.split(whole[2] if whole else text) if item]
    if not whole and len(items) < 2:
        word = _WORD.fullmatch(text) and text in (text.lower(), text.capitalize(), text.title())
        return text.lower() if word else text
    brackets, forms = whole[1] + whole[3] if whole else "", list(map(_form, items))
    if len(forms) == 1 and brackets in ("()", "{}"):
        return forms[0]
    return frozenset(forms) if brackets in ("", "{}") else (brackets, *forms)


def _forms(*texts):
    """Forms of two normalised texts, without what only one of them has: "x=", the brackets of a
    pair, what follows the letter of a choice."""
    names = [_NAME.findall(text) for text in texts]
    if names[0] == names[1] or [] in names:
        texts = [_NAME.sub("", text) for text in texts]
    forms = list(map(_form, texts))
    for i, other in enumerate(reversed(forms)):
        if isinstance(other, tuple) and other[0] == "()" and _COMMA.search(texts[i]):
            forms[i] = _form(f"({texts[i]})")
        elif isinstance(other, str) and len(other) == 1 and (choice := _CHOICE.match(texts[i])):
            forms[i] = choice[1]
    return forms


def _differ(one, other):
    """Whether forms are known to differ, in value or in kind."""
    if isinstance(one, str) or isinstance(other, str):
        return ("=" in str(one)) != ("=" in str(other))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) != len(other) or one[0] != other[0] or any(map(_differ, one[1:], other[1:]))
    lists = isinstance(one, frozenset) and isinstance(other, frozenset)
    return one != other and all(isinstance(item, Fraction) for item in (one | other if lists else ()))


def _known(answer, reference):
    """Whether two texts are equal, or None where only `math-verify` could tell."""
    ours, theirs = normalise(answer), normalise(reference)
    bare, plain = (normalise(_UNIT.sub("", text)) for text in (answer, reference))
    for pair in ((ours, theirs), (bare, theirs), (ours, plain)):
        if len({*_forms(*pair)}) == 1 and "" not in pair:
            return True
    one, other = _forms(bare, plain)
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        percent = ["%" in text for text in (answer, reference)]  # 50% is 50, and 0.5
        return percent[0] != percent[1] and one * 100 ** percent[1] == other * 100 ** percent[0]
    words = _WORD.fullmatch(ours) and _WORD.fullmatch(theirs)
    cased = ours.casefold() == theirs.casefold() and not words
    return False if cased or "" in (ours, theirs) or _differ(one, other) else None


def _listed(text):
    """Several boxes of one statement as a list and the last one of them; other text twice."""
    boxes = [text[box[2]] for box in _boxes(text) or ()]
    return (", ".join(boxes[::-1]), boxes[0]) if len(boxes) > 1 else (text, text)


def is_correct(answer, reference, *, timeout=5.0):
    r"""Whether an answer (text or None) equals the reference (text or number). Never raises.

    The reference may be a whole solution with a \boxed{} or "####". Several boxes of an answer are
    a list if the reference is one; otherwise the last one counts. What is not known to be equal or
    different is put to `math-verify`, for at most `timeout` seconds.

    >>> is_correct(r"\dfrac12", "0.5"), is_correct("$1{,}000.$", "1000"), is_correct("2", "3")
    (True, True, False)
    """
    if answer is None:
        return False
    try:
        answer, reference = str(answer).strip(), str(reference).strip()
        if answer == reference:
            return answer != ""
        if re.search(r"\\boxed|\\fbox|####", reference):
            reference, _ = _listed(extract_answer(reference) or "")
        if max(len(answer), len(reference)) > LONGEST_ANSWER or not answer or not reference:
            return False
        answer = _listed(answer)[not _COMMA.search(normalise(reference))]
        if (known := _known(answer, reference)) is not None:
            return known
        installed = importlib.util.find_spec("math_verify") is not None
        return installed and _verify(answer, reference, float(timeout))
    except (OSError, ValueError):  # no process to be had; no package of that name; 5000 digits
        return False


# ------------------------------------------------------------------- math-verify, if it is there
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
