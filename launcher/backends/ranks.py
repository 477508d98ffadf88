"""Rank processes on this machine: start them, report each exit in order, stop them all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkd.run_folder.paths import log_name

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: no import may run between fork and exec


def free_port() -> int:
    """A port that nothing listens on, below the kernel's ephemeral range (from 32768)."""
    for port in random.sample(range(20000, 32768), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no free port between 20000 and 32767")


def rank_environments(
    nodes: int, gpus_per_node: int, port: int, device: str, gpus: Sequence[str], base: Mapping[str, str]
) -> list[dict[str, str]]:
    """The environment of every rank. ``gpus`` are the devices to assign, in order; unused on the CPU."""
    world_size = nodes * gpus_per_node
    threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    # DeepSpeed lets these override a configuration that was passed explicitly.
    clean = {key: value for key, value in base.items() if not key.startswith("DEEPSPEED_CONFIG")}
    environments = []
    for rank in range(world_size):
        node, local_rank = divmod(rank, gpus_per_node)
        values = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(gpus_per_node),
            "NODE_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONUNBUFFERED": "1",  # the log keeps every line of a rank that is killed
        }
        if device == "cpu":
            # All ranks are on this machine, and its host name may not resolve.
            values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
            # Large tensors are new memory in every step: huge pages spare most of the page faults.
            values["THP_MEM_ALLOC_ENABLE"] = base.get("THP_MEM_ALLOC_ENABLE", "1")
        else:
            # Without it DeepSpeed trains on the CPU where it finds no driver.
            values["DS_ACCELERATOR"] = "cuda"
            # Batches differ in length: without it the free memory of a GPU falls into pieces.
            values["PYTORCH_ALLOC_CONF"] = base.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            values["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[node * gpus_per_node : (node + 1) * gpus_per_node])
        environments.append({**clean, **values})
    return environments


@dataclass(frozen=True)
class Exit:
    rank: int
    code: int  # as subprocess reports it: negative for a signal


class RankGroup:
    """Running rank processes. Each leads a session of its own, so that its children can be killed with it."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = list(processes)
        self._exits: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        self.codes: dict[int, int] = {}  # rank -> exit code, in the order of the exits
        for rank, process in enumerate(self._processes):
            # One thread per rank: polling would not tell which of two ranks died first.
            threading.Thread(target=self._wait, args=(rank, process), daemon=True).start()

    def _wait(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self._exits.put(Exit(rank, process.wait()))

    @property
    def size(self) -> int:
        return len(self._processes)

    @property
    def running(self) -> bool:
        return len(self.codes) < self.size

    def next_exit(self, timeout: float) -> Exit | None:
        """The next rank that exits, or None after ``timeout`` seconds."""
        try:
            ended = self._exits.get(timeout=timeout)
        except queue.Empty:
            return None
        self.codes[ended.rank] = ended.code
        return ended

    def signal(self, number: int) -> None:
        """Send a signal to every running rank (to the rank alone: it looks after its loader workers)."""
        for rank, process in enumerate(self._processes):
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL every rank and all of its children."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self, grace_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """SIGTERM, then SIGKILL for the ranks that are still running after the grace."""
        self.signal(signal.SIGTERM)
        end = clock() + grace_seconds
        while self.running and (left := end - clock()) > 0:
            self.next_exit(left)
        self.kill()
        while self.running:
            self.next_exit(timeout=60.0)


def start_ranks(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    log_folder: Path,
    heading: str | None = None,
    *,
    show_first: bool = False,
) -> RankGroup:
    """Start one process per environment; its output is appended to ``log_folder/rank-R.log``, after the
    line ``heading``. With ``show_first``, rank 0 writes to this process's output instead.

    The ranks die with this process, however it dies. Raises OSError when one cannot be started, after the
    others were killed.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    launcher = os.getpid()

    def die_with_launcher() -> None:  # runs in the child, between fork and exec
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before the call above
            os._exit(1)

    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, environment in enumerate(environments):
            shown = show_first and rank == 0
            with contextlib.nullcontext() if shown else (log_folder / log_name(rank)).open("ab") as log:
                if heading is not None and log is not None:
                    log.write(f"{heading}\n".encode())
                    log.flush()
                processes.append(
                    subprocess.Popen(
                        list(command),
                        env=dict(environment),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=None if shown else subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=die_with_launcher,
                    )
                )
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return RankGroup(processes)
