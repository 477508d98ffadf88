"""The ssh back end: one connection per rank, which runs the same rank script as under Slurm.

Every host must see the run folder at the same path and let this user log in without a password.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from alignkd.errors import UserError
from alignkd.run_folder.atomic_files import read_json, write_json
from alignkd.run_folder.paths import RunPaths
from alignkd.text import counted
from launcher.backends import ssh_connect
from launcher.backends.base import Started
from launcher.backends.hostfile import Host, read_hosts
from launcher.backends.ranks import RankGroup
from launcher.backends.ssh_connect import READY, connect
from launcher.backends.ssh_probe import check_hosts
from launcher.backends.watch import watch_ranks
from launcher.backends.watched import WatchedBackend
from launcher.render.quoting import shell_word
from launcher.run import attempts
from launcher.run.console import say
from launcher.run.manifest import Manifest

if TYPE_CHECKING:
    from rich.console import Console

    from alignkd.config import Config

_NAMES = {signal.SIGUSR1: "USR1", signal.SIGTERM: "TERM", signal.SIGUSR2: "USR2"}


class SshBackend(WatchedBackend):
    def hosts(self, hostfile: Path | None, nodes: int | None, gpus_per_node: int | None) -> tuple[Host, ...]:
        if hostfile is None:
            raise UserError("--backend ssh needs --hostfile: one `host slots=N` per line")
        return read_hosts(hostfile, nodes, gpus_per_node)

    def prepare(self, run: Path, hosts: Sequence[Host]) -> None:
        if hosts:
            write_json(RunPaths(run).hosts, {"hosts": [asdict(host) for host in hosts]})

    def resize_problems(
        self, run: Path, wanted: Manifest, config: Config, hosts: Sequence[Host]
    ) -> list[str]:
        known = hosts or known_hosts(run)
        if len(known) < wanted.nodes:
            source = "the hostfile" if hosts else str(RunPaths(run).hosts)
            return [
                f"{counted(wanted.nodes, 'node')} wanted: {source} has {counted(len(known), 'host')}; "
                "name more with --hostfile, or lower --nodes"
            ]
        if wanted.gpus_per_node > known[0].slots:
            return [f"--gpus-per-node {wanted.gpus_per_node}: the hosts have {known[0].slots} slots each"]
        return []

    def would_run(self, run: Path, manifest: Manifest) -> str:
        script = shlex.quote(str(RunPaths(run).rank_script))
        each = counted(manifest.gpus_per_node, "time")
        lines = [f"would run, {each} on each host, with RANK and the like in its environment:"]
        hosts = known_hosts(run)[: manifest.nodes]
        return "\n".join([*lines, *(f"  ssh {shlex.quote(host.name)} bash {script}" for host in hosts)])

    def start(self, run: Path, manifest: Manifest, console: Console, after: str | None = None) -> Started:
        if shutil.which("ssh") is None:
            raise UserError("ssh is not on PATH")
        hosts = known_hosts(run)[: manifest.nodes]
        if len(hosts) < manifest.nodes:
            raise UserError(
                f"{RunPaths(run).hosts}: {len(hosts)} hosts, and the run was made for {manifest.nodes} nodes"
            )
        found = check_hosts(run, hosts)
        secrets, missing = secrets_of(run)
        for warning in (*found.warnings, *(f"{name} is not set here (slurm.secrets)" for name in missing)):
            say(console, f"warning: {warning}")

        def start() -> RankGroup:
            attempt = attempts.begin(run, "ssh", ",".join(host.name for host in hosts), None)
            environments = rank_variables(manifest, hosts, attempt.number, run, found.port)
            names = [host.name for host in hosts for _ in range(manifest.gpus_per_node)]
            return start_over_ssh(run, names, [secrets | environment for environment in environments])

        return Started(watch_ranks(run, start, console), None)


def known_hosts(run: Path) -> list[Host]:
    """The hosts of the run, in node order; there are more than nodes after a resume on fewer."""
    return [Host(**entry) for entry in (read_json(RunPaths(run).hosts) or {}).get("hosts", [])]


class SshGroup(RankGroup):
    """Ranks behind ssh processes: a signal travels through the connection, and closing it ends the rank."""

    def signal(self, number: int) -> None:
        for rank, process in enumerate(self._processes):
            if rank not in self.codes and process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.write(f"{_NAMES[signal.Signals(number)]}\n".encode())
                    process.stdin.flush()


def secrets_of(run: Path) -> tuple[dict[str, str], list[str]]:
    """The variables of ``slurm.secrets`` that are set here, and the names of those that are not."""
    from alignkd.config import load_run_config  # here: `status` imports this module, and must be quick

    names = load_run_config(RunPaths(run).config).slurm.secrets
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    return found, [name for name in names if name not in found]


def rank_variables(
    manifest: Manifest, hosts: Sequence[Host], attempt: int, run: Path, port: str
) -> list[dict[str, str]]:
    """The variables that rank.sh reads, for every rank. The first host is the master, with ``port`` free."""
    # Without the brackets of [::1], as ssh and hostfiles write IPv6 addresses.
    names = [host.name.rpartition("@")[2].strip("[]") for host in hosts]
    return [
        {
            "RUN": str(run),
            "ALIGNKD_ATTEMPT": str(attempt),
            "ALIGNKD_RANK": str(rank),
            "ALIGNKD_LOCAL_RANK": str(rank % manifest.gpus_per_node),
            "ALIGNKD_NODE_RANK": str(rank // manifest.gpus_per_node),
            "ALIGNKD_WORLD_SIZE": str(manifest.world_size),
            "ALIGNKD_NODES": " ".join(names),
            "MASTER_ADDR": os.environ.get("ALIGNKD_MASTER_ADDR", names[0]),
            "MASTER_PORT": port,
        }
        for rank in range(manifest.world_size)
    ]


def remote_command(run: Path) -> str:
    """What a host runs for each rank. One string: ssh hands it to the login shell, whichever that is."""
    folder, env = shell_word(str(run)), shell_word(str(RunPaths(run).environment_script))
    # The host names itself: this process knows only what ssh calls it.
    missing = f'{{ echo "$(uname -n): does not see the run folder" {folder} >&2; exit 2; }}'
    # Secrets follow on stdin: neither a command line nor a file shows them.
    script = (
        f"echo {shell_word(READY)}; exec >&2; export ALIGNKD_SECRETS_FOLLOW=1; "
        f'cd {folder} && source {env} || {missing}; exec "$PYTHON" -m launcher.backends.ssh_rank'
    )
    return f"exec bash -c {shell_word(script)}"


def start_over_ssh(run: Path, names: Sequence[str], environments: Sequence[Mapping[str, str]]) -> RankGroup:
    """Rank R runs on host ``names[R]``. Only some connections are opened at once, and a refused one again."""
    remote = remote_command(run)

    def start(rank: int) -> subprocess.Popen[bytes]:
        process = connect(names[rank], remote, RunPaths(run).ssh_log(rank))
        order = {"command": ["bash", str(RunPaths(run).rank_script)], "environment": dict(environments[rank])}
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has exited already, and its log says why
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        return process

    with ThreadPoolExecutor(ssh_connect.AT_ONCE) as pool:
        started = [pool.submit(start, rank) for rank in range(len(names))]
    failures = [failure for one in started if (failure := one.exception()) is not None]
    if failures:
        for one in started:
            if one.exception() is None:
                one.result().kill()
        raise failures[0]
    return SshGroup([one.result() for one in started])
