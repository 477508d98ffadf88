"""What is compared: the student alone, and the student with one thing about its teacher changed at a time.

The order is that of the sweep: what says most comes first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from alignkd.config.schema import DistillationSection


@dataclass(frozen=True)
class Condition:
    name: str
    about: str
    distillation: dict[str, Any] | None = None  # the section's keys; None: no teacher
    steps: float = 1.0  # times the baseline's
    frozen_adapters: bool = False
    attention: str | None = None  # one of ``patches.VARIANTS``
    labels_only: tuple[str, ...] = field(default=())  # kinds of question without a term of the teacher
    clip: float = 1.0  # largest gradient norm; 0: none
    balance_every: int | None = None  # steps between measurements that the weights follow
    better_teacher: bool = False  # ``models.train_better_teacher``
    varies: str | None = None  # the condition of which it changes one thing, where that is not the baseline

    def section(self) -> DistillationSection:
        return DistillationSection.model_validate(self.distillation or {"enabled": False})

    def as_dict(self) -> dict[str, Any]:
        """What a record must have been made with. ``better_teacher`` is left out where it is false: the first
        records are older."""
        values = asdict(self) | {"labels_only": list(self.labels_only)}
        left_out = ["about", "varies"] + ([] if self.better_teacher else ["better_teacher"])
        return {key: value for key, value in values.items() if key not in left_out}


BASELINE = "alone"
TOP_K = 4  # of 16 vision tokens, as in the demo


def _weights(attention: float, vision: float, logits: float) -> dict[str, float]:
    return {"attention": attention, "vision": vision, "logits": logits}


def _terms(name: str, about: str, attention: float, vision: float, logits: float) -> Condition:
    """With these weights of L_A, L_V and the logit term."""
    return Condition(name, about, {"top_k": TOP_K, "weights": _weights(attention, vision, logits)})


def _changed(
    base: Condition, name: str, about: str, section: dict[str, Any] | None = None, **fields: Any
) -> Condition:
    """``base`` with other keys of its ``distillation`` section, or other fields."""
    distillation = {**(base.distillation or {}), **(section or {})}
    return replace(base, name=name, about=about, varies=base.name, distillation=distillation, **fields)


_ALL = _terms("all", "all terms, unit weights, lambda 0.1", 1.0, 1.0, 1.0)
_ATTENTION = _terms("attention", "L_A only", 1.0, 0.0, 0.0)
_EACH = [
    _ALL,
    _terms("logits", "reverse KL only", 0.0, 0.0, 1.0),
    _ATTENTION,
    _terms("vision", "L_V only", 0.0, 1.0, 0.0),
]
_ON_SUMS = _changed(_ALL, "labels on sums", "sums without the teacher", labels_only=("text",))
_HARD = ("column", "row", "count", "largest", "two_images", "text")

_LIST = [
    Condition(BASELINE, "labels only"),
    *_EACH,
    Condition("alone, twice the steps", "labels only, at more than the cost of a teacher", steps=2.0),
    *(
        _changed(one, f"{one.name}, better teacher", f"{one.about}; a better teacher", better_teacher=True)
        for one in _EACH
    ),
    *(
        replace(
            one,
            name=f"{one.name}, twice the steps",
            about=f"{one.about}; twice the steps",
            varies="alone, twice the steps",
            steps=2.0,
        )
        for one in _EACH
    ),
    _ON_SUMS,
    _changed(_ON_SUMS, "labels on sums, no clipping", "the same, gradients of any norm", clip=0.0),
    _changed(_ALL, "labels on hard kinds", "the teacher on positions only", labels_only=_HARD),
    _changed(_ALL, "no clipping", "all terms, gradients of any norm", clip=0.0),
    Condition("alone, no clipping", "labels only, gradients of any norm", clip=0.0),
    replace(
        _ALL,
        name="no clipping, better teacher",
        about="all terms, gradients of any norm; a better teacher",
        varies="all, better teacher",
        clip=0.0,
        better_teacher=True,
    ),
    _changed(_ALL, "frozen adapters", "defect: adapters stay random", frozen_adapters=True),
    _changed(_ALL, "transposed attention", "defect: image queries, text keys", attention="transposed"),
    _changed(_ALL, "text-text attention", "text keys in L_A", attention="text-text"),
    _changed(_ALL, "every row", "rows of the image itself in L_A, too", attention="every row"),
    _changed(_ALL, "last layer", "L_A on the last layer", attention="last layer"),
    _changed(_ALL, "balanced", "weights by gradient norms", balance_every=50),
    _changed(_ALL, "learned weights", "all terms, weights by learned uncertainty", {"balance": "learned"}),
    _changed(_ALL, "forward KL", "all terms, KL weighted by the teacher", {"divergence": "forward_kl"}),
    *(_changed(_ALL, f"temperature {value:g}", "all terms", {"temperature": value}) for value in (2.0, 4.0)),
    *(
        replace(
            _terms(f"attention x {weight:g}", "L_A only, another weight", weight, 0.0, 0.0),
            varies=_ATTENTION.name,
        )
        for weight in (1e-2, 1e-1, 1e1, 1e2, 1e3, 1e4)
    ),
    _changed(_ATTENTION, "attention, row KL", "L_A only, as KL of rows", attention="row KL"),
    _changed(
        _ALL, "all, attention x 100", "all terms, L_A weighs more", {"weights": _weights(100.0, 1.0, 1.0)}
    ),
    *(_changed(_ALL, f"K {count}", "all terms", {"top_k": count}) for count in (1, 2, 8)),
    *(
        _changed(_ALL, f"lambda {weight:g}", "all terms", {"vision_focus_weight": weight})
        for weight in (0.0, 1.0, 10.0)
    ),
]
CONDITIONS: dict[str, Condition] = {condition.name: condition for condition in _LIST}
assert len(CONDITIONS) == len(_LIST), "names are unique"
