"""Connections over ssh: how many are opened at once, and which refusals are worth another try."""

from __future__ import annotations

import os
import random
import re
import selectors
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CONNECT_SECONDS = 30
# No prompts: nobody could answer them for each of many ranks. A lost host is noticed after 45 s.
OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
# sshd drops connections at random once ten have yet to log in (its default MaxStartups is 10:30:100), and
# the hosts of a run may be behind one jump host.
AT_ONCE = 8
PAUSES = (1.0, 3.0, 9.0)  # seconds before another try
READY = "alignkd: connected"  # the host's first word
_READY_SECONDS = CONNECT_SECONDS + 60
_REFUSED = re.compile(r"kex_exchange|ssh_exchange|banner exchange|Connection (closed|reset|refused)")


def refused(complaint: str) -> bool:
    """Does ssh say that the host took no connection just now? An unknown name or a wrong key stays wrong."""
    return _REFUSED.search(complaint) is not None


def pauses() -> Iterator[float]:
    """Seconds to wait after each refusal. Not the same for all: they were refused for coming together."""
    return (random.uniform(0.5, 1.5) * seconds for seconds in PAUSES)


def connect(host: str, command: str, log: Path) -> subprocess.Popen[bytes]:
    """Run ``command``, whose first word must be READY, on ``host``; what ssh and the command complain about
    goes to ``log``. Where all tries were refused, the last ssh is returned, which has ended."""
    waits = pauses()
    while True:
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["ssh", *OPTIONS, host, command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
            )  # fmt: skip
        if _is_ready(process) or not refused(log.read_text(encoding="utf-8", errors="replace")):
            return process
        if (seconds := next(waits, None)) is None:
            return process
        process.kill()
        process.wait()
        time.sleep(seconds)


def _is_ready(process: subprocess.Popen[bytes]) -> bool:
    """Waits for the first word, after what the login shell may have said. False if it does not come."""
    assert process.stdout is not None
    end, said = time.monotonic() + _READY_SECONDS, b""
    with process.stdout as stream, selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            part = os.read(stream.fileno(), 4096)
            said += part
            if not part or READY.encode() in said:
                return bool(part)
    return False
