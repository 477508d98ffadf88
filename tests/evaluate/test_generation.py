"""Decoding of ragged prompts together, against the whole sequence computed again for every token."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError
from alignkd.evaluate.generation import Decoding, Prompt, _choose, generate
from alignkd.models.attention import use_plain_attention
from alignkd.models.building import BuildOptions
from alignkd.models.families.mobilevlm import MobileVLM
from alignkd.models.loading import load_model
from tests import tiny

STEPS = 6


def large_random_weights(model: MobileVLM) -> MobileVLM:
    """The fixture's own weights say the same token for ever, whatever they are asked."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (*model.language_model.parameters(), *model.head.parameters()):
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def training_model() -> MobileVLM:
    """With the attention of training, which builds no mask."""
    torch.set_num_threads(1)
    return large_random_weights(load_model(tiny.STUDENT, BuildOptions(torch.float32)))


@pytest.fixture(scope="module")
def model() -> MobileVLM:
    torch.set_num_threads(1)
    model = large_random_weights(load_model(tiny.STUDENT, BuildOptions(torch.float32)))
    use_plain_attention(model.language_model)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    """Without an end: its answers are as long as they may be."""
    return NoEnd.from_folder(tiny.STUDENT)


class NoEnd(SentencePieceTokenizer):
    @property
    def eos_id(self) -> int:
        return self.end

    end = 2**30


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(1))


