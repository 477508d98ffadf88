from collections.abc import Callable
from pathlib import Path

import pytest

BASE = """
model:
  teacher: models/teacher
  student: models/student
data:
  sources:
    - {file: data/a.json, image_folder: images}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes text to a configuration file and returns its path."""

    def write_text(text: str) -> Path:
        path = tmp_path / "alignkd.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text
