"""How the ranks meet: within a stated time, or with an error that says who is missing, and why."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import socket
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from alignkd.errors import NodeError, TrainingError

_ALL_HERE = "alignkd/all-here"
_LAST_WORDS_SECONDS = 2.0  # rank 0 keeps its store after a failure: the others read who is missing


def meet(seconds: float, environment: Mapping[str, str] = os.environ) -> Any:
    """Rank 0's store, once all ranks have come to it. Collective.

    Raises TrainingError after ``seconds``, with the ranks and nodes that are missing or with what is wrong
    with the address of rank 0, and NodeError when a network interface that was asked for is not on this node.
    """
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    check_interfaces(environment)
    deadline = time.monotonic() + seconds
    store = _connect(rank, world_size, seconds, environment)
    store.set(_key(rank), "")
    if store.add("alignkd/count", 1) == world_size:
        store.set(_ALL_HERE, "")
    missing = _wait(store, rank, world_size, deadline)
    if missing:
        raise TrainingError(
            f"{missing} did not come to the rendezvous within {seconds:.0f} s (training.rendezvous_seconds); "
            "look at the end of their logs, if they have one"
        )
    return store


def _connect(rank: int, world_size: int, seconds: float, environment: Mapping[str, str]) -> Any:
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # torchrun's agent has opened the store already.
    opens = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # multi_tenant: the process group, which looks for the same port, then joins this store.
        return dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            world_size,
            opens,
            timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {rank} on {platform.node()} could not reach rank 0 at {host}:{port} within "
            f"{seconds:.0f} s (training.rendezvous_seconds): {_address_facts(host)} "
            f"({str(error).splitlines()[0]})"
        ) from error


def _wait(store: Any, rank: int, world_size: int, deadline: float) -> str:
    """The missing ranks in words; empty when all have come."""
    # Rank 0 gives up first, and tells the others.
    left = deadline - time.monotonic() + (0 if rank == 0 else _LAST_WORDS_SECONDS / 2)
    try:
        store.wait([_ALL_HERE], timedelta(seconds=max(left, 0.1)))
        missing: str = store.get(_ALL_HERE).decode()
        return missing
    except RuntimeError:
        pass
    if rank != 0:
        return "rank 0, or a rank that it waits for,"
    absent = [other for other in range(world_size) if not store.check([_key(other)])]
    words = missing_words(absent)
    if words:
        with contextlib.suppress(RuntimeError):
            store.set(_ALL_HERE, words)
            time.sleep(_LAST_WORDS_SECONDS)
    return words


def _key(rank: int) -> str:
    return f"alignkd/here-{rank}"


def missing_words(missing: Iterable[int], environment: Mapping[str, str] = os.environ) -> str:
    """``rank 3 (n2)``. ALIGNKD_NODES names the nodes in the order of the ranks."""
    names = environment.get("ALIGNKD_NODES", "").split()
    per_node = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    places = [(rank, rank // per_node) for rank in missing]
    return ", ".join(
        f"rank {rank} ({names[node] if node < len(names) else f'node {node}'})" for rank, node in places
    )


def _address_facts(host: str) -> str:
    """What this node makes of rank 0's address."""
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
    except OSError as error:
        return f"the name does not resolve here: {error.strerror}; set ALIGNKD_MASTER_ADDR in slurm.export"
    loopback = [address for address in found if ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    if loopback and host not in loopback:
        return (
            f"here the name resolves to {loopback[0]}, which is this node itself: correct /etc/hosts, or set "
            "ALIGNKD_MASTER_ADDR in slurm.export to an address that all nodes reach"
        )
    return f"the address is {', '.join(found)} here; rank 0 has not started, or a firewall is in between"


def check_interfaces(environment: Mapping[str, str]) -> None:
    """Raises NodeError when NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names an interface that is not here.

    NCCL takes prefixes, ``=`` for exact names and ``^`` for those to avoid; gloo takes exact names.
    """
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        names = wanted.removeprefix("=").split(",")
        exact = variable.startswith("GLOO") or wanted.startswith("=")
        if not any(name == given if exact else name.startswith(given) for given in names for name in here):
            raise NodeError(
                f"{variable}={wanted}: {platform.node()} has no such network interface; it has "
                f"{', '.join(here)} (slurm.network_interface)"
            )
