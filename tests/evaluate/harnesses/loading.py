"""What an adapter asks ``alignkd.load`` for."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

import alignkd


def loading_spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Folders and options of each call of ``alignkd.load``, which then raises InterruptedError."""
    loaded: list[tuple[str, dict[str, Any]]] = []

    def load(folder: str, **options: Any) -> NoReturn:
        loaded.append((folder, options))
        raise InterruptedError

    monkeypatch.setattr(alignkd, "load", load)
    return loaded
