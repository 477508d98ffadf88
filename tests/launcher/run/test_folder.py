import json
import os

import pytest

from alignkd.config import load_config
from alignkd.errors import UserError
from launcher.run.folder import create_run_folder, run_path, write_job
from launcher.run.manifest import file_hash, git_commit, make_manifest, read_manifest


@pytest.fixture
def create(make_config):
    def make(*overrides: str, scripts: dict[str, str] | None = None):
        config = make_config(*overrides)
        manifest = make_manifest(config, 2, 1, 2, "local", "cpu")
        return config, create_run_folder(config, manifest, {"a": 1}, {"b": 2}, scripts or {})

    return make


def test_a_new_run_folder_holds_all_that_a_rank_reads(create) -> None:
    config, run = create(scripts={"rank.sh": "#!/bin/sh\n"})
    assert run == run_path(config)
    assert load_config(run / "config.yaml") == config
    assert json.loads((run / "ds/student.json").read_text()) == {"a": 1}
    assert json.loads((run / "ds/teacher.json").read_text()) == {"b": 2}
    assert (run / "rank.sh").stat().st_mode & 0o111
    assert (run / "logs").is_dir()
    manifest = read_manifest(run)
    assert (manifest.nodes, manifest.gpus_per_node, manifest.world_size) == (2, 1, 2)
    assert manifest.data == {config.data.sources[0].file: file_hash(run.parents[1] / "data.json")}
    assert manifest.versions["python"].startswith("3.")
    assert [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize(("umask", "folder", "script"), [(0o077, 0o700, 0o700), (0o027, 0o750, 0o750)])
def test_permissions_follow_the_umask_and_env_sh_is_private(
    create, umask: int, folder: int, script: int
) -> None:
    before = os.umask(umask)
    try:
        _, run = create(scripts={"rank.sh": "#!/bin/sh\n", "env.sh": ""})
    finally:
        os.umask(before)
    modes = {name: (run / name).stat().st_mode & 0o777 for name in (".", "logs", "rank.sh", "env.sh")}
    assert modes == {".": folder, "logs": folder, "rank.sh": script, "env.sh": 0o600}
    assert (run / "config.yaml").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_existing_run_is_never_overwritten(create) -> None:
    _, run = create()
    (run / "manifest.json").write_text("mine")
    with pytest.raises(UserError, match=r"--name.*alignkd resume .*/run`.*move it away"):
        create()
    assert (run / "manifest.json").read_text() == "mine"
    create("run.name=other")


def test_a_dangling_link_counts_as_an_existing_run(create, make_config) -> None:
    run = run_path(make_config())
    run.parent.mkdir()
    run.symlink_to(run.parent / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        create()


def test_a_failed_creation_leaves_nothing_behind(create, make_config) -> None:
    with pytest.raises(TypeError):
        create(scripts={"job.sbatch": None})
    assert list(run_path(make_config()).parent.iterdir()) == []


def test_an_unwritable_parent_folder_is_a_user_error(create, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        create("run.folder=" + str(tmp_path / "file"))


def test_a_folder_without_a_valid_manifest_is_not_a_run(tmp_path) -> None:
    for text in (None, "[]", "{", '{"nodes": 1}'):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="not a run folder"):
            read_manifest(tmp_path)


def test_an_installed_copy_has_no_commit(tmp_path) -> None:
    assert git_commit(tmp_path) is None


def test_a_job_s_folder_gets_its_scripts_and_a_folder_of_logs(tmp_path):
    write_job(tmp_path, {"job.sbatch": "#!/bin/bash\n", "env.sh": "export TOKEN=1\n"})
    assert (tmp_path / "logs").is_dir()
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("logs", "job.sbatch", "env.sh")]
    assert modes == [modes[0], modes[0], 0o600]


def test_a_job_s_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written"):
        write_job(tmp_path, {"job.sbatch": ""})
    assert not (tmp_path / "job.sbatch").exists()
