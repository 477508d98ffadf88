"""Align-KD in a training loop of your own: transformers, accelerate and ``alignkd.losses``, no launcher.

    accelerate launch examples/plain_loop.py TEACHER STUDENT DATA.json OUT

TEACHER and STUDENT are folders of one family with one tokenizer, whose images become a fixed number of tokens
in one run (such as LLaVA). DATA.json lists {"image": path, "question": text, "answer": text}; paths are
relative to it. Eager attention keeps the maps of all layers, [B, H, L, L] each: where samples are long, give
the first layer's queries and keys to ``fused_attention_loss`` instead.

Shapes: B samples, L columns, M text rows behind the image, V vision tokens, H heads, D width.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from alignkd.losses import (
    IGNORE_INDEX,
    LogitTargets,
    attention_loss_sum,
    focus_indices,
    fused_logit_losses,
    vision_loss_sums,
)

TOP_K, FOCUS_WEIGHT = 16, 0.1


class Layout(NamedTuple):
    labels_BL: torch.Tensor  # IGNORE_INDEX outside the answer
    rows_BM: torch.Tensor  # columns of the text behind the image, filled up with -1
    columns_BV: torch.Tensor  # columns of the vision tokens


class View(NamedTuple):
    """What the losses compare."""

    hidden_BLD: torch.Tensor
    block_BHMV: torch.Tensor  # of the first layer's attention map
    tokens_BVD: torch.Tensor  # vision tokens in text-embedding space


def look(model: Any, inputs: dict[str, torch.Tensor], layout: Layout) -> View:
    output = model.model(**inputs, output_attentions=True, use_cache=False)
    rows_BM, columns_BV = layout.rows_BM, layout.columns_BV
    samples = torch.arange(len(rows_BM), device=rows_BM.device)[:, None, None]
    block_BMVH = output.attentions[0][samples, :, rows_BM.clamp(min=0)[:, :, None], columns_BV[:, None, :]]
    block_BMVH = block_BMVH * (rows_BM >= 0)[:, :, None, None]
    tokens_BVD = output.image_hidden_states.view(*columns_BV.shape, -1)
    return View(output.last_hidden_state, block_BMVH.movedim(-1, 1), tokens_BVD)


class AlignKD(nn.Module):
    """The student with P_attn and P_V, which are trained with it; the forward is the loss of a batch."""

    def __init__(self, student: Any, teacher: Any, words: int) -> None:
        """``words``: of the tokenizer; families pad their vocabularies differently."""
        super().__init__()
        text, theirs = student.config.get_text_config(), teacher.config.get_text_config()
        self.student, self.words = student, words
        self.p_attn = nn.Linear(theirs.num_attention_heads, text.num_attention_heads)
        self.p_v = nn.Linear(theirs.hidden_size, text.hidden_size)

    def counts(self, layout: Layout) -> torch.Tensor:
        """Elements of each term: answer tokens (of both logit terms), attention, vision, focus."""
        heads, width = self.p_attn.out_features, self.p_v.out_features
        rows, (images, V) = (layout.rows_BM >= 0).sum(), layout.columns_BV.shape
        answers = (layout.labels_BL[:, 1:] != IGNORE_INDEX).sum()
        vision, focus = answers.new_tensor([images * V * width, images * min(TOP_K, V) * width])
        return torch.stack([answers, rows * V * heads, vision, focus])

    def forward(
        self, inputs: Any, layout: Layout, teacher: View, head_WD: torch.Tensor, scales: list[float]
    ) -> torch.Tensor:
        view = look(self.student, inputs, layout)
        at = layout.labels_BL[:, 1:] != IGNORE_INDEX  # a hidden state predicts the next token
        labels, hidden_ND, theirs_ND = (
            x[at] for x in (layout.labels_BL[:, 1:], view.hidden_BLD[:, :-1], teacher.hidden_BLD[:, :-1])
        )
        logits = fused_logit_losses(
            hidden_ND,
            self.student.get_output_embeddings().weight[: self.words],
            targets=LogitTargets(labels, theirs_ND, head_WD[: self.words]),
            scales=(scales[0], scales[0]),
        )
        attention = attention_loss_sum(
            teacher.block_BHMV, view.block_BHMV, self.p_attn.weight, self.p_attn.bias, layout.rows_BM
        )
        best_BK = focus_indices(teacher.block_BHMV, TOP_K)
        everywhere, focus = vision_loss_sums(
            self.p_v(teacher.tokens_BVD), view.tokens_BVD, best_BK, layout.rows_BM
        )
        return logits.loss + scales[1] * attention + scales[2] * everywhere + FOCUS_WEIGHT * scales[3] * focus


class Collate:
    """Records -> inputs of a model and their layout, through the folder's chat template and processor."""

    def __init__(self, folder: str, images: Path, image_token_id: int) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.images, self.image_token_id = images, image_token_id

    def __call__(self, records: list[dict[str, str]]) -> tuple[dict[str, torch.Tensor], Layout]:
        images = [[Image.open(self.images / record["image"]).convert("RGB")] for record in records]
        prompts, whole = zip(*map(self._texts, records), strict=True)
        lengths = [
            len(self.processor(text=[text], images=[image])["input_ids"][0])
            for text, image in zip(prompts, images, strict=True)
        ]
        inputs = self.processor(
            text=list(whole), images=images, padding=True, padding_side="right", return_tensors="pt"
        )
        ids_BL = inputs["input_ids"]
        is_real_BL = inputs["attention_mask"].bool()
        columns_BV = torch.stack([(ids == self.image_token_id).nonzero()[:, 0] for ids in ids_BL])
        column_L = torch.arange(ids_BL.shape[1])
        is_answer_BL = is_real_BL & (column_L >= torch.tensor(lengths)[:, None])
        is_row_BL = is_real_BL & (column_L > columns_BV[:, -1:])
        rows_BM = pad_sequence([row.nonzero()[:, 0] for row in is_row_BL], batch_first=True, padding_value=-1)
        return dict(inputs), Layout(ids_BL.where(is_answer_BL, IGNORE_INDEX), rows_BM, columns_BV)

    def _texts(self, record: dict[str, str]) -> tuple[str, str]:
        """The prompt, and the same with the answer."""
        question = [{"type": "image"}, {"type": "text", "text": record["question"]}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": record["answer"]}]}
        turns = [{"role": "user", "content": question}]
        render = self.processor.apply_chat_template
        return render(turns, add_generation_prompt=True), render([*turns, answer]).rstrip()


def train(teacher_folder: str, student_folder: str, data: str, out: str, steps: int = 100) -> list[float]:
    """Returns the loss of each step, as printed."""
    accelerator = Accelerator()
    load = partial(AutoModelForImageTextToText.from_pretrained, attn_implementation="eager", dtype="float32")
    teacher, student = load(teacher_folder).eval().requires_grad_(False), load(student_folder).train()
    student.model.vision_tower.requires_grad_(False)
    collate = Collate(student_folder, Path(data).parent, student.config.image_token_id)
    torch.manual_seed(0)  # P_attn and P_V begin alike on all ranks
    step = AlignKD(student, teacher, len(collate.processor.tokenizer))
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], 1e-4, weight_decay=0.0)
    loader = DataLoader(json.loads(Path(data).read_text()), batch_size=4, shuffle=True, collate_fn=collate)
    counts_of = step.counts
    step, optimizer, loader, teacher = accelerator.prepare(step, optimizer, loader, teacher)
    head_WD = accelerator.unwrap_model(teacher).get_output_embeddings().weight
    losses: list[float] = []
    while len(losses) < steps:
        for inputs, layout in islice(loader, steps - len(losses)):
            with torch.no_grad():
                target = look(accelerator.unwrap_model(teacher), inputs, layout)
            # Each sum is divided once, by the count of all ranks. DDP averages over ranks; this undoes it.
            counts = accelerator.reduce(counts_of(layout), "sum").clamp(min=1)
            loss = step(inputs, layout, target, head_WD, (accelerator.num_processes / counts).tolist())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(step.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    if accelerator.is_main_process:
        student.save_pretrained(out)
        collate.processor.save_pretrained(out)
    return losses


if __name__ == "__main__":
    train(*sys.argv[1:5])
