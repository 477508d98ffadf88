"""``alignkd cache`` up to its ranks, in this process. tests/teacher/test_cache_writer.py writes caches."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from alignkd.config import Config, load_config
from alignkd.run_folder.atomic_files import write_json
from alignkd.teacher_cache.folder import CachePaths, Identity, Manifest, Shard
from alignkd.teacher_cache.key import cache_key
from launcher.cli.app import app
from launcher.commands import cache, cache_job, cache_request
from launcher.commands.local_ranks import Failed


def put_cache(config: Config) -> Path:
    """A finished cache of two shards with any bytes in them."""
    folder = Path(str(config.teacher.cache))
    paths = CachePaths(folder)
    paths.shards.mkdir(parents=True)
    shards = []
    for number in range(2):
        content = b"x" * (10 + number)
        paths.shard(number).write_bytes(content)
        shards.append(Shard(4, len(content), hashlib.sha256(content).hexdigest()))
    identity = Identity(
        cache_key(config, ()), (), "weights", 8, samples=3, shard_samples=2, entries="", form="exact", top_k=0
    )
    write_json(paths.identity, identity.as_json())
    write_json(paths.manifest, Manifest(identity, tuple(shards)).as_json())
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is to be, on a machine without Slurm and without a site profile."""
    for module in (cache_job, cache_request):
        monkeypatch.setattr(module, "slurm_is_installed", lambda: False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "site"))
    return tmp_path / "cache"


