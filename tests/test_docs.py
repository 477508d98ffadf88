"""What the manuals name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MANUALS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: path.name)
def test_files_and_tests_that_a_manual_names_exist(manual: Path) -> None:
    text = manual.read_text()
    for path, _, name in re.findall(
        r"`((?:alignkd|benchmarks|examples|ds_configs|launcher|slurm|tests)/[\w./-]*)(::(\w+))?`", text
    ):
        assert (ROOT / path).exists(), path
        assert f"def {name}(" in (ROOT / path).read_text() if name else True, name
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (manual.parent / link).exists(), link
