"""What all figures look like.  Importing this needs no matplotlib."""

import contextlib

from diagnose.style import BLUE, GREEN, GREY, LGR_MEAN, LOOKS, ORANGE, PINK, RED, SKY, STYLE  # noqa: F401

NEEDED = "matplotlib is needed for the figures: pip install -r benchmarks/requirements.txt"
DARK_GREY = "#555555"


@contextlib.contextmanager
def applied():
    """Within, matplotlib draws in this style, whatever the reader's own settings.

    Raises ImportError without matplotlib.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise ImportError(NEEDED) from None
    with matplotlib.style.context(["default", STYLE]):
        yield


def caption(figure, text: str) -> None:
    """A small line at the bottom right."""
    figure.supxlabel(text, fontsize=7.5, color=DARK_GREY, x=0.99, ha="right")


def save(figure, path) -> None:
    """Write a PNG; the same figure gives the same bytes."""
    figure.savefig(path, metadata={"Software": None})
