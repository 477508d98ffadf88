"""The evidence about scenes, with made-up cut-outs and a made-up network: neither is in the repository."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from alignkd.data.sample_task.questions import Question
from alignkd.data.templates import SYSTEM_SENTENCE
from alignkd.data.tokenizer import SentencePieceTokenizer
from benchmarks.evidence import __main__ as program
from benchmarks.evidence import table
from benchmarks.evidence.bench import Bench
from benchmarks.evidence.conditions import BASELINE, CONDITIONS
from benchmarks.evidence.run import Settings, train_once
from benchmarks.evidence.scenes import bench as scene_bench
from benchmarks.evidence.scenes import network as lite0
from benchmarks.evidence.scenes import settings as scene_settings
from benchmarks.evidence.scenes import task as scene_task
from benchmarks.evidence.scenes.bench import open_scenes, train_scene_teacher
from benchmarks.evidence.scenes.cutouts import CATEGORIES, Cutout, Sources, read_cutout, split_cutouts
from benchmarks.evidence.scenes.questions import KINDS, PLURAL, absent, all_texts, ask, caption
from benchmarks.evidence.scenes.scene import (
    CELLS,
    FADED,
    GROUP_OF,
    POSITIONS,
    SIDE,
    Item,
    Scene,
    draw_scene,
    render,
)
from benchmarks.evidence.scenes.task import SceneSizes, build_scenes, scenes_digest, write_scene_folders
from benchmarks.evidence.task import CAPTION

SIZES = SceneSizes(train=12, validation=1, test=1)


def made_up_sources(color: tuple[int, int, int] = (200, 0, 0)) -> Sources:
    """Two sorts of cut-outs, wide and high ones, in every category, on a blue photograph."""
    cutouts = {
        category.name: [
            Cutout(category.name, f"{category.name} {number}", Image.new("RGBA", size, (*color, 255)))
            for number, size in enumerate([(40, 20), (20, 40)] * 2)
        ]
        for category in CATEGORIES
    }
    return Sources(split_cutouts(cutouts), [Image.new("RGB", (64, 48), (0, 0, 100))], "made up")


@pytest.fixture(scope="module")
def sources() -> Sources:
    return made_up_sources()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return write_scene_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, sources: Sources) -> Bench:
    root = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_bench, "read_sources", lambda _: sources)
        patch.setattr(scene_task, "load_network", lambda _: {})
        patch.setattr(scene_task, "feature_map", means)
        train_scene_teacher(root, replace(SIZES, train=18), 1, root / "teacher.safetensors")
        opened: Bench = open_scenes.__wrapped__(root, SIZES, root / "teacher.safetensors")
    return opened


def means(_: Any, images: torch.Tensor) -> torch.Tensor:
    """In the network's place: the mean color of each patch."""
    patches = F.avg_pool2d(images.float() / 255, lite0.STRIDE)
    return patches.repeat(1, lite0.CHANNELS // 3 + 1, 1, 1)[:, : lite0.CHANNELS]


def load_kept(folder: Path, chunk: Sequence[Scene], sources: Sources) -> torch.Tensor:
    found = torch.load(folder / f"patches-{scene_task._chunk_digest(chunk, sources)}.pt")
    assert isinstance(found, torch.Tensor)
    return found


def scene_of(*items: tuple[str, int]) -> Scene:
    placed = tuple(Item(name, cell, f"{name} 0", (0, 0, 8, 8)) for name, cell in items)
    return Scene("train", "animals", 0, (0.0, 0.0, 1.0), False, placed)


def test_no_cutout_is_in_two_splits_and_each_has_every_category(sources: Sources) -> None:
    found = {
        split: {one.name for some in of.values() for one in some} for split, of in sources.cutouts.items()
    }
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]
    assert sum(map(len, found.values())) == 4 * len(CATEGORIES)
    assert all(of[category.name] for of in sources.cutouts.values() for category in CATEGORIES)


def test_a_cutout_loses_its_empty_margin_and_is_kept_small(tmp_path: Path) -> None:
    image = Image.new("RGBA", (400, 300))
    image.paste((10, 20, 30, 255), (100, 50, 300, 150))
    image.save(tmp_path / "cutout.png")
    found = read_cutout(tmp_path / "cutout.png")
    assert found.size == (96, 48)
    assert found.getpixel((48, 24)) == (10, 20, 30, 255)


