"""The file system that a run folder is on, or will be."""

from __future__ import annotations

from pathlib import Path


def file_system(path: Path) -> str:
    """Type of the file system that ``path`` will be on, from /proc/mounts."""
    place, best, kind = str(existing_parent(path)), "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for line in mounts:
        mount, found = (part.encode().decode("unicode_escape") for part in line.split()[1:3])
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, found
    return kind


def existing_parent(path: Path) -> Path:
    """``path`` or its nearest parent that exists."""
    return next(parent for parent in [path, *path.parents] if parent.exists())
