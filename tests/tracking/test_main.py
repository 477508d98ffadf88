"""The process beside rank 0, with the real TensorBoard and W&B (offline)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignkd.run_folder.metrics import row_line
from alignkd.run_folder.paths import RunPaths
from alignkd.tracking import __main__ as program
from tests import tiny
from tests.tracking.wandb_files import history

SECRET = "0123456789abcdef" * 3
# The product gives the trackers 30 seconds at the end, which a busy machine may need for W&B's import.
PATIENT = (
    "import sys; from alignkd.tracking import __main__ as program; program.FINISH_SECONDS = 300; "
    "sys.exit(program.main(sys.argv[1:]))"
)


def make_run(folder: Path, **tracking: object) -> Path:
    return tiny.write_run(folder, 1, **{f"tracking__{name}": value for name, value in tracking.items()})


def write_rows(run: Path, first: int, last: int, factor: float) -> None:
    rows = [{"step": step, "loss": step * factor, "lr": None} for step in range(first, last + 1)]
    with RunPaths(run).metrics.open("a") as file:
        file.write("".join(row_line(row) for row in rows))


def track(run: Path, resumed: int) -> str:
    """What the process prints."""
    done = subprocess.run(
        [sys.executable, "-c", PATIENT, str(run), "--resumed", str(resumed)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        env={**os.environ, "WANDB_API_KEY": SECRET},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses_on_tensorboard(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run / "tracking/tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert len({event.step for event in scalars}) == len(scalars)
    return {event.step: event.value for event in scalars}


def test_a_resumed_run_has_every_step_once_on_both_trackers_and_no_file_has_the_key(tmp_path: Path) -> None:
    """Six steps, then a resume from step 4 that repeats two of them and goes on to step 8."""
    run = make_run(tmp_path / "run", tensorboard=True, wandb={"project": "p", "mode": "offline"})
    write_rows(run, 1, 6, factor=1.0)
    assert track(run, resumed=0) == ""
    RunPaths(run).metrics.write_text("")
    write_rows(run, 1, 4, factor=1.0)
    write_rows(run, 5, 8, factor=10.0)
    assert track(run, resumed=4) == ""
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 50.0, 6: 60.0, 7: 70.0, 8: 80.0}
    assert losses_on_tensorboard(run) == expected
    rows = history(run / "tracking/wandb")
    assert [step for step, _ in rows] == list(range(1, 9))
    # W&B takes no step back, so the repeated steps keep their first values.
    assert {step: values["train/loss"] for step, values in rows} == expected | {5: 5.0, 6: 6.0}
    names = {path.name for path in (run / "tracking/wandb").rglob("*.wandb")}
    assert names == {f"run-{json.loads((run / 'tracking/wandb.json').read_text())['id']}.wandb"}
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_rows_are_written_while_the_run_goes_on_and_a_broken_tracker_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", tensorboard=True, wandb={"project": "p"})
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    monkeypatch.setattr(program, "INTERVAL", 0.01)
    monkeypatch.setattr(program, "FINISH_SECONDS", 300.0)

    def no_exit(code: int) -> None:
        raise AssertionError(f"a tracker did not finish: os._exit({code}) would end the tests")

    monkeypatch.setattr(os, "_exit", no_exit)
    ours, theirs = os.pipe()
    with open(ours, "rb") as stdin, open(theirs, "wb") as rank0:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        thread = threading.Thread(target=program.follow_run, args=(run, 0, None))
        thread.start()
        write_rows(run, 1, 3, factor=1.0)
        state = run / "tracking/tensorboard.json"
        deadline = time.monotonic() + 300
        while not (state.exists() and json.loads(state.read_text())["step"] == 3):
            assert thread.is_alive()
            assert time.monotonic() < deadline
            thread.join(0.01)
        write_rows(run, 4, 4, factor=1.0)
        rank0.close()
        thread.join(400)
        assert not thread.is_alive()
    assert losses_on_tensorboard(run) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("warning: tracking.wandb is off for this attempt: import of wandb halted")


def test_a_tracker_that_hangs_at_the_end_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", tensorboard=True)
    write_rows(run, 1, 1, factor=1.0)
    released, ends = threading.Event(), []
    monkeypatch.setattr(program, "FINISH_SECONDS", 0.05)
    monkeypatch.setattr(program, "follow", lambda *_: released.wait(60))
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    program.follow_run(run, 0, None)
    released.set()
    assert ends == [0]
    assert "did not finish" in caplog.text
