"""A real Slurm with four nodes on this machine: own munge, own ports, everything in one temporary folder.

Needs root and the packages ``slurmctld slurmd slurm-client munge``; no systemd, cgroup or database. The nodes
share one host name and one port space. Every process carries SLURM_CONF in its environment, so whatever the
cluster started can be found and ended.

No test may depend on how busy the machine is, so every time-out of Slurm is long; where one has to run out,
a test shortens the wait as an administrator could (``end_in``, ``notice``, ``clear``, the end of
``BeginTime``).
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

NODES = 4
GPUS = 2
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
GRACE_SECONDS = 25  # a preempted job always takes all of it, and up to 30 s more until Slurm looks
SHORT_GRACE_SECONDS = 5  # where it makes no difference whether the ranks have saved by its end
PATIENCE_SECONDS = 400.0
SBIN = "/usr/sbin"

CONF = """\
ClusterName=alignkd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=60
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=60
SlurmdTimeout=300
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=120
MinJobAge=3600
OverTimeLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,defer,kill_invalid_depend
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=4000 Gres=gpu:{gpus}
PartitionName=low Nodes=n[1-{nodes}] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=n[1-{nodes}] PriorityTier=10 PreemptMode=OFF
PartitionName=brief Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=REQUEUE GraceTime={short_grace}
PartitionName=cancel Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=CANCEL GraceTime={short_grace}
PartitionName=abrupt Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=CANCEL
PartitionName=short Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=OFF MaxTime=5
"""  # noqa: E501


def missing_programs() -> str | None:
    """Why no cluster can run here; None when one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "starting slurmd needs root"


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """For whatever talks to the cluster."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**clean, "SLURM_CONF": str(self.conf), "PATH": f"{clean['PATH']}:{SBIN}"}

    def start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        self._write_key()
        first = _free_ports(NODES + 1)
        fields = {"host": host, "folder": self.folder, "port": first, "first": first + 1}
        fields |= {"last": first + NODES, "nodes": NODES, "gpus": GPUS, "grace": GRACE_SECONDS}
        fields["short_grace"] = SHORT_GRACE_SECONDS
        self.conf.write_text(CONF.format(**fields))
        self._write_gpus()
        (self.folder / "state").mkdir()
        # One process that ends everything, should this one be killed.
        self._children["keeper"] = subprocess.Popen(
            [sys.executable, __file__, str(self.conf)], stdin=subprocess.PIPE, start_new_session=True
        )
        munge = [f"--{name}={self.folder}/munge.{name}" for name in ("socket", "pid-file", "log-file")]
        munge += [f"--key-file={self.folder}/munge.key", f"--seed-file={self.folder}/munge.seed"]
        self._start("munged", ["munged", "--foreground", "--force", *munge])
        wait_for((self.folder / "munge.socket").exists, "munge")
        self.start_controller("-c")
        for number in range(1, NODES + 1):
            self.start_node(f"n{number}")
        self.wait_for_nodes()
        threading.Thread(target=self._let_requeued_jobs_start, daemon=True).start()

    def start_controller(self, *options: str) -> None:
        """It finds the state of an earlier one, unless told to forget it (``-c``)."""
        self._start("slurmctld", ["slurmctld", "-D", *options, "-f", str(self.conf)])

    def stop_controller(self) -> None:
        """Jobs go on; no command of Slurm gets an answer."""
        controller = self._children["slurmctld"]
        controller.terminate()
        controller.wait()

    def start_node(self, name: str, *wrapper: str) -> None:
        self._start(name, [*wrapper, "slurmd", "-D", "-N", name, "-f", str(self.conf)])

    def wait_for_nodes(self) -> None:
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%D %T").split() == ["4", "idle"], "4 idle nodes")

    def lose_node(self, name: str, *, ranks_first: bool = False) -> None:
        """Its slurmd, the step managers and all their processes are gone at once, as with the power cord.

        With ``ranks_first`` the step managers still tell srun how the ranks ended, as when a node shuts down.
        """
        ranks = _processes(f"SLURMD_NODENAME={name}", str(self.conf))
        managers = [pid for pid in _processes("", str(self.conf)) if _has_open(pid, f"slurmd-{name}.log")]
        _send(self._children.pop(name).pid, signal.SIGKILL)
        for pid in ranks if ranks_first else managers:
            _send(pid, signal.SIGKILL)
        if ranks_first:
            time.sleep(1)
        for pid in managers if ranks_first else ranks:
            _send(pid, signal.SIGKILL)

    def notice(self, name: str) -> None:
        """Slurm learns that a node is gone: what comes of itself after SlurmdTimeout."""
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=power cut")

    def end_in(self, job: str, seconds: float) -> None:
        """Give a running job a time limit (``scontrol update TimeLimit`` knows only whole minutes)."""
        end = datetime.now() + timedelta(seconds=seconds)
        self.run("scontrol", "update", f"JobId={job}", f"EndTime={end.isoformat(timespec='seconds')}")

    def clear(self, job: str) -> None:
        """End what is left of a job that lost a node: what Slurm does after KillWait, and its step managers a
        minute after they last heard of the lost one."""
        conf = str(self.conf)
        for pid in (*_processes(f"SLURM_JOB_ID={job}", conf), *_step_managers(job, conf)):
            _send(pid, signal.SIGKILL)

    def preempt(self) -> None:
        """A job that wants all nodes for itself."""
        options = ("--partition=high", "--exclusive", f"--nodes={NODES}", "--output=/dev/null")
        self.run("sbatch", *options, "--wrap=true")

    def _let_requeued_jobs_start(self) -> None:
        """A requeued job is held back for longer than ``cred_expire``, which is long for a busy machine.
        The wait is for nodes with bad clocks; here there is one clock."""
        seen: set[str] = set()
        while "slurmctld" in self._children:
            time.sleep(1.1)  # the new start must not fall into the second of the old end
            with contextlib.suppress(subprocess.SubprocessError):
                lines = self.run("squeue", "-h", "-t", "PENDING", "-o", "%A %r").splitlines()
                waiting = {line.split()[0] for line in lines if line.endswith(" BeginTime")}
                for job in waiting & seen:
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
                seen = waiting - seen

    def run(self, *command: str) -> str:
        """Output of a Slurm program. Raises CalledProcessError."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Fields of ``scontrol show job``; values with spaces are cut."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def cancel_all(self) -> None:
        jobs = self.run("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.run("scancel", *jobs)
        wait_for(lambda: self.run("squeue", "-h") == "", "an empty queue")

    def stop(self) -> None:
        children, self._children = self._children, {}
        end_all(str(self.conf))
        for process in children.values():
            if process.stdin is not None:
                process.stdin.close()
            process.wait()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._children[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def _write_key(self) -> None:
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def _write_gpus(self) -> None:
        """Pretend GPUs. Slurm wants device files; those of a driver that is not there do no harm."""
        for index in range(GPUS):
            os.mknod(self.folder / f"nvidia{index}", stat.S_IFCHR | 0o600, os.makedev(195, index))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/nvidia[0-{GPUS - 1}]\n")


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Returns as soon as it holds. A command of Slurm that fails is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if condition():
                return
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def end_all(conf: str) -> None:
    """Kill everything that has this cluster in its environment: daemons, step managers, jobs."""
    for _ in range(50):
        found = _processes("", conf)
        if not found:
            return
        for pid in found:
            _send(pid, signal.SIGKILL)
        time.sleep(0.1)


def _processes(marker: str, conf: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = path.read_bytes().split(b"\0")
            if f"SLURM_CONF={conf}".encode() in variables and (not marker or marker.encode() in variables):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid() and not _is_zombie(pid)]


def _step_managers(job: str, conf: str) -> list[int]:
    """Of all its steps but the script's, which Slurm asks how that ended."""
    titles = {pid: _title(pid) for pid in _processes("", conf)}
    return [
        pid
        for pid, title in titles.items()
        if title.startswith(f"slurmstepd: [{job}.") and not title.endswith(".batch]")
    ]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").partition("\0")[0]
    except OSError:
        return ""


def _has_open(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(link).endswith("/" + name) for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nothing listens on."""
    for first in random.sample(range(21000, 31000, 16), 200):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise OSError("no free ports")


if __name__ == "__main__":  # the keeper: stdin ends when its parent does
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()
    end_all(sys.argv[1])
    shutil.rmtree(Path(sys.argv[1]).parent, ignore_errors=True)
