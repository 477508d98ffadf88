"""The local back end, with small programs in place of the training ranks."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.errors import UserError
from alignkd.run_folder.paths import RunPaths
from launcher.backends import local, watch
from launcher.backends.local import run_local
from launcher.commands.control import start_run
from launcher.commands.resume import ResumeRequest, resume_run
from launcher.commands.status import inspect_run
from launcher.run import attempts
from launcher.run.logs import attempt_lines, first_error


def run(make_run, program: str, **kwargs) -> tuple[int, str, Path]:
    folder, manifest = make_run(**kwargs)
    text = io.StringIO()
    code = run_local(folder, manifest, Console(file=text, width=200), [sys.executable, "-c", program])
    return code, text.getvalue(), folder


PROGRESS = """
import json, os, time
if os.environ["RANK"] == "0":
    for step in range(4):
        with open("{run}/progress.tmp", "w") as file:
            values = {{"phase": "training", "step": step, "total_steps": 3, "loss": 1.5}}
            json.dump({{**values, "updated": time.time()}}, file)
        os.replace("{run}/progress.tmp", "{run}/progress.json")
        time.sleep(0.4)
"""


def test_progress_is_shown_and_the_exit_code_is_0_if_all_ranks_exit_with_0(make_run, make_config) -> None:
    folder = Path(make_config().run.folder) / "run"
    code, text, _ = run(make_run, PROGRESS.format(run=folder))
    assert code == 0
    assert "training · loss 1.5" in text


def test_a_dead_rank_ends_the_others_and_its_last_lines_are_shown(make_run, capfd) -> None:
    program = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    print('out of cheese', flush=True); sys.exit(3)\n"
        "time.sleep(600)\n"
    )
    started = time.monotonic()
    code, text, folder = run(make_run, program)
    assert code == 3
    assert time.monotonic() - started < 60
    assert "rank 1 failed; ending the others" in text
    shown = capfd.readouterr().err
    assert "rank 1 ended with exit code 3" in shown
    assert "out of cheese" in shown
    assert str(folder / "logs" / "rank-1.log") in shown


def test_status_tells_how_each_start_ended(make_run) -> None:
    """Each start has a line in the log, and an earlier result does not hide a crash."""
    folder, manifest = make_run()
    (folder / "result.json").write_text('{"status": "stopped"}')
    (folder / "progress.json").write_text('{"phase": "training", "step": 3}')

    def start(program: str) -> None:
        words = [
            sys.executable,
            "-c",
            f"import os, sys\nif os.environ['RANK'] == '0': {program}\nsys.exit(0)",
        ]
        run_local(folder, manifest, Console(file=io.StringIO()), words)

    start("1 / 0")
    state = inspect_run(folder, None)
    assert state.state == "failed"
    assert state.detail == "crashed: rank 0 ended with exit code 1: ZeroDivisionError: division by zero"
    assert state.next == f"alignkd logs {folder} --errors"
    start("print('deep in it', flush=True); os.kill(os.getpid(), 9)")
    state = inspect_run(folder, None)
    assert state.detail == "crashed: rank 0 was killed by SIGKILL: deep in it"
    assert (state.attempts, state.reasons, state.job) == (2, ("crashed", "crashed"), None)
    start("sys.exit(85)")
    assert (inspect_run(folder, None).state, inspect_run(folder, None).detail) == ("stopped", "at step 0")
    start("sys.exit(86)")
    assert inspect_run(folder, None).state == "stopped"
    first, second, *_ = (attempt_lines(folder, 0, number) for number in (1, 2, 3, 4))
    assert re.match(r"=== attempt 1: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S+, on \S+: \S+ -c ", first[0])
    assert first[-1] == "ZeroDivisionError: division by zero"
    assert second[1:] == ["deep in it"]
    error = first_error(folder, None)
    assert error is not None
    assert (error.attempt, error.rank, error.exit_code) == (2, 0, -9)


def test_a_history_that_cannot_be_written_does_not_hide_how_the_ranks_ended(make_run, capfd) -> None:
    folder, manifest = make_run()
    RunPaths(folder).attempts.mkdir()
    code = run_local(folder, manifest, Console(file=io.StringIO()), [sys.executable, "-c", "1 / 0"])
    assert code == 1
    shown = capfd.readouterr().err
    assert f"{RunPaths(folder).attempts}: Is a directory" in shown
    assert "ZeroDivisionError" in shown


def test_status_of_a_run_whose_launcher_was_killed(make_run) -> None:
    folder, _ = make_run()
    attempts.begin(folder, "local", "here", None)
    state = inspect_run(folder, None)
    assert (state.state, state.detail) == ("stopped", "its launcher was killed, and the ranks with it")
    assert state.next == f"alignkd resume {folder}"


def test_a_user_error_of_a_rank_is_a_single_message(make_run, capfd) -> None:
    program = (
        "import sys\nfrom alignkd.errors import UserError, report_error\n"
        "sys.exit(report_error(UserError('sample a: no such image')))\n"
    )
    code, _, _ = run(make_run, program)
    assert code == 2
    assert capfd.readouterr().err == "sample a: no such image\n"


def test_ranks_that_saved_have_not_failed(make_run, capfd) -> None:
    code, text, folder = run(make_run, "import sys; sys.exit(85)")
    assert code == 85
    assert f"alignkd resume {folder}" in text
    assert capfd.readouterr().err == ""


def test_a_rank_that_hangs_after_the_save_is_ended(make_run, monkeypatch) -> None:
    monkeypatch.setattr(watch, "STOP_GRACE_SECONDS", 0.3)
    program = "import os, sys, time\nif os.environ['RANK'] == '0': sys.exit(86)\ntime.sleep(600)\n"
    code, text, _ = run(make_run, program)
    assert "did not exit after the save" in text
    assert code == 128 + signal.SIGTERM


SAVES = (
    "import os, signal, sys, time\n"
    "def leave(number, frame): print('saved', flush=True); os._exit({85: 85, 10: 85, 15: 86}[number])\n"
    "signal.signal(signal.SIGTERM, leave); signal.signal(signal.SIGUSR1, leave)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)\n"
)
IGNORES = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('ready', flush=True)\ntime.sleep(600)\n"
)


def send_when_ready(folder: Path, *numbers: int) -> threading.Thread:
    """Signal this process once both ranks are ready; with a pause between signals."""

    def send() -> None:
        logs = [folder / "logs" / f"rank-{rank}.log" for rank in range(2)]
        end = time.monotonic() + 30
        while time.monotonic() < end and not all(log.exists() and "ready" in log.read_text() for log in logs):
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.6)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 86), (signal.SIGTERM, 86), (signal.SIGUSR1, 85), (signal.SIGHUP, 86)]
)
def test_a_signal_makes_the_ranks_save(make_run, make_config, number: int, code: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    sender = send_when_ready(Path(make_config().run.folder) / "run", number)
    got, text, folder = run(make_run, SAVES)
    sender.join()
    assert got == code
    assert "the ranks save first" in text
    assert all("saved" in (folder / "logs" / f"rank-{rank}.log").read_text() for rank in range(2))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_ranks_save_after_the_terminal_or_pipe_was_closed(make_run, make_config, kind: str) -> None:
    """Every write fails from then on."""
    folder, _ = make_run()
    program = (
        "import sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from launcher.backends.local import run_local\nfrom launcher.run.manifest import read_manifest\n"
        "run = Path(sys.argv[1])\n"
        "sys.exit(run_local(run, read_manifest(run), Console(), [sys.executable, '-c', sys.argv[2]]))"
    )
    ours, theirs = os.openpty() if kind == "terminal" else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), SAVES], stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    logs = [folder / "logs" / f"rank-{rank}.log" for rank in range(2)]
    try:
        end = time.monotonic() + 60
        while not all(log.exists() and "ready" in log.read_text() for log in logs):
            assert time.monotonic() < end
            time.sleep(0.02)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 86
    finally:
        process.kill()
        process.wait()
    assert all("saved" in log.read_text() for log in logs)
    assert [attempt.reason for attempt in attempts.read_history(folder)] == ["terminated"]


def test_the_exit_code_counts_even_if_another_launcher_closed_the_attempt(make_run) -> None:
    """Possible on a file system without locks."""
    folder, manifest = make_run()
    code = f"import pathlib; pathlib.Path({str(RunPaths(folder).open_attempt)!r}).unlink(missing_ok=True)"
    assert run_local(folder, manifest, Console(file=io.StringIO()), [sys.executable, "-c", code]) == 0
    assert attempts.read_history(folder) == []


def test_the_second_ctrl_c_ends_them_at_once(make_run, make_config, capfd) -> None:
    sender = send_when_ready(Path(make_config().run.folder) / "run", signal.SIGINT, signal.SIGINT)
    code, text, _ = run(make_run, IGNORES)
    sender.join()
    assert code == 128 + signal.SIGKILL
    assert "ending the ranks at once" in text
    assert "before the ranks could save" in capfd.readouterr().err


def test_two_launchers_cannot_run_the_same_run(make_run) -> None:
    folder, manifest = make_run()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(600)",
            str(folder / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        for start in (start_run, lambda *_: resume_run(folder, ResumeRequest(), Console())):
            with pytest.raises(UserError, match="another launcher runs it"):
                start(folder, manifest, Console(file=io.StringIO()))
    finally:
        holder.kill()
        holder.wait()


def test_a_run_for_gpus_is_never_moved_to_the_cpu_silently(make_run, monkeypatch) -> None:
    monkeypatch.setattr(local, "visible_gpus", lambda environment: ["0"])
    folder, manifest = make_run(device="auto")
    with pytest.raises(UserError, match="takes 2 GPUs and this machine has 1"):
        run_local(folder, manifest, Console(file=io.StringIO()), ["true"])


def test_ranks_get_their_environment(make_run) -> None:
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    _, _, folder = run(make_run, program, nodes=2, gpus_per_node=1)
    ranks = [json.loads(attempt_lines(folder, rank, None)[1]) for rank in range(2)]
    assert [values["NODE_RANK"] for values in ranks] == ["0", "1"]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert ranks[0]["DS_ACCELERATOR"] == "cpu"
