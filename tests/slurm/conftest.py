"""The real cluster, started once for all tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.conftest import DATA, FIXTURE
from tests.needs import cannot_run
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.runs import Runs


@pytest.fixture(scope="package")  # it starts processes on its own account, which would disturb other tests
def slurm() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        cannot_run(missing)
    # Not pytest's folder: sockets have short paths only.
    folder = Path(tempfile.mkdtemp(prefix="alignkd-slurm-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The cluster with an empty queue and all nodes up, before and after."""
    slurm.wait_for_nodes()
    yield slurm
    slurm.cancel_all()


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> Runs:
    (tmp_path / "data.json").write_text(DATA)
    config = tmp_path / "alignkd.yaml"
    config.write_text(
        f"model: {{teacher: {FIXTURE / 'teacher'}, student: {FIXTURE / 'student'}}}\n"
        "data: {sources: [{file: data.json}]}\n"
        "training: {global_batch_size: 8, micro_batch_size: 1, precision: fp32}\n"
    )
    return Runs(cluster, tmp_path, config)