def text(length: int, seed: int) -> list[int]:
    return torch.randint(3, 600, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# Any lengths together: text only, an image in front, the same image again, two images, the second one first.
PROMPTS = [
    Prompt([1, *text(9, 0)], (), 10),
    Prompt([1, IMAGE_TOKEN_ID, *text(4, 1)], (0,), 11),
    Prompt([1, *text(2, 2), IMAGE_TOKEN_ID, *text(7, 3)], (0,), 12),
    Prompt([1, IMAGE_TOKEN_ID, *text(2, 4), IMAGE_TOKEN_ID, *text(3, 5)], (1, 0), 13),
    Prompt([1, *text(3, 6)], (), 14),
]
SAMPLED = Decoding(STEPS, temperature=0.7, top_p=0.9)


@torch.inference_mode()
def without_cache(model: MobileVLM, prompt: Prompt, images: torch.Tensor) -> list[int]:
    ids = list(prompt.ids)
    settings = CollateSettings(model.config.vision_tokens, (3, 336, 336))
    for _ in range(STEPS):
        whole = Example(ids, [IGNORE_INDEX] * len(ids), tuple(images[number] for number in prompt.images))
        hidden = model(collate([whole], settings)).hidden_BLD
        ids.append(int(model.logits(hidden[:, -1]).argmax()))
    return ids[len(prompt.ids) :]


def alone(
    model: MobileVLM, tokenizer: SentencePieceTokenizer, prompt: Prompt, images: torch.Tensor, how: Decoding
) -> str:
    own = replace(prompt, images=tuple(range(len(prompt.images))))
    pixels = images[list(prompt.images)] if prompt.images else None
    return generate(model, tokenizer, [own], pixels, how)[0]


def test_ragged_prompts_together_equal_each_alone_without_a_cache(model, training_model, tokenizer, images):
    together = generate(model, tokenizer, PROMPTS, images, Decoding(STEPS))
    expected = [without_cache(training_model, prompt, images) for prompt in PROMPTS]
    assert together == [tokenizer.decode(ids).strip() for ids in expected]
    assert all(len(set(ids)) > 1 for ids in expected), "later tokens differ from the first"
    assert len(set(together)) == len(PROMPTS), "prompts matter"


@pytest.mark.parametrize("how", [Decoding(STEPS), SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(model, tokenizer, images, how):
    together = generate(model, tokenizer, PROMPTS, images, how)
    assert together == [alone(model, tokenizer, prompt, images, how) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS[::-1], images, how) == together[::-1]


def test_prompts_without_any_image_are_decoded(model, tokenizer, images):
    texts = [prompt for prompt in PROMPTS if not prompt.images]
    whole = generate(model, tokenizer, PROMPTS, images, Decoding(STEPS))
    assert generate(model, tokenizer, texts, None, Decoding(STEPS)) == [whole[0], whole[4]]


def test_equal_seeds_draw_equal_answers_and_others_do_not(model, tokenizer):
    prompts = [Prompt(PROMPTS[0].ids, (), seed) for seed in (1, 1, 2, 3)]
    first, again, *others = generate(model, tokenizer, prompts, None, SAMPLED)
    assert first == again
    assert len({first, *others}) > 1


def test_distinct_images_are_encoded_once_each(model, tokenizer, images, monkeypatch):
    encoded = []
    original = model.vision_tokens
    monkeypatch.setattr(
        model, "vision_tokens", lambda pixels: encoded.append(len(pixels)) or original(pixels)
    )
    generate(model, tokenizer, PROMPTS, images, Decoding(2))
    assert encoded == [2]


def test_each_answer_ends_before_its_own_end_token(model, tokenizer, training_model, images, monkeypatch):
    expected = [without_cache(training_model, prompt, images) for prompt in PROMPTS]
    end = expected[1][2]
    monkeypatch.setattr(NoEnd, "end", end)
    ended = generate(model, tokenizer, PROMPTS, images, Decoding(STEPS))
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert ended == [tokenizer.decode(ids).strip() for ids in cut]
    assert len(cut[1]) <= 2
    assert any(len(ids) == STEPS for ids in cut), "the others go on"


def test_each_answer_ends_before_a_stop_string(model, tokenizer, images):
    free = generate(model, tokenizer, PROMPTS, images, Decoding(STEPS))
    stop = free[1][2:5]
    stopped = generate(model, tokenizer, PROMPTS, images, Decoding(STEPS, stop=(stop, "\0never")))
    assert stopped == [answer.split(stop)[0].strip() for answer in free]
    assert stopped[1] != free[1]
    assert any(answer == other for answer, other in zip(stopped, free, strict=True)), "the others go on"


def test_decoding_stops_when_all_answers_are_done(model, tokenizer, images, monkeypatch):
    free = generate(model, tokenizer, PROMPTS[:1], None, Decoding(STEPS))[0]
    steps = []
    original = model.decode
    monkeypatch.setattr(model, "decode", lambda *values: steps.append(1) or original(*values))
    generate(model, tokenizer, PROMPTS[:1], None, Decoding(100, stop=(free[:2],)))
    assert len(steps) < STEPS


def test_sampling_follows_the_distribution_within_top_p():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).expand(1000, 4)
    uniform = torch.arange(1000, dtype=torch.float64) / 1000
    all_of_it = _choose(logits, Decoding(1, temperature=1.0), uniform).bincount(minlength=4)
    assert all_of_it.tolist() == pytest.approx([100, 500, 150, 250], abs=1)
    # 0.5 and 0.25 hold 0.75; the token that reaches 0.7 stays, the next ones go.
    nucleus = _choose(logits, Decoding(1, temperature=1.0, top_p=0.7), uniform).bincount(minlength=4)
    assert nucleus.tolist() == pytest.approx([0, 667, 0, 333], abs=1)
    sharp = _choose(logits, Decoding(1, temperature=0.5), uniform).bincount(minlength=4)
    assert sharp.tolist() == pytest.approx([29, 725, 65, 181], abs=1)
    assert set(_choose(logits, Decoding(1, temperature=1.0, top_p=0.01), uniform).tolist()) == {1}


def test_bf16_decodes_ragged_prompts(tokenizer, images):
    model = load_model(tiny.STUDENT, BuildOptions(torch.bfloat16)).eval()
    use_plain_attention(model.language_model)
    answers = generate(model, tokenizer, PROMPTS, images, Decoding(2))
    assert all(answers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"stop": ("",)}, "an empty text"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Decoding(**settings)


def test_the_most_likely_token_stays_however_small_its_share_must_be() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, -9.0]])
    for drawn in (0.0, 0.5, 0.999):
        chosen = _choose(logits, Decoding(temperature=1.0, top_p=1e-9), torch.tensor([drawn]))
        assert chosen.tolist() == [0]
