"""How ranks meet, in real processes, and what they say when one does not come."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from alignkd.distributed import rendezvous
from alignkd.distributed.rendezvous import check_interfaces, missing_words
from alignkd.errors import NodeError
from launcher.backends.ranks import free_port

PROGRAM = """
import sys
from alignkd.distributed.rendezvous import meet
from alignkd.errors import AlignkdError
try:
    store = meet(float(sys.argv[1]))
except AlignkdError as error:
    print(type(error).__name__, error)
else:
    print("met")
    import os, time
    store.add("left", 1)
    while os.environ["RANK"] == "0" and store.add("left", 0) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
"""


def started(rank: int, world_size: int, port: int, seconds: float, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "2",
        "ALIGNKD_NODES": "n1\nn2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(seconds)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=300)[0].strip().splitlines()[-1]


def test_all_ranks_meet() -> None:
    port = free_port()
    assert [said(process) for process in [started(rank, 3, port, 120) for rank in range(3)]] == ["met"] * 3


def test_the_ranks_that_came_name_the_rank_and_the_node_that_did_not() -> None:
    port = free_port()
    # Long enough for both to start on a busy machine: what is tested is what they say afterwards.
    ends = [said(process) for process in [started(rank, 3, port, 20) for rank in range(2)]]
    for end in ends:
        assert end.startswith("TrainingError rank 2 (n2) did not come to the rendezvous within 20 s"), end


def test_a_rank_that_cannot_reach_rank_0_says_what_it_makes_of_the_address() -> None:
    alone = started(1, 2, free_port(), 3)
    unresolved = started(1, 2, free_port(), 3, MASTER_ADDR="no-such-host.invalid")
    assert "could not reach rank 0 at 127.0.0.1:" in (end := said(alone))
    assert "rank 0 has not started, or a firewall is in between" in end
    assert "the name does not resolve here" in (end := said(unresolved))
    assert "set ALIGNKD_MASTER_ADDR in slurm.export" in end


def test_a_name_that_is_this_node_itself_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Debian, whose /etc/hosts gives a machine's own name the address 127.0.1.1."""
    found = [(None, None, None, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", lambda *_: found)
    facts = rendezvous._address_facts("n1")
    assert facts.startswith(
        "here the name resolves to 127.0.1.1, which is this node itself: correct /etc/hosts"
    )


@pytest.mark.parametrize(
    ("variable", "value", "known"),
    [
        ("NCCL_SOCKET_IFNAME", "ib", True),  # a prefix
        ("NCCL_SOCKET_IFNAME", "eth,ib", True),
        ("NCCL_SOCKET_IFNAME", "=ib0", True),
        ("NCCL_SOCKET_IFNAME", "=ib", False),
        ("NCCL_SOCKET_IFNAME", "^eth9", True),  # all but these
        ("NCCL_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib", False),
        ("GLOO_SOCKET_IFNAME", "", True),
    ],
)
def test_an_interface_that_was_asked_for_must_exist(
    variable: str, value: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous.socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib0")])
    if known:
        check_interfaces({variable: value})
        return
    with pytest.raises(
        NodeError, match=f"{variable}={value}: .* has no such network interface; it has lo, ib0"
    ):
        check_interfaces({variable: value})


def test_nodes_without_a_name_are_numbered() -> None:
    assert missing_words([0, 5], {"LOCAL_WORLD_SIZE": "4"}) == "rank 0 (node 0), rank 5 (node 1)"
    assert missing_words([5], {"LOCAL_WORLD_SIZE": "4", "ALIGNKD_NODES": "a b"}) == "rank 5 (b)"
    assert missing_words([]) == ""
