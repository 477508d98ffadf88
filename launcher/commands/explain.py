"""``alignkd explain SCRIPT``: Slurm pitfalls in any batch script, by line, each with its reason.

The script is read, not run. The pitfalls were measured on a real Slurm 22.05 (docs/slurm.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import UserError


@dataclass(frozen=True)
class Finding:
    line: int  # in the file, from 1; 0: about the script as a whole
    text: str
    reason: str


@dataclass(frozen=True)
class Line:
    number: int
    text: str


@dataclass(frozen=True)
class Script:
    """``commands`` have no comments, and are joined at backslashes; ``directives`` are the options of
    ``#SBATCH`` lines before the first command, ``late`` those after it."""

    commands: list[Line]
    directives: list[Line]
    late: list[Line]

    def directive(self, name: str) -> Line | None:
        wanted = re.compile(rf"--{name}(?:[=\s]|$)")
        return next((line for line in self.directives if wanted.match(line.text)), None)

    def commands_with(self, pattern: str) -> list[Line]:
        return [line for line in self.commands if re.search(pattern, line.text)]


def explain(path: Path) -> list[Finding]:
    """All findings, in line order. Raises UserError when the file cannot be read."""
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


# (pattern of a command, why it is a pitfall)
COMMAND_PITFALLS = [
    (
        r"\b(torchrun|torch\.distributed\.(run|launch))\b",
        "torchrun swallows SIGUSR1 or dies of it, so ranks cannot save before the time limit; start one task "
        "per GPU with srun, and take RANK from SLURM_PROCID",
    ),
    (
        r"(^|[\s/])deepspeed(\s|$)(?!=)",
        "the deepspeed launcher exits with 0 when a signal kills its child, so a killed run looks finished; "
        "start the ranks with srun",
    ),
    (
        r"\btrap\b.*\b(SIG)?CONT\b",
        "Slurm sends SIGCONT along with other signals, and this trap can make bash's `wait` miss SIGUSR1",
    ),
    (
        r"--gpus-per-task\b",
        "each rank sees only its own GPU, which breaks peer access between ranks; use --gpus-per-node",
    ),
    (r"--gpu-bind=none", "leaves CUDA_VISIBLE_DEVICES unset, so ranks see the GPUs of other jobs; omit it"),
    (
        r"\$\{?(0\b|BASH_SOURCE)",
        "Slurm runs a copy of the script, so this path is in Slurm's spool folder; use an absolute path",
    ),
    (
        r"\bbash\s+-l?c\s+\"[^\"]*(?<!\\)\$\{?SLURM_(PROCID|LOCALID|NODEID)",
        "in double quotes this is expanded by the batch script, where it is 0 for every rank; use single "
        "quotes or a script file",
    ),
    (
        r"\bMASTER_PORT=\"?\d+\"?(\s|;|$)",
        "two jobs on one node would use the same port; derive one below 32768 from SLURM_JOB_ID",
    ),
]


def _command_pitfalls(script: Script) -> Iterator[Finding]:
    for pattern, reason in COMMAND_PITFALLS:
        for line in [*script.directives, *script.commands]:
            if re.search(pattern, line.text):
                yield Finding(line.number, line.text, reason)


def _signals(script: Script) -> Iterator[Finding]:
    line = script.directive("signal")
    if line is None:
        if script.directive("time"):
            yield Finding(0, "no --signal", "nothing tells the ranks to save before the time limit")
    elif "B:" in line.text and not script.commands_with(r"(^|[\s;&|('\"])kill\s"):
        reason = "with `B:` only this script gets the signal, and it does not forward it: no rank saves"
        yield Finding(line.number, line.text, reason)


def _requeue(script: Script) -> Iterator[Finding]:
    line = script.directive("requeue")
    if (
        line is None
        and script.directive("no-requeue") is None
        and not script.commands_with("scontrol requeue")
    ):
        reason = "whether a job is requeued after a preemption or a lost node is left to the cluster"
        yield Finding(0, "no --requeue", reason)
    appends = script.directive("open-mode")
    comes_back = line or next(iter(script.commands_with("scontrol requeue")), None)
    if comes_back and (appends is None or "append" not in appends.text) and script.directive("output"):
        reason = "without --open-mode=append a requeue truncates the log"
        yield Finding(comes_back.number, comes_back.text, reason)


def _requeue_on_term(script: Script) -> Iterator[Finding]:
    functions = _functions(script)
    for line in script.commands_with(r"\btrap\b.*\b(SIG)?(TERM|EXIT)\b"):
        called = [body for name, body in functions.items() if re.search(rf"\b{re.escape(name)}\b", line.text)]
        if any(re.search(r"scontrol\s+requeue|\bsbatch\b", text) for text in [line.text, *called]):
            reason = (
                "scancel sends SIGTERM too, so this requeues cancelled jobs, and Slurm itself requeues "
                "preempted ones; requeue on SIGUSR1 only"
            )
            yield Finding(line.number, line.text, reason)


def _functions(script: Script) -> dict[str, str]:
    """The bodies of shell functions in the usual notation, by name."""
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
                "SLURM_* and SBATCH_* variables of this job become options of the new one; unset all of "
                "them first, except SLURM_CONF"
            )
            yield Finding(line.number, line.text, reason)


def _srun(script: Script) -> Iterator[Finding]:
    for line in script.commands_with(r"(^|[\s;&|(])srun\s"):
        if not re.search(r"--kill-on-bad-exit(=1)?\b|\s-K", line.text):
            yield Finding(
                line.number, line.text, "without --kill-on-bad-exit=1 the other ranks wait for a dead rank"
            )
        if script.directive("cpus-per-task") and not re.search(r"--cpus-per-task|\s-c\s?\d", line.text):
            reason = "Slurm 22.05 to 23.02 do not pass --cpus-per-task on to srun; repeat it"
            yield Finding(line.number, line.text, reason)
        export = script.directive("export")
        if export and "NONE" in export.text and "--export" not in line.text:
            yield Finding(line.number, line.text, "with --export=NONE ranks have no PATH; add --export=ALL")


def _directives(script: Script) -> Iterator[Finding]:
    for line in script.late:
        yield Finding(
            line.number, f"#SBATCH {line.text}", "sbatch does not read it, because it comes after a command"
        )
    for line in script.directives:
        if re.search(r"(?<!\\)\$\w|\$\{|\$\(|=~", line.text):
            reason = "#SBATCH lines are not shell code: variables, commands and ~ are not expanded"
            yield Finding(line.number, f"#SBATCH {line.text}", reason)


CHECKS: list[Callable[[Script], Iterator[Finding]]] = [
    _command_pitfalls,
    _signals,
    _requeue,
    _requeue_on_term,
    _resubmit,
    _srun,
    _directives,
]
