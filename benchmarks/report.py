"""Results as a Markdown section, as JSON and with the facts that a number is worth nothing without."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import alignkd

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
FOLDER = ROOT / "docs" / "performance"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "sentencepiece", "pillow")


def facts(arguments: Sequence[str]) -> dict[str, Any]:
    """Commit, machine, versions and command of this process."""
    module = sys.modules["__main__"].__spec__
    name = "benchmarks" if module is None else module.name.removesuffix(".__main__")
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "machine": _machine(),
        "load": round(os.getloadavg()[0], 2),
        "versions": _versions(),
        "command": shlex.join(["python", "-m", name, *arguments]),
    }


def _versions() -> dict[str, str]:
    # Not from alignkd's metadata: a checkout on PYTHONPATH has none.
    own = {"python": platform.python_version(), "alignkd": alignkd.__version__}
    return own | {package: metadata.version(package) for package in PACKAGES}


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # What a benchmark writes itself does not make the code another.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + (" with changes" if changed else "")


def _machine() -> str:
    cores = f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads of torch"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{_cpu_name()}, {cores}, {memory:.0f} GiB"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        text = f"{device.name}, {device.total_memory / 2**30:.0f} GiB; {text}"
    return text


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(name: str, measured: dict[str, Any], body: str) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in measured["versions"].items())
    return (
        f"{body}\n\n"
        f"`{measured['command']}`, {measured['date']}, commit {measured['commit']}, load at the start "
        f"{measured['load']}.\n{measured['machine']}.\n{versions}.\n"
    )


def as_json(measured: dict[str, Any], results: Any) -> str:
    return json.dumps({"measured": measured, "results": results}, indent=1) + "\n"


def publish(name: str, measured: dict[str, Any], body: str, results: Any) -> None:
    """Write ``docs/performance/NAME.json`` and replace the section NAME of docs/performance.md."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(as_json(measured, results), encoding="utf-8")
    replace_section(DOCUMENT, name, section(name, measured, body))


def replace_section(document: Path, name: str, text: str) -> None:
    """What stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; they must be there."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{document}: no section {begin.strip()} ... {end.strip()}")
    document.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
