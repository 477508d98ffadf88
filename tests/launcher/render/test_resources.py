import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.render.resources import resource_folder, source_checkout

ROOT = Path(__file__).parents[3]


def test_a_checkout_uses_its_own_folders() -> None:
    assert resource_folder("ds_configs") == ROOT / "ds_configs"
    with pytest.raises(FileNotFoundError, match="broken installation"):
        resource_folder("nothing")


def test_only_a_checkout_has_a_root(tmp_path: Path) -> None:
    assert source_checkout() == ROOT
    (tmp_path / "site-packages" / "launcher").mkdir(parents=True)
    assert source_checkout(tmp_path / "site-packages" / "launcher") is None


def test_a_wheel_carries_templates_and_presets(tmp_path) -> None:
    """Built from the tree, unpacked elsewhere, read without the checkout."""
    build = "import os, sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    for name in ("page.html.j2", "macros.html.j2", "style.css"):
        assert (installed / "launcher" / "report" / name).is_file()
    read = (
        "import launcher.render.deepspeed as r, launcher.backends.slurm.client, json, sys\n"
        "import launcher.render.resources as s\n"
        "from alignkd.config.presets import PRESETS, preset_text\n"
        "assert s.__file__.startswith(sys.argv[1]), s.__file__\n"
        "[preset_text(name) for name in PRESETS]\n"
        "for folder in ('ds_configs', 'slurm'):\n"
        "    found = s.resource_folder(folder)\n"
        "    assert str(found).startswith(sys.argv[1]), found\n"
        "    print(*sorted(path.name for path in found.iterdir()))\n"
        "assert s.source_checkout() is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", read, str(installed)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for folder, line in zip(("ds_configs", "slurm"), done.stdout.splitlines(), strict=True):
        assert line.split() == sorted(path.name for path in (ROOT / folder).iterdir())
