from __future__ import annotations

import json

import pytest
import torch

from alignkd.config.schema import DataSection, DataSource
from alignkd.data.batch import TermCounts
from alignkd.data.collate import CollateSettings, collate
from alignkd.data.examples import ExampleReader, collate_prompts, read_samples
from alignkd.data.index import build_index
from alignkd.data.records import BadSample
from alignkd.errors import UserError
from tests.data.records import entry


def source_of(file, folder, **more):
    return DataSource(file=file, image_folder=str(folder), **more)


def test_from_png_and_text_to_the_counts_of_the_fixture(
    cases, fixture_folder, write_json, tokenizer, processor
):
    sources = [
        source_of(write_json([cases["plain"]["record"]], "plain.json"), fixture_folder, template="plain"),
        source_of(write_json([cases[n]["record"] for n in ("v1", "rounds", "text")]), fixture_folder),
    ]
    data = DataSection(sources=sources)
    index = build_index(data, tokenizer, vision_tokens=144)
    read = ExampleReader(data, index, tokenizer, processor)
    batch = collate([read(number) for number in range(len(index))], CollateSettings(144, processor.shape))

    counts = json.loads((fixture_folder / "expected_losses.json").read_text())
    wanted = counts["batch plain+v1+rounds+text"]["counts"]
    student_heads, student_width, top_k = 4, 48, 16
    assert batch.counts.supervised == wanted["ce"]
    assert batch.counts.logits == wanted["reverse_kl"]
    assert batch.counts.attention_rows * student_heads * 144 == wanted["attention"]
    assert batch.counts.images * student_width * 144 == wanted["vision_all"]
    assert batch.counts.focus_images * student_width * top_k == wanted["vision_focus"]
    assert batch.lengths_B.tolist() == index.length.tolist()
    assert batch.image_starts.tolist() == [
        cases[n]["image_token_position"] for n in ("plain", "v1", "rounds")
    ]


def test_a_broken_image_names_file_entry_id_path_and_reason(write_json, tmp_path, tokenizer, processor):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    file = write_json([entry(), entry("<image>", image="broken.png", id="seven")])
    data = DataSection(sources=[source_of(file, tmp_path)])
    read = ExampleReader(data, build_index(data, tokenizer, 9), tokenizer, processor)
    assert read(0).sample_id == "x"
    with pytest.raises(BadSample) as caught:
        read(1)
    for part in (file, "entry 1", "'seven'", "broken image", "'broken.png'"):
        assert part in str(caught.value)


def test_a_file_that_changed_after_indexing_is_noticed(write_json, tmp_path, tokenizer, processor):
    data = DataSection(sources=[source_of(write_json([entry(), entry()]), tmp_path)])
    read = ExampleReader(data, build_index(data, tokenizer, 9), tokenizer, processor)
    write_json(["x" * 500])
    with pytest.raises(UserError, match="has the file changed"):
        read(1)


def test_prompts_have_no_labels_and_no_answer(
    cases, expected, fixture_folder, write_json, tokenizer, processor
):
    closed, open_ended = cases["v1"]["record"], cases["text"]["record"]
    open_ended = {**open_ended, "conversations": open_ended["conversations"][:1]}
    source = source_of(write_json([closed, open_ended]), fixture_folder)
    samples = read_samples(source, answered=False)
    batch = collate_prompts(samples, source, tokenizer, processor, vision_tokens=144)

    ids, labels = (expected[f"v1.{kind}"][0] for kind in ("input_ids", "labels"))
    prompt = int((labels == -100).sum())  # all before the only answer
    assert batch.lengths_B.tolist() == [prompt + 143, 39]
    question = ids[34:prompt]  # what follows the image
    assert batch.input_ids_BL[0, -len(question) :].tolist() == question.tolist()
    assert (batch.labels_BL == -100).all()
    assert batch.image_count == 1
    assert batch.counts.supervised == batch.counts.logits == 0
    assert batch.counts != TermCounts()


def test_reading_a_small_file_raises_for_a_bad_sample(write_json, tmp_path):
    source = source_of(write_json([entry(), {"conversations": []}]), tmp_path)
    with pytest.raises(BadSample, match="entry 1"):
        read_samples(source)


def test_the_source_decides_on_padding(cases, fixture_folder, write_json, tokenizer, processor):
    file = write_json([cases["v1"]["record"]])
    pixels = []
    for ratio in ("pad", "square"):
        source = source_of(file, fixture_folder, image_aspect_ratio=ratio)
        pixels.append(collate_prompts(read_samples(source), source, tokenizer, processor, 144).pixel_values)
    assert not torch.equal(*pixels)
