"""Builds DeepSpeed's CPU communication operator once, before the ranks would all build it at the same time.

torch guards a build with a file named ``lock``. A process that is killed while it builds leaves that file
behind, and every later start waits for it without end; so it is looked after here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from alignkd.errors import AlignkdError, UserError
from launcher.run.files import read_json, write_json

OPERATOR = "deepspeed_shm_comm"
STALE_SECONDS = 120.0
BUILD_SECONDS = 600.0
BUILD_COMMAND = (sys.executable, "-m", "alignkd.engine.operators")


def build_cpu_operators(
    environment: Mapping[str, str],
    note: Callable[[str], None],
    command: Sequence[str] = BUILD_COMMAND,
    time_out: float = BUILD_SECONDS,
) -> None:
    """Build the operator, or return at once when these versions have built it before.

    ``environment`` is a rank's. ``note`` tells the user what takes time. Raises UserError for a missing
    compiler or ninja, AlignkdError when the build fails or hangs.
    """
    folder = extensions_folder(environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); TORCH_EXTENSIONS_DIR names another"
        ) from error
    stamp = folder / f"{OPERATOR}.alignkd.json"
    if _is_built(folder, stamp):
        return
    _check_tools(environment)
    with _one_at_a_time(folder / f".{OPERATOR}.alignkd-lock", note, time_out):
        _clear_stale_locks(folder, note, time_out)
        if _is_built(folder, stamp):  # by the one that was waited for
            return
        note("building DeepSpeed's CPU operator (once)")
        _build(command, environment, folder, time_out)
        write_json(stamp, _versions())


def _is_built(folder: Path, stamp: Path) -> bool:
    built = read_json(stamp) == _versions() and any(folder.glob(f"**/{OPERATOR}.so"))
    return built and not _locks(folder)


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where torch keeps compiled extensions: what the user says, else a folder of this virtual environment.

    torch's default is one folder for all environments, where each rebuilds what another one has built.
    """
    if environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(environment["TORCH_EXTENSIONS_DIR"])
    cache = environment.get("XDG_CACHE_HOME") or str(
        Path(environment.get("HOME", "~")).expanduser() / ".cache"
    )
    return Path(cache) / "alignkd" / f"extensions-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}"


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "prefix": sys.prefix}
    for name in ("torch", "deepspeed"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _check_tools(environment: Mapping[str, str]) -> None:
    path = environment.get("PATH")
    missing = []
    compiler = environment.get("CXX", "g++")
    if shutil.which(compiler, path=path) is None:
        missing.append(f"the C++ compiler {compiler} (Debian: apt-get install g++)")
    if shutil.which("ninja", path=path) is None:
        missing.append("ninja (pip install ninja)")
    if missing:
        raise UserError(
            f"training on the CPU compiles a DeepSpeed operator; not on PATH: {', '.join(missing)}"
        )


@contextlib.contextmanager
def _one_at_a_time(path: Path, note: Callable[[str], None], time_out: float) -> Iterator[None]:
    """A lock that the kernel releases when its holder dies, however it dies."""
    with path.open("a") as file:
        end, told = time.monotonic() + time_out, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise AlignkdError(
                        f"{path}: another launch has been building for {time_out:.0f} s"
                    ) from None
                if not told:
                    note("waiting for another launch that builds the CPU operator")
                    told = True
                time.sleep(0.2)
        yield


def _locks(folder: Path) -> list[Path]:
    """torch's lock of this operator; by default it lies below a folder per Python and device."""
    return [*folder.glob(f"{OPERATOR}/lock"), *folder.glob(f"*/{OPERATOR}/lock")]


def _clear_stale_locks(folder: Path, note: Callable[[str], None], time_out: float) -> None:
    """Remove locks that nobody holds. A process of this machine that builds has its lock open."""
    end, told = time.monotonic() + time_out, False
    while locks := _locks(folder):
        for lock in locks:
            with contextlib.suppress(FileNotFoundError):
                age = time.time() - lock.stat().st_mtime
                if age > STALE_SECONDS and not _is_open(lock):
                    lock.unlink()
                    note(f"removed a stale build lock, {age / 60:.0f} minutes old: {lock}")
        if not (locks := _locks(folder)):
            return
        if time.monotonic() > end:
            raise AlignkdError(
                f"{locks[0]}: another build has held this lock for {time_out:.0f} s; "
                "if none runs, remove the file and start again"
            )
        if not told:
            note(f"waiting for another build, or until its lock is {STALE_SECONDS:.0f} s old: {locks[0]}")
            told = True
        time.sleep(0.2)


def _is_open(path: Path) -> bool:
    """Does a process of this machine (that we may look at) have the file open?"""
    target = os.path.realpath(path)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == target:
                return True
    return False


def _build(command: Sequence[str], environment: Mapping[str, str], folder: Path, time_out: float) -> None:
    try:
        done = subprocess.run(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=time_out,
        )
    except subprocess.TimeoutExpired as error:
        raise AlignkdError(
            f"DeepSpeed's CPU operator was not built within {time_out:.0f} s; the build folder is {folder}, "
            "a file named `lock` in it that no running build holds must be removed"
        ) from error
    if done.returncode != 0:
        last = "\n".join(f"  | {line}" for line in done.stdout.splitlines()[-30:])
        raise AlignkdError(
            f"DeepSpeed's CPU operator could not be built (exit code {done.returncode}):\n{last}"
        )


def main() -> int:
    """For a rank of a job, which has no launcher beside it: build, print the folder of the operators."""
    from alignkd.errors import report_error

    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions_folder(os.environ))}
    try:
        build_cpu_operators(environment, lambda text: print(text, file=sys.stderr))
    except AlignkdError as error:
        return report_error(error)
    print(environment["TORCH_EXTENSIONS_DIR"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
