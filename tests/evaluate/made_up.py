"""The six benchmarks with made-up questions and pictures, in the published formats and any size, and a tiny
random model that answers them."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from alignkd.evaluate.tasks.mme import CATEGORIES
from tests.evaluate.benchmark_files import write_json, write_lines
from tests.model_folders import copy_model, published_tensors

WORD = "\nAnswer the question using a single word or phrase."
# Questions of each published benchmark.
PUBLISHED = {"gqa": 12_578, "sqa": 2_017, "textvqa": 5_000, "pope": 8_910, "mme": 2_374, "mmbench": 4_377}
WORDS = ("dog", "red", "left", "two", "a table", "yes", "no", "umbrella", "street")
MILLION = 1_000_000


class Maker:
    def __init__(self, folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
        self.folder, self.sizes = folder, sizes
        self.random = np.random.default_rng(seed)

    def make(self) -> None:
        for name in self.sizes:
            getattr(self, name)(self.sizes[name])

    def gqa(self, count: int) -> None:
        """31.6 questions about an image."""
        root, rows, labels = self.folder / "gqa", [], {}
        images = self._images(root / "data" / "images", max(1, count // 32), (640, 480))
        for number in range(count):
            image = images[number * len(images) // count]
            question = f"What is number {number}?"
            rows.append({"question_id": str(number), "image": image, "text": question + WORD})
            labels[str(number)] = {"answer": self._word(), "imageId": image, "question": question}
        write_lines(root / "llava_gqa_testdev_balanced.jsonl", rows)
        write_json(root / "data" / "testdev_balanced_questions.json", labels)

    def sqa(self, count: int) -> None:
        """As many questions without an image as with one, as in the published file (4,241)."""
        root, entries = self.folder / "scienceqa", []
        images = self._images(root / "images" / "test", count, (460, 300))
        for number, image in enumerate(images):
            turns = [
                {"from": "human", "value": f"<image>\nWhich is it, {number}?\nA. a dog\nB. a cat"},
                {"from": "gpt", "value": "AB"[number % 2]},
            ]
            entries.append({"id": str(number), "image": image, "conversations": turns})
            blind = [{"from": "human", "value": f"Which?\nA. {number}\nB. none"}, turns[1]]
            entries.append({"id": f"{number}t", "conversations": blind})
        write_json(root / "llava_test_CQM-A.json", entries)

    def textvqa(self, count: int) -> None:
        """Ids are the images', and repeat."""
        root, rows, labels = self.folder / "textvqa", [], []
        images = self._images(root / "train_images", max(1, count * 3 // 5), (1024, 768))
        for number in range(count):
            image = images[number * len(images) // count]
            image_id, question = image.removesuffix(".jpg"), f"What does sign {number} say?"
            tokens = ", ".join(self._word() for _ in range(int(self.random.integers(0, 20))))
            text = f"{question}\nReference OCR token: {tokens}{WORD}"
            rows.append({"question_id": image_id, "image": image, "text": text})
            answers = [self._word() for _ in range(10)]
            labels.append({"image_id": image_id, "question": question, "answers": answers})
        write_lines(root / "llava_textvqa_val_v051_ocr.jsonl", rows)
        write_json(root / "TextVQA_0.5.1_val.json", {"data": labels})

    def pope(self, count: int) -> None:
        root, rows = self.folder / "pope", []
        images = self._images(root / "val2014", max(1, count // 18), (640, 480))
        for place, split in enumerate(("adversarial", "random", "popular")):
            labels = []
            for number in range(1, count // 3 + 1):
                image = images[(number - 1) * len(images) // (count // 3)]
                text = f"Is there thing {number} in the {split} image?"
                labels.append({"question_id": number, "image": image, "text": text, "label": "yes"})
                labels[-1]["label"] = ("yes", "no")[number % 2]
                question_id = 10 * MILLION * place + number
                row = {"question_id": question_id, "image": image, "text": text + WORD, "category": split}
                rows.append(row)
            write_lines(root / "coco" / f"coco_pope_{split}.json", labels)
        write_lines(root / "llava_pope_test.jsonl", rows)

    def mme(self, count: int) -> None:
        """Two questions about each image, spread over the categories."""
        root, rows = self.folder / "MME", []
        release = root / "MME_Benchmark_release_version"
        for number in range(count // 2):
            category = CATEGORIES[number % len(CATEGORIES)]
            self._picture((640, 480)).save(self._at(release / category / f"{number}.jpg"))
            lines = [("Is it a dog?", "Yes"), ("Is it a cat?", "No")]
            labels = "".join(f"{text} Please answer yes or no.\t{answer}\n" for text, answer in lines)
            (release / category / f"{number}.txt").write_text(labels)
            file = f"{category}/{number}.jpg"
            rows += [
                {"question_id": file, "image": file, "text": text + WORD, "category": category}
                for text, _ in lines
            ]
        write_lines(root / "llava_mme.jsonl", rows)

    def mmbench(self, count: int) -> None:
        """Questions with their rotations; a rotation has the index of its base instead of a picture."""
        path = self._at(self.folder / "mmbench" / "mmbench_dev_20230712.tsv")
        columns = [
            "index",
            "question",
            "hint",
            *"ABCD",
            "answer",
            "category",
            "l2-category",
            "split",
            "image",
        ]
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(columns)
            for number in range(count):
                base, turn = number // 4 + 1, number % 4
                options = [f"thing {(place + turn) % 4}" for place in range(4)]
                image = str(base) if turn else self._encoded((512, 384))
                fixed = [f"Which is {base}?", "", *options, "ABCD"[-turn % 4], "ocr", "fine", "dev", image]
                writer.writerow([base + turn * MILLION, *fixed])

    def _word(self) -> str:
        return str(self.random.choice(WORDS))

    def _images(self, folder: Path, count: int, size: tuple[int, int]) -> list[str]:
        names = [f"{number:06}.jpg" for number in range(count)]
        for name in names:
            self._picture(size).save(self._at(folder / name))
        return names

    def _picture(self, size: tuple[int, int]) -> Image.Image:
        """A few coloured blobs; noise would compress badly."""
        cells = self.random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return Image.fromarray(cells).resize(size, Image.Resampling.BILINEAR)

    def _encoded(self, size: tuple[int, int]) -> str:
        buffer = io.BytesIO()
        self._picture(size).save(buffer, "JPEG")
        return base64.b64encode(buffer.getvalue()).decode()

    def _at(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def random_model(folder: Path, seed: int = 0) -> Path:
    """Large random weights, whose answers depend on picture and text and end after a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Any] = published_tensors()
    for name, value in tensors.items():
        if name.startswith(("model.layers", "model.embed_tokens", "lm_head")) and value.dim() > 1:
            tensors[name] = torch.empty(value.shape).normal_(0.0, 0.3, generator=generator)
    # In about half of all states `</s>` is the likeliest token by far.
    tensors["lm_head.weight"][2] *= 100
    return copy_model(folder, tensors)
