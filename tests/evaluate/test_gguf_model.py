"""A GGUF export answers through a real llama.cpp, as the folder that it was made of."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch

import alignkd
from alignkd.data.records import Turn
from alignkd.distributed.ranks import Ranks
from alignkd.errors import UserError
from alignkd.evaluate import gguf_limits
from alignkd.evaluate.answering_model import AnsweringModel, Request
from alignkd.evaluate.generation import Decoding
from alignkd.evaluate.gguf_model import GgufModel
from alignkd.evaluate.options import EvalOptions, ModelChoice, OwnQuestions
from alignkd.evaluate.program import answer_all
from alignkd.export.gguf import export_gguf
from tests.export import test_gguf
from tests.launcher.cli.command import ROOT

wide_model, pictures = test_gguf.wide_model, test_gguf.pictures  # the fixtures


@pytest.fixture(scope="module")
def export(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phone") / "out"
    export_gguf(wide_model, out, "wide", "f16", class_token=False)
    return out


@pytest.fixture(scope="module")
def model(export: Path) -> AnsweringModel:
    return alignkd.load(export)


def requests(model: AnsweringModel, pictures: list[Path]) -> list[Request]:
    """Their first words lead by more than 0.1: the f16 file errs by up to 0.02."""
    first, second = (model.request(picture, "what can be seen?") for picture in pictures)
    rounds = (*first.turns, Turn("gpt", "a picture"), Turn("human", "and what else?"))
    both = (Turn("human", "<image> is the one, <image> the other: why?"),)
    return [
        first,
        model.request(None, "how are you?"),
        Request(rounds, first.images),
        Request(both, (*first.images, *second.images)),
    ]


def test_answers_are_those_of_the_folder(
    wide_model: Path, model: AnsweringModel, pictures: list[Path]
) -> None:
    folder = alignkd.load(wide_model)
    expected = folder.answers(requests(folder, pictures), Decoding(1))
    assert model.answers(requests(model, pictures), Decoding(1)) == expected
    assert len(set(expected)) > 1
    assert not model.in_batches


def test_sampling_takes_a_seed_and_stop_strings_end_an_answer(model: AnsweringModel) -> None:
    hot = {"temperature": 5.0, "max_new_tokens": 8}
    first = model.answer(None, "why?", seed=1, **hot)
    assert first == model.answer(None, "why?", seed=1, **hot)
    assert first != model.answer(None, "why?", seed=2, **hot)
    whole = model.answer(None, "why?", max_new_tokens=6)
    assert model.answer(None, "why?", max_new_tokens=6, stop=whole[2:4]) == whole[: whole.index(whole[2:4])]


def test_what_a_gguf_cannot_do_is_refused(model: AnsweringModel, export: Path) -> None:
    with pytest.raises(UserError, match="precision 'fp32': a GGUF has the one it was exported with"):
        alignkd.load(export, precision="fp32")
    with pytest.raises(UserError, match="device 'cuda': a GGUF answers on the CPU"):
        alignkd.load(export, device="cuda")
    with pytest.raises(UserError, match=r"--step 3 is for a run folder; this is an export for llama\.cpp"):
        alignkd.load(export, step=3)
    with pytest.raises(UserError, match=r"--image-padding crop: llama\.cpp decides by itself"):
        model.padding_for("crop", pads=True)
    with pytest.raises(UserError, match=r"llama\.cpp refuses: .* exceeds the available context size"):
        model.answer(None, "why? " * 3000)


def test_an_incomplete_export_and_a_missing_wheel_are_errors(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(export / "text.gguf", tmp_path)
    with pytest.raises(UserError, match=r"mmproj\.gguf is missing beside text\.gguf"):
        alignkd.load(tmp_path)
    monkeypatch.setattr(gguf_limits, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'alignkd\[gguf\]'"):
        alignkd.load(export)


@pytest.mark.parametrize("kept", [3, 100_000])
@pytest.mark.parametrize("name", ["text.gguf", "mmproj.gguf"])
def test_a_damaged_file_is_one_error(
    export: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, kept: int
) -> None:
    for file in ("text.gguf", "mmproj.gguf"):
        shutil.copy(export / file, tmp_path)
    (tmp_path / name).write_bytes((export / name).read_bytes()[:kept])
    with pytest.raises(UserError, match=r"llama\.cpp does not load it \(.{10}"):
        alignkd.load(tmp_path)
    assert capfd.readouterr() == ("", "")


RAISING_SERVER = """
from unittest.mock import MagicMock as CommonParams
def Server(parameters): raise MemoryError("no room")
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("raise ImportError('undefined symbol')", "ImportError: undefined symbol"),
        (RAISING_SERVER, "MemoryError: no room"),
    ],
)
def test_an_exception_in_the_process_of_llama_cpp_is_one_error_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, reason: str
) -> None:
    (tmp_path / "xllamacpp.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(UserError, match=rf"does not load it \(it ended with exit code 1: {reason}\)"):
        GgufModel(tmp_path)


def server_of(model: AnsweringModel) -> subprocess.Popen[str]:
    server: subprocess.Popen[str] = vars(model)["_server"]
    return server


def test_llama_cpp_ending_by_itself_is_one_error(export: Path) -> None:
    model = alignkd.load(export)
    server_of(model).kill()
    with pytest.raises(UserError, match=r"llama\.cpp no longer answers \(it ended with exit code -9\)"):
        model.answer(None, "why?")


def test_llama_cpp_ends_with_the_model(export: Path) -> None:
    model = alignkd.load(export)
    server = server_of(model)
    assert server.poll() is None
    del model
    gc.collect()
    assert server.poll() is not None


def test_a_closed_model_does_not_answer(export: Path) -> None:
    model = alignkd.load(export, device="cpu")
    assert isinstance(model, GgufModel)
    model.close()
    model.close()
    with pytest.raises(UserError, match="the model has been closed"):
        model.answer(None, "why?")


def test_llama_cpp_ignores_ctrl_c_and_ends_with_the_program_that_asks(export: Path) -> None:
    """Ctrl-C reaches both, and a program that is killed closes its pipes."""
    model = alignkd.load(export)
    server = server_of(model)
    server.send_signal(signal.SIGINT)
    assert model.answer(None, "why?", max_new_tokens=1)
    assert server.stdin is not None
    server.stdin.close()
    assert server.wait(timeout=60) == 0


class OnGpu:
    """In place of ``Ranks``: one, which has a GPU."""

    rank, world_size, device = 0, 1, torch.device("cuda")

    def broadcast_object(self, value: bool) -> bool:
        return value

    def barrier(self) -> None: ...


def test_eval_asks_a_gguf_its_questions_on_ranks_with_gpus_too(
    export: Path, pictures: list[Path], tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "<image>\nwhy?"}, {"from": "gpt", "value": "so"}]
    asked = [{"id": path.stem, "image": path.name, "conversations": turns} for path in pictures]
    (tmp_path / "own.json").write_text(json.dumps(asked))
    own = OwnQuestions("own.json", str(pictures[0].parent))
    out = tmp_path / "eval"
    options = EvalOptions((ModelChoice("phone", str(export)),), "own", str(tmp_path), str(out), own)
    answer_all(options, cast(Ranks, OnGpu()))
    rows = [json.loads(line) for line in (out / "phone" / "own.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [path.stem for path in pictures]
    assert all(row["text"] for row in rows)


def test_chat_asks_a_gguf_through_the_command_line(
    wide_model: Path, export: Path, pictures: list[Path]
) -> None:
    expected = alignkd.load(wide_model).answer(pictures[0], "what can be seen?", max_new_tokens=1)
    done = chat(export, pictures[0])
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


def chat(model: Path, picture: Path) -> subprocess.CompletedProcess[str]:
    """One thread, as the tests: those of llama.cpp wait for each other without sleeping."""
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "chat", model, picture, "--max-new-tokens", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        input="what can be seen?\n",
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_digest_tells_both_files(model: AnsweringModel, export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "other")
    other = alignkd.load(tmp_path / "other")
    assert other.fingerprint() == model.fingerprint()
    with (tmp_path / "other" / "mmproj.gguf").open("ab") as file:
        file.write(b"x")
    assert other.fingerprint() != model.fingerprint()
