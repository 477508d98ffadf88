"""A student from any checkpoint of any stage, with a card that says where it comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignkd.checkpoint import resume
from alignkd.checkpoint.export import export_engine, export_run
from alignkd.checkpoint.model_card import model_card
from alignkd.distributed.ranks import Ranks
from alignkd.engine.setup import prepare
from alignkd.models.building import BuildOptions
from alignkd.models.loading import fingerprint, load_model
from alignkd.run_folder.checkpoints import read_manifest
from alignkd.run_folder.paths import RunPaths
from alignkd.run_folder.progress import Progress
from tests import tiny
from tests.checkpoint.test_damaged_checkpoints import go_on
from tests.ranks import RankPool


def export_loaded(ranks: Ranks, run: str, out: str) -> None:
    """The weights as the engine has them after loading the newest checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "PATIENCE_SECONDS", 0.2)
        state = prepare(Path(run), ranks, Progress(Path(run), writes=False))
    export_engine(state.engine, state.config, Path(out), ranks)


def same_weights(folder: Path, other: Path) -> bool:
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_student_is_exported_from_any_checkpoint_of_any_stage(
    two_ranks: RankPool, tmp_path: Path, stage: int
) -> None:
    run = tiny.write_run(tmp_path / "run", 2, student__zero_stage=stage, training__precision="bf16")
    assert [code for code, _ in two_ranks.run(go_on, str(run))] == [0, 0]
    # Where DeepSpeed would look, and it is neither of the two that are asked for.
    (RunPaths(run).checkpoints / "latest").write_text("step-7")
    assert export_run(run, tmp_path / "newest", None, "safetensors") == 4
    assert export_run(run, tmp_path / "older", 2, "safetensors") == 2
    assert same_weights(tmp_path / "newest", RunPaths(run).student)
    shutil.rmtree(RunPaths(run).checkpoints / "step-4")
    two_ranks.run(export_loaded, str(run), str(tmp_path / "loaded"))
    assert same_weights(tmp_path / "older", tmp_path / "loaded")
    assert not same_weights(tmp_path / "older", tmp_path / "newest")
    assert not any("adapter" in name for name in load_file(tmp_path / "older" / "model.safetensors"))
    if stage == 2:
        the_cards_say_where_it_comes_from(run, tmp_path / "newest", tmp_path / "older")


def the_cards_say_where_it_comes_from(run: Path, newest: Path, older: Path) -> None:
    manifest = read_manifest(RunPaths(run).checkpoints / "step-2")
    for folder, step in ((RunPaths(run).student, 4), (newest, 4), (older, 2)):
        text = (folder / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        facts = yaml.safe_load(front)
        assert facts["license"] is None  # the user's to choose
        assert facts["alignkd"] == {
            "version": manifest["versions"]["alignkd"],
            "step": step,
            "student_start": "student",
            "teacher": "teacher",
            "teacher_sha256": manifest["teacher"],
            "data_sha256": manifest["data"],
        }
        row = tiny.metrics_rows(run)[step - 1]
        assert f"| loss | {row['loss']:.6g} |" in body
        shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
        assert shown["training"] == manifest["config"]["training"]
        assert shown["data"]["sources"][0]["file"] == "v1.json"
        assert str(run.parent) not in text  # a published model says nothing of the machine
        assert fingerprint(load_model(folder, BuildOptions(torch.bfloat16)))


def test_a_card_is_written_without_a_metrics_row_or_a_teacher(tmp_path: Path) -> None:
    config = {
        "run": {"name": "alone"},
        "model": {"teacher": None, "student": "/x/a: # start"},
        "data": {"sources": [], "max_length": 8},
        **{name: {} for name in ("training", "distillation", "student", "teacher")},
    }
    RunPaths(tmp_path).metrics.write_text(json.dumps({"step": 1, "loss": 1.0}) + '\n{"step": 2, "lo')
    facts = {"config": config, "data": "d", "teacher": None}
    text = model_card(tmp_path, 2, facts, {"alignkd": "0"})
    assert "There is no row of step 2." in text
    assert "trained on labels alone" in text
    assert yaml.safe_load(text.split("---\n")[1])["alignkd"]["student_start"] == "a: # start"
    assert "| loss | 1 |" in model_card(tmp_path, 1, facts, {"alignkd": "0"})
