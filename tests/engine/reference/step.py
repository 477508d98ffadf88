"""The loss of a global batch, and its gradients: equations 1 to 7, sample by sample.

Shapes: V vision tokens of an image, D width of the student.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tests.engine.reference.models import Model, Weights
from tests.engine.reference.samples import IGNORED, IMAGE, Sample

TERMS = ("ce", "divergence", "attention", "vision_all", "vision_focus")


@dataclass(frozen=True)
class Settings:
    """The keys of ``distillation`` in a run's YAML."""

    logits: float
    attention: float
    vision: float
    focus: float  # lambda
    top_k: int
    temperature: float
    divergence: str
    attention_rows: str
    logit_positions: str


def step(
    samples: list[Sample], teacher: Model, student: Model, adapters: Weights, settings: Settings
) -> tuple[float, dict[str, float]]:
    """The loss (equation 7) over the whole global batch, and the mean of each term. Leaves the gradients in
    the weights that require one."""
    sums, counts = dict.fromkeys(TERMS, torch.zeros((), dtype=torch.float64)), dict.fromkeys(TERMS, 0)
    for sample in samples:
        for term, (value, count) in _terms_of(sample, teacher, student, adapters, settings).items():
            sums[term], counts[term] = sums[term] + value, counts[term] + count
    means = {term: sums[term] / counts[term] for term in TERMS}
    vision = means["vision_all"] + settings.focus * means["vision_focus"]  # equation 5
    loss = (
        means["ce"]
        + settings.attention * means["attention"]
        + settings.vision * vision
        + settings.logits * means["divergence"]
    )
    loss.backward()
    return loss.item(), {term: value.item() for term, value in means.items()}


def _terms_of(
    sample: Sample, teacher: Model, student: Model, adapters: Weights, settings: Settings
) -> dict[str, tuple[torch.Tensor, int]]:
    """Sum and number of elements of each term."""
    with torch.no_grad():
        teacher_tokens = [teacher.vision_tokens(pixels) for pixels in sample.pixels]
        teacher_logits, teacher_maps = _run(teacher, sample, teacher_tokens)
    tokens = [student.vision_tokens(pixels) for pixels in sample.pixels]
    logits, maps = _run(student, sample, tokens)
    ids, labels, starts = _expanded(sample, len(tokens[0]) if tokens else 0)
    zero = logits.new_zeros(())
    terms = dict.fromkeys(TERMS, (zero, 0))

    def add(term: str, value: torch.Tensor, count: int) -> None:
        terms[term] = (terms[term][0] + value, terms[term][1] + count)

    for position in range(len(ids) - 1):
        if labels[position + 1] != IGNORED:
            add("ce", -logits[position].log_softmax(-1)[labels[position + 1]], 1)
        wanted = labels[position + 1] != IGNORED
        if settings.logit_positions == "all_text":
            wanted = ids[position + 1] != IMAGE
        if wanted:
            add("divergence", _divergence(logits[position], teacher_logits[position], settings), 1)

    for start, image, teacher_image in zip(starts, tokens, teacher_tokens, strict=True):
        V, D = image.shape
        rows = [
            column
            for column in range(start + V, len(ids))
            if ids[column] != IMAGE and (settings.attention_rows == "all_text" or labels[column] == IGNORED)
        ]
        adapted = F.conv1d(
            teacher_image.T[None], adapters["vision.weight"][..., None], adapters["vision.bias"]
        )
        squares = (adapted[0].T - image).square().sum(dim=1)
        add("vision_all", squares.sum(), V * D)
        if not rows:
            continue
        block, teacher_block = maps[:, rows, start : start + V], teacher_maps[:, rows, start : start + V]
        weight = adapters["attention.weight"][..., None, None]
        adapted = F.conv2d(teacher_block[None], weight, adapters["attention.bias"])[0]
        add("attention", (adapted - block).square().sum(), block.numel())
        scores = teacher_block.mean(dim=0).sum(dim=0)
        best = scores.sort(descending=True).indices[: settings.top_k]
        add("vision_focus", squares[best].sum(), settings.top_k * D)
    return terms


def _divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Equation 6 at one position."""
    p, q = ((x / settings.temperature).softmax(-1) for x in (logits, teacher_logits))
    if settings.divergence == "reverse_kl":
        value = (p * (p / q).log()).sum()
    elif settings.divergence == "forward_kl":
        value = (q * (q / p).log()).sum()
    else:
        m = (p + q) / 2
        value = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    return value * settings.temperature**2


def _run(model: Model, sample: Sample, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    images = iter(tokens)
    table = model.weights["model.embed_tokens.weight"]
    return model.language_model(
        torch.cat([next(images) if token == IMAGE else table[token][None] for token in sample.ids])
    )


def _expanded(sample: Sample, vision_tokens: int) -> tuple[list[int], list[int], list[int]]:
    """ids and labels with every vision token, and where each image begins."""
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for token, label in zip(sample.ids, sample.labels, strict=True):
        if token == IMAGE:
            starts.append(len(ids))
        times = vision_tokens if token == IMAGE else 1
        ids += [token] * times
        labels += [label] * times
    return ids, labels, starts
