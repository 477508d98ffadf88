"""The encoder of a model folder's family."""

from __future__ import annotations

from pathlib import Path

from alignkd.config.schema import Config, ModelSection
from alignkd.data.chat_encoder import ChatEncoder
from alignkd.data.encoder import MobileVLMEncoder, SampleEncoder
from alignkd.data.images import ImageProcessor
from alignkd.data.pair_encoder import PairEncoder
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.errors import UserError
from alignkd.models.agreement import has_other_grids, student_folder, student_model_config
from alignkd.models.families.processors import read_config, read_processor
from alignkd.models.families.table import family_of
from alignkd.models.families.untried import found_family


def student_encoder(config: Config) -> SampleEncoder:
    """Encodes samples for the student, and so for the teacher, or for both where their grids of vision tokens
    differ. Raises UserError when the teacher's processor encodes a sample differently, whatever its files
    say."""
    if not config.distillation.enabled:
        return encoder_of(config.model, config.data.max_image_pixels)
    return pair_encoder(config.model, config.data.max_image_pixels)


def pair_encoder(section: ModelSection, max_image_pixels: int) -> SampleEncoder:
    """The same, whatever is done with the teacher."""
    encoder, teacher = encoder_of(section, max_image_pixels), section.teacher
    if not isinstance(encoder, ChatEncoder) or teacher is None:
        return encoder
    theirs = chat_encoder(Path(teacher), max_image_pixels)
    if has_other_grids(section):
        return PairEncoder(encoder, theirs)
    if theirs.fingerprint() != encoder.fingerprint():
        raise UserError(f"{teacher}: its processor encodes a sample differently from the student's")
    return encoder


def encoder_of(section: ModelSection, max_image_pixels: int) -> SampleEncoder:
    folder = student_folder(section)
    if family_of(folder) is None:
        facts = student_model_config(section)
        processor = ImageProcessor(facts.preprocessor_config, max_image_pixels)
        tokenizer = SentencePieceTokenizer.from_folder(folder)
        return MobileVLMEncoder(tokenizer, facts.vision_tokens, processor)
    return chat_encoder(folder, max_image_pixels)


def chat_encoder(folder: Path, max_image_pixels: int) -> ChatEncoder:
    """Raises CheckpointError when the folder has no usable processor."""
    family = found_family(folder)
    token = read_config(folder).image_token_id
    processor = read_processor(folder)
    return ChatEncoder(folder, processor, token, max_image_pixels, by_row=family.inputs_by_row)
