"""What all figures look like.  Importing this needs no matplotlib."""

import contextlib

NEEDED = "matplotlib is needed for the figures: pip install -r benchmarks/requirements.txt"
# Okabe and Ito's colours, safe for the colour-blind
ORANGE, SKY, GREEN, BLUE, RED, PINK = "#E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7".split()
GREY, DARK_GREY = "#777777", "#555555"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.dpi": 130,
    "savefig.dpi": 130,
}


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
