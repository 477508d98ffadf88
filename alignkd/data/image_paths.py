"""Where the images of untrusted records are: below their folder, or they are bad. Without torch."""

from __future__ import annotations

import stat
from pathlib import Path

from alignkd.errors import raise_if_passing


class BadImage(Exception):
    """An unusable image. ``reason`` is a short category, used for counting."""

    def __init__(self, reason: str, path: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = f"{path!r:.300}" + (f" ({detail})" if detail else "")
        super().__init__(f"{reason}: {self.detail}")


def resolve_below(folder: str | Path, path: str) -> Path:
    """The regular file at ``path``, with links resolved; it must be inside ``folder``."""
    try:
        root = Path(folder).resolve(strict=True)
        file = (root / path).resolve(strict=True)
        if not file.is_relative_to(root):
            raise BadImage("image path leaves the image folder", path)
        # A pipe or a device could block, or never end.
        if not stat.S_ISREG(file.stat().st_mode):
            raise BadImage("image is not a regular file", path)
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("missing image", path, f"looked in {folder}") from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL byte, a cycle of links
        raise_if_passing(error, Path(folder) / path)
        raise BadImage("unreadable image", path, str(error)) from error
    return file
