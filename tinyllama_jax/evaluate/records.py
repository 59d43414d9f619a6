"""Results kept beside a run, RUN/evaluations/<step>-<what>.json, and which checkpoints still lack one.

A result is written under a temporary name and renamed, so that a reader sees none that is half written and an
evaluation that was killed counts as not done.  No jax here: reports and schedules read these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyllama_jax.data.durable import write_json

FOLDER = "evaluations"
_NAME = re.compile(r"(\d{8,})-(.+)\.json")


def label(names: str, *, shots: int | None = None, limit: int = 0) -> str:
    """What a result's file is called behind its step: another number of examples or documents is another result."""
    text = re.sub(r"[^\w.-]+", "+", names.strip())
    return text + (f".{shots}-shot" if shots is not None else "") + (f".first-{limit}" if limit else "")


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint's directory belongs to, if it does."""
    checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == "checkpoints" and (run / "run.json").is_file() else None


def put(run: Path, label: str, value: Mapping[str, Any]) -> Path:
    """Keeps a result, which has `step` and `tokens`; replaces one of the same step and label."""
    path = run / FOLDER / f"{value['step']:08d}-{label}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"label": label, **value})
    return path


def read(run: Path) -> list[dict[str, Any]]:
    """All results of a run with their `label` and `file`, by step; what is no such result is left out."""
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        name = _NAME.fullmatch(path.name)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if name and isinstance(value, dict) and isinstance(value.get("tokens"), int) and "step" in value:
            found.append(value | {"label": name[2], "step": int(name[1]), "file": str(path)})
    return sorted(found, key=lambda value: value["step"])


def due(kept: Mapping[int, int], done: Mapping[int, int], every_tokens: int, last: int) -> list[int]:
    """Steps to be evaluated: of the checkpoints `kept` the first at or behind each multiple of `every_tokens`, unless
    one between that multiple and the next is `done` (both {step: tokens}); and step `last`, where it is kept.
    """
    had = {tokens // every_tokens for tokens in done.values()}
    first: dict[int, int] = {}
    for step in sorted(kept):
        if mark := kept[step] // every_tokens:
            first.setdefault(mark, step)
    steps = {step for mark, step in first.items() if mark not in had}
    return sorted(steps | ({last} & kept.keys() - done.keys()))