def test_a_picture_shows_every_cutout_in_its_cell_and_the_photograph_elsewhere(sources: Sources) -> None:
    scene = draw_scene(sources, "test", np.random.default_rng(5))
    picture = np.array(render(scene, sources))
    faded = round(255 * FADED)
    background = (abs(picture[..., 0].astype(int) - faded) <= 1) & (picture[..., 2] > 100)
    shown = (picture == (200, 0, 0)).all(axis=-1)
    assert picture.shape == (SIDE, SIDE, 3)
    room = SIDE // CELLS
    for item in scene.items:
        left, top, width, height = item.box
        row, column = divmod(item.cell, CELLS)
        assert column * room <= left < left + width <= (column + 1) * room
        assert row * room <= top < top + height <= (row + 1) * room
        assert shown[top : top + height, left : left + width].all()
        shown[top : top + height, left : left + width] = False
        background[top : top + height, left : left + width] = True
    assert not shown.any()
    assert background.all()


def test_a_scene_has_up_to_six_cutouts_of_its_split_in_cells_of_their_own(sources: Sources) -> None:
    random = np.random.default_rng(0)
    scenes = [draw_scene(sources, "validation", random) for _ in range(300)]
    assert {len(scene.items) for scene in scenes} == set(range(1, 7))
    assert {count for scene in scenes for count in scene.counts().values()} == {1, 2, 3, 4}
    for scene in scenes:
        assert len({item.cell for item in scene.items}) == len(scene.items)
        for item in scene.items:
            assert item.cutout in {one.name for one in sources.of("validation", item.category)}
    shown = [item.category for scene in scenes for item in scene.items]
    assert shown.count("bird") > 2 * shown.count("fish")  # the most and the least popular animal
    of_group = [GROUP_OF[item.category] == scene.group for scene in scenes for item in scene.items]
    assert 0.6 < np.mean(of_group) < 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_of_the_scene(sources: Sources, kind: str) -> None:
    random = np.random.default_rng(1)
    answers = []
    for _ in range(400):
        scene = draw_scene(sources, "train", random)
        question = ask(kind, scene, random)
        if question is None:
            continue
        answers.append(question.answer)
        at = {POSITIONS[item.cell]: item.category for item in scene.items}
        where = {item.category: divmod(item.cell, CELLS) for item in scene.items}
        words = question.text.removesuffix("?")
        match kind:
            case "presence":
                name = words.removeprefix("Is there a ").removesuffix(" in the picture")
                assert question.answer == ("yes" if name in at.values() else "no")
            case "position":
                assert at[question.answer] == words.removeprefix("Where is the ")
                assert scene.counts()[at[question.answer]] == 1
            case "count":
                plural = words.removeprefix("How many ").removesuffix(" are there")
                assert question.answer == str([PLURAL[name] for name in at.values()].count(plural))
            case "category":
                assert question.answer == at[words.removeprefix("What is at the ")]
            case "option":
                options = dict(
                    zip(
                        "ABCD",
                        question.text.split("? A. ")[1]
                        .replace(" B. ", "|")
                        .replace(" C. ", "|")
                        .replace(" D. ", "|")
                        .split("|"),
                        strict=True,
                    )
                )
                assert len(set(options.values())) == 4
                assert [letter for letter, name in options.items() if name in at.values()] == [
                    question.answer
                ]
            case "relation":
                relation = next(one for one in ("left of", "right of", "above", "below") if one in words)
                first, second = words.removeprefix("Is the ").split(f" {relation} the ")
                axis, sign = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}[
                    relation
                ]
                distance = sign * (where[second][axis] - where[first][axis])
                assert distance != 0
                assert question.answer == ("yes" if distance > 0 else "no")
    most = max(answers.count(answer) for answer in answers) / len(answers)
    assert len(answers) > 80
    assert most < {"presence": 0.58, "relation": 0.6, "count": 0.6, "category": 0.25, "position": 0.2}.get(
        kind, 0.33
    )


def test_negatives_are_absent_popular_or_of_the_group() -> None:
    scene, random = scene_of(("bird", 0), ("coin", 4)), np.random.default_rng(2)
    drawn = {
        how: [absent(scene, how, random) for _ in range(300)] for how in ("random", "popular", "adversarial")
    }
    assert not {"bird", "coin"} & {name for names in drawn.values() for name in names}
    assert set(drawn["adversarial"]) == {"mammal", "insect", "fish"}
    assert drawn["popular"].count("house") > 2 * drawn["random"].count("house")
    assert set(drawn["random"]) > {"house", "planet", "fish"}


def test_what_a_scene_lacks_is_not_asked() -> None:
    random = np.random.default_rng(3)
    assert ask("position", scene_of(("bird", 0), ("bird", 1)), random) is None
    assert ask("relation", scene_of(("bird", 0)), random) is None


