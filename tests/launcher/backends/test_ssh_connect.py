"""How connections over ssh are opened, with a program of that name which runs the command here."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkd.errors import UserError
from launcher.backends import ssh_connect
from launcher.backends.hostfile import Host
from launcher.backends.ranks import RankGroup
from launcher.backends.ssh import rank_variables, secrets_of, start_over_ssh
from launcher.backends.ssh_connect import READY, connect, refused
from launcher.backends.ssh_probe import PORT_SCRIPT, check_hosts
from tests.launcher.backends.slurm.programs import put_program

DROPPED = "kex_exchange_identification: Connection closed by remote host"
# Refuses the first connections to a host, as many as its file says; else runs the command.
SSH = """\
folder=$(dirname "$0") host=${@: -2:1}
printf '%s\\n' "$*" >>"$folder/commands"
left=$(cat "$folder/refusals-$host" 2>/dev/null || echo 0)
if ((left > 0)); then
    echo $((left - 1)) >"$folder/refusals-$host"
    cat "$folder/complaint" >&2
    exit 255
fi
exec bash -c "${@: -1}"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the program; nobody waits long before another try."""
    put_program(tmp_path / "bin", "ssh", SSH, monkeypatch)
    (tmp_path / "bin" / "complaint").write_text(f"{DROPPED}\n")
    monkeypatch.setattr(ssh_connect, "PAUSES", (0.01, 0.01, 0.01))
    return tmp_path / "bin"


@pytest.mark.parametrize(
    ("complaint", "again"),
    [
        (DROPPED, True),
        ("ssh_exchange_identification: read: Connection reset by peer", True),
        ("ssh: connect to host two port 22: Connection refused", True),
        ("Connection timed out during banner exchange", True),
        ("ssh: Could not resolve hostname two: Name or service not known", False),
        ("me@two: Permission denied (publickey).", False),
        ("Host key verification failed.", False),
        ("ssh: connect to host two port 22: No route to host", False),
    ],
)
def test_only_a_host_that_took_no_connection_is_asked_again(complaint: str, again: bool) -> None:
    assert refused(complaint) == again


@pytest.mark.parametrize(("refusals", "complaint", "tries", "code"), [
    (3, DROPPED, 4, 0),
    (4, DROPPED, 4, 255),
    (1, "Permission denied (publickey).", 1, 255),
])  # fmt: skip
def test_a_refused_connection_is_opened_again_at_most_three_times(
    ssh: Path, tmp_path: Path, refusals: int, complaint: str, tries: int, code: int
) -> None:
    (ssh / "refusals-one").write_text(str(refusals))
    (ssh / "complaint").write_text(f"{complaint}\n")
    command = f"echo hello from the login shell; echo {shlex.quote(READY)}; read -r word; echo $word >&2"
    process = connect("one", command, tmp_path / "log")
    process.communicate(b"done\n")
    assert process.returncode == code
    assert (tmp_path / "log").read_text() == ("done\n" if code == 0 else f"{complaint}\n")
    assert len((ssh / "commands").read_text().splitlines()) == tries


def test_a_host_that_refuses_at_first_is_asked_again_what_it_sees(ssh: Path, make_run) -> None:
    run, _ = make_run(backend="ssh")
    (ssh / "refusals-two").write_text("2")
    warnings, port = check_hosts(run, [Host("one", 1), Host("two", 1)])
    assert warnings == []
    assert 20000 <= int(port) < 32768
    (ssh / "refusals-two").write_text("4")
    with pytest.raises(UserError, match=f"two does not answer over ssh: {DROPPED}$"):
        check_hosts(run, [Host("one", 1), Host("two", 1)])


def test_a_host_on_which_looking_at_the_run_folder_hangs_does_not_see_it(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints its port before it looks, and nothing more until it is killed."""
    run, _ = make_run(backend="ssh")
    body = 'bash -c "${@: -1}" | if [[ ${@: -2:1} == two ]]; then head -n 1; else cat; fi'
    put_program(tmp_path / "bin", "ssh", body, monkeypatch)
    with pytest.raises(UserError, match=f"  - two cannot see run.folder = {run}: it must be on a file syst"):
        check_hosts(run, [Host("one", 1), Host("two", 1)])


