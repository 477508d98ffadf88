"""The ssh back end through a real sshd on this machine: two names stand for two hosts."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launcher.backends.hostfile import Host
from launcher.backends.ranks import free_port
from launcher.backends.ssh import rank_variables, remote_command
from launcher.backends.ssh_connect import OPTIONS
from launcher.run.attempts import read_history
from tests import tiny
from tests.needs import cannot_run

ROOT = Path(__file__).parents[3]
WAIT = 300.0  # seconds at most; every wait ends when its condition holds
RANK = """
import json, os, pathlib, signal, sys, time
got = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, _: got.append(n))
run, rank = pathlib.Path(sys.argv[3]), os.environ["RANK"]
names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ALIGNKD_HOST")
(run / f"rank-{rank}.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))
(run / f"pid-{rank}").write_text(str(os.getpid()))
place = run / "mode"
mode = (place if place.exists() else run.parent / f"mode-{run.name}").read_text()
if mode == "fail" and rank == "1":
    sys.exit("out of cheese")
while mode in ("wait", "fail") and not got:
    time.sleep(0.05)
sys.exit({"": 0, signal.SIGUSR1: 85, signal.SIGTERM: 86}[got[0] if got else ""])
"""


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a program ``ssh`` that knows the hosts `one` and `two`, both served by our sshd."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or os.geteuid() != 0 or shutil.which("ssh") is None:
        cannot_run("needs root, ssh and sshd (Debian: openssh-server)")
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nMaxStartups 100\n"
    )
    (folder / "ssh.conf").write_text(
        f"Host one two\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  SetEnv ALIGNKD_HOST=%n\n"
    )
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(f'#!/bin/bash\nexec {shutil.which("ssh")} -F {folder}/ssh.conf "$@"\n')
    client.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it to be there
    process = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd.conf"], stderr=subprocess.DEVNULL)
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
    yield client.parent
    process.terminate()
    process.wait()


def wait_for(condition: Callable[[], object], seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def alignkd(ssh: Path, config_file: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``alignkd`` with small ranks and the two hosts, in a folder whose name needs quoting."""
    (tmp_path / "rank.py").write_text(RANK)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ $2 == alignkd.train ]] && exec {sys.executable} {tmp_path}/rank.py "$@"\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "hosts").write_text("# two hosts\none slots=2\ntwo slots=2  # the other\n")
    settings = {"activate": f"export PYTHON={python}", "gpu_option": "none"}

    def start(*arguments: object) -> subprocess.Popen[str]:
        options = [
            *("--backend", "ssh", "--hostfile", tmp_path / "hosts", "--set", f"slurm={json.dumps(settings)}"),
            *("--set", f"run.folder={tmp_path}/a 'run'"),
        ]
        words = [*arguments, *(options if arguments[0] == "launch" else [])]
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *map(str, words)],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": f"{ssh}:{os.environ['PATH']}", "COLUMNS": "200"},
        )  # fmt: skip

    return start


