"""What fits into the host's memory: running out of it there ends the process, not the step."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Result

# Of what is free: tensors are counted, but neither kernels' scratch memory nor what the allocator loses.
USABLE_SHARE = 0.75


def free_memory() -> int:
    """Bytes that the kernel would give without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def usable_memory() -> int:
    return int(free_memory() * USABLE_SHARE)


def limit_memory() -> None:
    """The second line: what was predicted too low fails, before the kernel ends the process."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (int(free_memory() * 0.9), limit))


def predicted_peak(result: Result, measured: Sequence[Result]) -> int | None:
    """Bytes at most, from the method's peaks with fewer samples: linear in the samples (padded to the
    longest), between linear and quadratic in the length. None when none was measured."""
    length, samples = max(result.lengths), len(result.lengths)
    bounds = []
    for other in measured:
        if other.method == result.method and other.memory is not None and len(other.lengths) < samples:
            ratio = length / max(other.lengths)
            growth = max(ratio, ratio**2) * samples / len(other.lengths)
            bounds.append(int(other.memory.peak * growth))
    return min(bounds, default=None)
