"""The scenes' task: samples of every split, the folders of its models, and the tower's output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from alignkd.data.records import IMAGE_MARKER
from alignkd.data.sample_task import folders
from alignkd.data.sample_task.tokenizer import train_on_texts
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.models.tower import default_preprocessor
from benchmarks.evidence.bench import kept
from benchmarks.evidence.scenes.cutouts import CATEGORIES, SPLITS, Sources
from benchmarks.evidence.scenes.network import CHANNELS, STRIDE, Network, feature_map, load_network
from benchmarks.evidence.scenes.questions import KINDS, all_texts, ask, caption
from benchmarks.evidence.scenes.scene import POSITIONS, SIDE, Scene, draw_scene, render
from benchmarks.evidence.task import CAPTION, DATA_SEED, Sample, Splits, encoded_sample, splits_digest

QUESTIONS = 3  # of each training scene, beside its caption
CHUNK = 256  # scenes in a file of patches
PATCHES = SIDE // STRIDE  # per side
WIDTH = CHANNELS + 2 * PATCHES  # of a patch
POSITION = 3.0  # of the channels that say where a patch is


@dataclass(frozen=True)
class SceneSizes:
    train: int = 10_240  # scenes, with a caption and three questions each
    validation: int = 40  # questions of each kind, each about a scene of its own
    test: int = 150


@dataclass(frozen=True)
class SceneTask(Splits):
    scenes: tuple[Scene, ...]


def build_scenes(tokenizer: SentencePieceTokenizer, sources: Sources, sizes: SceneSizes) -> SceneTask:
    """The same sizes give the same task; fewer training scenes are the first of more."""
    scenes: list[Scene] = []
    train = _training_samples(tokenizer, sources, sizes.train, scenes)
    validation = _questions(tokenizer, sources, "validation", sizes.validation, scenes)
    test = _questions(tokenizer, sources, "test", sizes.test, scenes)
    return SceneTask(tuple(train), tuple(validation), tuple(test), tuple(scenes))


def scenes_digest(task: SceneTask, sources: Sources) -> str:
    """First digits of the sha256 of all samples and scenes, and of how patches are made of them."""
    digests = [_chunk_digest(chunk, sources) for chunk in _chunks(task.scenes)]
    return splits_digest(task, "".join([*digests, f"{WIDTH} {POSITION}"]).encode())


def _training_samples(
    tokenizer: SentencePieceTokenizer, sources: Sources, count: int, scenes: list[Scene]
) -> list[Sample]:
    """The kinds of question take turns, one scene each; every scene has two questions of other kinds too."""
    random = np.random.default_rng([DATA_SEED, 30])
    samples = []
    for index in range(count):
        first = KINDS[index % len(KINDS)]
        number, sample = _asked(tokenizer, sources, "train", first, random, scenes)
        text = caption(scenes[number])
        samples.append(encoded_sample(tokenizer, CAPTION, "plain", IMAGE_MARKER, text, (number,)))
        samples.append(sample)
        more = 1
        for kind in random.permutation([kind for kind in KINDS if kind != first]).tolist():
            question = ask(kind, scenes[number], random) if more < QUESTIONS else None
            if question is not None:
                samples.append(_sample(tokenizer, kind, question.text, question.answer, number))
                more += 1
    return samples


def _questions(
    tokenizer: SentencePieceTokenizer, sources: Sources, split: str, count: int, scenes: list[Scene]
) -> list[Sample]:
    random = np.random.default_rng([DATA_SEED, 31, ("validation", "test").index(split)])
    return [
        _asked(tokenizer, sources, split, kind, random, scenes)[1] for kind in KINDS for _ in range(count)
    ]


def _asked(
    tokenizer: SentencePieceTokenizer,
    sources: Sources,
    split: str,
    kind: str,
    random: np.random.Generator,
    scenes: list[Scene],
) -> tuple[int, Sample]:
    """A scene that has something to ask about in this way, appended to ``scenes``, and the question."""
    question = None
    while question is None:
        scene = draw_scene(sources, split, random)
        question = ask(kind, scene, random)
    scenes.append(scene)
    number = len(scenes) - 1
    return number, _sample(tokenizer, kind, question.text, question.answer, number)


def _sample(tokenizer: SentencePieceTokenizer, kind: str, text: str, answer: str, number: int) -> Sample:
    return encoded_sample(tokenizer, kind, "v1", f"{IMAGE_MARKER}\n{text}", answer, (number,))


def write_scene_folders(cache: Path) -> SentencePieceTokenizer:
    """The folders that models are built from: the demo's shapes, with the scenes' words.

    The tower in them is a place-holder of zeros with the right number of patches, which never runs.
    """
    tower = cache / folders.TOWER
    if not (tower / "model.safetensors").exists():
        phrases = [*POSITIONS, *(name for one in CATEGORIES for name in (one.plural, one.name))]
        tokenizer = train_on_texts(list(all_texts()), phrases)
        for name, config in (("teacher", folders.TEACHER_CONFIG), ("student", folders.STUDENT_CONFIG)):
            adapted = {**config, "mm_hidden_size": WIDTH}
            folders.write_model_folder(cache / name, adapted, tokenizer)
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=1,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=PATCHES,
                patch_size=1,
            )
        )
        for parameter in clip.parameters():
            torch.nn.init.zeros_(parameter)
        clip.save_pretrained(tower)
        folders.write_json(tower / "preprocessor_config.json", default_preprocessor(PATCHES))
    return SentencePieceTokenizer.from_folder(cache / "student")


def scene_patches(scenes: Sequence[Scene], sources: Sources, folder: Path, packages: Path) -> torch.Tensor:
    """float16 [scenes, 1, 64, 336]: of the pretrained network, which runs once. ``folder`` keeps what it
    returns, before :func:`located`."""
    network = load_network(packages)
    parts = []
    for chunk in _chunks(scenes):
        path = folder / f"patches-{_chunk_digest(chunk, sources)}.pt"
        # Chunk by chunk, since the fp32 copies in between are twice as large.
        parts.append(located(kept(path, partial(_computed, network, chunk, sources))))
    return torch.cat(parts)


def located(maps_I1PC: torch.Tensor) -> torch.Tensor:
    """What a CLIP tower gives its patches and a convolution does not: one scale, and where each is."""
    normed = F.layer_norm(maps_I1PC.float(), (CHANNELS,))
    places = torch.eye(PATCHES) * POSITION
    rows, columns = places.repeat_interleave(PATCHES, 0), places.repeat(PATCHES, 1)
    where = torch.cat([rows, columns], dim=1).expand(*normed.shape[:3], -1)
    return torch.cat([normed, where], dim=-1).half()


def _computed(network: Network, chunk: Sequence[Scene], sources: Sources) -> torch.Tensor:
    images = np.stack([np.array(render(scene, sources)) for scene in chunk])
    parts = torch.split(torch.from_numpy(images).permute(0, 3, 1, 2), 4)
    maps_ICSS = torch.cat([feature_map(network, part) for part in parts])
    return maps_ICSS.flatten(2).transpose(1, 2)[:, None].half().contiguous()


def _chunks(scenes: Sequence[Scene]) -> list[Sequence[Scene]]:
    """Of one split each, so that tasks of several sizes share them."""
    splits = [[scene for scene in scenes if scene.split == split] for split in SPLITS]
    return [some[start : start + CHUNK] for some in splits for start in range(0, len(some), CHUNK)]


def _chunk_digest(chunk: Sequence[Scene], sources: Sources) -> str:
    """Of the scenes' descriptions, the pictures that they are made of, and one picture as it is drawn."""
    found = hashlib.sha256(json.dumps([sources.digest, *map(asdict, chunk)]).encode())
    found.update(render(chunk[0], sources).tobytes())
    return found.hexdigest()[:16]