@pytest.fixture
def prepared(alignkd, config_file: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(mode: str) -> Path:
        process = alignkd("launch", config_file, "--dry-run", "--name", mode or "plain")
        assert process.wait(WAIT) == 0, process.stdout.read()
        run = tmp_path / "a 'run'" / (mode or "plain")
        (run / "mode").write_text(mode)
        return run

    return make


def alive(run: Path) -> list[int]:
    return [
        int(path.read_text())
        for path in run.glob("pid-*")
        if Path("/proc", path.read_text(), "status").exists()
        and "zombie" not in Path("/proc", path.read_text(), "status").read_text()
    ]


def test_the_rank_script_runs_on_both_hosts(alignkd, prepared) -> None:
    run = prepared("")
    process = alignkd("resume", run)
    assert process.wait(WAIT) == 0, process.stdout.read()
    for rank in range(4):
        values = json.loads((run / f"rank-{rank}.json").read_text())
        assert values == {
            "LOCAL_RANK": str(rank % 2),
            "NODE_RANK": str(rank // 2),
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "one",
            "ALIGNKD_HOST": None,
        }
        assert "=== attempt 1: " in (run / "logs" / f"rank-{rank}.log").read_text()


@pytest.mark.parametrize(("number", "code", "reason"), [("USR1", 85, "stopped"), ("INT", 86, "terminated")])
def test_signals_reach_the_ranks(alignkd, prepared, number: str, code: int, reason: str) -> None:
    run = prepared("wait")
    process = alignkd("resume", run)
    wait_for(lambda: len(list(run.glob("pid-*"))) == 4)
    process.send_signal(signal.Signals[f"SIG{number}"])
    assert process.wait(WAIT) == code, process.stdout.read()
    assert [attempt.reason for attempt in read_history(run)] == [reason]
    assert alive(run) == []


def test_one_dead_rank_ends_all_ranks(alignkd, prepared) -> None:
    run = prepared("fail")
    process = alignkd("resume", run)
    assert process.wait(WAIT) == 1
    output = process.stdout.read()
    assert "rank 1 ended with exit code 1" in output
    assert "out of cheese" in output
    assert "ended with exit code 1 on one; the last lines of" in output  # the host, not this machine
    assert alive(run) == []
    (attempt,) = read_history(run)
    assert (attempt.reason, attempt.failed_rank, attempt.exit_code) == ("crashed", 1, 1)
    assert attempt.failed_node == "one"


def test_no_rank_outlives_its_launcher(alignkd, prepared) -> None:
    run = prepared("wait")
    process = alignkd("resume", run)
    wait_for(lambda: len(list(run.glob("pid-*"))) == 4)
    process.kill()
    process.wait()
    wait_for(lambda: alive(run) == [])


STAGES = "stages:\n  first: {run: {name: one}}\n  second: {run: {name: two}}\n"


def test_a_failed_stage_keeps_the_next_from_starting(alignkd, config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(config_file.read_text() + STAGES)
    runs = tmp_path / "a 'run'"
    runs.mkdir()
    for name, mode in {"one": "fail", "two": ""}.items():
        (runs / f"mode-{name}").write_text(mode)
    process = alignkd("launch", config_file, "--stages", "first,second")
    assert process.wait(WAIT) == 1
    assert "out of cheese" in process.stdout.read()
    assert (runs / "two" / "manifest.json").exists()
    assert not (runs / "two" / "rank-0.json").exists()
    # Each stage can be resumed once the cause is gone.
    (runs / "mode-one").write_text("")
    for name in ("one", "two"):
        assert alignkd("resume", runs / name).wait(WAIT) == 0
    assert [attempt.reason for attempt in read_history(runs / "one")] == ["crashed", "crashed"]


def test_two_stages_train_on_two_hosts(ssh: Path, tmp_path: Path) -> None:
    """Real ranks and gloo, one rank per host; the second stage continues with student and adapters."""
    records = [tiny.CASES[name]["record"] for name in ("v1", "rounds", "text")] * 4
    (tmp_path / "data.json").write_text(json.dumps(records))
    document = {
        "model": {"teacher": str(tiny.TEACHER), "student": str(tiny.STUDENT)},
        "data": {"sources": [{"file": "data.json", "image_folder": str(tiny.FOLDER)}], "workers": 0},
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "max_steps": 3,
        },
        "checkpoint": {"every": 2},
        "slurm": {"gpu_option": "none", "network_interface": "lo"},
        "stages": {
            "first": {"run": {"name": "one"}},
            "second": {
                "run": {"name": "two"},
                "model": {"student": "runs/one/student", "adapters": "runs/one"},
            },
        },
    }
    (tmp_path / "alignkd.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launcher.cli", "launch", str(tmp_path / "alignkd.yaml")),
            *("--backend", "ssh", "--hostfile", str(tmp_path / "hosts"), "--stages", "first,second"),
        ],
        cwd=ROOT, text=True, capture_output=True, timeout=500,
        env={**os.environ, "PATH": f"{ssh}:{os.environ['PATH']}", "ALIGNKD_MASTER_ADDR": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("one", "two"):
        run = tmp_path / "runs" / name
        assert (run / "student" / "model.safetensors").is_file()
        assert (run / "adapters.safetensors").is_file()
        assert [row["step"] for row in tiny.metrics_rows(run)] == [1, 2, 3]
        (attempt,) = read_history(run)
        assert (attempt.reason, attempt.nodes, attempt.saved_step) == ("done", "one,two", 3)
    # With another student or other adapters the first loss of the second stage would be higher.
    first, second = (tiny.metrics_rows(tmp_path / "runs" / name) for name in ("one", "two"))
    for term in ("loss", "attention", "vision"):
        assert second[0][term] < first[0][term]


def test_an_unknown_host_ends_the_run(alignkd, prepared) -> None:
    run = prepared("")
    hosts = json.loads((run / "hosts.json").read_text())
    hosts["hosts"][1]["name"] = "nowhere.invalid"
    (run / "hosts.json").write_text(json.dumps(hosts))
    process = alignkd("resume", run)
    assert process.wait(WAIT) == 2, process.stdout.read()
    assert "nowhere.invalid does not answer over ssh: " in process.stdout.read()
    assert read_history(run) == []  # no rank was started


def test_a_host_without_the_run_folder_names_itself(tmp_path: Path) -> None:
    """Not the launcher, whose name was in the command."""
    (tmp_path / "uname").write_text("#!/bin/sh\necho the-other-host\n")
    (tmp_path / "uname").chmod(0o755)
    done = subprocess.run(
        remote_command(Path("/no/such folder/it's")),
        shell=True, capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "the-other-host: does not see the run folder /no/such folder/it's\n" in done.stderr


def test_an_ipv6_address_loses_its_brackets(make_run) -> None:
    run, manifest = make_run(backend="ssh")
    for name, address in (("me@[::1]", "::1"), ("[fe80::2]", "fe80::2"), ("me@one", "one")):
        (first, *_) = rank_variables(manifest, [Host(name, 2)], 1, run, "20000")
        assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (address, "20000")


def test_a_host_that_does_not_answer_is_given_up_soon() -> None:
    assert "ConnectTimeout=30" in OPTIONS


def test_every_place_that_a_host_does_not_see_is_named(alignkd, prepared, tmp_path: Path) -> None:
    run = prepared("")
    (tmp_path / "data.json").rename(tmp_path / "elsewhere.json")
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(tmp_path / "not-mounted")
    process = alignkd("resume", run)
    assert process.wait(WAIT) == 2, process.stdout.read()
    said = process.stdout.read()
    assert f"one, two cannot see data.sources[0].file = {tmp_path}/data.json" in said
    assert f"one, two cannot see checkpoints = {run}/checkpoints: it must be on a file system" in said
    assert "cannot see run.folder" not in said
