"""README.md of an exported student: where its weights come from. YAML front matter as model hubs read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkd.run_folder.metrics import iter_rows
from alignkd.run_folder.paths import RunPaths

# The other sections hold paths of the machine that trained, which a published model should not.
SECTIONS = ("training", "distillation", "student", "teacher")


def model_card(
    run: Path, step: int, facts: Mapping[str, Any], versions: Mapping[str, str], family: str = "mobilevlm"
) -> str:
    """``facts`` are ``config``, ``data`` and ``teacher`` as a checkpoint's manifest has them; ``family`` is
    the student's."""
    config = facts["config"]
    # The last part of a path is the name by which people know a model or a file.
    teacher = Path(config["model"]["teacher"]).name if facts["teacher"] is not None else None
    front = {
        "pipeline_tag": "image-text-to-text",
        "tags": [family, "distillation", "align-kd"],
        "alignkd": {
            "version": versions["alignkd"],
            "step": step,
            "student_start": Path(config["model"]["student"]).name,
            "teacher": teacher,
            "teacher_sha256": facts["teacher"],
            "data_sha256": facts["data"],
        },
    }
    kind = "MobileVLM V2" if family == "mobilevlm" else family
    taught = f"distilled from {teacher}" if teacher is not None else "trained on labels alone"
    sources = [
        {
            "file": Path(source["file"]).name,
            **{key: source[key] for key in ("template", "image_aspect_ratio", "weight")},
        }
        for source in config["data"]["sources"]
    ]
    settings = {name: config[name] for name in SECTIONS} | {
        "data": {"sources": sources, "max_length": config["data"]["max_length"]}
    }
    return "\n".join(
        [
            "---",
            "license:  # fill this in; teacher, student and data have licences of their own",
            _yaml(front) + "---",
            f"# {config['run']['name']}",
            "",
            f"A {kind} model, {taught} with alignkd {versions['alignkd']}.",
            f"It is the state at optimizer step {step}, without the adapters of the distillation.",
            "",
            "## Last metrics row",
            "",
            *_metrics(run, step),
            "",
            "## Configuration",
            "",
            "```yaml",
            _yaml(settings) + "```",
            "",
            "Made with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
            "",
        ]
    )


def _yaml(value: object) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))


def _metrics(run: Path, step: int) -> list[str]:
    """The step's row as a table."""
    row = next((row for row in iter_rows(RunPaths(run).metrics) if row.get("step") == step), None)
    if row is None:
        return [f"There is no row of step {step}."]
    shown = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return [
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in shown.items()),
    ]
