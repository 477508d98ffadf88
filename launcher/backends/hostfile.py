"""DeepSpeed's hostfile: one ``host slots=N`` per line; ``#`` starts a comment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import UserError
from alignkd.text import counted

_LINE = re.compile(r"(?P<host>[A-Za-z0-9_.@:\[\]-]+)\s+slots\s*=\s*(?P<slots>\d+)")


@dataclass(frozen=True)
class Host:
    name: str  # anything that ssh accepts: an alias of ~/.ssh/config, user@host, ...
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """All hosts, in order. Raises UserError that lists every bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {why}; valid: one `host slots=N` per line") from error
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        found = _LINE.fullmatch(text)
        if found is None:
            if text:
                problems.append(f"line {number}: {text!r} is not of the form `host slots=N`")
        elif found["host"].startswith("-") or int(found["slots"]) < 1:  # ssh would read -x as an option
            problems.append(f"line {number}: {text!r}: needs a host name and at least one slot")
        elif any(host.name == found["host"] for host in hosts):
            problems.append(f"line {number}: {found['host']} appears twice")
        else:
            hosts.append(Host(found["host"], int(found["slots"])))
    if not hosts and not problems:
        problems.append("no hosts")
    if len({host.slots for host in hosts}) > 1:
        problems.append("all hosts must have the same number of slots: every node runs as many ranks")
    if problems:
        raise UserError(f"{path}: not a usable hostfile\n" + "\n".join(f"  - {text}" for text in problems))
    return hosts


def read_hosts(hostfile: Path, nodes: int | None, ranks_per_node: int | None) -> tuple[Host, ...]:
    """The first ``nodes`` hosts (None: all). Raises UserError when hosts or slots are too few."""
    hosts = read_hostfile(hostfile)
    if nodes is not None and nodes > len(hosts):
        raise UserError(f"--nodes {nodes}: {hostfile} has {counted(len(hosts), 'host')}")
    if ranks_per_node is not None and ranks_per_node > hosts[0].slots:
        raise UserError(f"--gpus-per-node {ranks_per_node}: {hostfile} gives {hosts[0].slots} slots per host")
    return tuple(hosts[:nodes])
