"""Before ranks start over ssh: does every host answer, and does it see what the ranks read and write?"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from alignkd.errors import UserError
from launcher.backends import ssh_connect
from launcher.backends.hostfile import Host
from launcher.backends.node_probe import (
    LATE_SECONDS,
    SCRIPT,
    arguments,
    places_of,
    problems,
    tokens,
    unseen,
    warnings,
)
from launcher.backends.ssh_connect import CONNECT_SECONDS, OPTIONS, pauses, refused
from launcher.render.quoting import shell_word

_ANSWER_SECONDS = CONNECT_SECONDS + 2 * LATE_SECONDS + 30
# Prints `HOST port N`: a port that nothing listens on there, below the kernel's ephemeral range (from 32768).
PORT_SCRIPT = """\
port=$((20000 + RANDOM % 12768))
while grep -qE "^ *[0-9]+: \\w+:$(printf %04X "$port") \\w+:0000 0A " /proc/net/tcp /proc/net/tcp6; do
    port=$((20000 + (port - 19999) % 12768))
done 2>/dev/null
echo "$1 port $port"
"""


class Answers(NamedTuple):
    """``port`` is free on the first host, which will be the master."""

    warnings: list[str]
    port: str


def check_hosts(run: Path, hosts: Sequence[Host]) -> Answers:
    """Raises UserError with the hosts that do not answer, and the places that hosts do not see."""
    places = places_of(run)
    with tokens(places) as token, ThreadPoolExecutor(ssh_connect.AT_ONCE) as pool:
        answers = list(pool.map(lambda host: _ask(host, arguments(token, places)), hosts))
    ports = [_port(host, said) for host, (said, _) in zip(hosts, answers, strict=True)]
    silent = [
        f"{host.name} does not answer over ssh: {complaint}"
        for host, (_, complaint), port in zip(hosts, answers, ports, strict=True)
        if port is None
    ]
    # The port is printed before any place is looked at.
    started = [host.name for host, port in zip(hosts, ports, strict=True) if port is not None]
    found = unseen("".join(said for said, _ in answers), places, started)
    if refusals := [*silent, *problems(found)]:
        raise UserError(f"{run}: not started\n" + "\n".join(f"  - {line}" for line in refusals))
    return Answers(warnings(found), ports[0] or "")


def _port(host: Host, said: str) -> str | None:
    """None if the script did not run; a login shell may have said something all the same."""
    found = re.search(rf"^{re.escape(host.name)} port (\d+)$", said, re.MULTILINE)
    return found and found[1]


def _ask(host: Host, words: Sequence[str]) -> tuple[str, str]:
    """What the scripts printed, and ssh's last word."""
    remote = " ".join(shell_word(word) for word in ("bash", "-s", "--", host.name, *words))
    waits = pauses()
    while True:
        said, complaint = _run(["ssh", *OPTIONS, host.name, f"exec {remote}"])
        seconds = next(waits, None) if not said and refused(complaint) else None
        if seconds is None:
            return said, complaint
        time.sleep(seconds)


def _run(command: Sequence[str]) -> tuple[str, str]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    try:
        said, complaint = process.communicate(PORT_SCRIPT + SCRIPT, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        said, complaint = process.communicate()
        complaint = complaint or f"nothing for {_ANSWER_SECONDS} s"
    lines = complaint.strip().splitlines()
    return said, lines[-1] if lines else f"exit code {process.returncode}"
