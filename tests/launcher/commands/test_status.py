"""States from files and queues, with the clock given. The real Slurm is asked in tests/slurm."""

import fcntl
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.run_folder.atomic_files import write_json
from alignkd.run_folder.paths import RunPaths
from launcher.backends.base import QueuedJob
from launcher.cli.tables import show_state, state_table
from launcher.commands.status import _next, inspect_run
from launcher.run.attempts import Attempt

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


def test_never_started(run) -> None:
    state = inspect_run(run, [], NOW)
    assert (state.state, state.attempts, state.step, state.goodput) == ("not started", 0, 0, None)
    assert state.next == f"alignkd resume {run}"


def test_queued_says_why_and_when(run) -> None:
    state = inspect_run(run, job("PENDING", "Resources", "2026-01-02T03:04:05"), NOW)
    assert (state.state, state.detail) == ("queued", "not enough free nodes yet")
    assert state.start_estimate == "2026-01-02T03:04:05"
    assert inspect_run(run, job("PENDING", "SomethingNew"), NOW).detail == "SomethingNew"


def test_running(run) -> None:
    past(run, "crashed")
    train(run)
    state = inspect_run(run, job("RUNNING"), NOW)
    assert (state.state, state.detail, state.job) == ("running", "training", "7")
    assert (state.step, state.total_steps, state.loss) == (30, 100, 4.7)
    assert state.seconds_left == 140
    assert (state.attempts, state.lost_steps, state.queue_seconds) == (2, 2, 5.0)
    assert state.goodput == pytest.approx(60 / (100 + 100))
    assert state.next == f"alignkd logs {run} -f"


def test_silence_is_mentioned(run) -> None:
    train(run, updated=9950.0)
    assert (
        inspect_run(run, job("RUNNING"), 9950.0 + 1200).detail == "training; no sign of life for 20 minutes"
    )
    train(run, started=9990.0, updated=9950.0)  # progress of the attempt before
    assert inspect_run(run, job("RUNNING"), NOW).detail == "starting"


def test_gone_without_a_word(run) -> None:
    train(run)
    assert inspect_run(run, [], NOW).state == "lost"
    state = inspect_run(run, None, NOW)  # Slurm is not here: it may well run
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
    ],
)
def test_after_its_end(run, reason: str, word: str, command: str) -> None:
    past(run, reason)
    state = inspect_run(run, [], NOW)
    assert state.state == word
    assert state.next.startswith(f"alignkd {command} ")


def test_nodes_that_are_to_blame(run) -> None:
    past(run, "node lost", bad_nodes=["n2", "n3"])
    state = inspect_run(run, [], NOW)
    assert (state.detail, state.reasons) == (
        "node lost (n2, n3); and was not requeued",
        ("node lost (n2, n3)",),
    )
    past(run, "configuration error", bad_nodes=["n2"])
    state = inspect_run(run, [], NOW)
    assert state.detail.endswith("the run folder is not seen by n2")
    assert state.next == f"alignkd resume {run}"


def test_preempted_and_no_slurm_to_ask(run) -> None:
    past(run, "preempted")
    assert inspect_run(run, None, NOW).state == "queued"


def test_done(run) -> None:
    past(run, "done")
    write_json(run / "result.json", {"status": "done"})
    assert inspect_run(run, None, NOW).state == "done"


def test_local_runs_are_known_by_their_lock(make_run) -> None:
    run, _ = make_run()
    assert inspect_run(run, None, NOW).state == "not started"
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert inspect_run(run, None, NOW).state == "running"
    write_json(run / "progress.json", {"phase": "training", "step": 3, "total_steps": 9, "updated": 1.0})
    assert inspect_run(run, None, NOW).state == "stopped"


def test_a_narrow_terminal_cuts_neither_folder_nor_command(run, capsys) -> None:
    folder = Path("/a-folder-with-a-long-name-for-all-the-runs-of-one-project/and a space") / run.name
    state = replace(inspect_run(run, [], NOW), run=str(folder), next=_next(folder, "stopped"))
    show_state(state, Console(width=40))
    shown = capsys.readouterr().out.splitlines()
    assert f"run       {folder}" in shown
    assert f"next      alignkd resume '{folder}'" in shown
    named = replace(state, run=str(folder.parent / "distil-7b-to-1.7b-finetune"))
    Console(width=80).print(state_table([named]))
    shown = capsys.readouterr().out
    assert "distil-7b-to-1.7b-finetune" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_what_a_terminal_shows(run) -> None:
    past(run, "crashed")
    train(run)
    state = inspect_run(run, job("RUNNING"), NOW)
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_state(state, console)
    console.print(state_table([state]))
    text = console.export_text()
    for part in ("running: training", "30 of 100", "2:20", "4.7", "2 (crashed), 2 steps lost", "30%", "logs"):
        assert part in text


def test_waiting_and_padding_are_shown_when_they_are_notable(run) -> None:
    train(run)
    rows = [
        {"step": n, "step_seconds": 2.0, "data_wait_share": 0.12, "padding_share": 0.3} for n in range(20)
    ]
    rows[0]["data_wait_share"] = 1.0  # the loader's processes start
    shown = []
    for change in ({}, {"data_wait_share": 0.01, "padding_share": 0.0}):
        (run / "metrics.jsonl").write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))
        state = inspect_run(run, job("RUNNING"), NOW)
        console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        show_state(state, console)
        shown.append(console.export_text())
    assert "for data 12% of a step: more data.workers" in shown[0]
    assert "30% of the positions: see training.packing" in shown[0]
    assert "workers" not in shown[1]
    assert "packing" not in shown[1]
