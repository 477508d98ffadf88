"""``python -m alignkd.demo.vlm_pair PART``: the model folders of the demo's second form, as on a hub.

A tiny SmolVLM of random weights is the teacher to be trained; its student has a smaller, random language
model and the vision tower of the trained teacher.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from alignkd.data.sample_task.digits import IMAGE_SIDE
from alignkd.data.sample_task.questions import POSITIONS, SIDES, all_texts
from alignkd.models.families.processors import images_only
from alignkd.models.saving import write_folder

CONFIGURATION = "alignkd.yaml"
IMAGE, END = "<image>", "<|im_end|>"
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", END, IMAGE, "<fake_token_around_image>", "<global-img>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A word is a token, and so is a position ("top left"): a model learns to find a cell by one token sooner than
# by two.
WORD = "|".join([*POSITIONS, r"\w+", r"[^\w\s]"])
PATCH, SHUFFLE = 4, 2  # pixels of a patch; 8 x 8 patches become 4 x 4 vision tokens
SIZES = {"teacher": (128, 4, 4), "student": (96, 2, 3)}  # width, layers, heads


def new_tokenizer() -> PreTrainedTokenizerFast:
    splitter = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    sides = [side for pair in SIDES.values() for side in pair]  # one is an answer
    texts = ["user", "assistant", *sides, *all_texts(), *map(str, range(10))]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE, "fake_image_token": "<fake_token_around_image>"},
    )


def new_model(role: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    width, layers, heads = SIZES[role]
    config = SmolVLMConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            initializer_range=0.06,
            pad_token_id=0,
            eos_token_id=SPECIAL.index(END),
        ),
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH,
        },
        scale_factor=SHUFFLE,
        image_token_id=SPECIAL.index(IMAGE),
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmolVLMForConditionalGeneration(config)


def new_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": IMAGE_SIDE},
        max_image_size={"longest_edge": IMAGE_SIDE},
        do_image_splitting=False,
    )
    vision_tokens = (IMAGE_SIDE // PATCH // SHUFFLE) ** 2
    return images_only(SmolVLMProcessor)(
        images, tokenizer, None, image_seq_len=vision_tokens, chat_template=TEMPLATE
    )


def write_member(folder: Path, role: Literal["teacher", "student"], tower_of: Path | None, seed: int) -> None:
    """Atomic. ``tower_of``: a folder of the same family that the vision tower is taken from."""
    tokenizer = new_tokenizer()
    model = new_model(role, tokenizer, seed)
    if tower_of is not None:
        trained = AutoModelForImageTextToText.from_pretrained(tower_of, local_files_only=True)
        model.model.vision_model.load_state_dict(trained.model.vision_model.state_dict())

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        new_processor(tokenizer).save_pretrained(partial)

    write_folder(folder, write, replace=True)


def main(
    part: Annotated[str, typer.Argument(help="teacher or student.")],
    out: Annotated[Path, typer.Option(help="Folder of the demo.")],
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write the folder of a model, and with the teacher's the configuration."""
    if part == "teacher":
        text = (resources.files("alignkd.demo") / "vlm.yaml").read_text(encoding="utf-8")
        (out / CONFIGURATION).write_text(text, encoding="utf-8")
        write_member(out / "models" / part, "teacher", None, seed)
    else:
        write_member(out / "models" / part, "student", out / "runs" / "teacher" / "student", seed + 1)


if __name__ == "__main__":
    typer.run(main)
