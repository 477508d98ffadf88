"""``alignkd.load`` of other families than MobileVLM: answers as by transformers' own ``generate``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText

import alignkd
from alignkd.data.records import Turn
from alignkd.errors import UserError
from alignkd.evaluate.answering_model import AnsweringModel, Request
from alignkd.evaluate.generation import Decoding
from alignkd.evaluate.options import EvalOptions, OwnQuestions, named_models
from alignkd.evaluate.program import answer_all, score_all
from alignkd.models.families.processors import read_processor
from alignkd.run_folder.paths import RunPaths
from tests import vlm

TOKENS = 6
SHORT = Decoding(TOKENS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    vlm.write_images(folder)
    return folder


@pytest.fixture(scope="module")
def smolvlm() -> AnsweringModel:
    return alignkd.load(vlm.folder("smolvlm"))


def prompt(*turns: str) -> str:
    """By hand, as ``vlm_models.TEMPLATE`` writes it."""
    roles = ("user", "assistant")
    written = [f"<|im_start|>{roles[number % 2]}\n{text}<|im_end|>\n" for number, text in enumerate(turns)]
    return "".join(written) + "<|im_start|>assistant\n"


def natural_inputs(family: str, text: str, pictures: list[Path], **options: Any) -> dict[str, torch.Tensor]:
    """What a user of transformers would give to ``generate``."""
    processor = read_processor(vlm.folder(family))
    opened = [Image.open(path).convert("RGB") for path in pictures]
    text = text.replace("<image>", processor.image_token)
    return dict(processor(text=[text], images=[opened] if opened else None, return_tensors="pt", **options))


def own_answer(family: str, inputs: dict[str, Any]) -> str:
    """Greedily, by a model that transformers loads."""
    model = AutoModelForImageTextToText.from_pretrained(vlm.folder(family), dtype=torch.float32).eval()
    tokenizer = read_processor(vlm.folder(family)).tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    row = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
    return str(tokenizer.decode(row[: row.index(end)] if end in row else row)).strip()


@pytest.mark.parametrize("family", vlm.FAMILIES)
def test_inputs_and_answers_are_those_of_transformers(family: str, images: Path) -> None:
    """About one image, none, and two after an earlier turn; together as each alone."""
    model = alignkd.load(vlm.folder(family))
    first, second = images / "0.png", images / "1.png"
    turns = (Turn("human", "and <image> this <image>"), Turn("gpt", "red"), Turn("human", "what"))
    pictures = tuple(model.request(path, "").images[0] for path in (second, first))
    asked = [
        model.request(first, "what colour"),
        model.request(None, "the answer"),
        Request(turns, pictures),
    ]
    natural = [
        natural_inputs(family, prompt("<image>what colour"), [first]),
        natural_inputs(family, prompt("the answer"), []),
        natural_inputs(family, prompt("and <image> this <image>", "red", "what"), [second, first]),
    ]
    for request, theirs in zip(asked, natural, strict=True):
        ours = model.inputs(request)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, torch.as_tensor(theirs[name])) for name, value in ours.items())
    found = model.answers(asked, SHORT)
    assert found == [own_answer(family, theirs) for theirs in natural]
    assert model.answers(asked[:1], SHORT) == found[:1]
    assert model.answer(first, "what colour", max_new_tokens=TOKENS) == found[0]
    if family != "gemma3":  # its tied head repeats the newline that ends every prompt
        assert len(set(found)) == 3


def test_an_answer_ends_at_the_templates_end_token(
    smolvlm: AnsweringModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder's generation settings name another one, which counts, too."""
    tokenizer, calls = smolvlm.encoder.tokenizer, []
    red, blue = (tokenizer(word)["input_ids"] for word in ("red", "blue"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def generate(input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        calls.append(generation_config)
        return torch.cat([input_ids, torch.tensor([[*red, end, *blue]])], dim=1)

    monkeypatch.setattr(smolvlm.whole, "generate", generate)
    other = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    monkeypatch.setattr(smolvlm.whole.generation_config, "eos_token_id", [other])
    model = type(smolvlm)(smolvlm.whole, smolvlm.family, smolvlm.encoder, "fp32")
    assert model.answer(None, "what") == "red"
    assert calls[0].eos_token_id == sorted([end, other])


def test_what_a_folder_says_of_generation_does_not_change_an_answer(
    smolvlm: AnsweringModel, images: Path, tmp_path: Path
) -> None:
    """An export of a student that began from the folder would not say it."""
    shutil.copytree(vlm.folder("smolvlm"), tmp_path / "folder")
    file = tmp_path / "folder" / "generation_config.json"
    asks = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | asks))
    penalised = alignkd.load(tmp_path / "folder")
    long = Decoding(12)
    for text in ("what colour", "the answer"):
        request = smolvlm.request(images / "0.png", text)
        assert penalised.answers([request], long) == smolvlm.answers([request], long)


def finished_run(out: Path, *options: dict[str, Any], texts_only: bool = False) -> Path:
    """A run of SmolVLM without checkpoints, with one source of images for each of ``options``."""
    run = vlm.write_run(out, 1, "smolvlm")
    shutil.copytree(vlm.folder("smolvlm"), RunPaths(run).student)
    document = yaml.safe_load(RunPaths(run).config.read_text())
    (source,) = document["data"]["sources"]
    sources = [source | {"image_options": one} for one in options]
    document["data"]["sources"] = [*sources, *([source | {"image_folder": None}] if texts_only else [])]
    RunPaths(run).config.write_text(json.dumps(document))
    return run


def test_a_run_answers_with_the_image_options_that_it_was_trained_with(
    smolvlm: AnsweringModel, images: Path, tmp_path: Path
) -> None:
    """Unless its sources differ in them. Those that have texts only do not count."""
    options = {"size": {"longest_edge": 28}}
    model = alignkd.load(finished_run(tmp_path / "same", options, options, texts_only=True))
    request = model.request(images / "0.png", "what colour")
    theirs = natural_inputs("smolvlm", prompt("<image>what colour"), [images / "0.png"], **options)
    ours = model.inputs(request)
    assert all(torch.equal(value, torch.as_tensor(theirs[name])) for name, value in ours.items())
    default = smolvlm.inputs(request)
    assert ours["pixel_values"].shape != default["pixel_values"].shape
    assert model.answer_settings() == {"image_options": '{"size": {"longest_edge": 28}}'}
    assert smolvlm.answer_settings() == {}


def test_a_run_whose_sources_differ_in_image_options_says_that_none_apply(
    smolvlm: AnsweringModel, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "differs", {"size": {"longest_edge": 28}}, {})
    model = alignkd.load(run)
    assert f"note: {run}: its sources differ in image_options" in capsys.readouterr().err
    request = model.request(images / "0.png", "what colour")
    assert torch.equal(model.inputs(request)["pixel_values"], smolvlm.inputs(request)["pixel_values"])


def test_a_stop_string_ends_an_answer(smolvlm: AnsweringModel, images: Path) -> None:
    request = smolvlm.request(images / "0.png", "what colour")
    (whole,) = smolvlm.answers([request], SHORT)
    stop = whole[len(whole) // 2 :][:2]
    assert smolvlm.answers([request], Decoding(TOKENS, stop=(stop,))) == [whole[: whole.index(stop)].strip()]


def test_sampling_takes_a_seed_and_leaves_torchs_generator_alone(
    smolvlm: AnsweringModel, images: Path
) -> None:
    before = torch.get_rng_state()
    sampled = Decoding(TOKENS, temperature=2.0)
    asked = [smolvlm.request(images / "0.png", "what", seed) for seed in (1, 2, 1)]
    first, second, third = smolvlm.answers(asked, sampled)
    assert first == third != second
    assert torch.equal(torch.get_rng_state(), before)


def test_a_special_token_in_a_question_is_refused(smolvlm: AnsweringModel) -> None:
    with pytest.raises(UserError, match=r"contains '<\|im_end\|>', a special token"):
        smolvlm.answer(None, "what <|im_end|>")


def test_an_evaluation_asks_a_family_and_does_not_pad_its_images(images: Path, tmp_path: Path) -> None:
    model = alignkd.load(vlm.folder("smolvlm"))
    expected = [model.answer(images / f"{number}.png", "what colour") for number in range(3)]
    expected[2] = "another answer"
    turns = [({"from": "human", "value": "<image>\nwhat colour"}, answer) for answer in expected]
    records = [
        {
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [turn, {"from": "gpt", "value": answer}],
        }
        for number, (turn, answer) in enumerate(turns)
    ]
    (tmp_path / "own.json").write_text(json.dumps(records))
    options = EvalOptions(
        named_models([f"mine={vlm.folder('smolvlm')}"]),
        "own",
        str(tmp_path),
        str(tmp_path / "out"),
        own=OwnQuestions("own.json", str(images)),
    )
    with pytest.raises(UserError, match="--image-padding pad: only for MobileVLM"):
        answer_all(replace(options, image_padding="pad"), None)
    answer_all(options, None)
    (score,) = score_all(options)["mine"]
    assert score.overall.estimates["score"].value == pytest.approx(200 / 3)
    assert score.settings["image_padding"] == "processor"