@pytest.fixture
def finished(folder: Path, config_file: Path) -> Path:
    return put_cache(load_config(config_file, [f"teacher.cache={folder}"]))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each start of ranks, their number. The first start fails with exit code 3."""
    found: list[int] = []

    def run_ranks(_command: list[str], environments: list[dict[str, str]], _logs: Path) -> Failed | None:
        found.append(len(environments))
        return Failed(3, "") if len(found) == 1 else None

    monkeypatch.setattr(cache, "run_ranks", run_ranks)
    return found


def alignkd(config_file: Path, *words: object, folder: Path | None = None) -> Result:
    where = [] if folder is None else ["--set", f"teacher.cache={folder}"]
    return CliRunner().invoke(app, ["cache", str(config_file), *where, *map(str, words)])


TOP_K = ("--set", "teacher.cache_form=top_k", "--set", "distillation.divergence=forward_kl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--partition", "gpu"), "are only for a Slurm job (--nodes N)"),
        (("--time", "1:00:00"), "are only for a Slurm job (--nodes N)"),
        (("--gpus-per-node", 2), "are only for a Slurm job (--nodes N)"),
        (("--nodes", 1, "--ranks", 2), "--nodes N has --gpus-per-node instead of --ranks"),
        (("--nodes", 1, "--verify"), "and writes only"),
        (("--nodes", 1), "sbatch is not on PATH"),
        (("--verify",), "this cache of the teacher does not exist"),
        (("--set", "distillation.enabled=false"), "there is no teacher to cache"),
        (
            ("--set", "teacher.cache_form=fp4"),
            "teacher.cache_form = fp4: not valid; valid: one of exact, fp8, top_k",
        ),
        (("--set", "data.sources.0.file=none.json"), "none.json"),
        (("--set", "teacher.cache_form=top_k"), "does not work with distillation.divergence = reverse_kl"),
        (
            ("--set", "teacher.cache_form=top_k", "--set", "data.sources.0.file=none.json"),
            "does not work with distillation.divergence = reverse_kl",
        ),
        (
            ("--set", "teacher.cache_form=top_k", "--set", "teacher.placement=cached"),
            "does not work with distillation.divergence = reverse_kl",
        ),
        (
            (*TOP_K, "--set", "teacher.cache_top_k=1000"),
            "the teacher's vocabulary has 600 tokens; valid: fewer",
        ),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(
    config_file: Path, folder: Path, started: list[int], words: tuple[object, ...], message: str
) -> None:
    done = alignkd(config_file, *words, folder=folder)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not folder.exists()
    assert started == []


@pytest.mark.parametrize("words", [(), ("--nodes", 1), ("--verify",)])
def test_the_configuration_must_name_the_folder(
    config_file: Path, folder: Path, words: tuple[object, ...]
) -> None:
    done = alignkd(config_file, *words)
    assert done.exit_code == 2
    assert "teacher.cache is missing; valid: the folder of the teacher's cache" in done.stderr


def test_an_unfinished_cache_starts_ranks_whose_exit_code_counts(
    config_file: Path, finished: Path, started: list[int]
) -> None:
    CachePaths(finished).shard(1).unlink()
    assert alignkd(config_file, "--ranks", 3, folder=finished).exit_code == 3
    assert alignkd(config_file, folder=finished).exit_code == 0
    assert started == [3, 1]
    assert load_config(CachePaths(finished).config).teacher.cache == str(finished)


def test_a_second_start_is_refused_until_the_first_has_ended(
    config_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile: list[Result] = []

    def run_ranks(*_: object) -> None:
        if not meanwhile:
            before = CachePaths(folder).config.read_bytes()
            meanwhile.append(alignkd(config_file, "--set", "data.workers=7", folder=folder))
            assert CachePaths(folder).config.read_bytes() == before

    monkeypatch.setattr(cache, "run_ranks", run_ranks)
    assert alignkd(config_file, folder=folder).exit_code == 0
    (second,) = meanwhile
    assert (second.exit_code, second.stdout) == (2, "")
    refusal = f"{folder}: another `alignkd cache` is writing this cache; wait for its end, or stop it"
    assert " ".join(second.stderr.split()) == f"alignkd: error: {refusal}"
    assert alignkd(config_file, folder=folder).exit_code == 0


@pytest.mark.parametrize("words", [(), ("--nodes", 1)])
def test_a_finished_cache_is_not_written_again(
    config_file: Path, finished: Path, started: list[int], words: tuple[object, ...]
) -> None:
    done = alignkd(config_file, *words, folder=finished)
    assert done.exit_code == 0
    assert f"{finished} is finished: 0.00 GB, 8 positions of 3 samples" in done.stdout
    assert started == []
    assert not (finished / "job.sbatch").exists()


def test_a_cache_of_something_else_is_refused(config_file: Path, finished: Path, started: list[int]) -> None:
    done = alignkd(config_file, "--set", "data.max_length=99", folder=finished)
    assert done.exit_code == 2
    assert "holds the cache of something else; what differs:" in done.stderr
    assert "Give another folder (teacher.cache), or remove this one." in done.stderr
    assert started == []


def test_a_cache_in_another_form_is_refused_with_both_forms(
    config_file: Path, finished: Path, started: list[int]
) -> None:
    done = alignkd(config_file, "--set", "teacher.cache_form=fp8", folder=finished)
    assert done.exit_code == 2
    told = " ".join(done.stderr.split())
    assert "the form of the teacher's answers (teacher.cache_form; for top_k also" in told
    assert "exact in the cache, fp8 in the run" in told
    assert started == []


def test_verify_names_what_is_not_as_it_was_written(config_file: Path, finished: Path) -> None:
    sound = alignkd(config_file, "--verify", folder=finished)
    assert sound.exit_code == 0
    assert "2 shards as they were written; 0.00 GB" in sound.stdout
    path = CachePaths(finished).shard(1)
    path.write_bytes(b"y" * 11)
    flipped = alignkd(config_file, "--verify", folder=finished)
    path.unlink()
    lost = alignkd(config_file, "--verify", folder=finished)
    for done, problem in ((flipped, "has another sha256 than when it was written"), (lost, "is missing")):
        assert done.exit_code == 1
        assert f"{path} {problem}" in done.stdout
        assert str(CachePaths(finished).shard(0)) not in done.stdout
        assert "remove these files, and `alignkd cache` writes them again" in done.stdout
