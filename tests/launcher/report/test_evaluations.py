"""Answers are matched with the models of the runs, and the students compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths
from launcher.commands.report import read_report
from launcher.report.evaluations import Role, find_evaluations
from launcher.report.numbers import MINUS
from launcher.report.page import Report, task_scores
from tests.launcher.conftest import FIXTURE

TEACHER, START = FIXTURE / "teacher", FIXTURE / "student"


def report_on(*runs: Path, evaluations: tuple[Path, ...] = ()) -> Report:
    return read_report(runs, evaluations)


def roles(report: Report) -> list[tuple[str, Role, int]]:
    return [(one.name, one.place.role, one.place.run) for one in report.evaluations]


def test_student_start_and_teacher_are_known_by_their_folders(run: Path, evaluate) -> None:
    models = {"t": (TEACHER, 36), "begin": (START, 10), "s": (run, 30), "stranger": (run.parent, 40)}
    report = report_on(run, evaluations=(evaluate(models),))
    assert roles(report) == [("s", Role.STUDENT, 0), ("begin", Role.START, 0), ("t", Role.TEACHER, 0)]
    assert [one.score.score.value for one in report.evaluations] == [75.0, 25.0, 90.0]
    better, worse = report.differences
    assert (better.second.name, better.value, better.verdict) == ("begin", 50.0, "better")
    assert better.low > 0
    assert better.p_value < 0.001
    assert (worse.second.name, worse.value, worse.verdict) == ("t", -15.0, "worse")


def test_a_difference_whose_interval_holds_zero_is_no_verdict(run: Path, evaluate) -> None:
    report = report_on(run, evaluations=(evaluate({"s": (run, 30), "t": (TEACHER, 31)}),))
    (difference,) = report.differences
    assert (difference.value, difference.high) == (-2.5, 0.0)
    assert difference.verdict == "no difference shown"
    assert replace(difference, p_value=None).verdict == "no difference shown"  # without a test, too


def test_a_difference_that_the_test_does_not_confirm_is_no_verdict(run: Path, evaluate) -> None:
    """McNemar's p of 5 questions against 0 is 2 / 2^5."""
    report = report_on(run, evaluations=(evaluate({"s": (run, 30), "t": (TEACHER, 35)}),))
    (difference,) = report.differences
    assert difference.high < 0
    assert difference.finding == "no difference shown, p = 0.062"
    assert replace(difference, p_value=None).finding == "worse"  # of answers that may be partly right


@pytest.mark.parametrize(
    ("questions", "right", "finding", "text"),
    [
        (1, 0, "too few questions, p = 1", f"{MINUS}100.0"),
        (2, 0, "no interval, p = 0.5", f"{MINUS}100.0"),
        (2, 2, "no difference shown, p = 1", "+0.0"),
    ],
)
def test_an_interval_without_width_is_no_verdict(
    run: Path, evaluate, questions: int, right: int, finding: str, text: str
) -> None:
    """The bootstrap draws the same difference again and again."""
    out = evaluate({"s": (run, right), "t": (TEACHER, questions)}, questions=questions)
    (difference,) = report_on(run, evaluations=(out,)).differences
    assert difference.low == difference.high
    assert (difference.finding, difference.text) == (finding, text)
    (row,) = task_scores(report_on(run, evaluations=(out,)))[0].differences.rows
    assert row.note == finding


def test_models_whose_folder_is_not_known_any_more_are_known_by_the_name_that_eval_gives(
    run: Path, evaluate
) -> None:
    """A later evaluation into the same folder has replaced evaluation.json, or all was moved here."""
    RunPaths(run).student.mkdir()
    models = {run.name: (Path("/gone/student"), 30), "teacher": (Path("/gone/teacher"), 36)}
    out = evaluate(models)
    assert roles(report_on(run, evaluations=(out,))) == [
        (run.name, Role.STUDENT, 0),
        ("teacher", Role.TEACHER, 0),
    ]
    evaluate({"teacher": (TEACHER, 36)})
    assert len(report_on(run, evaluations=(out,)).evaluations) == 2


def test_a_model_of_an_equal_name_in_another_folder_is_not_taken(run: Path, evaluate, tmp_path: Path) -> None:
    other = tmp_path / "other" / run.name
    other.mkdir(parents=True)
    assert roles(report_on(run, evaluations=(evaluate({run.name: (other, 30)}),))) == []


def test_a_part_of_the_questions_and_a_step_are_said(run: Path, evaluate) -> None:
    out = evaluate({"s": (run, 30)}, step=12)
    (out / "s" / "own.jsonl").rename(out / "s" / "own.first-40.jsonl")
    (one,) = report_on(run, evaluations=(out,)).evaluations
    assert (one.part, one.title) == ("first 40 questions", "s, step 12")


def test_a_student_at_a_step_is_compared_with_models_that_have_no_steps(run: Path, evaluate) -> None:
    out = evaluate({"s": (run, 30)}, step=12).rename(run.parent / "at-12")
    later = evaluate({"s": (run, 35)}, step=16).rename(run.parent / "at-16")
    others = evaluate({"begin": (START, 10), "t": (TEACHER, 36)})
    report = report_on(run, evaluations=(out, later, others))
    assert [(one.title, one.value) for one in report.differences] == [
        (f"s, step 16 {MINUS} s, step 12", 12.5),
        (f"s, step 16 {MINUS} begin", 62.5),
        (f"s, step 16 {MINUS} t", -2.5),
        (f"s, step 12 {MINUS} begin", 50.0),
        (f"s, step 12 {MINUS} t", -15.0),
    ]
    (task,) = task_scores(report)
    assert task.student == "87.5 (77.1 to 97.9) at step 16"
    assert [row.name for row in task.scores.rows] == ["s, step 16", "s, step 12", "begin", "t"]
    assert [one.first.step for one in task.verdicts] == [16, 16, 16]


