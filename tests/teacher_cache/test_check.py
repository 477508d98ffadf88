"""A cache that does not fit a run is refused, with what does not fit."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignkd.config import Config, load_config
from alignkd.errors import FileSystemError, UserError
from alignkd.run_folder.atomic_files import write_json
from alignkd.teacher_cache.check import checked_manifest
from alignkd.teacher_cache.folder import CachePaths, Identity, Manifest, Shard
from alignkd.teacher_cache.key import MEANINGS, cache_key, top_k_of
from tests import tiny

SECTIONS = {
    "model": {"teacher": "teacher", "student": "student"},
    "data": {"sources": [{"file": "data.json", "image_folder": "images"}]},
    "teacher": {"placement": "cached", "cache": "cache"},
}
IMAGES = ((0, "image_0.png"), (0, "image_1.png"))


def write_cache(config: Config) -> Manifest:
    """Three shards with any bytes in them: a check reads their sizes only."""
    folder = Path(str(config.teacher.cache))
    CachePaths(folder).shards.mkdir(parents=True)
    for number in range(3):
        CachePaths(folder).shard(number).write_bytes(b"x" * (10 + number))
    form, top_k = config.teacher.cache_form, top_k_of(config) or 0
    identity = Identity(cache_key(config, IMAGES), IMAGES, "weights", 8, 5, 2, "entries", form, top_k)
    manifest = Manifest(identity, tuple(Shard(4, 10 + number, "") for number in range(3)))
    write_json(CachePaths(folder).identity, identity.as_json())
    write_json(CachePaths(folder).manifest, manifest.as_json())
    return manifest


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run beside copies of all that its cache depends on, and that cache."""
    folder = tmp_path / "here"
    for name, source in (("teacher", tiny.TEACHER), ("student", tiny.STUDENT)):
        shutil.copytree(source, folder / name)
    shutil.copytree(tiny.FOLDER / "openai", folder / "openai")
    (folder / "images").mkdir()
    for _, name in IMAGES:
        shutil.copyfile(tiny.FOLDER / name, folder / "images" / name)
    (folder / "data.json").write_text(json.dumps([tiny.CASES["v1"]["record"]]))
    path = folder / "alignkd.yaml"
    path.write_text(json.dumps(SECTIONS))
    write_cache(load_config(path))
    return path


def change(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    """Change one byte of a file of the same size, or its whole content."""

    def apply(folder: Path) -> None:
        path = folder / name
        old = path.read_bytes()
        path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]) if content is None else content)

    return apply


def more_layers(folder: Path) -> None:
    path = folder / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


def both_tokenizers(folder: Path) -> None:
    for model in ("teacher", "student"):
        change(f"{model}/tokenizer.model")(folder)


CHANGES: list[tuple[str, Callable[[Path], None] | None, list[str]]] = [
    ("teacher", change("teacher/pytorch_model.bin"), []),
    ("teacher", more_layers, []),
    ("records", change("data.json", b"[]"), []),
    ("records", None, ["data.max_length=100"]),
    ("records", None, ["data.on_bad_sample=skip"]),
    ("records", None, ["data.max_image_pixels=1000"]),
    ("images", change("images/image_1.png"), []),
    ("images", lambda folder: (folder / "images" / "image_0.png").unlink(), []),
    ("template", None, ["data.sources.0.template=plain"]),
    ("template", None, ["data.sources.0.image_aspect_ratio=square"]),
    ("tokenizer", both_tokenizers, []),
    ("positions", None, ["distillation.logit_positions=all_text"]),
    ("precision", None, ["training.precision=fp32"]),
    ("precision", None, ["teacher.precision=fp16"]),
    ("form", None, ["teacher.cache_form=fp8"]),
]


@pytest.mark.parametrize(("part", "apply", "overrides"), CHANGES)
def test_a_stale_cache_is_refused_naming_what_has_changed(
    config_file: Path, part: str, apply: Callable[[Path], None] | None, overrides: list[str]
) -> None:
    if apply is not None:
        apply(config_file.parent)
    with pytest.raises(UserError) as caught:
        checked_manifest(load_config(config_file, overrides))
    first, *lines = str(caught.value).splitlines()
    assert first == f"teacher.cache = {config_file.parent / 'cache'}: the cache is stale; what has changed:"
    (line,) = lines
    assert line.startswith(f"  {part}: {MEANINGS[part]}")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["distillation.temperature=2"], "top_k, 64 at temperature 2.0"),
        (["teacher.cache_top_k=16"], "top_k, 16 at temperature 1.0"),
        (["teacher.cache_form=exact"], "exact"),
    ],
)
def test_a_cache_of_tokens_is_stale_with_another_temperature_or_number_of_tokens(
    config_file: Path, tmp_path: Path, overrides: list[str], wanted: str
) -> None:
    of_tokens = [
        "teacher.cache_form=top_k",
        "distillation.divergence=forward_kl",
        f"teacher.cache={tmp_path / 'tokens'}",
    ]
    identity = write_cache(load_config(config_file, of_tokens)).identity
    assert checked_manifest(load_config(config_file, of_tokens)).identity == identity
    assert (identity.form, identity.top_k) == ("top_k", 64)
    with pytest.raises(UserError) as caught:
        checked_manifest(load_config(config_file, of_tokens + overrides))
    line = str(caught.value).splitlines()[1]
    cached = "top_k, 64 at temperature 1.0 in the cache"
    assert line == f"  form: {MEANINGS['form']}: {cached}, {wanted} in the run"


