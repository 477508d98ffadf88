"""What the launcher tells the watch for hangs. test_local.py and test_ssh.py watch real ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.backends import watch
from launcher.run.attempts import begin
from launcher.run.manifest import Manifest


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("here", ["here"] * 4), ("one,two", ["one", "one", "two", "two"])],
)
def test_the_watch_for_hangs_knows_the_node_of_each_rank_and_the_times_of_the_configuration(
    make_run: Callable[..., tuple[Path, Manifest]],
    monkeypatch: pytest.MonkeyPatch,
    nodes: str,
    expected: list[str],
) -> None:
    run, _ = make_run(nodes=2, gpus_per_node=2)
    begin(run, "ssh", nodes, None)
    monkeypatch.setattr(watch, "HangWatch", lambda *arguments: arguments)
    found = cast(Any, watch._hang_watch(run, cast(Any, SimpleNamespace(size=4))))
    assert found == (run, 4, expected, 600, 300)
