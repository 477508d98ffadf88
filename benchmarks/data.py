"""The input side: ``python -m benchmarks.data``. How long a big data file takes to be indexed once and
opened ever after, what the split of its samples over ranks costs, and samples per second of the loader.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignkd.config.schema import Config
from alignkd.data.encoder import MobileVLMEncoder
from alignkd.data.images import ImageProcessor
from alignkd.data.index import Index
from alignkd.data.index_cache import CACHE_VARIABLE, cached_index
from alignkd.data.loader import build_loader
from alignkd.data.processes import map_in_order
from alignkd.data.tokenizer import SentencePieceTokenizer
from alignkd.models.tower import CLIP_MEAN, CLIP_STD
from benchmarks import padding, report
from benchmarks.batches import VISION_TOKENS
from benchmarks.corpus import made_up_words, train_tokenizer, write_corpus

IMAGE_SIZES = ((640, 480), (480, 640), (1024, 768))  # COCO's, and a larger one
SAMPLES = 256  # with an image each
MICRO_BATCH = 8
PREPROCESSING = {
    "crop_size": {"height": 336, "width": 336},
    "size": {"shortest_edge": 336},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """JPEGs of photographs' sizes: smooth shapes and some noise, about 100 KB each."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = IMAGE_SIZES[number % len(IMAGE_SIZES)]
        coarse = rng.integers(0, 255, size=(height // 32, width // 32, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        noise = rng.integers(-12, 13, size=smooth.shape, dtype=np.int16)
        pixels = np.clip(smooth.astype(np.int16) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=85)


def loader_rates(folder: Path, tokenizer: SentencePieceTokenizer, workers: list[int]) -> list[dict[str, Any]]:
    """Samples per second of the product's loader, decoded, preprocessed and collated."""
    write_images(folder, SAMPLES)
    rounds = [("human", "<image>\nwhat is on the table?"), ("gpt", "two cups and " + "a plate " * 40)]
    turns = [{"from": speaker, "value": text} for speaker, text in rounds]
    entries = [{"id": str(n), "image": f"{n}.jpg", "conversations": turns} for n in range(SAMPLES)]
    file = folder / "samples.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    results = []
    for number in workers:
        config = Config.model_validate(
            {
                "model": {"student": "unused"},
                "data": {
                    "sources": [{"file": str(file), "image_folder": str(folder)}],
                    "workers": number,
                },
                "training": {"global_batch_size": MICRO_BATCH, "micro_batch_size": MICRO_BATCH},
            }
        )
        index = cached_index(folder / "index.bin", config.data, MobileVLMEncoder(tokenizer, VISION_TOKENS))
        processor = ImageProcessor(PREPROCESSING, config.data.max_image_pixels)
        encoder = MobileVLMEncoder(tokenizer, VISION_TOKENS, processor)
        taken = []
        for _ in range(3):
            with build_loader(config, index, encoder, 0, 1, 1) as loader:
                windows = iter(loader)
                next(windows)  # workers have started
                start = time.perf_counter()
                read = sum(batch.counts.samples for window in windows for batch in window)
                taken.append(read / (time.perf_counter() - start))
        results.append({"workers": number, "rates": taken})
    return results


def index_times(folder: Path, tokenizer: SentencePieceTokenizer, file: Path) -> tuple[Index, dict[str, Any]]:
    """Seconds and peak memory of the first start, of a second one, and of another run's."""
    config = {"sources": [{"file": str(file), "image_folder": str(folder)}]}
    data = Config.model_validate({"model": {"student": "unused"}, "data": config}).data
    time.sleep(2.5)  # a file that has just been written is hashed at every start
    show_progress = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if show_progress:
            print(f"\rindexing {done / total:.0%}", end="" if done < total else "\n", file=sys.stderr)

    def start(name: str) -> tuple[float, Index]:
        begin = time.perf_counter()
        index = cached_index(folder / name, data, MobileVLMEncoder(tokenizer, VISION_TOKENS), progress)
        return time.perf_counter() - begin, index

    list(map_in_order(abs, range(2), 2))  # a rank has started its server long before
    cpu = _cpu_seconds()
    first, index = start("index.bin")
    cpu = _cpu_seconds() - cpu
    again, _ = start("index.bin")
    other, _ = start("other.bin")
    return index, {
        "entries": index.reports[0].entries,
        "kept": len(index),
        "megabytes": file.stat().st_size / 1e6,
        "build_seconds": first,
        "build_cpu_seconds": cpu,
        "open_seconds": again,
        "other_run_seconds": other,
        # Resident, of this process, the mapped pages of code and files included. Most of it is what torch and
        # numpy are.
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "index_bytes": (folder / "index.bin").stat().st_size,
    }


def _cpu_seconds() -> float:
    """Of this process, of the server of its workers, and of the workers that have ended."""
    server = vars(forkserver._forkserver)["_forkserver_pid"]
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return sum(os.times()[:4]) + sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--entries", type=int, default=2_400_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--publish", action="store_true", help="write the results into docs/")
    options = parser.parse_args(arguments)
    measured = report.facts(arguments)
    with tempfile.TemporaryDirectory(prefix="alignkd-benchmark-") as name:
        folder = Path(name)
        os.environ[CACHE_VARIABLE] = str(folder / "cache")
        words = made_up_words()
        tokenizer = train_tokenizer(words)
        file = folder / "big.json"
        write_corpus(file, options.entries, words)
        big, index = index_times(folder, tokenizer, file)
        file.unlink()
        splits = padding.split_costs(big)
        images = folder / "images"
        images.mkdir()
        rates = loader_rates(images, tokenizer, options.workers)
    cores = len(os.sched_getaffinity(0))
    index_table = report.table(
        ["index", "value"],
        [
            ["entries", f"{index['entries']:,}"],
            ["file, MB", f"{index['megabytes']:,.0f}"],
            [f"first start on {cores} cores, seconds", f"{index['build_seconds']:.1f}"],
            ["CPU seconds of all processes", f"{index['build_cpu_seconds']:.1f}"],
            ["MB per second and core", f"{index['megabytes'] / index['build_cpu_seconds']:.1f}"],
            ["second start of the run, seconds", f"{index['open_seconds']:.2f}"],
            ["first start of another run, seconds", f"{index['other_run_seconds']:.2f}"],
            ["peak resident memory, MB", f"{index['peak_bytes'] / 1e6:,.0f}"],
            ["index file, MB", f"{index['index_bytes'] / 1e6:,.0f}"],
        ],
    )
    rate_table = report.table(
        ["workers", "samples per second", "spread"],
        [
            [
                str(result["workers"]) if result["workers"] else "0 (in the rank)",
                f"{statistics.median(result['rates']):.1f}",
                f"{min(result['rates']):.1f} to {max(result['rates']):.1f}",
            ]
            for result in rates
        ],
    )
    lengths = (
        f"Splits of {padding.GLOBAL_BATCH} of these samples ({big.length.mean():.0f} tokens on average, at "
        f"most {big.length.max()}): micro-batches of {padding.MICRO_BATCH}, or of {padding.budget_of(big)} "
        "tokens."
    )
    body = "\n\n".join([index_table, lengths, padding.table(splits), rate_table])
    print(report.section("data", measured, body))
    if options.publish:
        report.publish(
            "data", measured, body, {"index": index, "splits": padding.as_results(splits), "loader": rates}
        )


if __name__ == "__main__":
    main(sys.argv[1:])
