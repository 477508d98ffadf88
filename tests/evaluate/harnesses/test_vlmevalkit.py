"""The adapter for VLMEvalKit, on the real package where it is installed, else on a stand-in for its base
class (see ``stand_ins``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignkd.data.records import Turn
from alignkd.evaluate.answering_model import AnsweringModel, Request
from alignkd.evaluate.generation import Decoding
from tests import tiny
from tests.evaluate.harnesses import stand_ins
from tests.evaluate.harnesses.loading import loading_spy

stand_ins.install()
from alignkd.evaluate.harnesses.vlmevalkit import AlignKD  # noqa: E402

PICTURES = [tiny.FOLDER / "image_0.png", tiny.FOLDER / "image_1.png"]


@pytest.fixture(scope="module")
def adapter() -> Any:
    return AlignKD(folder=str(tiny.STUDENT), max_new_tokens=6)


def image(path: Path) -> dict[str, str]:
    return {"type": "image", "value": str(path)}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "value": value}


def test_answers_equal_those_of_load(adapter: Any, model: AnsweringModel) -> None:
    expected = model.answer(PICTURES[0], "What is this?", max_new_tokens=6)
    assert adapter.generate([image(PICTURES[0]), text("What is this?")], dataset="MME") == expected
    assert adapter.generate([text("What is this?"), image(PICTURES[0])]) == expected
    text_only = adapter.generate([text("What is 2 plus 3?")])
    assert text_only == model.answer(None, "What is 2 plus 3?", max_new_tokens=6) != expected


def test_several_images_and_texts_keep_their_order(
    adapter: Any, model: AnsweringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (model.request(picture, "").images[0] for picture in PICTURES)
    request = Request((Turn("human", "First:\n<image>\nSecond:\n<image>\nDiffer?"),), (second, first))
    message = [text("First:"), image(PICTURES[1]), text("Second:"), image(PICTURES[0]), text("Differ?")]
    assert adapter.generate(message) == model.answers([request], Decoding(6))[0]
    asked: list[Request] = []
    monkeypatch.setattr(adapter.model, "answers", lambda requests, _: asked.extend(requests) or [""])
    adapter.generate(message)
    assert asked[0].turns == request.turns
    assert [torch.equal(image, second) for image in asked[0].images] == [True, False]


def test_a_marker_in_a_text_is_no_image(adapter: Any, model: AnsweringModel) -> None:
    message = [image(PICTURES[0]), text("What is <image> here?")]
    expected = model.answer(PICTURES[0], "What is <image> here?", max_new_tokens=6)
    assert adapter.generate(message) == expected


def test_decoding_is_chosen_in_the_configuration(model: AnsweringModel) -> None:
    whole = model.answer(PICTURES[0], "What is this?", max_new_tokens=6)
    message = [image(PICTURES[0]), text("What is this?")]
    short = AlignKD(str(tiny.STUDENT), max_new_tokens=6, stop=[whole[2:4]], device="cpu", precision="fp32")
    assert whole.startswith(short.generate(message))
    assert len(short.generate(message)) < len(whole)
    hot = AlignKD(str(tiny.STUDENT), max_new_tokens=8, temperature=5.0, top_p=0.9)
    assert hot.generate(message) == model.answer(
        PICTURES[0], "What is this?", max_new_tokens=8, temperature=5.0, top_p=0.9
    )
    assert AlignKD(str(tiny.STUDENT)).decoding == Decoding(1024)


def test_a_conversation_is_answered_at_its_end(adapter: Any, model: AnsweringModel) -> None:
    messages = [
        {"role": "user", "content": [image(PICTURES[0]), text("What is this?")]},
        {"role": "assistant", "content": [text("A square.")]},
        {"role": "user", "content": [text("Which colour?")]},
    ]
    turns = (
        Turn("human", "<image>\nWhat is this?"),
        Turn("gpt", "A square."),
        Turn("human", "Which colour?"),
    )
    request = Request(turns, model.request(PICTURES[0], "").images)
    assert adapter.chat(messages) == model.answers([request], Decoding(6))[0]


def test_the_harness_may_interleave_and_sends_no_videos(adapter: Any) -> None:
    assert adapter.INTERLEAVE
    assert not adapter.use_custom_prompt("MME")  # VLMEvalKit's own prompts
    with pytest.raises(AssertionError, match="Invalid input type: video"):
        adapter.generate([{"type": "video", "value": "film.mp4"}])


def test_the_model_is_loaded_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loading_spy(monkeypatch)
    with pytest.raises(InterruptedError):
        AlignKD(folder="a-run", step=1600, device="cuda:1", precision="fp16")
    assert loaded == [("a-run", {"step": 1600, "device": "cuda:1", "precision": "fp16"})]
