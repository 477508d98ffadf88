"""States from files and queues, at a given time. tests/slurm asks a real Slurm."""

import fcntl
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.best import Best
from alignkd.run_folder.checkpoints import MANIFEST, MARKER, step_folder
from alignkd.run_folder.heartbeat import Beat
from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths
from launcher.backends.base import QueuedJob
from launcher.backends.slurm import backend
from launcher.cli.tables import show_state
from launcher.commands import status
from launcher.commands.launch import write_run
from launcher.commands.status import _next, all_states, inspect_run
from launcher.plan.workload import Cluster
from launcher.run.attempts import Attempt
from launcher.run.restarts import MAX_LOST

NOW = 10_000.0


@pytest.fixture
def run(make_run):
    folder, manifest = make_run()
    write_json(folder / "manifest.json", {**manifest.as_dict(), "backend": "slurm"})
    return folder


def job(state: str, reason: str = "None", start: str | None = None) -> list[QueuedJob]:
    return [QueuedJob("7", state, reason, start, "job.sbatch")]


def past(run, *reasons: str, **changes) -> None:
    with RunPaths(run).attempts.open("a") as file:
        for number, reason in enumerate(reasons, start=1):
            values = {"end": 9000.0, "saved_step": 4, "lost_steps": 2, "queue_seconds": 5.0, **changes}
            attempt = Attempt(number, "7", "n1", 8900.0, 0, reason=reason, **values)
            file.write(json.dumps(asdict(attempt)) + "\n")


