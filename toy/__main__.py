"""Build the models of the toy worlds, or print what they can do.

    python -m toy --table                     what the models of --out can do
    python -m toy --world fork-0.1            what one world needs and --out lacks
    python -m toy --force                     all models that come with the repository, anew
    python -m toy --horizon 4 --corruption 0.2 --out my_teachers      another horizon teacher

One CPU thread, minutes. `--world` keeps the models that exist; with --force it trains the world's
teacher anew, and nothing else. A clean teacher to start from is taken from --out, else from the
repository.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers

import harness
import toy
from toy import build


def make_parser():
    """The flags."""
    parser = harness.Parser(
        prog="python -m toy", allow_abbrev=False, description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="worlds, by what the teacher does:\n"
        + "\n".join(f"  {name:12} {w.about}" for name, w in toy.WORLDS.items()),
    )  # fmt: skip
    add, number = parser.add_argument, harness.number
    add("--out", type=harness.path_name, metavar="FOLDER", default=str(toy.ASSETS),
        help="folder of the model folders (%(default)s)")  # fmt: skip
    add("--world", metavar="NAME", choices=list(toy.WORLDS),
        help="build what this world needs and --out lacks")  # fmt: skip
    add("--horizon", type=number(int, 0, toy.MAX_MOVES), metavar="H", help="build one more teacher "
        f"from the clean one: the last move it knows, 0 to {toy.MAX_MOVES}")  # fmt: skip
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


def print_tables(out):
    """The accuracy tables of the shipped models in that folder: the dials, then the forks."""
    parts = []
    for forks, moves in ((False, (2, 6, 9, 12)), (True, (1, 2, 4, 6))):
        chosen = [w for w in map(toy.world, toy.SHIPPED) if bool(w.uncertain) == forks]
        names = dict.fromkeys(f.name for w in chosen for f in (w.student, w.teacher))
        parts.append(([out / name for name in names], moves))
    for folder in parts[0][0] + parts[1][0]:
        build.load(folder)  # all of them before minutes of sampling
    print("\n\n".join(build.table(*part) for part in parts))


def run(args):
    """Build or print what the arguments ask for; ValueError or OSError names what is wrong."""
    torch.set_num_threads(args.threads)
    if args.table:
        return print_tables(args.out)
    harness.check_creatable("--out", args.out)  # not after minutes of training
    options = {"seed": args.seed, "steps": args.steps}
    if args.world:
        build.build_world(args.out, args.world, force=args.force, **options)
    elif args.horizon is None:
        build.rebuild(args.out, force=args.force, **options)
    else:
        folder = args.out / f"horizon-H{args.horizon}-c{args.corruption:g}"
        build.refuse_overwrite([folder], args.force)
        noise = {"horizon": args.horizon, "corruption": args.corruption}
        build.spoil(toy.ASSETS / "clean", noise, folder, **options)
        print(folder)


def main(argv=None):
    """The command; exit code 2 and one line on stderr for what the user can put right."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        run(args)
    except (ValueError, OSError) as error:
        harness.complain("toy", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
