r"""The answer in a response, and whether it equals the reference. Nothing is ever evaluated.

    extract_answer   the last \boxed{} of a response, else its last number
    normalise        one spelling for LaTeX that means the same: fractions, text, thousands, units
    value            the exact value of a plain number, a ratio or a mixed number
    is_correct       equal as normalised text, or equal in value, or equal for `math-verify`

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
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<brace>[{}])", re.DOTALL)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_UNSIGNED = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(
    # a minus after a digit, letter or bracket is an operation or a range: 10-7 ends in 7
    rf"(?:(?<![0-9A-Za-z)\]}}])[-+\u2212])?"
    rf"(?:\\[dt]?frac\{{-?{_UNSIGNED}\}}\{{{_UNSIGNED}\}}|{_UNSIGNED}(?:\s?/\s?{_UNSIGNED})?)"
)


def _boxes(text):
    """Slices of the insides of all closed boxes, in the order in which they close."""
    starts = []  # of every open brace: where its box's inside begins, or None if it is no box
    for match in _BRACES.finditer(text):
        if match["box"]:
            starts.append(match.end())
        elif match["brace"] == "{":
            starts.append(None)
        elif match["brace"] == "}" and starts and (start := starts.pop()) is not None:
            yield slice(start, match.start())


def extract_answer(text):
    r"""The inside of the last closed \boxed{} or \fbox{}, else the last number, else None.

    Braces balance, escaped ones do not count, of nested boxes the outer one wins. Linear time.

    >>> extract_answer(r"So \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("It costs $1,234.50. \\boxed{"), extract_answer("none")
    ('1,234.50', None)
    """
    if boxes := list(_boxes(text)):
        return text[boxes[-1]]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


# ------------------------------------------------------------------------------------ comparison
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


def normalise(text):
    r"""One spelling for LaTeX that means the same; text that is no LaTeX stays nearly as it is.

    >>> normalise(r"$1{,}234.$"), normalise(r"\left( \dfrac12, x \right)"), normalise(r"90^\circ")
    ('1234', '(1/2,x)', '90')
    """
    text = re.sub(r"\s+", " ", text)
    for pattern, replacement in _REWRITES:
        if _THOUSANDS.fullmatch(text):  # not after the last one: "1, 234" is a list
            text = text.replace(",", "")
        text = pattern.sub(replacement, text)
    return _FRACTION.sub(lambda match: "/".join(map(_in_brackets, match.groups())), text)


def _in_brackets(text):
    return text if re.fullmatch(r"[-+]?[\w.]+|\\[A-Za-z]+", text) else f"({text})"


def value(text):
    """The exact value of a plain number, a ratio or a mixed number; None for anything else.

    >>> value("-1 1/2"), value("0.25"), value("1e3"), value("1/0"), value("x")
    (Fraction(-3, 2), Fraction(1, 4), Fraction(1000, 1), None, None)
    """
    match = _RATIO.fullmatch(text)
    if not match or (match[4] and Fraction(match[4]) == 0):
        return None
    exact = int(match[2] or 0) + Fraction(match[3]) / Fraction(match[4] or 1)
    return -exact if match[1] == "-" else exact


def is_correct(answer, reference, *, timeout=5.0):
    r"""Whether an answer (text or None) equals the reference (text or number). Never raises.

    What differs as normalised text and in value is put to `math-verify`, for at most `timeout`
    seconds.

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
    ours, theirs = normalise(answer), normalise(reference)
    if ours == theirs != "":
        return True
    if value(ours) is not None and value(ours) == value(theirs):
        return True
    try:
        installed = importlib.util.find_spec("math_verify") is not None
        return installed and _verify(answer, reference, float(timeout))
    except (OSError, ValueError):  # no process to be had; a module of that name that is no package
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
