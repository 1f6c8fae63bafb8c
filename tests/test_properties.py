"""Properties of every public function: what mathematics says, and what bad input may do.

Bad input means a ValueError that names an argument, or a valid result: no other exception, no nan
that finite input does not explain, and arguments that stay as they were (`refused_or`).

The test below lists the public names of all library files and fails for one without a property
test in `test_*_properties.py` or elsewhere (ELSEWHERE), and without a reason to have none (EXEMPT).

The random inputs are the same every time. PROPERTIES_TIMES=10 takes new ones,
ten times as many.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "fast", "toy", "diagnose")
# Public names that other files test with random inputs: where, and by which test.
ELSEWHERE = {
    "release_rule.release_point": (
        "test_release_rule.py", "test_release_point_keeps_what_change_point_keeps"),
    "masks.spend": (
        "test_masks.py", "test_every_control_spends_the_whole_budget_however_rows_are_shared_out"),
    "harness.micro_batches": (
        "harness/test_micro_batches.py",
        "test_micro_batches_hold_every_row_once_and_keep_to_their_limits"),
    "logprobs.StopClass": ("test_stop_class.py", "test_a_class_is_one_outcome"),
    "lgr.lookahead_confidence": (
        "test_lgr.py", "test_any_ragged_batch_equals_a_forward_pass_per_candidate"),
    "lgr.group_reward": ("test_lgr.py", "test_any_group_equals_exact_arithmetic"),
    "answers.normalise": ("test_answers.py", "test_is_correct_is_reflexive_and_never_raises"),
    "answers.value": ("test_answers.py", "test_is_correct_is_reflexive_and_never_raises"),
    "answers.extract_answer": ("test_answers.py", "test_extract_answer_takes_any_text"),
    "answers.is_correct": ("test_answers.py", "test_is_correct_is_reflexive_and_never_raises"),
}  # fmt: skip

EXEMPT = {
    "records without behaviour": "release_rule.ChangePoint logprobs.TokenStats rollout.Rollout "
    "toy.World toy.Stage harness.Position harness.Checkpoint diagnose.Options diagnose.Job",
    "commands, run with bad and good flags by the tests of their files": "evaluate.main "
    "evaluate.run toy.main toy.run toy.parse train.main harness.main harness.show",
    "begin, resume and end the command; test_resume.py kills and starves it": "harness.start "
    "harness.open_run harness.written_down harness.end_when_told harness.end_with_error",
    "train models for minutes, or evaluate them all": "toy.fit toy.spoil toy.rebuild "
    "toy.build_world toy.train_models toy.table toy.print_tables",
    "build and merge a model; test_lora.py compares each with peft": "harness.adapt "
    "harness.targets harness.round_in_proportion",
    "join a process group; test_shard.py runs two and four": "harness.start_processes "
    "harness.Shards harness.whole harness.spread_like harness.in_turn",
    "look at a run; test_track.py compares each with log.jsonl": "harness.check harness.flat "
    "harness.named harness.tracker harness.draw",
    "draw on a terminal; test_evaluate.py reads what is told": "evaluate.SamplingBar",
}


def public_names():
    """ "file.name", or "package.name", of every function and class without a leading underscore."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    for path in [*ROOT.glob("*.py"), *(p for room in PACKAGES for p in ROOT.glob(f"{room}/*.py"))]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                where = path.stem if path.parent == ROOT else path.parent.name
                yield f"{where}.{node.name}"


def covered_names():
    """The names that `prop` is given in the files beside this one."""
    for path in Path(__file__).parent.rglob("test_*_properties.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "prop":
                yield from (argument.value for argument in node.args)


def test_every_public_name_has_a_property_test_or_a_reason():
    names, exempt = set(public_names()), " ".join(EXEMPT.values()).split()
    covered = set(covered_names())
    assert sorted(names - {*covered, *ELSEWHERE, *exempt}) == [], "without a property test"
    assert sorted({*covered, *ELSEWHERE, *exempt} - names) == [], "gone"
    assert not {*covered, *ELSEWHERE} & {*exempt}, "not exempt any more"
    assert len(exempt) < len(names) / 5
    for name, (file, test) in ELSEWHERE.items():
        tree = ast.parse((ROOT / "tests" / file).read_text())
        found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == test]
        assert found and "given(" in ast.unparse(found[0].decorator_list[-1]), name
