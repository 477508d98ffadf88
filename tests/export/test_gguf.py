"""A real llama.cpp runs the exported files, and computes what torch computes."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.images import ImageProcessor
from alignkd.data.records import Turn
from alignkd.data.templates import SYSTEM_SENTENCE, encode_prompt
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import CheckpointError
from alignkd.export.gguf import Quantization, export_gguf
from alignkd.models.building import BuildOptions
from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm import MobileVLM, public_name
from alignkd.models.loading import load_model
from alignkd.run_folder.paths import RunPaths
from tests import model_folders, tiny
from tests.checkpoint.test_damaged_checkpoints import go_on
from tests.export.llama_cpp import LlamaCpp
from tests.launcher.cli.command import alignkd
from tests.ranks import RankPool

# (turns, in which <image> stands for the next picture; the last one is a question)
CONVERSATIONS = {
    "image": ["<image>\nwhat is in the picture?"],
    "text": ["how are you?"],
    "rounds": ["<image>\nwhat is this?", "a picture", "and what else can be seen?"],
    "two images": ["<image> is the one, <image> the other: what differs?"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """In the size of the tower, so that llama.cpp's own resizing does nothing."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number in range(2):
        path = folder / f"{number}.png"
        Image.open(tiny.FOLDER / f"image_{number}.png").convert("RGB").resize((336, 336)).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose rows fill blocks of 32, with grouped keys, more ids than pieces, and a class token
    and positions that matter."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model_folders.copy_model(folder, **sizes, num_key_value_heads=2, vocab_size=608)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MobileVLM(read_model_config(folder)).float()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.5)
        nn.init.normal_(model.vision_tower.embeddings.class_embedding, std=20.0)
        nn.init.normal_(model.vision_tower.embeddings.position_embedding.weight, std=8.0)
    (folder / "model.safetensors").unlink(missing_ok=True)
    model_folders.write_weights(
        folder, {public_name(name): value.detach() for name, value in model.named_parameters()}
    )
    return folder


class TorchModel:
    """The same model in torch, fp32."""

    def __init__(self, folder: Path, *, class_token: bool) -> None:
        self.model = load_model(folder, BuildOptions(torch.float32)).eval()
        self.tokenizer = SentencePieceTokenizer.from_folder(folder)
        self.class_token = class_token

    @torch.inference_mode()
    def next_token(self, turns: list[str], pictures: list[Path]) -> tuple[torch.Tensor, int]:
        """(log-probabilities of the next token, number of prompt tokens)."""
        speakers = ("human", "gpt") * len(turns)
        asked = [Turn(speaker, text) for speaker, text in zip(speakers, turns, strict=False)]
        ids = encode_prompt(asked, "v1", self.tokenizer)
        processor = ImageProcessor(self.model.config.preprocessor_config, DEFAULT_MAX_IMAGE_PIXELS)
        images = tuple(processor.read(path.parent, path.name, "pad") for path in pictures)
        settings = CollateSettings(self.model.config.vision_tokens, processor.shape)
        batch = collate([Example(ids, [-100] * len(ids), images)], settings)
        patches = None if self.class_token else self.patches_without_class_token(batch.pixel_values)
        hidden = self.model(batch, patches).hidden_BLD[0, -1]
        return self.model.logits(hidden).log_softmax(-1), batch.counts.tokens

    def patches_without_class_token(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels)[:, 1:])
        for layer in tower.encoder.layers[: self.model.used_tower_layers]:
            hidden = layer(hidden, attention_mask=None)
        return hidden


def v1_prompt(turns: list[str]) -> str:
    """The text of template v1, written down once more."""
    prompt = f"{SYSTEM_SENTENCE} "
    for number, text in enumerate(turns):
        prompt += f"USER: {text} ASSISTANT:" if number % 2 == 0 else f" {text}</s>"
    return prompt


def largest_error(folder: Path, exported: Path, pictures: list[Path], *, class_token: bool) -> float:
    """Of any word's log-probability, over all conversations."""
    reference = TorchModel(folder, class_token=class_token)
    vocab_size = reference.model.config.vocab_size
    llama, errors = LlamaCpp(exported), []
    for turns in CONVERSATIONS.values():
        shown = pictures[: "".join(turns).count("<image>")]
        expected, length = reference.next_token(turns, shown)
        found, evaluated = llama.next_token(v1_prompt(turns), shown, vocab_size)
        assert evaluated == length
        errors.append(float(np.abs(np.array(found) - expected.numpy()).max()))
    return max(errors)


# Log-probabilities of these random models spread over some 15 units. What is measured: 0.024, 0.21 and 2.5.
@pytest.mark.parametrize(("quantize", "bound"), [("f16", 0.05), ("q8_0", 0.5), ("q4_0", 4.0)])
def test_next_token_log_probabilities_are_those_of_torch(
    wide_model: Path, pictures: list[Path], tmp_path: Path, quantize: Quantization, bound: float
) -> None:
    export_gguf(wide_model, tmp_path / "out", "wide", quantize, class_token=False)
    assert largest_error(wide_model, tmp_path / "out", pictures, class_token=False) < bound


