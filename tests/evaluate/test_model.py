"""``alignkd.load``: from an export, a run, a step of a run and a public folder, and what comes of others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import alignkd
from alignkd.checkpoint.export import export_run
from alignkd.errors import UserError
from alignkd.evaluate.answering_model import AnsweringModel
from alignkd.evaluate.generation import Decoding
from alignkd.models.weight_files import WeightFiles
from alignkd.run_folder.paths import RunPaths
from tests import tiny
from tests.checkpoint.test_damaged_checkpoints import go_on
from tests.model_folders import change_json, copy_model, published_tensors
from tests.ranks import RankPool

PICTURE = tiny.FOLDER / "image_0.png"
SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def run(two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2 and 4."""
    folder = tiny.write_run(tmp_path_factory.mktemp("runs") / "run", 2)
    assert [code for code, _ in two_ranks.run(go_on, str(folder))] == [0, 0]
    return folder


def weights(folder: Path) -> str:
    return alignkd.load(folder).fingerprint()


def test_importing_alignkd_is_light() -> None:
    program = "import sys, alignkd; print(alignkd.load.__name__, *({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["load"]


def test_a_run_its_steps_and_its_exports_load_alike(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "newest", None, "safetensors")
    export_run(run, tmp_path / "older", 2, "bin")
    newest = alignkd.load(run)
    assert newest.fingerprint() == weights(tmp_path / "newest") == weights(RunPaths(run).student)
    older = alignkd.load(run, step=2)
    assert older.fingerprint() == weights(tmp_path / "older")
    assert older.fingerprint() != newest.fingerprint()
    exported = alignkd.load(tmp_path / "newest")
    assert newest.answer(PICTURE, "What?", **SHORT) == exported.answer(PICTURE, "What?", **SHORT)


def test_a_finished_run_whose_checkpoints_were_deleted_gives_its_student(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "run"
    shutil.copytree(run, kept)
    shutil.rmtree(RunPaths(kept).checkpoints)
    assert weights(kept) == weights(run)
    shutil.rmtree(RunPaths(kept).student)
    with pytest.raises(UserError, match="the run has no checkpoint yet"):
        alignkd.load(kept)


def test_the_weights_of_a_public_folder_are_loaded_as_they_are(model: AnsweringModel) -> None:
    published = WeightFiles(tiny.STUDENT).read("lm_head.weight")
    assert torch.equal(model.model.head.weight, published.float())


def test_precision_and_device_are_chosen() -> None:
    assert alignkd.load(tiny.STUDENT).precision == "fp32"  # on a CPU
    bf16 = alignkd.load(str(tiny.STUDENT), precision="bf16", device="cpu")
    assert bf16.model.head.weight.dtype == torch.bfloat16
    assert isinstance(bf16.answer(PICTURE, "What is this?", **SHORT), str)
    with pytest.raises(UserError, match="precision 'int4' is unknown; valid: bf16, fp16, fp32"):
        alignkd.load(tiny.STUDENT, precision="int4")
    with pytest.raises(UserError, match="device 'tpu' cannot be used"):
        alignkd.load(tiny.STUDENT, device="tpu")


def test_an_image_is_a_path_a_decoded_picture_or_none(model: AnsweringModel) -> None:
    by_path = model.answer(PICTURE, "What is this?", **SHORT)
    assert by_path == model.answer(str(PICTURE), "What is this?", **SHORT)
    with Image.open(PICTURE) as image:
        assert by_path == model.answer(image, "What is this?", **SHORT)
    assert model.answer(None, "What is this?", **SHORT)
    requests = [model.request(PICTURE, "What is this?"), model.request(None, "What is this?")]
    assert requests[0].turns[0].text == "<image>\nWhat is this?"
    assert requests[1].turns[0].text == "What is this?"
    assert not torch.equal(model.request(tiny.FOLDER / "image_1.png", "").images[0], requests[0].images[0])
    together = model.answers(requests, Decoding(max_new_tokens=4))
    assert together[0] == by_path
    assert model.answers([]) == []


def test_images_are_padded_or_cropped(model: AnsweringModel) -> None:
    wide = Image.new("RGB", (64, 32), "white")
    padded, cropped = (model._prepared(wide, "it", padding) for padding in ("pad", "crop"))
    assert padded.shape == cropped.shape
    assert len(cropped.unique()) == 3  # white, in three channels
    assert len(padded.unique()) > 3
    assert torch.equal(model._prepared(wide, "it", None), padded)  # as in the model's configuration


def test_sampling_takes_a_seed(model: AnsweringModel) -> None:
    hot = {"temperature": 5.0, "max_new_tokens": 8}
    first = model.answer(PICTURE, "What?", seed=1, **hot)
    assert first == model.answer(PICTURE, "What?", seed=1, **hot)
    assert first != model.answer(PICTURE, "What?", seed=2, **hot)
    assert first.startswith(model.answer(PICTURE, "What?", seed=1, stop=[first[3:5]], **hot))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.png", "missing.png: the picture is missing"),
        ("broken.png", "broken.png: not a picture"),
        (Image.new("RGB", (1, 500)), "image too narrow"),
    ],
)
def test_an_unusable_image_is_an_error(
    model: AnsweringModel, tmp_path: Path, image: str | Image.Image, message: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=message):
        model.answer(tmp_path / image if isinstance(image, str) else image, "What?")


def test_folders_that_are_no_model_are_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        alignkd.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a model folder"):
        alignkd.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 2, 4"):
        alignkd.load(run, step=3)
    with pytest.raises(UserError, match="--step 3 is for a run folder; this is a model folder"):
        alignkd.load(tiny.STUDENT, step=3)


def test_foreign_and_incomplete_model_folders_are_errors(tmp_path: Path) -> None:
    change_json(copy_model(tmp_path / "foreign") / "config.json", model_type="llava")
    with pytest.raises(UserError, match="only 'llama' and 'mobilevlm' are supported"):
        alignkd.load(tmp_path / "foreign")
    tensors = published_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        alignkd.load(copy_model(tmp_path / "incomplete", tensors))
    (copy_model(tmp_path / "untold") / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: cannot be read"):
        alignkd.load(tmp_path / "untold")
    tensors = published_tensors()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:100].clone()
    with pytest.raises(UserError, match="the model's vocabulary only 100"):
        alignkd.load(copy_model(tmp_path / "short", tensors, vocab_size=100))
