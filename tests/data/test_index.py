from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from alignkd.config.schema import DataSection, DataSource
from alignkd.data import encoder, index_parts
from alignkd.data import index as index_module
from alignkd.data.encoder import MobileVLMEncoder
from alignkd.data.index import ARRAYS, build_index
from alignkd.data.json_list import JsonListFile
from alignkd.data.records import BadSample
from alignkd.data.templates import encode
from alignkd.errors import FileSystemError, UserError
from tests.data.records import entry

BAD = {"id": "bad", "conversations": []}


def section(*sources: DataSource, **more) -> DataSection:
    return DataSection(sources=list(sources), **more)


def with_images(file: str, tmp_path: Path, **more) -> DataSource:
    return DataSource(file=file, image_folder=str(tmp_path), **more)


def test_lengths_equal_those_of_the_fixture(cases, expected, write_json, tmp_path, tokenizer):
    records = [cases[name]["record"] for name in ("v1", "rounds", "text")]
    index = build_index(section(with_images(write_json(records), tmp_path)), MobileVLMEncoder(tokenizer, 144))
    ids = [expected[f"{name}.input_ids"][0] for name in ("v1", "rounds", "text")]
    assert index.length.tolist() == [len(ids[0]) + 143, len(ids[1]) + 143, len(ids[2])]
    assert index.image_count.tolist() == [1, 1, 0]
    assert index.entry.tolist() == [0, 1, 2]
    assert index.summary().endswith("data.json: 3 of 3 samples")


def test_samples_that_are_too_long_are_removed_and_counted_by_source(write_json, tmp_path, tokenizer):
    short, long = entry("q", "a"), entry("q", "a " * 60)
    image = entry("<image>", "a", image="a.png")
    sources = [
        with_images(write_json([short, long, long], "one.json"), tmp_path),
        with_images(write_json([image, short, long], "two.json"), tmp_path),
    ]
    encoded = encode([*map(_turn, short["conversations"])], "v1", tokenizer)
    data = section(*sources, max_length=len(encoded.ids))
    index = build_index(data, MobileVLMEncoder(tokenizer, 9))
    assert list(zip(index.source.tolist(), index.entry.tolist(), strict=True)) == [(0, 0), (1, 1)]
    assert [report.removed for report in index.reports] == [{"too long": 2}, {"too long": 2}]
    assert (
        index.summary().splitlines()[-1] == f"all sources: 2 of 6 samples, 4 too long (> {data.max_length})"
    )


def _turn(value):
    from alignkd.data.records import Turn

    return Turn(value["from"], value["value"])


def test_a_bad_entry_stops_the_run_by_default(write_json, tokenizer):
    file = write_json([entry(), BAD])
    with pytest.raises(BadSample, match=r"data\.json: entry 1 \(id 'bad'\): no conversation"):
        build_index(section(DataSource(file=file)), MobileVLMEncoder(tokenizer, 9))


def test_bad_entries_can_be_skipped_and_are_counted_by_reason(write_json, tokenizer):
    file = write_json([BAD, entry(), "text", BAD, entry("<image>")])
    data = section(DataSource(file=file), on_bad_sample="skip")
    index = build_index(data, MobileVLMEncoder(tokenizer, 9))
    assert index.entry.tolist() == [1]
    assert index.summary().endswith(
        "1 of 5 samples, 4 bad: 1 markers do not match images, 2 no conversation, 1 not an object"
    )


def test_a_sample_that_does_not_fit_its_template_is_bad(write_json, tokenizer):
    file = write_json([entry("no image", "a")])
    with pytest.raises(BadSample, match="does not fit the template: template plain needs an image"):
        build_index(section(DataSource(file=file, template="plain")), MobileVLMEncoder(tokenizer, 9))


def test_an_empty_index_is_an_error_with_the_reasons(write_json, tokenizer):
    file = write_json([entry(), entry(), BAD])
    data = section(DataSource(file=file), max_length=8, on_bad_sample="skip")
    with pytest.raises(
        UserError, match=r"no sample is left.*\n.*2 too long \(> 8\), 1 bad: 1 no conversation"
    ):
        build_index(data, MobileVLMEncoder(tokenizer, 9))
    with pytest.raises(UserError, match="no sample is left"):
        build_index(section(DataSource(file=write_json([]))), MobileVLMEncoder(tokenizer, 9))


def test_a_missing_image_folder_setting_is_never_skipped(write_json, tokenizer):
    file = write_json([entry("<image>", image="a.png")])
    data = section(DataSource(file=file), on_bad_sample="skip")
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.image_folder is not set"):
        build_index(data, MobileVLMEncoder(tokenizer, 9))


