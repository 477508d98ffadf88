"""A model that answers: the one loader behind `alignkd eval`, `alignkd chat` and ``alignkd.load``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator
from PIL import Image

from alignkd.checkpoint.export import saved_student
from alignkd.config.schema import DEFAULT_MAX_IMAGE_PIXELS
from alignkd.data.images import AspectRatio, BadImage, ImageProcessor
from alignkd.data.records import IMAGE_MARKER, Turn
from alignkd.data.templates import encode_prompt
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError
from alignkd.evaluate.generation import Decoding, Prompt, generate
from alignkd.evaluate.model_folders import FolderKind, folder_kind
from alignkd.evaluate.tasks.pictures import Picture, PictureFile, open_picture
from alignkd.models.agreement import student_folder, student_model_config
from alignkd.models.attention import use_plain_attention
from alignkd.models.building import DTYPES, BuildOptions
from alignkd.models.families.mobilevlm import MobileVLM, public_name
from alignkd.models.families.mobilevlm_loading import load_model, model_of_tensors
from alignkd.models.loading import fingerprint
from alignkd.run_folder.paths import RunPaths

Padding = Literal["pad", "crop"]  # how an image becomes a square: padded, or its centre cut out


@dataclass(frozen=True)
class Request:
    """A conversation that ends with a question; its turns hold one marker `<image>` per image."""

    turns: tuple[Turn, ...]
    images: tuple[torch.Tensor, ...] = ()  # pixel values; a tensor that occurs twice is encoded once
    seed: int = 0  # of sampling


@dataclass
class AnsweringModel:
    """Answers with the `v1` template. Made by :func:`load`."""

    model: MobileVLM
    tokenizer: SentencePieceTokenizer
    precision: str
    _processor: ImageProcessor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        use_plain_attention(self.model.eval().language_model)
        self._processor = ImageProcessor(self.model.config.preprocessor_config, DEFAULT_MAX_IMAGE_PIXELS)

    def answer(
        self,
        image: str | Path | Image.Image | None,
        text: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> str:
        """The answer to one question, about an image or none. Temperature 0 is greedy decoding."""
        decoding = Decoding(
            max_new_tokens, temperature, top_p, (stop,) if isinstance(stop, str) else tuple(stop)
        )
        return self.answers([self.request(image, text, seed)], decoding)[0]

    def answers(self, requests: Sequence[Request], decoding: Decoding = Decoding()) -> list[str]:  # noqa: B008
        """The answers to requests of any lengths, as one batch."""
        if not requests:
            return []
        numbers: dict[int, int] = {}  # id of a tensor -> its number among the distinct ones
        distinct: list[torch.Tensor] = []
        for image in (image for request in requests for image in request.images):
            if id(image) not in numbers:
                numbers[id(image)] = len(distinct)
                distinct.append(image)
        prompts = [
            Prompt(
                encode_prompt(request.turns, "v1", self.tokenizer),
                tuple(numbers[id(image)] for image in request.images),
                request.seed,
            )
            for request in requests
        ]
        pixel_values = torch.stack(distinct) if distinct else None
        return generate(self.model, self.tokenizer, prompts, pixel_values, decoding)

    def request(self, image: str | Path | Image.Image | None, text: str, seed: int = 0) -> Request:
        """One question about an image or none. Raises UserError for an unusable image."""
        if image is None:
            return Request((Turn("human", text.replace(IMAGE_MARKER, "")),), (), seed)
        if isinstance(image, Image.Image):
            pixels = self._pixels(image, "the image", None)
        else:
            pixels = self.pixels(PictureFile(Path(image).parent, Path(image).name))
        return Request((Turn("human", f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '')}"),), (pixels,), seed)

    def pixels(self, picture: Picture, padding: Padding | None = None) -> torch.Tensor:
        """Pixel values of a picture, float32 [3, H, W]; ``padding`` None: as the model was trained. Raises
        UserError for an unusable picture."""
        return self._pixels(open_picture(picture, DEFAULT_MAX_IMAGE_PIXELS), str(picture), padding)

    def _pixels(self, image: Image.Image, name: str, padding: Padding | None) -> torch.Tensor:
        aspect_ratio: AspectRatio = "square" if (padding or self.padding) == "crop" else "pad"
        try:
            return self._processor.pixels(image, name, aspect_ratio)
        except BadImage as error:
            raise UserError(str(error)) from None

    @property
    def padding(self) -> Padding:
        """How images became squares when the model was trained."""
        return "pad" if self.model.config.image_aspect_ratio == "pad" else "crop"

    def fingerprint(self) -> str:
        """sha256 of the weights, in the precision that answers."""
        return fingerprint(self.model)


def load(
    folder: str | Path, *, step: int | None = None, device: str | None = None, precision: str | None = None
) -> AnsweringModel:
    """Load an export, a public MobileVLM V2 folder, or the student in a run's checkpoint (the newest, or that
    of ``step``). ``device``: default a GPU if there is one; ``precision`` bf16, fp16 or fp32: default bf16
    on a GPU, fp32 on a CPU. Raises UserError."""
    folder = Path(folder)
    kind = folder_kind(folder, step)
    where = _device(device)
    precision = precision or ("fp32" if where.type == "cpu" else "bf16")
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r:.80} is unknown; valid: {', '.join(DTYPES)}")
    if precision == "fp32":  # and not TF32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    options = BuildOptions(DTYPES[precision], where)
    if kind is FolderKind.CHECKPOINT:
        saved = saved_student(folder, step)
        shown = f"{folder}, step {saved.step}"
        tensors = {public_name(name): value for name, value in saved.tensors.items()}
        model = model_of_tensors(student_model_config(saved.model), tensors, options, shown)
        tokenizer_folder = student_folder(saved.model)
    else:
        tokenizer_folder = folder if kind is FolderKind.MODEL else RunPaths(folder).student
        model = load_model(tokenizer_folder, options)
    tokenizer = SentencePieceTokenizer.from_folder(tokenizer_folder)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{tokenizer_folder}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{model.config.vocab_size}"
        )
    return AnsweringModel(model, tokenizer, precision)


def _device(name: str | None) -> torch.device:
    """``name``, or this rank's accelerator if there is one, else the CPU. Raises UserError."""
    try:
        if name is not None:
            device = torch.device(name)
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r:.80} cannot be used ({str(error).splitlines()[0]})") from None
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu" or not accelerator.is_available():
        return torch.device("cpu")
    return torch.device(
        accelerator.device_name(int(os.environ.get("LOCAL_RANK", "0")) % accelerator.device_count())
    )
