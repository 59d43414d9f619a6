"""From a name and some `--set` words to a Run, and from a Run to JSON and a fingerprint.

Precedence: the experiment function's values, then each `--set` from left to right.  There is no other layer.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union

from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.finetune.recipe import FineTune

Experiment = typing.TypeVar("Experiment", Run, FineTune)

# ---------------------------------------------------------------------------------------------------------
# dataclasses <-> plain JSON values


def to_dict(value: Any) -> Any:
    """Dataclasses, tuples and dicts as plain JSON values."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def from_dict(kind: Any, value: Any, where: str = "") -> Any:
    """The inverse of `to_dict`, strict: an unknown key or a wrong type raises ConfigError naming the place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):  # only ever `X | None` here
        return None if value is None else from_dict(args[0], value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where or kind.__name__}: expected a group of fields, got {value!r}")
        hints = typing.get_type_hints(kind)
        known = [f.name for f in dataclasses.fields(kind)]
        for key in value:
            if key not in known:
                raise ConfigError(_unknown(_join(where, key), key, known))
        missing = [f.name for f in dataclasses.fields(kind) if _is_required(f) and f.name not in value]
        if missing:
            raise ConfigError(f"{where or kind.__name__}: missing {', '.join(missing)}")
        return kind(**{key: from_dict(hints[key], v, _join(where, key)) for key, v in value.items()})
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, got {value!r}")
        return tuple(from_dict(k, v, _join(where, i)) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected name: value pairs, got {value!r}")
        return {str(k): from_dict(args[1], v, _join(where, k)) for k, v in value.items()}
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(str, args))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)', or '' when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unknown(path: str, key: str, known: Sequence[str]) -> str:
    hint = nearest(key, known) or f" (there are: {', '.join(known)})"
    return f"unknown key {path!r}{hint}"


# ---------------------------------------------------------------------------------------------------------
# --set a.b=c


def override(run: Experiment, settings: Sequence[str]) -> Experiment:
    """Applies `a.b=c` words, parsed by the field's type.

    Stages are addressed by number or name (`curriculum.cooldown.tokens=1e6`).  Groups, lists and mixtures may be
    given as JSON; an optional group is removed with `none`.  Raises UsageError for an unknown key or a value of the
    wrong type, ConfigError for values that contradict each other.
    """
    tree = to_dict(run)
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not path:
            raise UsageError(f"--set {setting!r}: write it as key=value, such as --set lr.peak=1e-3")
        _assign(tree, type(run), path.split("."), text, setting)
    return from_dict(type(run), tree)


def _assign(tree: Any, kind: Any, keys: list[str], text: str, setting: str) -> None:
    node, walked = tree, ""
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        kind = _without_none(kind)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            if key not in hints:
                raise UsageError(f"--set {setting!r}: {_unknown(_join(walked, key), key, list(hints))}")
            child = hints[key]
        elif origin is tuple and args[-1] is Ellipsis and dataclasses.is_dataclass(args[0]):
            names = [item.get("name", "") for item in node]
            if key in names:
                key = names.index(key)
            elif key.isdigit() and int(key) < len(node):
                key = int(key)
            else:
                raise UsageError(f"--set {setting!r}: no {walked}.{key}; there are: {', '.join(names)}")
            child = args[0]
        elif origin is dict:
            child = args[1]
        else:
            raise UsageError(f"--set {setting!r}: {walked} is a single value and has no field {key!r}")
        walked = _join(walked, key)
        if last:
            node[key] = parse(child, text, walked, setting)
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}  # an optional group that is being filled in
            node, kind = node[key], child


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return typing.get_args(kind)[0]
    return kind


def parse(kind: Any, text: str, where: str, setting: str) -> Any:
    """Text as a plain JSON value of the field type `kind`; raises UsageError that names the type."""
    optional = _without_none(kind) is not kind
    kind = _without_none(kind)
    if optional and text.lower() in ("none", "null"):
        return None
    wanted = getattr(kind, "__name__", str(kind))
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            try:
                return int(text)
            except ValueError:
                if float(text).is_integer():
                    return int(float(text))  # 1e6
                raise
        if kind is float:
            return float(text)
        if kind is str:
            return text
        if typing.get_origin(kind) is Literal:
            wanted = "one of " + ", ".join(map(str, typing.get_args(kind)))
            return next(c for c in typing.get_args(kind) if str(c) == text)
        wanted = "JSON"
        value = json.loads(text)
        from_dict(kind, value, where)
        return to_dict(value)
    except (ValueError, KeyError, StopIteration, OverflowError) as error:
        raise UsageError(f"--set {setting!r}: {where} takes {wanted}, not {text!r}") from error
    except ConfigError as error:
        raise UsageError(f"--set {setting!r}: {error}") from error


# ---------------------------------------------------------------------------------------------------------
# identity: what decides which numbers a run produces


def total_tokens(run: Run) -> int:
    """Tokens of the whole curriculum, each stage rounded up to whole batches."""
    return sum(-(-s.tokens // s.batch_tokens) * s.batch_tokens for s in run.curriculum)


def identity(run: Run, begun_tokens: int | None = None) -> dict:
    """The fields that decide the numbers, as plain JSON values.

    With `begun_tokens` only the stages that had begun by then are kept, so that the future may be edited.  The
    learning rate's horizon is resolved: if it follows from the curriculum's length, lengthening the curriculum
    changes rates already used, and that is a change.
    """
    full = to_dict(run)
    kept = {name: full[name] for name in ("seed", "model", "lr", "optimizer", "fork")}
    kept |= {name: full[name] for name in ("start", "adapter", "preference") if full[name] is not None}
    if run.start:
        kept["start"]["checkpoint"] = os.path.basename(os.path.normpath(run.start.checkpoint))
    kept["data"] = {k: v for k, v in full["data"].items() if k not in ("store", "cache")}
    for name in ("examples", "replay_store"):  # as runs were named before there was fine-tuning
        if not full["data"][name]:
            del kept["data"][name]
    if run.optimizer.kind == "adamw":
        del kept["optimizer"]["kind"]
    if not run.data.unique_tokens:  # as runs were named before there were budgets
        del kept["data"]["unique_tokens"], kept["data"]["unique_seed"]
    if run.data.recipe is None:  # without a recipe the store's own name is all that identifies the text
        kept["data"]["store_name"] = os.path.basename(os.path.normpath(run.data.store))
    if run.fork:
        kept["fork"]["run"] = os.path.basename(os.path.normpath(run.fork.run))
    if run.lr.kind in ("cosine", "linear", "wsd"):
        kept["lr"]["horizon_tokens"] = run.lr.horizon_tokens or total_tokens(run)
    stages, start, begun_steps = [], 0, 0
    for stage, plain in zip(run.curriculum, full["curriculum"], strict=True):
        steps = -(-stage.tokens // stage.batch_tokens)
        if begun_tokens is None or start < max(begun_tokens, 1):
            stages.append(plain)
            begun_steps += steps if begun_tokens is None else min(steps, (begun_tokens - start) // stage.batch_tokens)
        start += steps * stage.batch_tokens
    kept["curriculum"] = stages
    kept["data"]["skip_ranges"] = [r for r in full["data"]["skip_ranges"] if r[0] < begun_steps or begun_tokens is None]
    return kept


def fingerprint(run: Run) -> str:
    """Sixteen hex digits that name the run's identity."""
    text = json.dumps(identity(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """'path: old -> new' for every leaf that differs between two plain JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(dict.fromkeys([*before, *after]))
        return [d for k in keys for d in differences(before.get(k), after.get(k), _join(where, k))]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            d for i, (b, a) in enumerate(zip(before, after, strict=True)) for d in differences(b, a, _join(where, i))
        ]
    return [] if before == after else [f"{where}: {before!r} -> {after!r}"]


# ---------------------------------------------------------------------------------------------------------
# module:function


def load_any(name: str, search: Sequence[str] = ()) -> Any:
    """What `module:function` returns, whatever it is; of `module:function[n]` what load_experiment does."""
    return load_experiment(name, search) if name.endswith("]") else _made(name, search)


def load_recipe(name: str, search: Sequence[str] = ()) -> FineTune:
    """The FineTune that `module:function` returns."""
    made = _made(name, search)
    if isinstance(made, FineTune):
        return made
    if isinstance(made, Run):
        raise ConfigError(f"experiment {name!r} is a Run, no recipe for fine-tuning: `tinyllama train` trains it")
    raise ConfigError(f"experiment {name!r} returned {type(made).__name__}, not a FineTune")


def load_experiment(name: str, search: Sequence[str] = ()) -> Run:
    """The Run that `module:function` returns, or the n-th, from 0, of the list that `module:function[n]` does.

    `search` and then the current directory are put first on the import path, so that a user's own module is found
    from any directory and whichever way the program was started.
    """
    found = re.fullmatch(r"(.*)\[(\d+)\]", name)
    made = load_runs(found[1] if found else name, search)
    if not found:
        if isinstance(made, Run):
            return made
        raise ConfigError(
            f"experiment {name!r} returned {len(made)} Runs: a sweep is not one run; name one, such as {name}[0], or "
            "launch them all"
        )
    if isinstance(made, Run):
        raise UsageError(f"experiment {name!r}: {found[1]} returns one Run; leave [{found[2]}] out")
    if int(found[2]) >= len(made):
        raise UsageError(f"experiment {name!r}: {found[1]} returns {len(made)} Runs, numbered from 0")
    return made[int(found[2])]


def load_runs(name: str, search: Sequence[str] = ()) -> Run | list[Run]:
    """What `module:function` returns: a Run, or the list of Runs of a sweep, which is not empty."""
    made = _made(name, search)
    if isinstance(made, Run):
        return made
    if isinstance(made, (list, tuple)) and made and all(isinstance(run, Run) for run in made):
        return list(made)
    if isinstance(made, FineTune):
        raise ConfigError(f"experiment {name!r} is a recipe for fine-tuning: `tinyllama finetune` trains it")
    what = "an empty list" if isinstance(made, (list, tuple)) and not made else type(made).__name__
    raise ConfigError(f"experiment {name!r} returned {what}, not a Run and not a list of Runs")


def _made(name: str, search: Sequence[str]) -> Any:
    """What `module:function` returns."""
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise UsageError(f"experiment {name!r}: write it as module:function, such as experiments.smoke:demo")
    for folder in reversed([*search, os.getcwd()]):
        folder = os.path.abspath(folder)
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UsageError(
                f"experiment {name!r}: no module {error.name!r} in the current directory or --experiment-path"
            ) from error
        raise ConfigError(f"experiment {name!r}: it imports {error.name!r}, which is not installed") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name]
        public = [n for n in own if not n.startswith("_")]
        hint = nearest(function_name, public) or f" (there are: {', '.join(public)})"
        raise UsageError(f"experiment {name!r}: {module_name} has no function {function_name!r}{hint}")
    return function()