def test_counts_are_of_the_category_that_is_there_most_often() -> None:
    scene = scene_of(("bird", 0), ("fish", 1), ("fish", 2), ("coin", 4))
    assert ask("count", scene, np.random.default_rng(3)) == Question("count", "How many fish are there?", "2")


def test_a_caption_names_every_cutout_in_reading_order() -> None:
    assert caption(scene_of(("road sign", 8), ("bird", 0))) == "top left bird bottom right road sign"


def test_every_category_and_position_is_one_token(tokenizer: SentencePieceTokenizer) -> None:
    words = [*POSITIONS, *(category.name for category in CATEGORIES), SYSTEM_SENTENCE, "yes", "no", "A", "3"]
    assert {len(tokenizer.encode(word)) for word in words} == {1}
    assert max(len(tokenizer.encode(text)) for text in all_texts()) <= 16


def test_fewer_training_scenes_are_the_first_of_more(
    tokenizer: SentencePieceTokenizer, sources: Sources
) -> None:
    few, more = (build_scenes(tokenizer, sources, replace(SIZES, train=count)) for count in (12, 18))
    assert few.train == more.train[: len(few.train)]
    assert few.scenes[:12] == more.scenes[:12]
    assert few.test[0].example == more.test[0].example
    assert [sample.kind for sample in few.test] == list(KINDS)
    shown = [sample.grids[0] for sample in (*few.validation, *few.test)]
    assert shown == list(range(12, 24))
    assert [scene.split for scene in few.scenes] == ["train"] * 12 + ["validation"] * 6 + ["test"] * 6
    assert [sample.kind for sample in few.train].count(CAPTION) == 12
    assert {sample.kind for sample in few.train} == {CAPTION, *KINDS}


def test_other_pictures_and_other_samples_have_another_digest(
    tokenizer: SentencePieceTokenizer, sources: Sources
) -> None:
    task = build_scenes(tokenizer, sources, SIZES)
    digests = {
        scenes_digest(task, sources),
        scenes_digest(task, replace(sources, digest="other files")),
        scenes_digest(task, made_up_sources((0, 200, 0))),  # drawn differently
        scenes_digest(replace(task, test=task.validation), sources),
        scenes_digest(replace(task, scenes=task.scenes[::-1]), sources),
    }
    assert len(digests) == 5
    assert scenes_digest(build_scenes(tokenizer, sources, SIZES), sources) in digests


