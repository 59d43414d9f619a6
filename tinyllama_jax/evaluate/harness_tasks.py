"""Tasks of lm-evaluation-harness with their data, from the package's own files or from a folder of one's own.

The package is imported inside functions: a wrong command is told so before it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyllama_jax.configio import nearest
from tinyllama_jax.errors import ConfigError, DataError, UsageError
from tinyllama_jax.evaluate.suites import SUITES, Task

INSTALL = "pip install 'tinyllama_jax[eval]'"
SEED = 1234  # the harness' own


@dataclass(frozen=True)
class Tasks:
    """What was asked for, and the harness' objects for it."""

    asked: tuple[Task, ...]
    loaded: dict[str, Any]  # as TaskManager.load returns
    seed: int


def require() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs lm-evaluation-harness, which is not installed: {INSTALL}")


def load_tasks(
    asked: Sequence[Task], *, include_path: Sequence[str] = (), allow_code: bool = False, seed: int = SEED
) -> Tasks:
    """The tasks with their data.

    include_path: folders with task YAMLs, which go before the harness' own of the same names.
    Raises UsageError for an unknown task, DataError for one whose data cannot be had, ConfigError when lm_eval is not
    installed or a task would execute what the model writes and that was not allowed.
    """
    require()
    for folder in include_path:
        if not Path(folder).is_dir():
            raise DataError(f"--include-path {folder}: no such folder; it holds the YAML files of tasks")
    if not allow_code:
        _refuse_code([task.name for task in asked if task.runs_code])
    manager = _manager([task.name for task in asked], include_path)
    for task in asked:
        if task.name not in manager.task_index:
            known = [*manager.all_tasks, *SUITES]
            raise UsageError(f"no task or suite {task.name!r}{nearest(task.name, known)}; see --include-path")
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own question
    random.seed(seed)  # some tasks shuffle their documents
    found: list[Task] = []
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for task in asked:
        if not allow_code:
            _refuse_code([task.name] if _file_of(manager, task.name).get("unsafe_code") else [])
        one = _load(manager, task)
        for name in one["tasks"].keys() & loaded["tasks"].keys():
            raise UsageError(f"task {name} is asked for twice, once as a part of a group")
        for kind, objects in one.items():
            loaded[kind] |= objects
        known = one["tasks"].keys() | one["groups"].keys()
        # A tag is only a name for several tasks.
        found += [task] if task.name in known else [replace(task, name=name) for name in one["tasks"]]
    if not allow_code:
        _refuse_code([name for name, one in loaded["tasks"].items() if getattr(one, "UNSAFE_CODE", False)])
    return Tasks(tuple(found), loaded, seed)


def _refuse_code(names: Sequence[str]) -> None:
    for name in names:
        raise ConfigError(
            f"task {name} executes code that the model writes; give --allow-code-execution where that can do no harm"
        )


@functools.lru_cache(maxsize=2)
def manager_of_all(include_path: tuple[str, ...]):
    """All the harness' own tasks and those of the folders: reading its 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_path) or None)


def _manager(names: Sequence[str], include_path: Sequence[str]):
    """Of the folders alone where they hold all of these tasks."""
    from lm_eval.tasks import TaskManager

    if include_path:
        manager = TaskManager(include_defaults=False, include_path=list(include_path))
        if all(_whole(manager, name) for name in names):
            return manager
    return manager_of_all(tuple(include_path))


def _whole(manager, name: str) -> bool:
    """Whether it is known there, and what a group consists of is too."""
    if name not in manager.task_index:
        return False
    if name not in manager.all_groups:
        return True
    members = _file_of(manager, name).get("task")
    return isinstance(members, list) and all(isinstance(one, str) and _whole(manager, one) for one in members)


def _load(manager, task: Task) -> dict[str, Any]:
    """A task or a group, with its number of examples set.  Whatever goes wrong is about its data or its YAML."""
    try:
        loaded = manager.load([task.name])
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        data = _data_of(manager, task.name)
        raise DataError(
            f"task {task.name}: its data {data} cannot be had ({reason}); copy the task's YAML into a folder with "
            "`dataset_path: json` and `dataset_kwargs: {data_files: ...}` and name that with --include-path"
        ) from error
    for one in loaded["tasks"].values():
        default = one.get_config("num_fewshot")
        one.set_config(key="num_fewshot", value=(default or 0) if task.shots is None else task.shots)
    return loaded


def _file_of(manager, name: str) -> dict[str, Any]:
    """A task's YAML, without its functions; empty where it cannot be read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    with contextlib.suppress(Exception):
        return load_yaml(manager.task_index[name].yaml_path, resolve_func=False, recursive=True)
    return {}


def _data_of(manager, name: str) -> str:
    """The data set that a task's file names; for a group, the first one that its members name."""
    found = _file_of(manager, name)
    files = (found.get("dataset_kwargs") or {}).get("data_files")
    named = " ".join(str(part) for part in (found.get("dataset_path"), found.get("dataset_name"), files) if part)
    members = [member for member in found.get("task") or [] if isinstance(member, str) and member != name]
    return named or (_data_of(manager, members[0]) if isinstance(found.get("task"), list) and members else "")
