"""The adapter for lmms-eval, on the real package where it is installed, else on a stand-in for its base class
(see ``stand_ins``)."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import alignkd
from alignkd.data.records import Turn
from alignkd.errors import UserError
from alignkd.evaluate.answering_model import AnsweringModel, Request
from alignkd.evaluate.generation import Decoding
from tests import tiny
from tests.evaluate.harnesses import stand_ins
from tests.evaluate.harnesses.loading import loading_spy

stand_ins.install()
from lmms_eval.api.instance import Instance  # noqa: E402

from alignkd.evaluate.harnesses.lmms_eval import AlignKD, manifest  # noqa: E402

PICTURES = [tiny.FOLDER / "image_0.png", tiny.FOLDER / "image_1.png"]
GREEDY = {"max_new_tokens": 6, "until": ["\n\n"], "do_sample": False}
Doc = tuple[str, tuple[int, ...]]  # a question and the numbers of its pictures


@pytest.fixture(scope="module")
def adapter() -> Any:
    options = {"batch_size": "2", "max_batch_size": None, "device": "cpu"}  # as lmms-eval passes them
    return AlignKD.create_from_arg_string(f"folder={tiny.STUDENT}", options)


def visuals(doc: Doc) -> list[Image.Image]:
    return [Image.open(PICTURES[number]) for number in doc[1]]


def ask(
    adapter: Any, docs: Sequence[Doc], settings: Any = GREEDY, to_visual: Any = visuals, repeats: int = 1
) -> list[str]:
    """Answers to ``docs``; ``settings`` of all, or a list with those of each."""
    adapter.task_dict["task"] = {"test": docs}
    requests = []
    for number, doc in enumerate(docs):
        each = settings[number] if isinstance(settings, list) else settings
        arguments = (doc[0], dict(each), to_visual, number, "task", "test")
        metadata = {"task": "task", "doc_id": number, "repeats": repeats}
        requests += [Instance("generate_until", arguments, 0, metadata)] * repeats
    return list(adapter.generate_until(requests))


def spy(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Request, Decoding]]:
    """What the adapter asks of its model, which then answers nothing."""
    seen: list[tuple[Request, Decoding]] = []

    def answers(requests: Sequence[Request], decoding: Decoding) -> list[str]:
        seen.extend((request, decoding) for request in requests)
        return [""] * len(requests)

    monkeypatch.setattr(adapter.model, "answers", answers)
    return seen


def test_the_entry_point_names_a_manifest_whose_class_can_be_imported() -> None:
    project = tomllib.loads((Path(alignkd.__file__).parents[1] / "pyproject.toml").read_text())
    module, name = project["project"]["entry-points"]["lmms_eval.models"]["alignkd"].split(":")
    assert getattr(importlib.import_module(module), name) is manifest
    module, name = manifest().simple_class_path.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is AlignKD
    assert manifest().model_id == "alignkd"
    assert AlignKD.is_simple


def test_answers_equal_those_of_load(adapter: Any, model: AnsweringModel) -> None:
    docs: list[Doc] = [("What is this?", (0,)), ("What is 2 plus 3?", ()), ("Tell me more of it.", (1,))]
    expected = [
        model.answer(PICTURES[0], "What is this?", max_new_tokens=6),
        model.answer(None, "What is 2 plus 3?", max_new_tokens=6),
        model.answer(PICTURES[1], "Tell me more of it.", max_new_tokens=6),
    ]
    assert len(set(expected)) == 3
    assert ask(adapter, docs) == expected
    assert ask(adapter, []) == []


def test_images_stand_before_the_text_unless_the_task_places_all_of_them(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spy(adapter, monkeypatch)
    pixels = [adapter.model.request(picture, "").images[0] for picture in PICTURES]
    cases: list[tuple[Doc, str]] = [
        (("Larger?", (0, 1)), "<image> <image>\nLarger?"),
        (("Is <image> larger than <image> ?", (1, 0)), "Is <image> larger than <image> ?"),
        (("Is <image> larger?", (0, 1)), "<image> <image>\nIs  larger?"),
        (("What?", (1,)), "<image>\nWhat?"),
        (("<image> and <image>", (0,)), "<image>\n and "),
        (("What is <image> here?", ()), "What is  here?"),
    ]
    ask(adapter, [doc for doc, _ in cases])
    for (doc, text), (request, _) in zip(cases, asked, strict=True):
        assert request.turns == (Turn("human", text),)
        assert len(request.images) == len(doc[1])
        assert all(torch.equal(image, pixels[n]) for image, n in zip(request.images, doc[1], strict=True))
    ask(adapter, [("What?", ())], to_visual=lambda _: None)
    assert asked[-1][0].images == ()


def test_several_images_are_answered_as_by_load(adapter: Any, model: AnsweringModel) -> None:
    images = tuple(model.request(picture, "").images[0] for picture in PICTURES)
    request = Request((Turn("human", "<image> <image>\nWhich is larger?"),), images)
    expected = model.answers([request], Decoding(6))
    assert ask(adapter, [("Which is larger?", (0, 1))]) == expected


@pytest.mark.parametrize("as_list", [True, False])
def test_answers_end_before_a_stop_string(adapter: Any, model: AnsweringModel, as_list: bool) -> None:
    whole = model.answer(PICTURES[0], "What is this?", max_new_tokens=6)
    stop = whole[2:4]
    until = ["", stop] if as_list else stop
    (answer,) = ask(adapter, [("What is this?", (0,))], {"max_new_tokens": 6, "until": until})
    assert answer == model.answer(PICTURES[0], "What is this?", max_new_tokens=6, stop=[stop])
    assert len(answer) < len(whole)


def test_each_request_has_the_longest_answer_of_its_task(adapter: Any, model: AnsweringModel) -> None:
    docs: list[Doc] = [("What is this?", (0,))] * 4
    lengths = [5, 1, 5, 3]
    expected = [model.answer(PICTURES[0], "What is this?", max_new_tokens=length) for length in lengths]
    assert ask(adapter, docs, [{"max_new_tokens": length} for length in lengths]) == expected


def test_a_batch_holds_no_more_than_its_size(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    answers = adapter.model.answers

    def counting(requests: Sequence[Request], decoding: Decoding) -> Any:
        sizes.append(len(requests))
        return answers(requests, decoding)

    monkeypatch.setattr(adapter.model, "answers", counting)
    ask(adapter, [("What is this?", (0,))] * 5, {"max_new_tokens": 1})
    assert sizes == [2, 2, 1]


def test_sampling_is_repeatable_and_repeats_differ(adapter: Any) -> None:
    hot = {"max_new_tokens": 8, "temperature": 5.0, "do_sample": True}
    first = ask(adapter, [("What is this?", (0,))], hot, repeats=3)
    assert len(set(first)) == 3
    assert ask(adapter, [("What is this?", (0,))], hot, repeats=3) == first


def test_what_decides_between_greedy_and_sampled_decoding(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spy(adapter, monkeypatch)
    cases = [
        ({}, Decoding(1024)),
        ({"do_sample": True}, Decoding(1024, 1.0)),
        ({"do_sample": True, "temperature": 0, "top_p": 0.9}, Decoding(1024)),
        ({"do_sample": False, "temperature": 0.7}, Decoding(1024)),
        ({"temperature": 0.7, "top_p": 0.9, "until": None}, Decoding(1024, 0.7, 0.9)),
        ({"temperature": 0.7, "top_p": 0}, Decoding(1024)),
        ({"until": "stop"}, Decoding(1024, stop=("stop",))),
        ({"temperature": 0.7, "top_p": None, "num_beams": 1, "image_aspect_ratio": "x"}, Decoding(1024, 0.7)),
    ]
    for settings, _ in cases:
        ask(adapter, [("What?", ())], settings)
    assert [decoding for _, decoding in asked] == [decoding for _, decoding in cases]


def test_what_cannot_be_answered_is_a_clear_error(adapter: Any) -> None:
    with pytest.raises(UserError, match="task task: num_beams is 3; alignkd has no beam search"):
        ask(adapter, [("What?", ())], {"num_beams": 3})
    with pytest.raises(UserError, match="task task: found a str; only images can be shown"):
        ask(adapter, [("What?", ())], to_visual=lambda _: ["film.mp4"])
    metadata = {"task": "choices", "doc_id": 0, "repeats": 1}
    request = Instance("loglikelihood", ("What?", " yes", visuals, 0, "choices", "test"), 0, metadata)
    for kind in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(UserError, match=f"choices: alignkd answers tasks .* generate_until, not {kind}"):
            getattr(adapter, kind)([request])
    for size in ("auto", "0", -1):
        with pytest.raises(UserError, match=r"--batch_size .* must be a number above 0"):
            AlignKD(str(tiny.STUDENT), batch_size=size)


def test_after_cleaning_the_weights_are_gone_and_the_device_is_known() -> None:
    adapter = AlignKD(str(tiny.STUDENT), precision="bf16", device="cpu")
    assert adapter.model.precision == "bf16"
    adapter.clean()
    assert not hasattr(adapter, "model")
    assert adapter.device == torch.device("cpu")


def test_the_model_is_loaded_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loading_spy(monkeypatch)
    with pytest.raises(InterruptedError):
        AlignKD("a-run", step=1600, precision="fp16", device="cuda:1", batch_size=4)
    assert loaded == [("a-run", {"step": 1600, "device": "cuda:1", "precision": "fp16"})]