def test_the_network_is_convolutions_and_norms_with_same_padding(tmp_path: Path) -> None:
    """Against the plain form, with four channels and an odd kernel of five in one block."""
    random = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    steps: list[tuple[str, str, int, int, bool]] = []

    def layer(
        convolution: str, norm: str, shape: tuple[int, ...], stride: int, groups: int, bent: bool
    ) -> None:
        weights[f"{convolution}.weight"] = torch.randn(shape, generator=random) / 3
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norm}.{name}"] = torch.rand(4, generator=random) + 0.5
        steps.append((convolution, norm, stride, groups, bent))

    layer("_conv_stem", "_bn0", (4, 3, 3, 3), 2, 1, True)
    for number, stride in enumerate(lite0.STRIDES):
        block, side = f"_blocks.{number}", 5 if number == 3 else 3
        if number:
            layer(f"{block}._expand_conv", f"{block}._bn0", (4, 4, 1, 1), 1, 1, True)
        layer(f"{block}._depthwise_conv", f"{block}._bn1", (4, 1, side, side), stride, 4, True)
        layer(f"{block}._project_conv", f"{block}._bn2", (4, 4, 1, 1), 1, 1, False)
    (tmp_path / lite0.FILE).parent.mkdir(parents=True)
    torch.save(weights, tmp_path / lite0.FILE)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=random).to(torch.uint8)

    x = (images.float() - 127) / 128
    start = x
    for convolution, norm, stride, groups, bent in steps:
        if convolution.endswith("_expand_conv") or convolution == "_blocks.0._depthwise_conv":
            start = x
        kernel, side = weights[f"{convolution}.weight"], x.shape[-1]
        padding = max((-(-side // stride) - 1) * stride + kernel.shape[-1] - side, 0)
        x = F.conv2d(
            F.pad(x, (padding // 2, padding - padding // 2) * 2), kernel, stride=stride, groups=groups
        )
        mean, variance, scale, shift = (
            weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, variance, scale, shift, eps=1e-3)
        x = F.relu6(x) if bent else x
        if convolution.endswith("_project_conv") and x.shape == start.shape:
            x = x + start
    torch.testing.assert_close(lite0.feature_map(lite0.load_network(tmp_path), images), x)
    assert x.shape == (2, 4, 2, 2)


def test_patches_are_the_network_of_every_scene_and_computed_once(bench: Bench, sources: Sources) -> None:
    task = bench.task
    assert isinstance(task, scene_task.SceneTask)
    assert bench.patches.shape == (len(task.scenes), 1, 64, scene_task.WIDTH)
    picture = torch.from_numpy(np.array(render(task.scenes[3], sources))).permute(2, 0, 1)[None]
    expected = scene_task.located(means(None, picture).flatten(2).transpose(1, 2)[:, None])[0].float()
    torch.testing.assert_close(bench.patches[3].float(), expected, atol=1e-3, rtol=0)
    folder = bench.cache.parent / "patches"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_task, "load_network", lambda _: {})
        patch.setattr(scene_task, "feature_map", None)  # would fail
        again = scene_task.scene_patches(task.scenes, sources, folder, folder)
    assert torch.equal(again, bench.patches)
    chunks = [load_kept(folder, chunk, sources) for chunk in scene_task._chunks(task.scenes)]
    assert len(chunks) == 3
    assert {chunk.shape[1:] for chunk in chunks} == {(1, 64, lite0.CHANNELS)}  # as the network returns them
    assert torch.equal(scene_task.located(torch.cat(chunks)), bench.patches)


def test_patches_are_of_one_scale_and_say_where_they_are() -> None:
    maps = torch.randn(2, 1, 64, lite0.CHANNELS) * torch.tensor([1.0, 50.0])[:, None, None, None]
    found = scene_task.located(maps).float()
    normed, row, column = torch.split(found, [lite0.CHANNELS, 8, 8], dim=-1)
    scales = normed.std(dim=-1, correction=0)
    torch.testing.assert_close(scales, torch.ones_like(scales), atol=5e-3, rtol=0)
    assert (8 * row.argmax(dim=-1) + column.argmax(dim=-1)).tolist() == [[list(range(64))]] * 2
    assert (row.sum(dim=-1) == scene_task.POSITION).all()
    assert (column.sum(dim=-1) == scene_task.POSITION).all()


def test_a_run_about_scenes_has_every_kind_and_every_term(bench: Bench) -> None:
    assert not any("vision_tower" in name for name in load_file(bench.teacher_file))
    record = train_once(bench, CONDITIONS["all"], 0, Settings(steps=1, batch=8))
    assert {kind: len(flags) for kind, flags in record["test"].items()} == dict.fromkeys(KINDS, 1)
    norms = record["gradient_norms"][0]["norms"]
    assert set(norms) == {"ce", "divergence", "attention", "vision_all", "vision_focus"}
    assert norms["vision_all"]["projector"] > 0
    assert (record["teacher"], record["data"]) == (bench.teacher, bench.data)
    alone, taught = (program.wanted((name, 0, Settings()), bench)["teacher"] for name in (BASELINE, "all"))
    assert (alone, taught) == (None, bench.teacher)  # the student alone uses nothing of the teacher's file
    assert "| condition | " + " | ".join(KINDS) in table.tables(table.by_condition([record]), [], [])


def test_every_seed_of_the_scenes_is_compared_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene_bench, "TEACHER_FILE", tmp_path)
    options = argparse.Namespace(cache=None, conditions=None, seeds=[0, 1])
    experiment = program._scenes(options)
    names = list(scene_settings.CONDITIONS)
    assert [run[:2] for run in experiment.runs] == [(name, seed) for seed in (0, 1) for name in names]
    assert experiment.records.name == "scenes"
    assert {run[2] for run in experiment.runs} == {scene_settings.SETTINGS}
    assert scene_settings.SETTINGS in {run[2] for run in experiment.tuning}
    assert not {run[1] for run in experiment.tuning} & set(program.SEEDS)


def test_the_tables_of_one_task_leave_those_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "evidence.md"
    document.write_text(f"a\n{table.BEGIN}\n1\n{table.END}\nb\n{table.BEGIN_SCENES}\n2\n{table.END}\nc\n")
    monkeypatch.setattr(table, "DOCUMENT", document)
    table.write_tables(tmp_path, table.BEGIN_SCENES, tmp_path / "scenes.svg", ())
    none = "No run has been recorded yet.\n"
    assert document.read_text() == (
        f"a\n{table.BEGIN}\n1\n{table.END}\nb\n{table.BEGIN_SCENES}\n\n{none}\n{table.END}\nc\n"
    )
