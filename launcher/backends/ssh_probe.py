"""Before ranks start over ssh: does every host answer, and does it see what the ranks read and write?"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from alignkd.errors import UserError
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
from launcher.render.quoting import shell_word

_CONNECT_SECONDS = 30
# No prompts: nobody could answer them for each of many ranks. A lost host is noticed after 45 s.
OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
_ANSWER_SECONDS = _CONNECT_SECONDS + 2 * LATE_SECONDS + 30


def check_hosts(run: Path, hosts: Sequence[Host]) -> list[str]:
    """Warnings. Raises UserError with the hosts that do not answer, and the places that hosts do not see."""
    places = places_of(run)
    output, silent = "", []
    with tokens(places) as token:
        processes = [_ask(host, arguments(token, places)) for host in hosts]
        for host, process in zip(hosts, processes, strict=True):
            said, complaint = _answer(process)
            output += said
            if not said:
                silent.append(f"{host.name} does not answer over ssh: {complaint}")
    found = unseen(output, places)
    if refused := [*silent, *problems(found)]:
        raise UserError(f"{run}: not started\n" + "\n".join(f"  - {line}" for line in refused))
    return warnings(found)


def _ask(host: Host, words: Sequence[str]) -> subprocess.Popen[str]:
    remote = " ".join(shell_word(word) for word in ("bash", "-s", "--", host.name, *words))
    return subprocess.Popen(
        ["ssh", *OPTIONS, host.name, f"exec {remote}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip


def _answer(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the script printed, and ssh's last word."""
    try:
        said, complaint = process.communicate(SCRIPT, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        said, complaint = process.communicate()
        complaint = complaint or f"nothing for {_ANSWER_SECONDS} s"
    lines = complaint.strip().splitlines()
    return said, lines[-1] if lines else f"exit code {process.returncode}"
