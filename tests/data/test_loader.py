from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch.utils.data._utils import signal_handling

from alignkd.config.schema import Config, DataSection, DataSource, ModelSection, TrainingSection
from alignkd.data.batch import Batch
from alignkd.data.encoder import MobileVLMEncoder
from alignkd.data.images import ImageProcessor
from alignkd.data.index import build_index
from alignkd.data.loader import batches_ahead, build_loader, build_sampler
from alignkd.errors import EXIT_FAILED, CheckpointError, FileSystemError, TrainingError, UserError
from tests.data.records import entry
from tests.ranks import RANK_NAME


@dataclass(frozen=True)
class Facts:
    vision_tokens: int
    preprocessor_config: dict[str, Any]


def encoder_of(tokenizer, facts) -> MobileVLMEncoder:
    return MobileVLMEncoder(tokenizer, facts.vision_tokens, ImageProcessor(facts.preprocessor_config, 10**8))


@pytest.fixture
def facts() -> Facts:
    return Facts(4, {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}})


@pytest.fixture
def data_set(tmp_path, write_json):
    """30 entries that name their number: text only, one image, two images."""
    for number in range(5):
        Image.new("RGB", (12, 9), (number * 40, 9, 9)).save(tmp_path / f"{number}.png")
    entries = []
    for number in range(30):
        images = [f"{(number + k) % 5}.png" for k in range(number % 3)]
        answer = "a red circle " * (number % 4 + 1)
        entries.append(entry("<image> " * len(images) + f"what {number}?", answer, id=number, image=images))
    return entries


def configure(write_json, tmp_path, entries, workers=0, **data) -> Config:
    source = DataSource(file=write_json(entries), image_folder=str(tmp_path))
    return Config(
        model=ModelSection(student="x"),
        data=DataSection(sources=[source], workers=workers, **data),
        training=TrainingSection(global_batch_size=8, micro_batch_size=2, epochs=2, seed=5),
    )


def windows(config, tokenizer, facts, rank=0, world_size=1, accumulation=4, start_step=0, read_cache=None):
    index = build_index(config.data, MobileVLMEncoder(tokenizer, facts.vision_tokens))
    encoder = encoder_of(tokenizer, facts)
    with build_loader(
        config, index, encoder, rank, world_size, accumulation, start_step, read_cache=read_cache
    ) as loader:
        found = list(loader)
        assert len(found) == len(loader)
    return found


def same(left, right) -> bool:
    if len(left) != len(right):
        return False
    return all(
        torch.equal(vars(a)[name], value) if isinstance(value, torch.Tensor) else vars(a)[name] == value
        for first, second in zip(left, right, strict=True)
        for a, b in zip(first, second, strict=True)
        for name, value in vars(b).items()
    )


def test_a_run_is_the_same_with_any_number_of_workers(data_set, write_json, tmp_path, tokenizer, facts):
    alone = windows(configure(write_json, tmp_path, data_set), tokenizer, facts)
    assert len(alone) == 8  # two epochs of 8 + 8 + 8 + 6 samples
    assert [sum(b.counts.samples for b in window) for window in alone] == [8, 8, 8, 6] * 2
    assert {b.image_count for window in alone for b in window} >= {0, 2, 4}
    assert not same(alone[:4], alone[4:])
    for workers in (1, 2):
        config = configure(write_json, tmp_path, data_set, workers)
        assert same(alone, windows(config, tokenizer, facts))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_the_same_stream(data_set, write_json, tmp_path, tokenizer, facts, workers):
    config = configure(write_json, tmp_path, data_set, workers)
    whole = windows(config, tokenizer, facts, rank=1, world_size=2, accumulation=2)
    for step in (1, 4, 5, 8):
        rest = windows(config, tokenizer, facts, rank=1, world_size=2, accumulation=2, start_step=step)
        assert same(whole[step:], rest)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_share_the_global_batch(
    data_set, write_json, tmp_path, tokenizer, facts, world_size, accumulation
):
    config = configure(write_json, tmp_path, data_set)
    sampler = build_sampler(config, build_index(config.data, MobileVLMEncoder(tokenizer, 4)))
    ranks = [windows(config, tokenizer, facts, r, world_size, accumulation) for r in range(world_size)]
    for step in range(8):
        found = [
            int(number)
            for rank in ranks
            for batch in rank[step]
            for number in re.findall(r"what (\d+)\?", tokenizer.decode(batch.input_ids_BL.flatten()))
        ]
        assert sorted(found) == sorted(sampler.samples_of_step(step))


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_of_a_token_budget_differ_in_length_and_resume(
    data_set, write_json, tmp_path, tokenizer, facts, workers
):
    config = configure(write_json, tmp_path, data_set, workers)
    # The last step of an epoch has 6 samples, the others 8.
    tokens = 2 * int(build_index(config.data, MobileVLMEncoder(tokenizer, facts.vision_tokens)).length.max())
    training = config.training.model_copy(update={"tokens_per_micro_batch": tokens, "packing": True})
    config = config.model_copy(update={"training": training})
    whole = windows(config, tokenizer, facts)
    assert len({len(window) for window in whole}) > 1
    assert all(
        sum(batch.segments) == batch.counts.slots <= tokens
        for window in whole
        for batch in window
        if batch.counts.samples > 1
    )
    assert any(batch.counts.samples > 1 for window in whole for batch in window)
    rest = windows(config, tokenizer, facts, start_step=5)
    assert same(whole[5:], rest)


