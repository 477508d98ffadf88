import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkd.run_folder.paths import log_name
from launcher.backends.ranks import free_port, rank_environments, start_ranks

SHOW = (
    "import os, json; print(json.dumps([os.environ['RANK'], os.getsid(0) == os.getpid(), "
    "os.environ['OMP_NUM_THREADS']]), flush=True)"
)


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def start(program: str, tmp_path: Path, ranks: int = 2):
    environments = rank_environments(1, ranks, 1, "cpu", [], os.environ)
    return start_ranks([sys.executable, "-c", program], environments, tmp_path / "logs")


def finish(group) -> None:
    while group.running:
        assert group.next_exit(20.0) is not None, "a rank hangs"


def test_every_rank_gets_its_place_and_devices() -> None:
    base = {"PATH": "/bin", "DEEPSPEED_CONFIG_X": "y", "MINE": "1"}
    environments = rank_environments(2, 2, 23456, "auto", ["4", "5", "6", "7"], base)
    assert [e["RANK"] for e in environments] == ["0", "1", "2", "3"]
    assert [e["LOCAL_RANK"] for e in environments] == ["0", "1", "0", "1"]
    assert [e["NODE_RANK"] for e in environments] == ["0", "0", "1", "1"]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["4,5", "4,5", "6,7", "6,7"]
    for e in environments:
        assert (e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"], e["MASTER_PORT"]) == ("4", "2", "23456")
        assert e["PATH"] == "/bin"
        assert "DEEPSPEED_CONFIG_X" not in e
        assert e["DS_ACCELERATOR"] == "cuda"  # never a silent change to the CPU
        assert e["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert int(e["OMP_NUM_THREADS"]) >= 1
    cpu = rank_environments(1, 1, 1, "cpu", ["0"], base)[0]
    assert (cpu["DS_ACCELERATOR"], cpu["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    assert cpu["THP_MEM_ALLOC_ENABLE"] == "1"
    assert all("THP_MEM_ALLOC_ENABLE" not in e for e in environments)
    own = rank_environments(1, 1, 1, "cpu", ["0"], base | {"THP_MEM_ALLOC_ENABLE": "0"})[0]
    assert own["THP_MEM_ALLOC_ENABLE"] == "0"  # a user's own choice


def test_ports_lie_below_the_ephemeral_range() -> None:
    assert all(20000 <= free_port() < 32768 for _ in range(20))


def test_logs_are_appended_and_ranks_lead_a_session(tmp_path) -> None:
    for _ in range(2):
        group = start(SHOW, tmp_path)
        finish(group)
        assert group.codes == {0: 0, 1: 0}
    for rank in range(2):
        lines = (tmp_path / "logs" / log_name(rank)).read_text().splitlines()
        assert [line.startswith(f'["{rank}", true') for line in lines] == [True, True]


def test_exits_are_reported_in_order(tmp_path) -> None:
    program = (
        "import os, time, pathlib\n"
        f"first = pathlib.Path({str(tmp_path / 'first')!r})\n"
        "if os.environ['RANK'] == '1': first.touch(); os._exit(5)\n"
        "while not first.exists(): time.sleep(0.01)\n"
        "time.sleep(0.1); os._exit(6)\n"
    )
    group = start(program, tmp_path)
    finish(group)
    assert list(group.codes.items()) == [(1, 5), (0, 6)]


def test_stop_kills_ranks_that_ignore_sigterm_and_their_children(tmp_path) -> None:
    program = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    group = start(program, tmp_path)
    logs = [(tmp_path / "logs" / log_name(rank)) for rank in range(2)]
    wait_for(lambda: all(log.read_text().endswith("\n") for log in logs))
    group.stop(grace_seconds=0.2)
    assert group.codes == {0: -signal.SIGKILL, 1: -signal.SIGKILL}
    for log in logs:
        wait_for(lambda log=log: not is_alive(int(log.read_text())))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_die_when_their_launcher_is_killed(tmp_path) -> None:
    launcher = (
        "import sys, time\nfrom pathlib import Path\nfrom launcher.backends.ranks import start_ranks\n"
        "program = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        f"start_ranks([sys.executable, '-c', program], [{{}}, {{}}], Path({str(tmp_path)!r}))\n"
        "time.sleep(600)\n"
    )
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=root)
    logs = [(tmp_path / log_name(rank)) for rank in range(2)]
    wait_for(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
    pids = [int(log.read_text()) for log in logs]
    assert all(map(is_alive, pids))
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, pids)))


def test_a_rank_that_cannot_start_is_an_error(tmp_path) -> None:
    with pytest.raises(OSError, match="no-such-program"):
        start_ranks([str(tmp_path / "no-such-program")], [{}], tmp_path / "logs")
