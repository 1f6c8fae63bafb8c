"""How a method looks in every figure of this repository, and matplotlib's settings."""

# Okabe and Ito's colours, safe for the colour-blind
ORANGE, SKY, GREEN, BLUE, RED, PINK = "#E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7".split()
GREY = "#777777"
LGR_MEAN = "lgr, mean, γ = 4"
LOOKS = {  # colour, dashes, marker; two methods share a colour only where no panel has both
    "opd": (RED, "-", "s"),
    "release": (BLUE, "-", "o"),
    "prefix": (GREEN, "-", "D"),
    "shuffled": (PINK, (0, (5, 1.5)), "^"),
    "random": (ORANGE, (0, (1, 1)), "v"),
    "std": (SKY, (0, (4, 1, 1, 1)), "x"),
    "rkl": (ORANGE, "-", "D"),
    "fkl": (PINK, (0, (5, 1.5)), "^"),
    "jsd": (SKY, (0, (4, 1, 1, 1)), "v"),
    "lgr": (GREEN, "-", "^"),
    "lgr_topk": (PINK, "-", "v"),
    "release+lgr": (SKY, (0, (2, 1)), "D"),
    LGR_MEAN: (GREEN, (0, (2, 1)), "v"),
    "untrained": (GREY, (0, (4, 3)), None),
}
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "figure.dpi": 130, "savefig.dpi": 130,
}  # fmt: skip