def test_a_run_stops_after_max_steps(data_set, write_json, tmp_path, tokenizer, facts):
    config = configure(write_json, tmp_path, data_set)
    training = config.training.model_copy(update={"max_steps": 3})
    config = config.model_copy(update={"training": training})
    assert len(windows(config, tokenizer, facts)) == 3
    assert windows(config, tokenizer, facts, start_step=3) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_with_a_user_error(
    data_set, write_json, tmp_path, tokenizer, facts, workers
):
    (tmp_path / "3.png").unlink()
    config = configure(write_json, tmp_path, data_set, workers)
    with pytest.raises(UserError) as caught:
        windows(config, tokenizer, facts)
    message = str(caught.value)
    assert type(caught.value) is UserError
    assert "\n" not in message
    assert message.startswith(f"{config.data.sources[0].file}: entry ")
    assert "missing image: '3.png'" in message
    assert not loader_workers()


def loader_workers() -> list[BaseProcess]:
    """Children of this process, without the ranks that other tests share."""
    return [child for child in multiprocessing.active_children() if not child.name.startswith(RANK_NAME)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_can_be_skipped_and_are_counted(data_set, write_json, tmp_path, tokenizer, facts, workers):
    (tmp_path / "3.png").write_bytes(b"\x89PNG")
    config = configure(write_json, tmp_path, data_set, workers, on_bad_sample="skip")
    bad = sum("3.png" in value["image"] for value in data_set)
    counts = [b.counts for window in windows(config, tokenizer, facts)[:4] for b in window]
    assert sum(c.skipped for c in counts) == bad > 0
    assert sum(c.samples for c in counts) == 30 - bad


def numbers_of_samples(batch: Batch, samples: list[int]) -> Batch:
    """In place of a cache: as many rows as positions, the first ones with the samples that were asked for."""
    rows = torch.full((batch.counts.logits, 1), -1)
    rows[: len(samples), 0] = torch.tensor(samples, dtype=torch.int64)
    return replace(batch, teacher_hidden_ND=rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_hidden_states_are_those_of_the_samples_that_are_left(
    data_set, write_json, tmp_path, tokenizer, facts, workers
):
    (tmp_path / "3.png").write_bytes(b"\x89PNG")
    config = configure(write_json, tmp_path, data_set, workers, on_bad_sample="skip")
    found = windows(config, tokenizer, facts, read_cache=numbers_of_samples)
    skipped = 0
    for batch in (batch for window in found for batch in window):
        text = tokenizer.decode(batch.input_ids_BL.clamp(min=0).flatten())
        in_batch = [int(number) for number in re.findall(r"what (\d+)\?", text)]
        asked = batch.teacher_hidden_ND.flatten().tolist()
        assert asked == in_batch + [-1] * (batch.counts.logits - len(in_batch))
        skipped += batch.counts.skipped
    assert skipped == 2 * sum("3.png" in value["image"] for value in data_set)  # two epochs


def test_a_cache_that_cannot_be_read_stops_the_run_with_its_error(
    data_set, write_json, tmp_path, tokenizer, facts
):
    def damaged(batch: Batch, samples: list[int]) -> Batch:
        raise CheckpointError("00003.safetensors: damaged")

    with pytest.raises(UserError, match=r"00003\.safetensors: damaged"):
        windows(configure(write_json, tmp_path, data_set), tokenizer, facts, read_cache=damaged)


class OnAStaleMount(ImageProcessor):
    def read(self, *arguments: Any) -> torch.Tensor:
        stale = OSError(errno.ESTALE, "Stale file handle")
        with mock.patch.object(Image, "open", side_effect=stale):  # here: in whichever process it runs
            return super().read(*arguments)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_file_system_skips_no_sample(data_set, write_json, tmp_path, tokenizer, facts, workers):
    config = configure(write_json, tmp_path, data_set, workers, on_bad_sample="skip")
    encoder = encoder_of(tokenizer, facts)
    encoder.processor = OnAStaleMount(facts.preprocessor_config, 10**8)
    index = build_index(config.data, MobileVLMEncoder(tokenizer, facts.vision_tokens))
    with (
        build_loader(config, index, encoder, 0, 1, 4) as loader,
        pytest.raises(
            FileSystemError, match=r"\.png: the file system failed \(Stale file handle\)"
        ) as caught,
    ):
        list(loader)
    assert caught.value.exit_code == EXIT_FAILED  # a launcher tries again


def test_the_random_state_of_the_run_is_not_touched(data_set, write_json, tmp_path, tokenizer, facts):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    windows(configure(write_json, tmp_path, data_set, workers=1), tokenizer, facts)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_ignore_the_signals_that_stop_a_run(data_set, write_json, tmp_path, tokenizer, facts):
    config = configure(write_json, tmp_path, data_set, workers=2)
    wanted = windows(configure(write_json, tmp_path, data_set), tokenizer, facts)
    index = build_index(config.data, MobileVLMEncoder(tokenizer, facts.vision_tokens))
    with build_loader(config, index, encoder_of(tokenizer, facts), 0, 1, 4) as loader:
        found = []
        for window in loader:
            found.append(window)
            for worker in loader_workers():
                for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                    os.kill(worker.pid, number)
    assert same(found, wanted)


def test_a_killed_worker_is_an_error_at_the_next_batch(
    data_set, write_json, tmp_path, tokenizer, facts, monkeypatch
):
    """And of nothing that this process does in between."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # torch sets it once in a process
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        config = configure(write_json, tmp_path, data_set, workers=1)
        index = build_index(config.data, MobileVLMEncoder(tokenizer, facts.vision_tokens))
        with build_loader(config, index, encoder_of(tokenizer, facts), 0, 1, 4) as loader:
            stream = iter(loader)
            next(stream)
            (worker,) = loader_workers()
            os.kill(worker.pid, signal.SIGKILL)
            assert connection.wait([worker.sentinel], 60)  # a join would hide it from torch
            with pytest.raises(TrainingError, match=r"was killed, .* memory ran out"):
                list(stream)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_closing_early_ends_the_workers(data_set, write_json, tmp_path, tokenizer, facts):
    config = configure(write_json, tmp_path, data_set, workers=2)
    index = build_index(config.data, MobileVLMEncoder(tokenizer, facts.vision_tokens))
    loader = build_loader(config, index, encoder_of(tokenizer, facts), 0, 1, 4)
    stream = iter(loader)
    next(stream)
    assert len(loader_workers()) == 2
    loader.close()
    loader.close()
    assert not loader_workers()


def test_python_exits_although_a_loader_is_still_open(data_set, write_json, tmp_path, fixture_folder):
    script = f"""
        from alignkd.config.schema import Config, DataSection, DataSource, ModelSection, TrainingSection
        from alignkd.data.encoder import MobileVLMEncoder
        from alignkd.data.images import ImageProcessor
        from alignkd.data.index import build_index
        from alignkd.data.loader import build_loader
        from alignkd.data.tokenizer import SentencePieceTokenizer

        source = DataSource(file={write_json(data_set)!r}, image_folder={str(tmp_path)!r})
        config = Config(
            model=ModelSection(student="x"),
            data=DataSection(sources=[source], workers=2),
            training=TrainingSection(global_batch_size=8, micro_batch_size=2),
        )
        tokenizer = SentencePieceTokenizer.from_folder({str(fixture_folder / "teacher")!r})
        encoder = MobileVLMEncoder(tokenizer, 4, ImageProcessor({{}}, 10**8))
        index = build_index(config.data, encoder)
        loader = build_loader(config, index, encoder, 0, 1, 4)
        stream = iter(loader)
        next(stream)
        print("open", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "open\n", "")


@pytest.mark.parametrize(
    ("accumulation", "workers", "ahead"), [(1, 4, 2), (16, 4, 6), (16, 1, 24), (3, 2, 3), (16, 0, None)]
)
def test_workers_prepare_more_than_a_window_ahead(accumulation: int, workers: int, ahead: int | None) -> None:
    assert batches_ahead(accumulation, workers) == ahead


def test_the_loader_is_told_how_far_to_read_ahead(data_set, write_json, tmp_path, tokenizer, facts) -> None:
    config = configure(write_json, tmp_path, data_set, workers=1)
    index = build_index(config.data, encoder_of(tokenizer, facts))
    with build_loader(config, index, encoder_of(tokenizer, facts), 0, 1, 16) as loader:
        assert loader._loader.prefetch_factor == 24
