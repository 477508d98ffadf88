"""``alignkd explain SCRIPT``: traps of Slurm in any batch script, by line, with the reason.

It reads, it does not run. What it knows was measured on a real Slurm 22.05 (docs/slurm.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import UserError


@dataclass(frozen=True)
class Finding:
    line: int  # of the file, from 1; 0: of the script as a whole
    text: str
    reason: str


@dataclass(frozen=True)
class Line:
    number: int
    text: str


@dataclass(frozen=True)
class Script:
    """``commands`` are joined at backslashes, without comments; ``directives`` are options of ``#SBATCH``
    lines before the first command, ``late`` those after it."""

    commands: list[Line]
    directives: list[Line]
    late: list[Line]

    def directive(self, name: str) -> Line | None:
        wanted = re.compile(rf"--{name}(?:[=\s]|$)")
        return next((line for line in self.directives if wanted.match(line.text)), None)

    def commands_with(self, pattern: str) -> list[Line]:
        return [line for line in self.commands if re.search(pattern, line.text)]


def explain(path: Path) -> list[Finding]:
    """All findings, in the order of the lines. Raises UserError when the file cannot be read."""
    try:
        script = parse(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    found = [finding for check in CHECKS for finding in check(script)]
    return sorted(found, key=lambda finding: finding.line)


def parse(text: str) -> Script:
    commands: list[Line] = []
    directives: list[Line] = []
    late: list[Line] = []
    joined, start = "", 0
    for number, raw in enumerate(text.splitlines(), start=1):
        if not joined and raw.startswith("#SBATCH"):
            (late if commands else directives).append(Line(number, raw[7:].strip()))
            continue
        line = re.sub(r"(^|\s)#.*$", "", raw) if not joined else raw
        start = start or number
        if line.endswith("\\"):
            joined += line[:-1] + " "
            continue
        whole = (joined + line).strip()
        if whole:
            commands.append(Line(start, whole))
        joined, start = "", 0
    return Script(commands, directives, late)


# (what a command looks like, why it is a trap)
COMMAND_TRAPS = [
    (
        r"\b(torchrun|torch\.distributed\.(run|launch))\b",
        "torchrun swallows SIGUSR1 or dies of it: its ranks cannot save before the time limit; start one "
        "task per GPU with srun and take RANK from SLURM_PROCID",
    ),
    (
        r"(^|[\s/])deepspeed(\s|$)(?!=)",
        "the deepspeed launcher exits with 0 when its child dies by a signal: a killed run looks finished; "
        "start the ranks with srun",
    ),
    (
        r"\btrap\b.*\b(SIG)?CONT\b",
        "Slurm sends SIGCONT along with other signals, and bash's `wait` can lose SIGUSR1 to this trap",
    ),
    (
        r"--gpus-per-task\b",
        "each rank sees its own GPU only, which breaks peer access between ranks; use --gpus-per-node",
    ),
    (r"--gpu-bind=none", "leaves CUDA_VISIBLE_DEVICES unset: ranks see GPUs of other jobs; leave it out"),
    (
        r"\$\{?(0\b|BASH_SOURCE)",
        "Slurm runs a copy of the script, so this is a path in its spool folder; use an absolute path",
    ),
    (
        r"\bbash\s+-l?c\s+\"[^\"]*(?<!\\)\$\{?SLURM_(PROCID|LOCALID|NODEID)",
        "inside double quotes this expands in the batch script, where it is 0 for every rank; use single "
        "quotes or a file",
    ),
    (
        r"\bMASTER_PORT=\"?\d+\"?(\s|;|$)",
        "two jobs on one node would take the same port; derive it from SLURM_JOB_ID, below 32768",
    ),
]


def _command_traps(script: Script) -> Iterator[Finding]:
    for pattern, reason in COMMAND_TRAPS:
        for line in [*script.directives, *script.commands]:
            if re.search(pattern, line.text):
                yield Finding(line.number, line.text, reason)


def _signals(script: Script) -> Iterator[Finding]:
    line = script.directive("signal")
    if line is None:
        if script.directive("time"):
            yield Finding(0, "no --signal", "nothing tells the ranks to save before the time limit")
    elif "B:" in line.text and not script.commands_with(r"(^|[\s;&|('\"])kill\s"):
        reason = "with `B:` only this script gets the signal, and it passes it on to nobody: no rank saves"
        yield Finding(line.number, line.text, reason)


def _requeue(script: Script) -> Iterator[Finding]:
    line = script.directive("requeue")
    if (
        line is None
        and script.directive("no-requeue") is None
        and not script.commands_with("scontrol requeue")
    ):
        reason = "whether a preempted job, or one that lost a node, comes back is left to the cluster"
        yield Finding(0, "no --requeue", reason)
    appends = script.directive("open-mode")
    comes_back = line or next(iter(script.commands_with("scontrol requeue")), None)
    if comes_back and (appends is None or "append" not in appends.text) and script.directive("output"):
        reason = "without --open-mode=append a requeue cuts the log to nothing"
        yield Finding(comes_back.number, comes_back.text, reason)


def _requeue_on_term(script: Script) -> Iterator[Finding]:
    functions = _functions(script)
    for line in script.commands_with(r"\btrap\b.*\b(SIG)?(TERM|EXIT)\b"):
        called = [body for name, body in functions.items() if re.search(rf"\b{re.escape(name)}\b", line.text)]
        if any(re.search(r"scontrol\s+requeue|\bsbatch\b", text) for text in [line.text, *called]):
            reason = (
                "scancel sends SIGTERM too, so this brings cancelled jobs back; and a preempted job is "
                "requeued by Slurm itself: requeue on SIGUSR1 only"
            )
            yield Finding(line.number, line.text, reason)


def _functions(script: Script) -> dict[str, str]:
    """Bodies of shell functions that are written in the usual way, by name."""
    bodies: dict[str, str] = {}
    current = None
    for line in script.commands:
        found = re.match(r"(?:function\s+)?([A-Za-z_]\w*)\s*(?:\(\))?\s*\{(.*)", line.text)
        if found:
            current, bodies[found[1]] = found[1], found[2]
        elif current is not None:
            bodies[current] += "\n" + line.text
        if current is not None and line.text.rstrip().endswith("}"):
            current = None
    return bodies


def _resubmit(script: Script) -> Iterator[Finding]:
    for line in script.commands_with(r"(^|[\s;&|(])sbatch\s"):
        if not script.commands_with(r"\bunset\b.*SLURM_|\benv\s+-i\b"):
            reason = (
                "SLURM_* and SBATCH_* of this job become options of the new one; unset them first "
                "(all but SLURM_CONF)"
            )
            yield Finding(line.number, line.text, reason)


def _srun(script: Script) -> Iterator[Finding]:
    for line in script.commands_with(r"(^|[\s;&|(])srun\s"):
        if not re.search(r"--kill-on-bad-exit(=1)?\b|\s-K", line.text):
            yield Finding(
                line.number, line.text, "without --kill-on-bad-exit=1 the other ranks wait for a dead one"
            )
        if script.directive("cpus-per-task") and not re.search(r"--cpus-per-task|\s-c\s?\d", line.text):
            reason = "Slurm 22.05 to 23.02 do not pass --cpus-per-task on to srun; name it again"
            yield Finding(line.number, line.text, reason)
        export = script.directive("export")
        if export and "NONE" in export.text and "--export" not in line.text:
            yield Finding(line.number, line.text, "under --export=NONE a rank has no PATH; add --export=ALL")


def _directives(script: Script) -> Iterator[Finding]:
    for line in script.late:
        yield Finding(
            line.number, f"#SBATCH {line.text}", "it comes after a command: sbatch does not read it"
        )
    for line in script.directives:
        if re.search(r"(?<!\\)\$\w|\$\{|\$\(|=~", line.text):
            reason = "#SBATCH lines are not shell: variables, commands and ~ stay as they are"
            yield Finding(line.number, f"#SBATCH {line.text}", reason)


CHECKS: list[Callable[[Script], Iterator[Finding]]] = [
    _command_traps,
    _signals,
    _requeue,
    _requeue_on_term,
    _resubmit,
    _srun,
    _directives,
]