def test_a_student_and_a_start_of_one_name_are_both_shown_and_compared(run: Path, evaluate) -> None:
    """The name of a folder, as of models/student and runs/student."""
    start = evaluate({"student": (START, 10)}).rename(run.parent / "e1")
    student = evaluate({"student": (run, 30)})
    report = report_on(run, evaluations=(start, student))
    assert roles(report) == [("student", Role.STUDENT, 0), ("student", Role.START, 0)]
    assert [one.title for one in report.differences] == [f"student (student) {MINUS} student (start)"]
    assert report.problems == ()


def test_runs_of_one_name_are_told_apart_by_their_folders(run: Path, evaluate, tmp_path: Path) -> None:
    """As their students are, in the evaluations that followed them."""
    runs = []
    for parent, right in (("a", 30), ("b", 20)):
        runs.append(Path(shutil.copytree(run, tmp_path / parent / run.name)))
        evaluate({run.name: (runs[-1], right)}).rename(RunPaths(runs[-1]).evaluation)
    report = report_on(*runs)
    assert [one.name for one in report.runs] == [f"a/{run.name}", f"b/{run.name}"]
    name = run.name
    assert [(one.title, one.value) for one in report.differences] == [
        (f"{name} (student of a/{name}) {MINUS} {name} (student of b/{name})", 25.0)
    ]
    (task,) = task_scores(report)
    assert [(row.name, row.note) for row in task.scores.rows] == [
        (name, f"student of a/{name}"),
        (name, f"student of b/{name}"),
    ]


def test_a_second_evaluation_of_a_model_is_named_and_not_shown(run: Path, evaluate) -> None:
    first = evaluate({"s": (run, 30)}).rename(run.parent / "e1")
    second = evaluate({"s": (run, 20)})
    report = report_on(run, evaluations=(first, second, first))
    assert [one.score.score.value for one in report.evaluations] == [75.0]
    (problem,) = report.problems
    assert problem == (
        f"{second / 's' / 'own.jsonl'}: not shown: {first / 's' / 'own.jsonl'} has answers of the same model "
        "to this task"
    )


def test_the_evaluation_that_follows_a_run_is_found_without_being_named(run: Path, evaluate) -> None:
    evaluate({"s": (run, 30)}).rename(RunPaths(run).evaluation)
    assert roles(report_on(run)) == [("s", Role.STUDENT, 0)]


def test_students_of_other_runs_are_compared_with_the_first(run: Path, evaluate, copied_run) -> None:
    other = copied_run("other")
    report = report_on(run, other, evaluations=(evaluate({"s": (run, 30), "o": (other, 20)}),))
    assert roles(report) == [("s", Role.STUDENT, 0), ("o", Role.STUDENT, 1)]
    assert [(one.first.name, one.second.name, one.value) for one in report.differences] == [("s", "o", 25.0)]


def test_a_teacher_that_is_one_of_the_runs_is_both(run: Path, evaluate, copied_run) -> None:
    """As in the demo, where the teacher was trained, too."""
    teacher = copied_run("big")
    RunPaths(run).config.write_text(
        RunPaths(run).config.read_text().replace(str(TEACHER), str(RunPaths(teacher).student))
    )
    models = {"s": (run, 30), "big": (RunPaths(teacher).student, 36)}
    RunPaths(teacher).student.mkdir()
    report = report_on(run, teacher, evaluations=(evaluate(models),))
    assert roles(report) == [("s", Role.STUDENT, 0), ("big", Role.TEACHER, 0)]
    assert [one.place.student_of for one in report.evaluations] == [0, 1]


def test_answers_of_an_evaluation_that_is_not_complete_do_not_count(run: Path, evaluate) -> None:
    out = evaluate({"s": (run, 30)})
    (out / "s" / "own.jsonl").rename(out / "s" / "own.part-0.jsonl")
    report = report_on(run, evaluations=(out,))
    assert report.evaluations == ()
    assert "own.part-0.jsonl: this evaluation is not complete" in report.problems[0]


def test_answers_that_cannot_be_scored_are_named_and_leave_the_others(run: Path, evaluate) -> None:
    out = evaluate({"s": (run, 30), "t": (TEACHER, 31)})
    lines = (out / "s" / "own.jsonl").read_text().splitlines()
    (out / "s" / "own.jsonl").write_text("\n".join(lines[:-1]))
    (out / "t" / "unknown.jsonl").write_text("{}\n")
    report = report_on(run, evaluations=(out,))
    assert roles(report) == [("t", Role.TEACHER, 0)]
    assert "1 of the 40 questions" in report.problems[0]
    assert "says nothing of a task 'unknown'" in report.problems[1]
    (out.parent / "questions" / "own.json").unlink()
    assert report_on(run, evaluations=(out,)).evaluations == ()


def test_a_folder_that_no_evaluation_wrote_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.json"):
        find_evaluations([], [tmp_path / "nowhere"])
    (tmp_path / "evaluation.json").write_text(json.dumps(["no options"]))
    with pytest.raises(UserError, match="not the options of an evaluation"):
        find_evaluations([], [tmp_path])
