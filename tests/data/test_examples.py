from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from alignkd.config.schema import DataSection, DataSource
from alignkd.data.collate import CollateSettings, collate
from alignkd.data.encoder import MobileVLMEncoder
from alignkd.data.examples import ExampleReader
from alignkd.data.index import build_index
from alignkd.data.records import BadSample
from alignkd.errors import UserError
from tests.data.records import entry


def source_of(file, folder, **more):
    return DataSource(file=file, image_folder=str(folder), **more)


def test_images_and_texts_give_the_counts_of_the_fixture(
    cases, fixture_folder, write_json, tokenizer, processor
):
    sources = [
        source_of(write_json([cases["plain"]["record"]], "plain.json"), fixture_folder, template="plain"),
        source_of(write_json([cases[n]["record"] for n in ("v1", "rounds", "text")]), fixture_folder),
    ]
    data = DataSection(sources=sources)
    index = build_index(data, MobileVLMEncoder(tokenizer, 144))
    read = ExampleReader(data, index, MobileVLMEncoder(tokenizer, 144, processor))
    settings = CollateSettings(144, processor.shape, top_k=16)
    examples = [read(number) for number in range(len(index))]
    batch = collate(examples, settings)

    counts = json.loads((fixture_folder / "expected_losses.json").read_text())
    wanted = counts["batch plain+v1+rounds+text"]["counts"]
    student_heads, student_width = 4, 48
    assert batch.counts.supervised == wanted["ce"]
    assert batch.counts.logits == wanted["reverse_kl"]
    assert batch.counts.attention_pairs * student_heads == wanted["attention"]
    assert batch.counts.vision_tokens * student_width == wanted["vision_all"]
    assert batch.counts.focus_tokens * student_width == wanted["vision_focus"]
    assert list(collate(examples, replace(settings, packing=True)).segments) == index.length.tolist()
    assert batch.image_starts.tolist() == [
        cases[n]["image_token_position"] for n in ("plain", "v1", "rounds")
    ]


def test_a_broken_image_names_file_entry_id_path_and_reason(write_json, tmp_path, tokenizer, processor):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    file = write_json([entry(), entry("<image>", image="broken.png", id="seven")])
    data = DataSection(sources=[source_of(file, tmp_path)])
    read = ExampleReader(
        data, build_index(data, MobileVLMEncoder(tokenizer, 9)), MobileVLMEncoder(tokenizer, 144, processor)
    )
    assert read(0).images == ()
    with pytest.raises(BadSample) as caught:
        read(1)
    for part in (file, "entry 1", "'seven'", "broken image", "'broken.png'"):
        assert part in str(caught.value)


def test_a_file_that_changed_after_indexing_is_noticed(write_json, tmp_path, tokenizer, processor):
    data = DataSection(sources=[source_of(write_json([entry(), entry()]), tmp_path)])
    read = ExampleReader(
        data, build_index(data, MobileVLMEncoder(tokenizer, 9)), MobileVLMEncoder(tokenizer, 144, processor)
    )
    write_json(["x" * 500])
    with pytest.raises(UserError, match="has the file changed"):
        read(1)


def test_each_source_chooses_its_padding(cases, fixture_folder, write_json, tokenizer, processor):
    file = write_json([cases["v1"]["record"]])
    sources = [source_of(file, fixture_folder, image_aspect_ratio=ratio) for ratio in ("pad", "square")]
    data = DataSection(sources=sources)
    read = ExampleReader(
        data, build_index(data, MobileVLMEncoder(tokenizer, 144)), MobileVLMEncoder(tokenizer, 144, processor)
    )
    assert read(0).ids == read(1).ids
    assert not torch.equal(read(0).images[0], read(1).images[0])
