r"""The answer in a response, and whether it equals the reference. Nothing is ever evaluated.

    extract_answer   the last \boxed{} of a response, else what follows "####", else the last value
    normalise        one spelling for LaTeX that means the same: fractions, roots, thousands, words
    value            the exact value of a plain number, a ratio, a mixed number or a power
    is_correct       equal as text, in value or item by item; if that is unknown, for `math-verify`

`math-verify` is asked only where it is installed: figures with and without it can differ. It can
hang and eats memory on towers of powers, so it runs in another process.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import sys
import threading
from fractions import Fraction
from subprocess import DEVNULL, PIPE, Popen

# ------------------------------------------------------------------------------------ extraction
_BRACES = re.compile(r"(?P<box>\\\\?(?:boxed|fbox)\s*\{)|\\.|(?P<brace>[{}])", re.DOTALL)
_AND = r"(?s)(?!.*(?:[.!?][\s$\\]|\n\s*\n))" \
    r"(?:(?:[^A-Za-z\\]|\\[A-Za-z]+|\\.|\b[A-Za-z](?![A-Za-z]))+|.*\b(?:and|or)\b.*)"
_MARKED = re.compile(r"^[ \t]*####[ \t]*(?:(.+)\Z|([-+$0-9.,/%]+)[ \t]*$)", re.MULTILINE)
_DIGITS = r"(?:(?<![0-9.,])[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])|[0-9]+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
# a minus after a digit, letter or bracket is an operation or a range: 10-7 ends in 7
_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)\]}}])[-+\u2212])?{_UNSIGNED}(?:\s?/\s?{_UNSIGNED})?")
_SIGN = r"[-+*/^_=<>|{}0-9\u2212×·√π∞∪]|[.,](?=[0-9\\}])|\\(?:text\{[^{}]*\}|[A-Za-z]+|[!%{},;:])"
_SIGN += "|(?<![A-Za-z])[B-HJ-Zb-z](?![A-Za-z])"  # not the words a, A and I
_BARE = rf"(?:{_SIGN}|[(\[](?:{_SIGN}|[ ,;.aA])*[)\]]|[()\[\]])"
_MATH = re.compile(  # between dollars, but no prose ("$5 and $7"); in other delimiters; in neither
    r"(?<!\\)(\$\$?)((?:\\text\{[^{}]*\}|(?!\s[A-Za-z]{2,}\s)[^$])+)\1"
    rf"|\\[(\[]((?:[^\\]|\\[^()\[\]])*)\\[)\]]|({_BARE}(?: ?{_BARE})*)"
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
            if end - box[1] > 40 or not re.fullmatch(_AND, text[box[1] : end]):
                break
            boxes.append(box)
    return boxes


def extract_answer(text):
    r"""The inside of the last \boxed{} or \fbox{}; without one the rest of the line after "####";
    without that the last value: a number, or LaTeX after its last "=". None if there is none.

    Several boxes in one statement come as they stand, for `is_correct` to decide. A last box that
    is cut off is no answer, nor is what stands before "</think>". Linear time.

    >>> extract_answer(r"So \boxed{1}, no: \boxed{\frac{1}{2}}."), extract_answer(r"$x = \frac34$")
    ('\\frac{1}{2}', '\\frac34')
    """
    text = re.sub(r"(?s)^.*</think>(?=.*\S)", "", text).rstrip()
    if boxes := _boxes(text):
        return text[boxes[0][2] if len(boxes) == 1 else slice(boxes[-1][0], boxes[0][1])]
    if boxes is None or (marked := _MARKED.findall(text)):
        return boxes if boxes is None else "".join(marked[-1])
    symbols = None
    for match in reversed(list(_MATH.finditer(text))):
        exact, _, rounded = (match[2] or match[3] or match[4]).partition(r"\approx")
        math = exact if "=" in exact or not rounded else rounded
        _, *sides = re.split(r"^|(?<![<>!])=(?![^{}=]*\})", math)  # not the one of \sum_{k=0}
        if not re.search("[,;]|or|and", "".join(sides[1:-1])) and sides[-1].strip() != "0":
            math = sides[-1]  # but of "x = 1, y = 2" and of "... = 0" all
        math = re.sub(r"^[-+*/<>|]\s|^[\s*:;,.&|]+|[\s*:;,.&|]+$", "", math)
        if match[4] and not re.search(r"[\\{^√π∞]|^[(\[][^()\[\],]*,.*[)\]]$", math):
            if numbers := _NUMBER.findall(match[4]):
                return numbers[-1]
        elif re.search(r"[0-9π∞]|\\(?:pi|infty|emptyset|sqrt)", math):
            return math
        symbols = symbols or (match[2] or match[3]) and math or None
    return symbols


# ------------------------------------------------------------------------------------ comparison
_WORDS = r"""− - × * · * π \pi ∞ \infty √ \sqrt ∪ \cup ≤ \le ≥ \ge ≠ \ne ∈ \in ° ^\circ ² ^2 ³ ^3
    \times * \cdot * \dfrac \frac \tfrac \frac \cfrac \frac \lt < \gt > \leq \le \geq \ge \neq \ne
    <= \le >= \ge != \ne pi \pi sqrt \sqrt infinity \infty and , or , percent % pct % percentage %
    thousand *10^3 million *10^6 billion *10^9 – - bmatrix pmatrix""".split()
_SPELLINGS = {one: f"{other} " for one, other in zip(_WORDS[::2], _WORDS[1::2], strict=True)}
_SIMPLE = r"\(([-+]?[\w.]+|\\[A-Za-z]+|\\sqrt\([^()]*\))\)"
_REWRITES = 2 * [  # twice, for what stands inside of something
    (r",\s*\\!\s*|\{\s*,\s*\}", ","), (r"~|(?<!\\)\\ |\\q?quad(?![A-Za-z])", " "),
    (r"\\?\$|(?<!\\)\\[()\[\]]|\\[!,;:]|\\(?:left|right|displaystyle)(?![A-Za-z])|[€£]", ""),
    (r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|left|right|text|pi|le|ge)(?![a-z]))", r"\\"),
    (r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|bb)|mbox|boxed)\s*\{([^{}]*)\}", r"\1"),
    (r"\\?[A-Za-z]+|[<>!]=|[^ -~]", lambda match: _SPELLINGS.get(match[0], match[0])),
    (r"^\*\*|\*\*$|^\s+|\s*\.?\s*$|(?:^|(?<=[(\[,]))\+\s*(?=[0-9.\\])|\\\\\s*(?=\\end)", ""),
    (r"^[-+]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]*)?$",
     lambda match: re.sub("[ ,]", "", match[0])),
    (r"^\{([^{}]*)\}$", r"\1"), (r"^(?:[A-Z][a-z]{2,}( \w[a-z]+)*|No)$", lambda m: m[0].lower()),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup"), (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"),
    (r"([\^_])\s*\{\s*(-?[0-9]+|[A-Za-z])\s*\}(?![0-9])", r"\1\2"),
    (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt(\1)"), (r"([\^_]|\\sqrt)\s*\{([^{}]*)\}", r"\1(\2)"),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))", r"\\frac{\1\2}{\3\4}"),
    (r"([0-9])\s*\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1 \2/\3"),  # one and a half, not 11/2
    (r"(?<![\w)}\]])\\frac\{([^{}]*)\}\{([^{}]*)\}(?![\w({\\])", r"(\1)/(\2)"),
    (rf"(?<![\w)}}\]]){_SIMPLE}(?=/)|(?<=/){_SIMPLE}(?![\w({{\\^])", r"\1\2"),
    (r"(?<=[0-9])\s*\*\s*10\s*\^\s*\(?\s*([-+]?[0-9]+)\s*\)?$", r"e\1"),
    (r"(?<=[0-9)])\s*(?:\\?%|\^\s*\(?\s*\\circ\s*\)?|\\degrees?)$", ""),
    (r"(?<![0-9A-Za-z,]) | (?![0-9A-Za-z])|(?<=[0-9]) (?=[A-Za-z])", ""),
]  # fmt: skip
_PLAIN = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"  # no 1e999999999
_RATIO = rf"([-+]?)(?:([0-9]+) (?=[0-9]+/[0-9]))?({_PLAIN})(?:\^(-?[0-9]{{1,3}}))?(?:/({_PLAIN}))?"
_UNIT = r"(?<=[\w)}\]])(?:\s|~|\\[ ,;])*(?<![a-z])(?=[\\a-z])" \
    r"(?!.*\b(?:hundred|thousand|(?:m|b|tr)illion|dozen|and|or)\b)(?:\\(?:text\w*|mathrm|mbox)\s*" \
    r"\{[^{}0-9]+\}|(?<=[\s0-9])[a-z]{3,}(?: [a-z]+){0,2})(?:\^\{?[23]\}?)?[.\s$]*$"
_NAME = r"(?:^|(?<=[,;(]))(?:(?:[A-Za-z|\\:/'{}_.\s]|(?<=_)[0-9]|\([^()=]*\))+(?:=|\\in(?![a-z]))" \
    r"(?:[-0-9+*/.()^]+=)*|(?:[-0-9+*/.()^]+=)+(?=[-0-9./]+$))"
LONGEST_ANSWER = 1000  # characters; longer ones are compared as they are


def normalise(text):
    r"""One spelling for LaTeX that means the same; text that is no LaTeX stays nearly as it is.

    >>> normalise(r"$1{,}234.$"), normalise(r"\left( \dfrac12, x \right)"), normalise(r"90^\circ")
    ('1234', '(1/2,x)', '90')
    """
    text = functools.reduce(lambda t, rule: re.sub(*rule, t), _REWRITES, re.sub(r"\s+", " ", text))
    return re.sub(r"\\(?=[{}])|(?<=,) ", "", text.replace(";", ","))


def value(text):
    """The exact value of a plain number, ratio, mixed number or power; None for anything else.

    >>> value("-1 1/2"), value("0.25"), value("10^3"), value("1/0"), value("x")
    (Fraction(-3, 2), Fraction(1, 4), Fraction(1000, 1), None, None)
    """
    match = re.fullmatch(_RATIO, text)
    if not match or 0 in (Fraction(match[5] or 1), match[4] and Fraction(match[3])):
        return None
    exact = int(match[2] or 0) + Fraction(match[3]) ** int(match[4] or 1) / Fraction(match[5] or 1)
    return -exact if match[1] == "-" else exact


def _form(text):
    """A normalised text, its values as ratios; sorted what has no order, a list or a set."""
    text = re.sub(r"^\{([^{}]*)\}$|^\(([^,(){}]*)\)$", r"\1\2", text)
    text = re.sub(r"[^,()\[\]{}]+", lambda m: str(value(m[0])).replace("None", m[0]), text)
    return ",".join(sorted({*re.split(r",(?![^(\[{)\]}]*[)\]}])", text)} - {""}))


def _known(answer, reference):
    """Whether two texts are equal but for a unit, "x=" or brackets; None if that is not known."""
    forms = [[normalise(text), normalise(re.sub(_UNIT, "", text))] for text in (answer, reference)]
    for mine, other in (forms, forms[::-1]):
        if len(other[0].strip("()")) == 1 and (choice := re.match(r"\(?([A-J])[).:]", mine[0])):
            mine[0] = choice[1]
    for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
        one, other = forms[0][i], forms[1][j]
        names = [re.findall(_NAME, text) for text in (one, other)]
        if [] in names or names[0] == names[1] and len(names[0]) == 1:
            one, other = re.sub(_NAME, "", one), re.sub(_NAME, "", other)
        same = {_form(one), _form(f"({one})")} & {_form(other), _form(f"({other})")} - {"", "()"}
        if same and (i, j) != (1, 1):  # the last pair lacks both units, and may be different still
            return True
    if all(re.fullmatch(r"[-0-9/,()\[\]{}]*", _form(text)) for text in (one, other)):
        return None if same or ("%" in answer) != ("%" in reference) else False  # 50% is 0.5, too
    bare = [re.sub(r"[()\[\]{}]" if "," in one else "^$", "", x.casefold()) for x in (one, other)]
    if bare[0] == bare[1] and not same:  # X and x, a tuple and a set; of words the judge decides
        return None if len(one) > 2 and one.isalpha() else False
    return False if ("=" in one) != ("=" in other) else None


def is_correct(answer, reference, *, timeout=5.0):
    r"""Whether an answer (text or None) equals the reference (text or number). Never raises.

    The reference may be a whole solution with a \boxed{} or "####". Several boxes of an answer are
    a list if the reference is one, else the last one counts. `timeout`: seconds for `math-verify`.

    >>> is_correct(r"\dfrac12", "0.5"), is_correct("$1{,}000.$", "1000"), is_correct("2", "3")
    (True, True, False)
    """
    with contextlib.suppress(OSError, ValueError):  # no process or package; 5000 digits
        texts = ["" if answer is None else str(answer).strip(), str(reference).strip()]
        if texts[0] == texts[1]:
            return texts[0] != ""
        if re.search(r"\\boxed|\\fbox|####", texts[1]):
            texts[1] = extract_answer(texts[1]) or ""
        for i in (1, 0):
            boxes = [texts[i][box[2]] for box in _boxes(texts[i]) or ()]
            if len(boxes) > 1:
                several = i == 1 or "," in normalise(texts[1])
                texts[i] = ", ".join(boxes[::-1]) if several else boxes[0]
        if "" in texts or max(map(len, texts)) > LONGEST_ANSWER:
            return False
        if (known := _known(*texts)) is None and importlib.util.find_spec("math_verify"):
            known = _verify(*texts, float(timeout))
        return bool(known)
    return False


# ------------------------------------------------------------------- math-verify, if it is there
_JUDGE = r"""
import contextlib, json, os, sys
out, sys.stdout = sys.stdout, open(os.devnull, "w")
with contextlib.suppress(Exception):  # a tower of powers eats memory faster than time
    import resource as r; r.setrlimit(r.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
print("ready", file=out, flush=True)
for line in sys.stdin:
    right = False
    with contextlib.suppress(Exception):
        answer, reference = (parse("\\boxed{" + text + "}") for text in json.loads(line))
        right = answer and reference and verify(reference, answer)
    print("yes" if right else "no", file=out, flush=True)
"""
_judges, _judge_lock = [], threading.Lock()  # at most one process, kept: importing takes seconds


@functools.lru_cache(maxsize=100_000)  # the same wrong answer comes again and again
def _verify(answer, reference, timeout):
    with _judge_lock:
        questions = [(json.dumps([answer, reference]) + "\n", timeout)]
        if not _judges:
            env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            how = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True, "bufsize": 1}
            _judges.append(Popen([sys.executable, "-c", _JUDGE], env=env, **how))
            questions.insert(0, ("", 60.0))  # until it is ready
        for question, seconds in questions:
            timer, reply = threading.Timer(seconds, _judges[0].kill), ""
            timer.start()  # signal.alarm works on the main thread only
            with contextlib.suppress(OSError):
                _judges[0].stdin.write(question)
                reply = _judges[0].stdout.readline()
            timer.cancel()
            timer.join()  # from here on it has killed or never will
            if not reply or _judges[0].poll() is not None:
                _judges[0].kill()
                _judges.pop().wait()
                return False  # it has failed or is late
    return reply == "yes\n"