def test_a_missing_image_folder_is_named(write_json, tokenizer, tmp_path):
    source = DataSource(file=write_json([entry()]), image_folder=str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.image_folder: no such folder"):
        build_index(section(source), MobileVLMEncoder(tokenizer, 9))


def test_an_index_can_be_sent_to_other_ranks(write_json, tokenizer):
    index = build_index(section(DataSource(file=write_json([entry()] * 3))), MobileVLMEncoder(tokenizer, 9))
    copy = pickle.loads(pickle.dumps(index))
    assert copy.fingerprint == index.fingerprint
    for name in ("source", "entry", "start", "stop", "length", "image_count"):
        np.testing.assert_array_equal(getattr(copy, name), getattr(index, name))


def test_the_fingerprint_depends_on_contents_and_settings_not_on_paths(write_json, tokenizer):
    def fingerprint(entries, name="a.json", vision_tokens=9, template="v1", **more):
        source = DataSource(file=write_json(entries, name), template=template, image_folder="/")
        return build_index(section(source, **more), MobileVLMEncoder(tokenizer, vision_tokens)).fingerprint

    entries = [entry("<image>", image="a.png")]
    first = fingerprint(entries)
    assert first == fingerprint(entries, name="b.json")
    others = [
        fingerprint(entries * 2),
        fingerprint(entries, vision_tokens=16),
        fingerprint(entries, template="plain"),
        fingerprint(entries, max_length=1000),
    ]
    assert len({first, *others}) == 5


def test_progress_ends_at_the_size_of_the_files(write_json, tokenizer):
    files = [write_json([entry()] * 3, "a.json"), write_json([entry()] * 5, "b.json")]
    seen = []
    build_index(
        section(*(DataSource(file=file) for file in files)),
        MobileVLMEncoder(tokenizer, 9),
        lambda *done: seen.append(done),
    )
    total = sum(Path(file).stat().st_size for file in files)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_many_processes_build_the_same_index_as_one(write_json, tmp_path, tokenizer, monkeypatch):
    """Two sources, several tasks of each, bad and over-long entries in between."""
    kinds = [entry(), BAD, entry("<image>", "b " * 40, image="a.png"), entry("q", "long " * 90), "text"]
    sources = [
        with_images(write_json(kinds * 30, "one.json"), tmp_path),
        with_images(write_json(kinds[2:] * 20 + [entry("last", "one")], "two.json"), tmp_path, weight=0.5),
    ]
    data = section(*sources, max_length=200, on_bad_sample="skip")
    one = build_index(data, MobileVLMEncoder(tokenizer, 9))
    monkeypatch.setattr(index_module, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(index_module, "TASK_BYTES", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    seen = []
    many = build_index(data, MobileVLMEncoder(tokenizer, 9), lambda *done: seen.append(done))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))
    assert (one.reports, one.fingerprint) == (many.reports, many.fingerprint)
    assert [report.entries for report in one.reports] == [150, 61]
    assert len(seen) > 10
    assert seen == sorted(seen)
    for source, start, stop in zip(one.source, one.start, one.stop, strict=True):
        assert isinstance(JsonListFile(sources[source].file).entry(start, stop), dict)

    with pytest.raises(BadSample, match=r"one\.json: entry 1 \(id 'bad'\): no conversation"):
        build_index(section(*sources), MobileVLMEncoder(tokenizer, 9))


def test_invalid_json_is_reported_with_line_and_column(tmp_path, tokenizer):
    (tmp_path / "data.json").write_text('[{"id": "a"},\n {"id": }]')
    data = section(DataSource(file=str(tmp_path / "data.json")), on_bad_sample="skip")
    with pytest.raises(UserError, match="line 2, column 9: Expecting value"):
        build_index(data, MobileVLMEncoder(tokenizer, 9))


def test_a_file_that_changes_while_it_is_indexed_is_worth_another_try(write_json, tokenizer, monkeypatch):
    """The parent has parsed the entry, so whatever is read there now is no mistake of the user's."""
    monkeypatch.setattr(encoder, "conversation_parts", None)  # never reached
    monkeypatch.setattr(JsonListFile, "read", lambda self, start, stop: b"x" * (stop - start))
    source = DataSource(file=write_json([entry("1")]))
    settings = index_parts.PartSettings(source, 0, 2048, skip_bad=False)
    with pytest.raises(FileSystemError, match="read twice were not the same"):
        index_parts.index_part(JsonListFile(source.file), 0, np.array([[1, 12]]), settings, None)
