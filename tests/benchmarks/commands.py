"""Commands of benchmarks/, run in this process, and one of the runs that they read."""

import json

import transformers


def last_line(capsys, main, *words):
    """Run the `main` of a benchmark with these words on its command line; its last line, as JSON,
    and all of its standard output."""
    logging = transformers.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        main([str(word) for word in words])
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
    shown = capsys.readouterr().out
    return json.loads(shown.splitlines()[-1]), shown


def result(method, seed, accuracy, *flags, world="clean", moves=12, **more):
    """One run as in compare.json."""
    return {"world": world, "method": method, "flags": list(flags), "moves": moves, "seed": seed,
            "accuracy": [0.25, accuracy], "ood": [1.0, 0.9], "kept": 0.5, "fired": 1.0,
            "uncertain_wording": None} | more