def train(run, started: float = 9900.0, updated: float = 9995.0, step: int = 30) -> None:
    write_json(RunPaths(run).open_attempt, asdict(Attempt(9, "7", "n1", started, 0)))
    facts = {"phase": "training", "step": step, "total_steps": 100, "updated": updated}
    write_json(run / "progress.json", facts)
    rows = [{"step": n, "loss": 5.0 - n / 100, "step_seconds": 2.0} for n in range(1, step + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "lo')


def test_a_run_without_attempts_is_not_started(run) -> None:
    state = inspect_run(run, [], NOW)
    assert (state.state, state.attempts, state.step, state.goodput) == ("not started", 0, 0, None)
    assert state.next == f"alignkd resume {run}"


def test_a_queued_run_has_a_reason_and_an_estimated_start(run) -> None:
    state = inspect_run(run, job("PENDING", "Resources", "2026-01-02T03:04:05"), NOW)
    assert (state.state, state.detail) == (
        "queued",
        "not enough free nodes yet; fewer --nodes may start earlier",
    )
    assert state.start_estimate == "2026-01-02T03:04:05"
    assert inspect_run(run, job("PENDING", "SomethingNew"), NOW).detail.startswith("Slurm says SomethingNew")


def test_a_running_run_has_its_progress_lost_steps_and_goodput(run) -> None:
    past(run, "crashed")
    train(run)
    state = inspect_run(run, job("RUNNING"), NOW)
    assert (state.state, state.detail, state.job) == ("running", "training", "7")
    assert (state.step, state.total_steps, state.loss) == (30, 100, 4.7)
    assert (state.seconds_left, state.weights) == (140, None)
    assert (state.attempts, state.lost_steps, state.queue_seconds) == (2, 2, 5.0)
    assert state.goodput == pytest.approx(60 / (100 + 100))
    assert state.next == f"alignkd logs {run} -f"


def test_the_newest_accuracy_and_the_best_checkpoint_by_it_are_told(run) -> None:
    train(run, step=4)
    columns = {
        1: {"evaluation_accuracy": 75.0},
        3: {"evaluation_accuracy": 50.0},
        4: {"evaluation_seconds": 1.0},
    }
    rows = [{"step": step, **columns.get(step, {})} for step in range(1, 5)]
    RunPaths(run).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (1, 3):
        folder = step_folder(run, step)
        folder.mkdir(parents=True)
        accuracy = columns[step]["evaluation_accuracy"]
        (folder / MANIFEST).write_text(json.dumps({"step": step, "evaluation": {"accuracy": accuracy}}))
        (folder / MARKER).touch()
    RunPaths(run).config.write_text("evaluation: {best: accuracy}\n")
    state = inspect_run(run, job("RUNNING"), NOW)
    assert (state.accuracy, state.best) == (None, None)  # no question has been asked, and nothing is read
    RunPaths(run).answers.touch()
    state = inspect_run(run, job("RUNNING"), NOW)
    assert (state.accuracy_step, state.accuracy) == (3, 50.0)
    assert state.best == Best(1, 75.0, "accuracy")
    assert state.as_dict()["best_by"] == "accuracy"


def test_all_rows_of_a_long_run_are_read_in_one_pass(run, monkeypatch: pytest.MonkeyPatch) -> None:
    past(run, "crashed")
    train(run)
    RunPaths(run).answers.touch()
    passes: list[Path] = []
    monkeypatch.setattr(status, "iter_rows", lambda path: passes.append(path) or iter_rows(path))
    assert inspect_run(run, job("RUNNING"), NOW).goodput == pytest.approx(60 / (100 + 100))
    assert passes == [RunPaths(run).metrics]


def test_weights_that_move_are_those_of_the_last_step(run) -> None:
    rows = [{"step": n, "loss": 1.0, "weight_of_js": 1.0 / n, "weight_of_attention": 2.0 * n} for n in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspect_run(run, [], NOW).weights == {"js": 0.5, "attention": 4.0}


def test_a_run_without_a_sign_of_life_is_reported(run) -> None:
    train(run, updated=9950.0)
    assert (
        inspect_run(run, job("RUNNING"), 9950.0 + 1200).detail == "training; no sign of life for 20 minutes"
    )
    train(run, started=9990.0, updated=9950.0)  # progress of the attempt before
    assert inspect_run(run, job("RUNNING"), NOW).detail == "starting"


def test_a_run_whose_job_vanished_is_lost(run) -> None:
    train(run)
    state = inspect_run(run, [], NOW)
    assert state.state == "lost"
    assert "vanished without recording an exit" in state.detail
    state = inspect_run(run, None, NOW)  # without Slurm: it may well be running
    assert (state.state, state.detail) == ("running", "training; Slurm does not answer here")


@pytest.mark.parametrize(
    ("reason", "word", "command"),
    [
        ("stopped", "stopped", "resume"),
        ("cancelled", "cancelled", "resume"),
        ("lost", "lost", "resume"),
        ("crashed", "failed", "logs"),
        ("configuration error", "failed", "logs"),
        ("preempted", "stopped", "resume"),
        ("node lost", "stopped", "resume"),
        ("requeued", "stopped", "resume"),
        ("node at fault", "stopped", "resume"),
    ],
)
def test_the_last_reason_decides_the_state_of_an_ended_run(run, reason: str, word: str, command: str) -> None:
    past(run, reason)
    state = inspect_run(run, [], NOW)
    assert state.state == word
    assert state.next.startswith(f"alignkd {command} ")


def test_nodes_to_blame_are_named(run) -> None:
    past(run, "node lost", bad_nodes=["n2", "n3"])
    state = inspect_run(run, [], NOW)
    assert (state.detail, state.reasons) == (
        "node lost (n2, n3), not requeued",
        ("node lost (n2, n3)",),
    )
    past(run, "configuration error", bad_nodes=["n2"])
    state = inspect_run(run, [], NOW)
    assert state.detail.endswith("a folder is not visible on n2")
    assert state.next == f"alignkd resume {run}"


@pytest.mark.parametrize(
    ("lost", "before", "word"),
    [(MAX_LOST, 0, "failed"), (MAX_LOST, 1, "stopped"), (MAX_LOST - 1, 0, "stopped")],
)
def test_a_run_that_was_given_up_for_lost_nodes_has_failed(run, lost: int, before: int, word: str) -> None:
    """Those before the last submission do not count."""
    past(run, *["node lost"] * lost, saved_step=0)
    write_json(RunPaths(run).job, {"job": "7", "attempts_before": before})
    state = inspect_run(run, [], NOW)
    assert state.state == word
    assert ("given up" in state.detail) == (word == "failed")


def test_a_queue_that_does_not_answer_is_not_an_empty_queue(run) -> None:
    state = inspect_run(run, None, NOW)
    assert (state.state, state.next) == ("unknown", f"alignkd status {run}")
    past(run, "preempted")
    state = inspect_run(run, None, NOW)
    assert (state.state, state.detail) == (
        "unknown",
        "the last attempt: preempted; Slurm does not answer here",
    )


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("crashed", "unknown"),  # its job is being requeued, perhaps
        ("hung", "unknown"),
        ("unusable node", "unknown"),
        ("node lost", "unknown"),
        ("lost", "unknown"),
        ("terminated", "unknown"),
        ("stopped", "stopped"),
        ("cancelled", "cancelled"),
        ("configuration error", "failed"),
    ],
)
def test_without_an_answer_only_an_end_that_nothing_follows_is_final(run, reason: str, word: str) -> None:
    past(run, reason)
    assert inspect_run(run, None, NOW).state == word


def test_a_final_end_counts_without_an_answer_unless_the_run_was_submitted_again(run) -> None:
    past(run, "stopped")
    assert inspect_run(run, None, NOW).state == "stopped"
    write_json(RunPaths(run).job, {"job": "8", "submitted": 9500.0})
    assert inspect_run(run, None, NOW).state == "unknown"


@pytest.mark.parametrize(("updated", "word"), [(9995.0, "running"), (9000.0, "unknown")])
def test_without_an_answer_only_a_sign_of_life_shows_that_a_run_is_running(
    run, updated: float, word: str
) -> None:
    train(run, started=8900.0, updated=updated)
    state = inspect_run(run, None, NOW)
    assert state.state == word
    assert state.detail.endswith("Slurm does not answer here")


def test_all_runs_are_listed_with_one_question_to_slurm(make_config, monkeypatch) -> None:
    runs = [write_run(make_config(f"run.name={name}"), Cluster(1, 1), "slurm") for name in ("b", "a", "c")]
    write_json(RunPaths(runs[2]).open_attempt, asdict(Attempt(1, "9", "n1", 9900.0, 0)))
    asked = []

    def own_jobs() -> list[QueuedJob]:
        asked.append("queue")
        return [QueuedJob("7", "PENDING", "Priority", None, str(runs[0] / "job.sbatch"))]

    monkeypatch.setattr(backend, "own_jobs", own_jobs)
    monkeypatch.setattr(backend, "running_jobs", lambda jobs: asked.append(jobs) or {"9"})
    states, problems = all_states(runs[0].parent)
    found = [(Path(state.run).name, state.state, state.job) for state in states]
    assert found == [("a", "not started", None), ("b", "queued", "7"), ("c", "running", "9")]
    assert (asked, problems) == (["queue", ["9"]], [])


def test_a_run_with_a_done_result_is_done(run) -> None:
    past(run, "done")
    write_json(run / "result.json", {"status": "done"})
    assert inspect_run(run, None, NOW).state == "done"


def test_a_local_run_is_running_while_its_lock_is_held(make_run) -> None:
    run, _ = make_run()
    assert inspect_run(run, None, NOW).state == "not started"
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert inspect_run(run, None, NOW).state == "running"
    write_json(run / "progress.json", {"phase": "training", "step": 3, "total_steps": 9, "updated": 1.0})
    assert inspect_run(run, None, NOW).state == "stopped"


@pytest.mark.parametrize(
    ("state", "command"),
    [
        ("done", "export '/a run' --out FOLDER"),
        ("running", "logs '/a run' -f"),
        ("queued", "status '/a run'"),
        ("unknown", "status '/a run'"),
        ("failed", "logs '/a run' --errors"),
        ("stopped", "resume '/a run'"),
        ("not started", "resume '/a run'"),
    ],
)
def test_the_next_command_can_be_pasted(state: str, command: str) -> None:
    assert _next(Path("/a run"), state) == f"alignkd {command}"


def test_shares_are_medians(run) -> None:
    train(run)
    rows = [{"step": n, "data_wait_share": 0.12, "padding_share": 0.3} for n in range(20)]
    rows[0]["data_wait_share"] = 1.0  # the loader's processes start
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = inspect_run(run, job("RUNNING"), NOW)
    assert (state.data_wait_share, state.padding_share) == (0.12, 0.3)


def test_a_rank_that_keeps_the_others_waiting_is_named_while_the_run_runs(run, capsys) -> None:
    train(run)
    RunPaths(run).beats.mkdir()
    for rank, own in enumerate((1.0, 1.5)):
        beat = Beat("training", 30, steps=9, step_seconds=2.0, own_seconds=own)
        RunPaths(run).beat(rank).write_text(json.dumps(asdict(beat)))
    state = inspect_run(run, job("RUNNING"), NOW)
    assert state.slow_ranks == ("rank 1 (node 0): 1.5 x",)
    show_state(state)
    assert "slow      rank 1 (node 0): 1.5 x the median rank's time" in capsys.readouterr().out
    assert inspect_run(run, [], NOW).slow_ranks == ()
