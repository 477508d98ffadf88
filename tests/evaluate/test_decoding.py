from pathlib import Path

import pytest
import torch

from alignkd.data.batch import IGNORE_INDEX, IMAGE_TOKEN_ID
from alignkd.data.collate import CollateSettings, Example, collate
from alignkd.evaluate.decoding import greedy_decode
from alignkd.models.building import BuildOptions
from alignkd.models.loading import load_model

FIXTURE = Path(__file__).parent.parent / "fixtures" / "mobilevlm_v2_tiny"
NO_TOKEN = -1


@pytest.fixture(scope="module")
def model():
    """Large random weights: the fixture's own say the same token for ever, whatever they are asked."""
    torch.set_num_threads(1)
    model = load_model(FIXTURE / "student", BuildOptions(torch.float32)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in (*model.language_model.parameters(), *model.head.parameters()):
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


def examples(count, generator):
    """Prompts of one length, with an image after the first token."""
    result = []
    for _ in range(count):
        text = torch.randint(3, 600, (6,), generator=generator).tolist()
        ids = [1, IMAGE_TOKEN_ID, *text]
        image = torch.randn(3, 336, 336, generator=generator)
        result.append(Example(ids, [IGNORE_INDEX] * len(ids), (image,)))
    return result


def settings(model):
    return CollateSettings(model.config.vision_tokens, (3, 336, 336))


@torch.inference_mode()
def decode_without_cache(model, example, steps):
    """The whole sequence again for every token."""
    ids = list(example.ids)
    for _ in range(steps):
        whole = Example(ids, [IGNORE_INDEX] * len(ids), example.images)
        hidden = model(collate([whole], settings(model))).hidden_BLD
        ids.append(int(model.logits(hidden[:, -1]).argmax()))
    return ids[len(example.ids) :]


def test_decoding_with_a_cache_equals_decoding_without(model):
    drawn = examples(3, torch.Generator().manual_seed(0))
    together = greedy_decode(model, collate(drawn, settings(model)), NO_TOKEN, 5)
    assert together == [decode_without_cache(model, example, 5) for example in drawn]
    assert all(len(set(answer)) > 1 for answer in together), "later tokens differ from the first"
    assert len({tuple(answer) for answer in together}) == 3, "prompts matter"


def test_each_answer_ends_before_its_own_end_token(model):
    drawn = examples(2, torch.Generator().manual_seed(0))
    batch = collate(drawn, settings(model))
    free = greedy_decode(model, batch, NO_TOKEN, 6)
    end = free[0][2]
    ended = greedy_decode(model, batch, end, 6)
    for without_end, answer in zip(free, ended, strict=True):
        length = without_end.index(end) if end in without_end else 6
        assert answer == without_end[:length]


def test_prompts_without_images_are_decoded(model):
    ids = [1, 5, 6, 7]
    example = Example(ids, [IGNORE_INDEX] * 4, ())
    answer = greedy_decode(model, collate([example], settings(model)), NO_TOKEN, 3)
    assert answer == [decode_without_cache(model, example, 3)]


def test_prompts_of_unequal_length_are_refused(model):
    long, short = examples(2, torch.Generator().manual_seed(0))
    shorter = Example(short.ids[:-1], short.labels[:-1], short.images)
    with pytest.raises(AssertionError, match="equal length"):
        greedy_decode(model, collate([long, shorter], settings(model)), NO_TOKEN, 1)