def test_with_its_class_token_the_file_is_wrong_in_llama_cpp_as_the_card_says(
    wide_model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """When this fails, llama.cpp places class tokens rightly: card and documents must say since when."""
    export_gguf(wide_model, tmp_path / "out", "wide", "f16", class_token=True)
    assert largest_error(wide_model, tmp_path / "out", pictures, class_token=True) > 0.05
    assert "llama.cpp issue 25814" in (tmp_path / "out" / "README.md").read_text()


def test_without_its_class_token_the_file_is_near_the_whole_model_too(
    wide_model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    export_gguf(wide_model, tmp_path / "out", "wide", "f16", class_token=False)
    assert largest_error(wide_model, tmp_path / "out", pictures, class_token=True) < 0.05
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-mtmd-cli --jinja " in card  # else it knows only templates of its own


def test_the_chat_template_of_the_file_is_template_v1(
    wide_model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    export_gguf(wide_model, tmp_path / "out", "wide", "f16", class_token=False)
    llama = LlamaCpp(tmp_path / "out")
    url = "data:image/png;base64," + base64.b64encode(pictures[0].read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "why?"}]},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "and then?"},
    ]
    prompt = llama.prompt_of(messages).replace(llama.marker, "<image>")
    assert prompt == v1_prompt(["<image>\nwhy?", "so", "and then?"])
    assert llama.chat(messages, 4)


def test_a_run_is_exported_through_the_command_line(one_rank: RankPool, tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run", 1)
    assert [code for code, _ in one_rank.run(go_on, str(run))] == [0]
    out = tmp_path / "out"
    assert alignkd("export", run, "--format", "gguf", "--out", out).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "mmproj.gguf", "text.gguf"]
    head, norm, down = stored(
        out / "text.gguf", "output.weight", "output_norm.weight", "blk.0.ffn_down.weight"
    )
    # Rows of 48 do not fill blocks of 32; those of 96 do.
    assert (head.tensor_type.name, norm.tensor_type.name, down.tensor_type.name) == ("F16", "F32", "Q8_0")
    student = load_file(RunPaths(run).student / "model.safetensors")
    np.testing.assert_array_equal(norm.data, student["model.norm.weight"].float().numpy())
    assert "v.class_embd" not in {tensor.name for tensor in gguf.GGUFReader(out / "mmproj.gguf").tensors}
    card = (out / "README.md").read_text()
    assert "It is the state at optimizer step 4" in card
    assert "`text.gguf` (q8_0)" in card
    assert not list(tmp_path.glob(".out*"))  # the model folder on the way


def stored(path: Path, *names: str) -> list[Any]:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    return [tensors[name] for name in names]


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: model_folders.change_json(folder / "config.json", **changes)


def change_tower(**changes: Any) -> Callable[[Path], None]:
    tower = Path(model_folders.TOWER_NAME) / "config.json"
    return lambda folder: model_folders.change_json(folder / tower, **changes)


def change_weights(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    tensors = {key: tensor for key, tensor in model_folders.published_tensors().items() if key != name}
    changed = tensors if value is None else {**tensors, name: value}
    return lambda folder: model_folders.write_weights(folder, changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config(mm_vision_tokens_per_side=8), "12 x 12 only"),
        (change_tower(hidden_act="silu"), "the tower's `hidden_act` is 'silu'"),
        (change_weights("lm_head.weight", None), "missing: lm_head.weight"),
        (change_weights("model.layers.9.x", torch.ones(2)), "unexpected: model.layers.9.x"),
        (change_weights("lm_head.weight", torch.ones(600, 40)), "wrong shape: lm_head.weight"),
        (change_weights("lm_head.weight", torch.full((600, 48), 1e5)), "output.weight: holds 100000.0"),
        (change_weights("lm_head.weight", torch.full((600, 48), torch.nan)), "output.weight: holds nan"),
    ],
)
def test_a_model_that_llama_cpp_cannot_run_is_refused_and_nothing_is_left(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = model_folders.copy_model(tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        export_gguf(folder, tmp_path / "out", "tiny", "f16", class_token=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "q8_0"], "--quantize and --[no-]class-token need --format gguf"),
        (["--format", "gguf", "--step", "3"], "is a model folder, which has no checkpoints"),
        (["--format", "gguf", "--quantize", "q2_k"], "q2_k"),
        (["--format", "gguf", "--out", "."], "exists; name a folder that does not exist"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    out = [] if "--out" in options else ["--out", tmp_path / "out"]
    done = alignkd("export", tiny.STUDENT, *options, *out)
    assert done.returncode == 2
    assert message in done.stderr
