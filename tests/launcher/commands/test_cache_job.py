"""The job that writes a cache: what is submitted, and what is refused, here and there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from alignkd.config import Config, load_config
from alignkd.errors import AlignkdError, UserError
from alignkd.teacher_cache.folder import CachePaths
from launcher.backends.base import QueuedJob
from launcher.commands import cache_job, cache_request
from launcher.commands.cache_job import folder_to_write, submit_cache
from launcher.commands.evaluate_job import JobSize
from tests.launcher.render.test_job_scripts import directives


@pytest.fixture
def config(make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a cache that is not begun; Slurm is there, and its queue is empty."""
    for module in (cache_job, cache_request):
        monkeypatch.setattr(module, "slurm_is_installed", lambda: True)
    monkeypatch.setattr(cache_request, "queued_jobs", lambda _: [])
    return make_config(f"teacher.cache={tmp_path / 'cache'}")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []
    monkeypatch.setattr(cache_job, "script_problems", lambda _slurm, _nodes, _scripts, container: container)
    monkeypatch.setattr(cache_job, "submit", lambda folder: found.append(folder) or "7")
    return found


def test_the_job_has_the_size_that_was_asked_for(config: Config, submitted: list[Path]) -> None:
    folder = folder_to_write(config, Console(quiet=True))
    assert folder is not None
    assert submit_cache(folder, config, JobSize(2, 4)) == "7"
    assert submitted == [folder]
    values = directives((folder / "job.sbatch").read_text())
    assert (values["nodes"], values["ntasks-per-node"], values["job-name"]) == ("2", "4", "cache-cache")
    assert load_config(CachePaths(folder).config).teacher.cache == str(folder)
    assert (folder / "logs").is_dir()


def test_a_cache_is_not_written_beside_a_job_that_writes_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by another job nor here: the second writer would remove what the first is writing."""
    folder = tmp_path / "cache"
    jobs = {folder: [QueuedJob("5", "RUNNING", "", None, "x")]}
    monkeypatch.setattr(cache_request, "queued_jobs", jobs.get)
    with pytest.raises(UserError, match="job 5 is running already; wait for its end"):
        folder_to_write(config, Console(quiet=True))
    jobs.clear()  # Slurm does not answer, and nothing was ever submitted
    assert folder_to_write(config, Console(quiet=True)) == folder
    folder.mkdir()
    (folder / "job.sbatch").touch()
    with pytest.raises(AlignkdError, match="Slurm does not answer, so a job may be writing there"):
        folder_to_write(config, Console(quiet=True))
    monkeypatch.setattr(cache_request, "slurm_is_installed", lambda: False)
    assert folder_to_write(config, Console(quiet=True)) == folder


def test_of_two_starts_at_once_the_second_submits_nothing(
    config: Config, submitted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked at the queue; the other one is writing here, or has submitted since."""
    folder = folder_to_write(config, Console(quiet=True))
    assert folder is not None
    with cache_request.request(folder, config), pytest.raises(UserError, match="is writing this cache; wait"):
        submit_cache(folder, config, JobSize(1))
    monkeypatch.setattr(cache_request, "queued_jobs", lambda _: [QueuedJob("5", "PENDING", "", None, "x")])
    with pytest.raises(UserError, match="job 5 is pending already; wait for its end"):
        submit_cache(folder, config, JobSize(1))
    assert submitted == []


def test_nothing_is_written_for_a_job_that_is_refused(
    config: Config, submitted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = {"kind": "pyxis", "image": "x", "mounts": [str(tmp_path)]}
    slurm = config.slurm.model_validate({"container": container})
    with pytest.raises(UserError, match=r"model\.teacher = .*: no mount of the container shows it there"):
        submit_cache(tmp_path / "cache", config.model_copy(update={"slurm": slurm}), JobSize(1))
    monkeypatch.setattr(cache_job, "slurm_is_installed", lambda: False)
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        submit_cache(tmp_path / "cache", config, JobSize(1))
    assert submitted == []
    assert not (tmp_path / "cache").exists()
