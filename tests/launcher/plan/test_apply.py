"""Edits of a file that people wrote."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest

from alignkd.config.presets import PRESETS, preset_text
from alignkd.config.yaml_reader import parse_yaml
from alignkd.errors import UserError
from launcher.plan.apply import apply_changes, edited

FILE = """\
# mine
model: {student: s}  # a comment with a colon: and more
training:   # how
  # over all ranks
  global_batch_size: 128
  micro_batch_size: 8  # fits

stages:
  finetune:
    run: {name: x}
  pretrain:
    training: {epochs: 2, micro_batch_size: 16}
"""


@pytest.mark.parametrize(
    ("keys", "value", "old", "new"),
    [
        ("training.micro_batch_size", 2, "size: 8  # fits", "size: 2  # fits"),
        ("training.epochs", 3, "  # over all ranks\n", "  # over all ranks\n  epochs: 3\n"),
        ("model.teacher", "t", "{student: s}  #", "{teacher: t, student: s} #"),
        ("teacher.placement", "zero3_node", "model: {", "teacher:\n  placement: zero3_node\nmodel: {"),
        (
            "stages.finetune.student.offload",
            True,
            "    run: {name: x}",
            "    student:\n      offload: true\n    run: {name: x}",
        ),
        ("stages.pretrain.training.micro_batch_size", 1, "size: 16}", "size: 1}"),
        ("stages.pretrain.data.workers", 0, "    training:", "    data:\n      workers: 0\n    training:"),
    ],
)
def test_nothing_but_the_value_changes(keys: str, value: Any, old: str, new: str) -> None:
    assert FILE.count(old) == 1
    text = edited(FILE, {tuple(keys.split(".")): value})
    assert text == FILE.replace(old, new)
    expected = parse_yaml(FILE)
    section = expected
    for key in keys.split(".")[:-1]:
        section = section.setdefault(key, {})
    section[keys.split(".")[-1]] = value
    assert parse_yaml(text) == expected


def test_a_link_line_endings_and_permissions_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "shared.yaml", tmp_path / "a.yaml"
    target.write_bytes(b"training:  # how\r\n  micro_batch_size: 8\r\n")
    target.chmod(0o600)
    link.symlink_to(target.name)
    apply_changes(link, None, {"training.micro_batch_size": 2})
    assert link.is_symlink()
    assert target.read_bytes() == b"training:  # how\r\n  micro_batch_size: 2\r\n"
    assert [path.stat().st_mode & 0o777 for path in (target, tmp_path / "a.yaml.bak")] == [0o600, 0o600]


def test_the_old_file_is_kept_as_a_backup(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(FILE)
    lines = apply_changes(path, "pretrain", {"training.micro_batch_size": 1, "student.zero_stage": 3})
    assert parse_yaml(path.read_text())["stages"]["pretrain"] == {
        "student": {"zero_stage": 3},
        "training": {"epochs": 2, "micro_batch_size": 1},
    }
    assert (tmp_path / "a.yaml.bak").read_text() == FILE
    assert "  stages.pretrain.training.micro_batch_size: 1" in lines
    for values in ({}, {"training.micro_batch_size": 1}):
        assert apply_changes(path, "pretrain", values) == [f"{path}: already set, nothing was written"]


def test_a_member_of_a_list_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  sources:\n    - {file: a.json}\n    - {file: c.json} # last\n")
    apply_changes(path, None, {"data.sources.0.file": "b.json"})
    assert path.read_text() == "data:\n  sources:\n    - {file: b.json}\n    - {file: c.json} # last\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {}\n", "training:\n  micro_batch_size: 2\n"),
        ("training:\nmodel: {student: s}\n", "training:\n  micro_batch_size: 2\nmodel: {student: s}\n"),
    ],
)
def test_an_empty_section_is_filled(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    apply_changes(path, None, {"training.micro_batch_size": 2})
    assert path.read_text() == expected


@pytest.mark.parametrize("text", ["training: 3\n", "[1, 2]\n", "just text\n", ""])
def test_lines_to_change_by_hand_are_shown_where_nothing_can_hold_the_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"change by hand\ntraining\.micro_batch_size: 2"):
        apply_changes(path, None, {"training.micro_batch_size": 2})
    assert path.read_text() == text
    assert not (tmp_path / "a.yaml.bak").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_changes_in_one_line(name: str) -> None:
    text = preset_text(name)
    stages = parse_yaml(text).get("stages")
    key = (*(("stages", next(iter(stages))) if stages else ()), "training", "epochs")
    before, after = text.splitlines(), edited(text, {key: 77}).splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert len(changed) == 1
    assert "epochs: 77" in changed[0]
    assert len(after) - len(before) in (0, 1)


OWN_STYLE = """\
# indented by four
training:
    seed: 0      # aligned
    precision: "bf16"   # quoted

    learning_rate: 1e-4
data:
    sources:
      - {file: 'a long name %s.json', image_folder: null}
"""


def test_a_style_of_its_own_is_kept() -> None:
    text = OWN_STYLE % ("x y " * 60)
    assert edited(text, {("training", "seed"): 3}) == text.replace("seed: 0", "seed: 3")
