from __future__ import annotations

import json
import time
from pathlib import Path

from alignkd.run_folder.progress import Progress


def test_a_long_phase_gives_signs_of_life(tmp_path: Path) -> None:
    progress = Progress(tmp_path, writes=True, interval=0.0)
    with progress.alive("converting", every=0.02):
        seen = set()
        while len(seen) < 3:
            time.sleep(0.01)
            if (tmp_path / "progress.json").exists():
                values = json.loads((tmp_path / "progress.json").read_text())
                assert values["phase"] == "converting"
                seen.add(values["updated"])
    last = (tmp_path / "progress.json").read_text()
    time.sleep(0.1)
    assert (tmp_path / "progress.json").read_text() == last
