"""What commands print for people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli.tables import checkpoint_table, show_state, state_table
from launcher.commands.status import RunState
from launcher.run.checkpoints import CheckpointSummary

STATE = RunState(
    run="/runs/distil",
    state="running",
    detail="training",
    backend="slurm",
    nodes=2,
    world_size=8,
    job="7",
    step=30,
    total_steps=100,
    loss=4.7,
    weights=None,
    seconds_left=140,
    data_wait_share=0.12,
    padding_share=0.3,
    slow_ranks=(),
    attempts=2,
    reasons=("crashed",),
    lost_steps=2,
    goodput=0.3,
    best_step=20,
    best_value=4.25,
    best_by="loss",
    accuracy_step=25,
    accuracy=81.25,
    queue_seconds=5.0,
    start_estimate=None,
    updated=9995.0,
    next="alignkd logs /runs/distil -f",
)


def test_weights_that_move_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show_state(replace(STATE, weights={"reverse_kl": 0.51239, "attention": 48213.7}))
    assert "weights   reverse_kl 0.512, attention 4.82e+04\n" in capsys.readouterr().out


def test_a_state_is_shown_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_state(STATE)
    assert capsys.readouterr().out.splitlines() == [
        "run       /runs/distil",
        "state     running: training",
        "step      30 of 100",
        "left      2:20",
        "loss      4.7",
        "best      step 20, 4.25 on held-out data",
        "accuracy  81.25 after step 25",
        "waiting   12% of a step for data; increase data.workers",
        "padding   30% of the positions; see training.packing",
        "job       7",
        "attempts  2 (crashed), 2 steps lost, 0:05 in the queue",
        "goodput   30% of the time was spent on steps that were kept",
        "next      alignkd logs /runs/distil -f",
    ]


def test_what_is_unknown_or_not_notable_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "seconds_left": None,
        "loss": None,
        "best_step": None,
        "accuracy": None,
        "goodput": None,
        "total_steps": None,
        "attempts": 0,
    }
    show_state(replace(STATE, **values, backend="local", data_wait_share=0.01, padding_share=0.0, detail=""))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("run", "state", "step", "next")
    ]


def test_the_best_accuracy_is_no_value_on_held_out_data(capsys: pytest.CaptureFixture[str]) -> None:
    show_state(replace(STATE, best_by="accuracy", best_value=87.5))
    assert "best      step 20, accuracy 87.5\n" in capsys.readouterr().out


def test_a_queued_run_shows_the_estimated_start(capsys: pytest.CaptureFixture[str]) -> None:
    show_state(replace(STATE, state="queued", start_estimate="2026-01-02T03:04:05"))
    assert "start     2026-01-02T03:04:05 (Slurm's estimate)\n" in capsys.readouterr().out


def test_a_narrow_terminal_breaks_neither_folder_nor_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    folder = "/a-folder-with-a-long-name-for-all-the-runs-of-one-project/and a space/run"
    show_state(replace(STATE, run=folder, next=f"alignkd resume '{folder}'"))
    shown = capsys.readouterr().out.splitlines()
    assert f"run       {folder}" in shown
    assert f"next      alignkd resume '{folder}'" in shown


def test_the_table_of_runs_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    long = replace(STATE, run=str(Path("/a" * 40) / "distil-7b-to-1.7b-finetune"))
    console = Console(width=80)
    console.print(state_table([long, STATE], console))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["run", "state", "step", "left", "loss", "attempts", "goodput"]
    assert lines[1].split() == [
        *("distil-7b-to-1.7b-finetune", "running", "30", "of", "100", "2:20", "4.7", "2", "30%")
    ]


def test_the_table_of_checkpoints_shows_the_first_problem(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        CheckpointSummary("step-4", 4, "committed", 8, 2, 2_000_000),
        CheckpointSummary("step-8", None, "broken", None, None, 0, ("no manifest", "other")),
    ]
    Console(width=80).print(checkpoint_table(rows))
    shown = capsys.readouterr().out
    assert "step-4" in shown
    assert "2.0" in shown
    assert "broken: no manifest" in shown
    assert "other" not in shown
