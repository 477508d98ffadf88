"""Write a MobileVLM folder as two GGUF files for llama.cpp, which runs on phones."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Literal

from alignkd.checkpoint.export import export_run
from alignkd.config import load_run_config
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import CheckpointError, FileSystemError, UserError
from alignkd.export import gguf_text, gguf_vision
from alignkd.export.gguf_card import gguf_card
from alignkd.export.gguf_file import write_gguf_file
from alignkd.export.gguf_names import MMPROJ, TEXT
from alignkd.models.configuration import read_model_config
from alignkd.models.families.mobilevlm_loading import check_tensors
from alignkd.models.weight_files import WeightFiles
from alignkd.run_folder.atomic_files import flush_to_disk, flush_tree
from alignkd.run_folder.paths import RunPaths

Quantization = Literal["f16", "q8_0", "q4_0"]


def export_gguf(model: Path, out: Path, name: str, quantize: Quantization, *, class_token: bool) -> None:
    """Write text.gguf, mmproj.gguf and README.md of the MobileVLM folder ``model`` into a new folder.

    ``out`` appears complete or not at all. ``class_token``: whether the vision tower keeps its class token
    (see ``gguf_vision``). Raises UserError when ``out`` exists, CheckpointError for models that do not fit
    llama.cpp's graph, FileSystemError when writing fails.
    """
    if out.exists():
        raise UserError(f"{out} exists; name a folder that does not exist")
    config = read_model_config(model)
    gguf_vision.check_tower(config, str(model))
    tokenizer = SentencePieceTokenizer.from_folder(model)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{model}: the tokenizer has {len(tokenizer)} pieces, the model {config.vocab_size} ids"
        )
    files = WeightFiles(model)
    check_tensors(config, files)
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_gguf_file(
            partial / MMPROJ,
            gguf_vision.ARCHITECTURE,
            gguf_vision.vision_metadata(config, name),
            list(gguf_vision.vision_tensors(config, files, class_token=class_token)),
        )
        write_gguf_file(
            partial / TEXT,
            gguf_text.ARCHITECTURE,
            gguf_text.text_metadata(config, tokenizer, name, quantize),
            list(gguf_text.text_tensors(config, files, quantize)),
        )
        card = gguf_card(model, name, quantize, class_token=class_token)
        (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        partial.rename(out)
        flush_to_disk(out.parent)
    except OSError as error:
        raise FileSystemError(f"{out}: could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # an incomplete model is of no use


def export_run_as_gguf(
    run: Path, out: Path, step: int | None, quantize: Quantization, *, class_token: bool
) -> None:
    """:func:`export_gguf` of a run's checkpoint, the newest by default. Raises as that and ``export_run`` do.

    The student is first written as a model folder beside ``out``, which costs its size on disk for a while.
    """
    if out.exists():
        raise UserError(f"{out} exists; name a folder that does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        model = Path(folder) / "model"
        export_run(run, model, step, "safetensors")
        name = load_run_config(RunPaths(run).config).run.name
        export_gguf(model, out, name, quantize, class_token=class_token)
