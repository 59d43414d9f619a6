"""What was ablated: fields of the configuration that differ between runs which are otherwise equal.

A factor is one field, or several that always change together (fewer KV heads and a wider MLP in their place).  Runs
that agree in every other field, in their planned tokens and in their unique tokens make a block, and a factor is
compared within blocks only.  Seeds, names and what never decides the numbers (mesh, checkpoints, ...) do not count.
The size of the model is no ablation: laws of loss treat it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllama_jax.lab.draw import si
from tinyllama_jax.lab.study_rows import Row, alike, column, number, seed

IGNORED = ("execution.", "mesh.", "checkpoint.", "health.", "evaluation.", "tracking.", "fork.")
IGNORED_FIELDS = ("name", "seed", "fork", "data.cache", "data.store", "curriculum")
SIZE = ("model.d_model", "model.layers")
NO_SIZE = 1.3  # a factor between the parameters of runs that differ in width or depth for another reason than size
SAME_LENGTH = 1.02  # a factor between the tokens of runs that count as equally long: borders round to batches


@dataclass(frozen=True)
class Block:
    """Runs that differ in one factor and in their seeds: [(value as it is shown, rows)], in the order of the table."""

    where: str  # what tells it from the factor's other blocks
    values: list[tuple[str, list[Row]]]

    def losses(self, index: int, key: str = "loss") -> dict[Any, float]:
        """Seed -> loss (the mean, where a seed was run twice) of the index-th value."""
        found: dict[Any, list[float]] = {}
        for i, row in enumerate(self.values[index][1]):
            found.setdefault(seed(row) if seed(row) is not None else f"run {i}", []).append(number(row, key))
        return {each: float(np.mean(losses)) for each, losses in found.items()}


@dataclass(frozen=True)
class Factor:
    fields: tuple[str, ...]
    blocks: list[Block]

    @property
    def name(self) -> str:
        return " with ".join((self.fields[0], ", ".join(self.fields[1:]))) if len(self.fields) > 1 else self.fields[0]

    @property
    def short(self) -> str:
        return _short(self.fields[:3])


def factors(rows: Sequence[Row]) -> list[Factor]:
    """Every factor with at least one block of two values, and variants that fit none (`variants`)."""
    rows = list(rows)
    table = design(rows)
    by_partition: dict[tuple, list[str]] = {}
    for field, values in table.items():
        by_partition.setdefault(_partition(values), []).append(field)
    axes = {
        fields: [tuple(table[field][i] for field in fields) for i in range(len(rows))]
        for fields in map(_ordered, by_partition.values())
    }
    length = _length(rows)
    found, covered = [], set()
    for fields, values in axes.items():
        if _is_size(fields):
            continue
        others = [name for name in axes if name != fields]
        groups: dict[tuple, list[int]] = {}
        for i in range(len(rows)):
            groups.setdefault((length[i], *(axes[name][i] for name in others)), []).append(i)
        kept = {key: members for key, members in groups.items() if len({values[i] for i in members}) > 1}
        if not kept:
            continue
        if any(field in SIZE for field in fields) and _spread(rows, kept.values()) > NO_SIZE:
            continue
        covered |= {i for members in kept.values() for i in members}
        places = _places(rows, kept, others)
        blocks = [
            Block(where, _by_value(rows, members, values)) for where, members in zip(places, kept.values(), strict=True)
        ]
        found.append(Factor(fields, blocks))
    left = [i for i in range(len(rows)) if i not in covered]
    return found + ([rest] if left and (rest := _variants(rows, left, table, length)) else [])


def design(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Field -> its value in every row (hashable), for the fields that decide the numbers and differ between rows."""
    flat = [_leaves(row) for row in rows]
    names = list(dict.fromkeys(name for leaves in flat for name in leaves))
    table = {name: [leaves.get(name, "–") for leaves in flat] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def variant(row: Row, fields: Sequence[str]) -> str:
    """What the row is in these fields, in short: "kv_heads 4, theta 1e+05"."""
    leaves = _leaves(row)
    return ", ".join(f"{_last(field)} {_shown(leaves.get(field, '–'))}" for field in fields)


def _leaves(row: Row) -> dict[str, Any]:
    leaves, stages = {}, row.get("config.curriculum")
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key.startswith("config.curriculum."):
            flat[key.removeprefix("config.curriculum.")] = value
        elif key.startswith("config."):
            name = key.removeprefix("config.")
            if name not in IGNORED_FIELDS and not name.startswith(IGNORED):
                leaves[name] = json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value
    leaves |= _curriculum(stages if isinstance(stages, list) else _stages(flat))
    return leaves


def _stages(flat: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stages from leaves such as "0.mixture.prose"."""
    stages: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        index, _, rest = path.partition(".")
        parts, place = rest.split("."), stages.setdefault(index, {})
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = value
    return [stages[index] for index in sorted(stages, key=lambda i: (len(i), i))]


def _curriculum(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As one field, whatever its length in tokens: share of the run and mixture of each stage; and the batches."""
    stages = [stage for stage in stages if isinstance(stage, Mapping)]
    total = sum(stage.get("tokens") or 0 for stage in stages)
    if not total:
        return {}
    parts = []
    for stage in stages:
        mixture = {k: v for k, v in (stage.get("mixture") or {}).items() if isinstance(v, int | float)}
        weight = sum(mixture.values()) or 1.0
        text = f"{stage.get('name', 'stage')} {stage['tokens'] / total:.0%}" if len(stages) > 1 else ""
        blend = ", ".join(f"{name} {value / weight:.0%}" for name, value in sorted(mixture.items()))
        parts.append(f"{text} ({blend})" if text else blend)
    batches = list(dict.fromkeys(stage.get("batch_tokens") for stage in stages))
    return {"curriculum": " → ".join(parts), "batch_tokens": batches[0] if len(batches) == 1 else str(batches)}


def _variants(rows: list[Row], left: list[int], table: Mapping[str, list], length: list[tuple]) -> Factor | None:
    """Runs of equal length and nearly equal size that differ in several fields at once."""
    size = alike(np.nan_to_num(column(rows, "parameters"), nan=1.0), 1.25)
    blocks, fields = [], set()
    for place in dict.fromkeys((length[i], size[i]) for i in left):
        members = [i for i in range(len(rows)) if (length[i], size[i]) == place]
        names = [name for name, values in table.items() if len({values[i] for i in members}) > 1]
        if not names or any(name in SIZE for name in names):
            continue
        values = [tuple(table[name][i] for name in names) for i in range(len(rows))]
        shown = {i: variant(rows[i], names) for i in members}
        grouped: dict[tuple, list[int]] = {}
        for i in members:
            grouped.setdefault(values[i], []).append(i)
        where = f"N = {si(number(rows[members[0]], 'parameters'))}, {_length_text(rows[members[0]])}"
        blocks.append(Block(where, [(shown[m[0]], [rows[i] for i in m]) for m in grouped.values()]))
        fields |= set(names)
    return Factor(_ordered(tuple(n for n in table if n in fields)), blocks) if blocks else None


def _spread(rows: list[Row], blocks) -> float:
    """The largest ratio of parameters within a block."""
    sizes = [np.nan_to_num(column([rows[i] for i in members], "parameters"), nan=1.0) for members in blocks]
    return max(float(each.max() / each.min()) for each in sizes)


def _places(rows: list[Row], kept: Mapping[tuple, list[int]], others: Sequence[tuple[str, ...]]) -> list[str]:
    """What tells each block from the others: length and size, and where these do not, the fields that differ."""
    heads = [rows[members[0]] for members in kept.values()]
    lengths, sizes = [_length_text(row) for row in heads], [f"N = {si(number(row, 'parameters'))}" for row in heads]
    parts = [those for those in (sizes, lengths) if len(set(those)) > 1]
    found = [", ".join(words) for words in zip(*parts, strict=True)] if parts else [""] * len(heads)
    for j, fields in enumerate(others, 1):
        values = [key[j] for key in kept]
        if len(set(found)) == len(found):
            break
        if len(set(values)) > 1 and not any("unique" in field for field in fields):
            found = [
                ", ".join(filter(None, (text, f"{_short(fields)} {_shown(value)}")))
                for text, value in zip(found, values, strict=True)
            ]
    return found


def _by_value(rows: list[Row], members: list[int], values: list[tuple]) -> list[tuple[str, list[Row]]]:
    found: dict[tuple, list[Row]] = {}
    for i in members:
        found.setdefault(values[i], []).append(rows[i])
    return [(_shown(value), those) for value, those in found.items()]


def _length(rows: Sequence[Row]) -> list[tuple]:
    """(planned tokens, unique tokens) of each row, as numbers of groups of nearly equal ones."""
    tokens = [number(row, "planned_tokens") for row in rows]
    tokens = [t if t > 0 else number(row, "tokens") for t, row in zip(tokens, rows, strict=True)]
    unique = np.nan_to_num(column(rows, "unique_tokens"), nan=1.0)
    by_tokens = alike(np.nan_to_num(np.array(tokens), nan=1.0), SAME_LENGTH)
    # A store that was read less than once may be of any size.
    once = np.array([number(row, "epochs") <= 1.01 for row in rows])
    by_unique = np.where(once, -1, alike(np.maximum(unique, 1.0), SAME_LENGTH))
    return list(zip(by_tokens.tolist(), by_unique.tolist(), strict=True))


def _length_text(row: Row) -> str:
    passes = number(row, "epochs")
    if passes > 1.01:
        return f"{si(number(row, 'unique_tokens'))} tokens × {passes:.3g}"
    return f"{si(number(row, 'tokens'))} tokens"


def _partition(values: Sequence[Any]) -> tuple[int, ...]:
    first: dict[Any, int] = {}
    return tuple(first.setdefault(value, len(first)) for value in values)


def _is_size(fields: Sequence[str]) -> bool:
    return len(fields) > 1 and any(field in SIZE for field in fields)


def _ordered(fields: Sequence[str]) -> tuple[str, ...]:
    """What was meant first, and behind it what follows from it or makes up for it."""
    followers = ("model.d_ff", "batch_tokens")
    return tuple(sorted(fields, key=lambda f: (f in followers, f.startswith("lr.") and f != "lr.peak", f)))


def _short(fields: Sequence[str]) -> str:
    return ", ".join(map(_last, _ordered(fields)))


def _last(field: str) -> str:
    return ".".join(field.split(".")[-2:]) if field.endswith(".kind") else field.rpartition(".")[2]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        text = f"{value:g}" if abs(value) < 1e4 else f"{value:.3e}"
        digits, _, exponent = text.partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}" if exponent else text
    return str(value)
