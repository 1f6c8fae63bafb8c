"""Can this teacher teach this student? Measured before GPU days are spent.

    python -m diagnose                                             the toy world `varied`
    python -m diagnose --student S --teacher T --problems P.jsonl --out FOLDER
    python -m diagnose --compare runs/opd-seed0/student runs/lgr-seed0/student

Samples responses of the student and of the teacher to the same prompts, lets both models read all
of them, and writes report.json, report.md and pictures: whether plain on-policy distillation can
work, where supervision fades, which method fits, and the `train.py` command for it.

    command     the flags, the models, the run
    probing     one number per token: what both models say along the responses
    measuring   curves, rates and errors of a pair, item by item
    curves      means with errors over problems, the four-parameter logistic (numpy only)
    verdicts    thresholds with their sources, a verdict per item, the method that fits
    report      the text;  pictures, style: the figures
"""

from diagnose import curves, report, style, verdicts
