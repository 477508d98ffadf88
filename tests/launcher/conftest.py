from collections.abc import Callable
from pathlib import Path

import pytest

from alignkd.config import Config, load_config
from launcher.run.manifest import make_manifest

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mobilevlm_v2_tiny"
DATA = '[{"id": "a", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]'


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration that can be launched on CPUs: the tiny teacher and student, one text-only sample."""
    (tmp_path / "data.json").write_text(DATA)
    path = tmp_path / "alignkd.yaml"
    path.write_text(
        f"model: {{teacher: {FIXTURE / 'teacher'}, student: {FIXTURE / 'student'}}}\n"
        "data: {sources: [{file: data.json}]}\n"
        "training: {global_batch_size: 8, micro_batch_size: 2, precision: fp32}\n"
        "slurm: {gpu_option: none}\n"
    )
    return path


@pytest.fixture
def make_config(config_file: Path) -> Callable[..., Config]:
    return lambda *overrides: load_config(config_file, overrides)


@pytest.fixture
def make_run(make_config, monkeypatch) -> Callable[..., tuple[Path, object]]:
    """A run folder without a launch: (folder, manifest)."""
    from launcher.run.folder import create_run_folder

    def make(nodes: int = 1, gpus_per_node: int = 2, device: str = "cpu", backend: str = "local"):
        manifest = make_manifest(make_config(), nodes, gpus_per_node, 1, backend, device)
        return create_run_folder(make_config(), manifest, {}, None, {}), manifest

    return make