def test_every_part_of_the_key_has_a_change_that_shows() -> None:
    assert {part for part, _, _ in CHANGES} == set(MEANINGS)


def test_what_does_not_matter_may_change_and_everything_may_move(config_file: Path, tmp_path: Path) -> None:
    shutil.move(config_file.parent, tmp_path / "moved")
    overrides = [
        "data.sources.0.weight=0.5",
        "data.workers=7",
        "training.packing=false",
        "training.seed=3",
        "distillation.top_k=3",
        "distillation.temperature=2",
        "distillation.attention_rows=prompt_only",
    ]
    manifest = checked_manifest(load_config(tmp_path / "moved" / config_file.name, overrides))
    assert (manifest.positions, manifest.bytes) == (12, 33)
    assert [list(manifest.identity.samples_of(shard)) for shard in range(3)] == [[0, 1], [2, 3], [4]]


def hashed_images(config_file: Path, name: str) -> str:
    return cache_key(load_config(config_file), [(0, name)])["images"]


def test_an_image_outside_its_folder_counts_as_missing(config_file: Path) -> None:
    """Paths come from records of others: nothing else than an image below the folder is opened."""
    outside = config_file.parent / "outside.png"
    shutil.copyfile(config_file.parent / "images" / "image_0.png", outside)
    missing = hashed_images(config_file, "none.png")
    assert hashed_images(config_file, "image_0.png") != missing
    assert hashed_images(config_file, "../outside.png") == missing
    assert hashed_images(config_file, str(outside)) == missing
    (config_file.parent / "images" / "link.png").symlink_to(outside)
    assert hashed_images(config_file, "link.png") == missing
    os.mkfifo(config_file.parent / "images" / "pipe.png")
    assert hashed_images(config_file, "pipe.png") == missing


def test_an_image_that_cannot_be_read_counts_as_missing_unless_the_disk_fails(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = hashed_images(config_file, "none.png")
    opened = Path.open

    def refuse(code: int) -> None:
        def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "image_0.png":
                raise OSError(code, os.strerror(code))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", refusing)

    refuse(errno.EACCES)
    assert hashed_images(config_file, "image_0.png") == missing
    refuse(errno.EIO)
    with pytest.raises(FileSystemError, match=r"image_0\.png: the file system failed"):
        hashed_images(config_file, "image_0.png")


def lose_manifest(cache: Path) -> None:
    CachePaths(cache).manifest.unlink()


def cut_manifest(cache: Path) -> None:
    path = CachePaths(cache).manifest
    path.write_text(path.read_text()[:-20])


def change_manifest(**values: Any) -> Callable[[Path], None]:
    def apply(cache: Path) -> None:
        path = CachePaths(cache).manifest
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "this cache of the teacher does not exist; `alignkd cache CONFIG` writes it"),
        (lose_manifest, "this cache of the teacher was begun but is not finished"),
        (cut_manifest, "manifest.json: damaged"),
        (change_manifest(shards=[]), "manifest.json: damaged (0 shards instead of 3)"),
        (change_manifest(shards=3), "manifest.json: damaged"),
        (change_manifest(images=3), "manifest.json: damaged"),
        (change_manifest(format=1), "manifest.json: format 1, this version reads 3; remove the folder"),
        (lambda cache: CachePaths(cache).shard(1).unlink(), "00001.safetensors is missing"),
        (
            lambda cache: CachePaths(cache).shard(2).write_bytes(b""),
            "00002.safetensors has 0 bytes instead of 12",
        ),
    ],
)
def test_an_unfinished_or_damaged_cache_is_refused(
    config_file: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(config_file.parent / "cache")
    with pytest.raises(UserError, match=re.escape(message)):
        checked_manifest(load_config(config_file))


def test_other_families_are_refused_by_name(config_file: Path) -> None:
    (config_file.parent / "teacher" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match="of the family llava cannot be cached; valid: a mobilevlm teacher"):
        checked_manifest(load_config(config_file))


def test_a_cached_teacher_needs_a_cache(config_file: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.cache is missing: teacher.placement = cached needs it"):
        load_config(config_file, ["teacher.cache=null"])
