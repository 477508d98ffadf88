"""``python -m launcher.backends.ssh_rank``: the remote end of one rank that is started over ssh.

ssh carries no signals, and a lost connection leaves its remote processes running. So this process reads the
rank's command and environment from stdin, then names of signals to pass on, and kills the rank when stdin is
closed: a rank never outlives its launcher. It exits with the rank's code.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO

SIGNALS = {"USR1": signal.SIGUSR1, "TERM": signal.SIGTERM, "USR2": signal.SIGUSR2}


def main() -> int:
    order = json.loads(sys.stdin.readline())
    rank = subprocess.Popen(
        order["command"],
        env={**os.environ, **order["environment"]},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    threading.Thread(target=_obey, args=(sys.stdin, rank.pid), daemon=True).start()
    code = rank.wait()
    _send(rank.pid, signal.SIGKILL)  # children that it left running
    return code if code >= 0 else 128 - code


def _obey(orders: IO[str], session: int) -> None:
    for line in orders:
        if line.strip() in SIGNALS:
            _send(session, SIGNALS[line.strip()])
    _send(session, signal.SIGKILL)


def _send(session: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, number)


if __name__ == "__main__":
    sys.exit(main())
