"""Block, vision tokens, loss and gradients of each family against transformers' own eager attention."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from alignkd.config.schema import DataSource, DistillationSection
from alignkd.data import chat_encoder as chat_encoder_module
from alignkd.data.batch import Batch
from alignkd.data.collate import collate
from alignkd.data.join import join
from alignkd.data.records import parse_sample
from alignkd.engine.student_step import StudentStep
from alignkd.losses.attention import text_vision_block
from alignkd.losses.total import TERMS
from alignkd.models.adapters import seeded_adapters
from alignkd.models.building import BuildOptions
from alignkd.models.encoding import chat_encoder
from alignkd.models.families.table import FAMILIES
from alignkd.models.loading import load_model
from alignkd.teacher.lookahead import split_targets
from alignkd.teacher.targets import TeacherModel, block_layout
from tests import vlm
from tests.models.families import reference

FP64 = BuildOptions(torch.float64)
TOP_K = 6  # more than an image of llava has
# Of logits in float64: eager computes softmax in fp32. The first has a linear attention in fp32 besides, the
# second four layers.
EAGER_ERRORS = {"qwen3_5": 3e-4, "gemma4": 3e-5}
UNIT = (1.0,) * len(TERMS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    vlm.write_images(out)
    return out


@pytest.fixture(scope="module", params=vlm.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def batch_of(family: str, images: Path, *numbers: int, packing: bool = False) -> Batch:
    encoder = chat_encoder(vlm.folder(family), 10**6)
    source = DataSource(file="x", image_folder=str(images), template="chat")
    samples = [parse_sample(vlm.RECORDS[number], "x", 0, number) for number in numbers]
    settings = encoder.collate_settings(top_k=TOP_K, packing=packing)
    return collate([encoder.encode(one, source) for one in samples], settings)


def test_tokens_rows_and_labels_are_those_of_the_expanded_text(family: str, images: Path) -> None:
    encoder = chat_encoder(vlm.folder(family), 10**6)
    source = DataSource(file="x", image_folder=str(images), template="chat")
    for number, record in enumerate(vlm.RECORDS):
        example = encoder.encode(parse_sample(record, "x", 0, number), source)
        found = reference.find(vlm.folder(family), record, images)
        assert example.ids == found.ids
        assert [columns.tolist() for columns in example.columns] == found.columns
        assert np.flatnonzero(example.is_text).tolist() == found.text
        supervised = [column for column, label in enumerate(example.labels) if label >= 0]
        assert supervised == found.supervised
        assert [example.labels[column] for column in supervised] == [found.ids[c] for c in supervised]


def test_a_data_loaders_worker_encodes_alike(family: str, images: Path) -> None:
    encoder = chat_encoder(vlm.folder(family), 10**6)
    workers = pickle.loads(pickle.dumps(encoder))
    source = DataSource(file="x", image_folder=str(images), template="chat")
    for number, record in enumerate(vlm.RECORDS):
        sample = parse_sample(record, "x", 0, number)
        expected, found = encoder.encode(sample, source), workers.encode(sample, source)
        assert (found.ids, found.labels) == (expected.ids, expected.labels)
        both = zip(found.inputs.items(), expected.inputs.items(), strict=True)
        assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in both)


def test_lengths_are_known_without_pixels(family: str, images: Path) -> None:
    encoder = chat_encoder(vlm.folder(family), 10**6)
    source = DataSource(file="x", image_folder=str(images), template="chat")
    samples = [parse_sample(record, "x", 0, number) for number, record in enumerate(vlm.RECORDS)]
    assert encoder.length(samples, source) == [len(encoder.encode(one, source).ids) for one in samples]


def test_no_more_sizes_of_images_are_remembered_than_there_is_room_for(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_encoder_module, "KEPT_REPLACEMENTS", 2)
    encoder = chat_encoder(vlm.folder("llava"), 10**6)
    source = DataSource(file="x", image_folder=str(images), template="chat")
    sizes = [((40, 30),), ((30, 60),), ((28, 28),)]
    found = [encoder._replacements_of(size, source) for size in sizes]
    assert [size for _, size in encoder._replacements] == sizes[1:]
    assert [encoder._replacements_of(size, source) for size in sizes] == found


def test_block_and_vision_tokens_equal_eager_attention(family: str, images: Path) -> None:
    """Of a batch of samples with one, no and two images of different sizes, padded to the longest."""
    folder = vlm.folder(family)
    model = load_model(folder, FP64).eval()
    batch = batch_of(family, images, 0, 1, 2)
    with torch.no_grad():
        outputs = model(batch)
        block_IHMV = text_vision_block(*outputs.first_layer, block_layout(batch, model.facts))
    image = 0
    for number, whole in enumerate(reference.run_whole(folder, vlm.RECORDS, images)):
        found = reference.find(folder, vlm.RECORDS[number], images)
        for columns in found.columns:
            rows = [column for column in found.text if column > columns[-1]]
            wanted = whole.attention[:, rows][:, :, columns]
            assert wanted.abs().max() > 1e-3
            got = block_IHMV[image]
            assert torch.allclose(got[:, : len(rows), : len(columns)], wanted, atol=1e-6)
            assert not got[:, len(rows) :].any()
            assert not got[..., len(columns) :].any()
            tokens = outputs.vision_tokens_IVD[image]
            assert torch.allclose(tokens[: len(columns)], whole.embeddings[columns], atol=1e-6)
            assert not tokens[len(columns) :].any()
            image += 1
        logits = model.logits(outputs.hidden_BLD[number, : len(found.ids)])
        cut = whole.logits[:, : logits.shape[-1]]
        assert (logits - cut).abs().max() < EAGER_ERRORS.get(family, 1e-5)
    assert image == batch.image_count == 3


def test_outputs_without_an_image_have_a_graph_like_those_with_one(family: str, images: Path) -> None:
    """Under ZeRO-3, an output without a gradient on one of the ranks stops the run."""
    model = load_model(vlm.folder(family), FP64)
    for numbers in ((0,), (1,)):
        outputs = model(batch_of(family, images, *numbers))
        found = (outputs.hidden_BLD, outputs.vision_tokens_IVD, *outputs.first_layer[:2])
        assert all(tensor.requires_grad for tensor in found)


def new_step(family: str) -> tuple[StudentStep, TeacherModel]:
    teacher = TeacherModel(load_model(vlm.folder(family, "teacher"), FP64), TOP_K)
    student = load_model(vlm.folder(family), FP64)
    adapters = seeded_adapters(teacher.model.facts, student.facts, 0).double()
    return StudentStep(student, adapters, DistillationSection(top_k=TOP_K)), teacher


def test_all_terms_equal_the_float64_reference(family: str, images: Path) -> None:
    step, teacher = new_step(family)
    batch = batch_of(family, images, 0, 1, 2)
    head = teacher.model.head
    got = step(batch, UNIT, teacher(batch), head.cut(head.weight))
    wanted = dict.fromkeys(TERMS, 0.0)
    wholes = [
        reference.run_whole(vlm.folder(family, role), vlm.RECORDS, images) for role in ("teacher", "student")
    ]
    tokens = vlm.token_count()
    for record, taught, learnt in zip(vlm.RECORDS, *wholes, strict=True):
        found = reference.find(vlm.folder(family), record, images)
        with torch.no_grad():
            one = reference.sums(taught, learnt, found, step.adapters, tokens, TOP_K)
        wanted = {term: wanted[term] + one[term] for term in TERMS}
    for term, value in zip(TERMS, got.sums.tolist(), strict=True):
        assert value == pytest.approx(wanted[term], rel=1e-5), term
        assert value > 0.01, term


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_parameter_gets_a_gradient(family: str, images: Path, checkpointing: bool) -> None:
    """Also on a rank whose batch has no image: there it is zero for the projector, but it is there."""
    step, teacher = new_step(family)
    if checkpointing:
        step.student.enable_gradient_checkpointing()
    step.train()
    head = teacher.model.head
    for numbers in ((0, 1, 2), (1,)):
        step.zero_grad(set_to_none=True)
        batch = batch_of(family, images, *numbers)
        step(batch, UNIT, teacher(batch), head.cut(head.weight)).loss.backward()
        for name, parameter in step.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        projector = [p for n, p in step.student.named_parameters() if step.student.is_projector(n)]
        assert projector
        assert all(parameter.grad.any() == (len(numbers) > 1) for parameter in projector)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_random_states_are_saved_only_for_a_model_with_dropout(
    family: str, images: Path, tmp_path: Path, dropout: float
) -> None:
    folder = Path(shutil.copytree(vlm.folder(family), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = dropout
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, FP64).train()
    model.enable_gradient_checkpointing()
    with patch.object(torch, "get_rng_state", wraps=torch.get_rng_state) as saved:
        model(batch_of(family, images, 0)).hidden_BLD.sum().backward()
    assert (saved.call_count > 0) == (dropout > 0)


def test_every_second_layer_is_checkpointed(family: str) -> None:
    model = new_step(family)[0].student
    model.enable_gradient_checkpointing(2)
    layers = model.whole.get_decoder().layers
    assert [layer.gradient_checkpointing for layer in layers] == [n % 2 == 0 for n in range(len(layers))]


def test_joined_batches_give_each_its_own_targets(family: str, images: Path) -> None:
    """Their images differ in vision tokens, and one batch has none."""
    _, teacher = new_step(family)
    batches = [batch_of(family, images, number) for number in (1, 0, 2)]
    parts = split_targets(teacher(join(batches)), batches)
    for batch, part in zip(batches, parts, strict=True):
        alone = teacher(batch)
        assert torch.allclose(part.hidden_ND, alone.hidden_ND, atol=1e-6)
        assert torch.allclose(part.block_IHMV, alone.block_IHMV, atol=1e-6)
        assert torch.allclose(part.vision_tokens_IVD, alone.vision_tokens_IVD, atol=1e-6)
        for span, ours, theirs in zip(
            batch.image_spans, part.focus_indices_IK, alone.focus_indices_IK, strict=True
        ):
            assert ours[: span.tokens].tolist() == theirs[: span.tokens].tolist()


@pytest.mark.parametrize("packed", [name for name, row in FAMILIES.items() if row.packs])
def test_a_packed_row_gives_the_losses_and_gradients_of_padded_ones(packed: str, images: Path) -> None:
    """Also where the layers are recomputed, and where the teacher runs several rows as one."""
    step, teacher = new_step(packed)
    step.student.enable_gradient_checkpointing()
    step.train()
    head = teacher.model.head
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    found = []
    for packing in (False, True):
        batch = batch_of(packed, images, 0, 1, 2, packing=packing)
        assert (len(batch.input_ids_BL) == 1) == (batch.counts.slots == batch.counts.tokens) == packing
        output = step(batch, UNIT, teacher(batch), head.cut(head.weight))
        found.append((output.sums, torch.autograd.grad(output.loss, trained)))
    (padded, wanted), (row, gradients) = found
    assert torch.allclose(row, padded, rtol=1e-9)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9)

    rows = [batch_of(packed, images, number, packing=True) for number in (1, 0, 2)]
    for batch, part in zip(rows, split_targets(teacher(join(rows)), rows), strict=True):
        alone = teacher(batch)
        for ours, theirs in zip(part[:3], alone[:3], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