def test_the_port_is_one_that_the_master_says_is_free(make_run, tmp_path, monkeypatch) -> None:
    """What this machine listens on says nothing about the master."""
    run, manifest = make_run(backend="ssh")
    body = 'port=23456; [[ ${@: -2:1} == two ]] && port=1; { echo hello; bash -c "${@: -1}"; } '
    put_program(tmp_path / "bin", "ssh", body + '| sed "s/ port .*/ port $port/"', monkeypatch)
    hosts = [Host("one", 1), Host("two", 1)]
    port = check_hosts(run, hosts).port
    assert {each["MASTER_PORT"] for each in rank_variables(manifest, hosts, 1, run, port)} == {"23456"}


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.2"])
def test_a_port_that_something_listens_on_is_passed_over(address: str) -> None:
    def chosen(seed: int) -> int:
        command = ["bash", "-c", f"RANDOM={seed}\n{PORT_SCRIPT}", "bash", "n1"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.fullmatch(r"n1 port \d+\n", said)
        return int(said.split()[2])

    seed = os.getpid() % 32768
    free = chosen(seed)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an earlier test may have used it
        listener.bind((address, free))
        listener.listen()
        assert chosen(seed) != free


RANK = """
import json, os, pathlib, sys
place = pathlib.Path(os.environ["RUN"]).parent / "seen"
(place / os.environ["ALIGNKD_RANK"]).write_text(json.dumps(dict(os.environ)))
"""


@pytest.fixture
def ranks(make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run over ssh whose rank script records its environment in ``seen``."""
    run, _ = make_run(backend="ssh")
    (run.parent / "seen").mkdir()
    (tmp_path / "rank.py").write_text(RANK)
    (run / "rank.sh").write_text(f"exec {sys.executable} {tmp_path}/rank.py\n")
    root = Path(__file__).parents[3]
    (run / "env.sh").write_text(f"export PYTHON={sys.executable} PYTHONPATH={root}\n")
    monkeypatch.delenv("MY_TOKEN", raising=False)
    return run


def ended(group: RankGroup) -> list[int]:
    while group.running:
        assert group.next_exit(60) is not None
    return [group.codes[rank] for rank in range(group.size)]


def test_few_connections_are_opened_at_once_and_all_ranks_start(
    ranks: Path, ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_connect, "AT_ONCE", 2)
    # Until it logs in, a connection is a file; each counts the files.
    (ssh / "open").mkdir()
    counting = "cd $folder/open; touch $$; ls | wc -l >>../counts; sleep 0.1; rm $$"
    (ssh / "ssh").write_text((ssh / "ssh").read_text().replace("exec bash", f"{counting}\nexec bash"))
    (ssh / "refusals-two").write_text("1")
    names = ["one", "two", "one", "two", "one"]
    group = start_over_ssh(ranks, names, [{"RUN": str(ranks), "ALIGNKD_RANK": str(r)} for r in range(5)])
    assert ended(group) == [0] * 5
    assert len(list((ranks.parent / "seen").iterdir())) == 5
    counts = [int(line) for line in (ssh / "counts").read_text().split()]
    assert len(counts) == 5
    assert max(counts) <= 2


def test_secrets_reach_the_ranks_but_no_file_and_no_command_line(
    ranks: Path, ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (ranks / "config.yaml").read_text()
    assert "  secrets: []\n" in config
    (ranks / "config.yaml").write_text(config.replace("  secrets: []\n", "  secrets: [MY_TOKEN, OTHER]\n"))
    monkeypatch.setenv("MY_TOKEN", "very-secret")
    secrets, missing = secrets_of(ranks)
    assert (secrets, missing) == ({"MY_TOKEN": "very-secret"}, ["OTHER"])
    monkeypatch.delenv("MY_TOKEN")  # another machine has none
    group = start_over_ssh(ranks, ["one"], [{**secrets, "RUN": str(ranks), "ALIGNKD_RANK": "0"}])
    assert ended(group) == [0]
    seen = json.loads((ranks.parent / "seen" / "0").read_text())
    assert seen["MY_TOKEN"] == "very-secret"
    assert "very-secret" not in (ssh / "commands").read_text()
    for file in ranks.rglob("*"):
        assert not file.is_file() or "very-secret" not in file.read_text(errors="replace"), file
