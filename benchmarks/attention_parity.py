"""How far each attention kernel is from float32, in units of how far plain bfloat16 attention is.

For the result o and each gradient dq, dk, dv:

    |kernel - exact| / |bfloat16 XLA - exact|  <=  LIMIT        (Frobenius norms)

where `exact` is the formula in float32 from the same inputs, and bfloat16 XLA jax.nn.dot_product_attention.  Both keep
all scores, so they are computed for one row and one key/value head at a time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
from pathlib import Path

import attention_contenders as contenders
import jax
import jax.numpy as jnp
import numpy as np
from attention_contenders import Shape, Unable
from lines import emit, isolated

from tinyllama_jax.errors import ConfigError

LIMIT = 2.0
DOCUMENTS = (1, 4)  # per row
NAMES = ("o", "dq", "dk", "dv")
KERNELS = {
    "gpu": ("triton", "hopper", "cudnn"),
    "tpu": ("tpu", "splash"),
    "cpu": ("interpret:triton", "interpret:tpu"),
}


def one_group(q_TRK: jax.Array, k_SK: jax.Array, v_SK: jax.Array, mask_TS: jax.Array, exactly: bool) -> jax.Array:
    """Attention of the R query heads that share one key/value head: [T, R, K], in float32 or as XLA does it."""
    if not exactly:
        mask = mask_TS[None, None]
        out = jax.nn.dot_product_attention(
            q_TRK[None], k_SK[None, :, None], v_SK[None, :, None], mask=mask, implementation="xla"
        )
        return out[0]
    highest = jax.lax.Precision.HIGHEST
    scores_RTS = jnp.einsum("trk,sk->rts", q_TRK, k_SK, precision=highest) / math.sqrt(q_TRK.shape[-1])
    weights_RTS = jax.nn.softmax(jnp.where(mask_TS, scores_RTS, -jnp.inf), axis=-1)
    return jnp.einsum("rts,sk->trk", weights_RTS, v_SK, precision=highest)


def by_group(q_BTHK, k_BTGK, v_BTGK, do_BTHK, ids_BT, *, exactly: bool) -> tuple[jax.Array, ...]:
    """o, dq, dk, dv of the whole, one row and one key/value head after the other."""
    (B, T, H, K), G = q_BTHK.shape, k_BTGK.shape[2]
    if exactly:
        q_BTHK, k_BTGK, v_BTGK, do_BTHK = (x.astype(jnp.float32) for x in (q_BTHK, k_BTGK, v_BTGK, do_BTHK))
    per_group = [x.reshape(B, T, G, H // G, K).transpose(0, 2, 1, 3, 4) for x in (q_BTHK, do_BTHK)]
    per_group += [x.transpose(0, 2, 1, 3) for x in (k_BTGK, v_BTGK)]
    cut = [x.reshape(B * G, *x.shape[2:]) for x in per_group]
    position = jnp.arange(T)

    def one(given):
        q, do, k, v, ids_T = given
        mask_TS = (ids_T[:, None] == ids_T) & (position[:, None] >= position)
        out, pull = jax.vjp(lambda q, k, v: one_group(q, k, v, mask_TS, exactly), q, k, v)
        return out, *pull(do)

    o, dq, dk, dv = jax.lax.map(one, (*cut, jnp.repeat(ids_BT, G, axis=0)))
    o, dq = (x.reshape(B, G, T, H // G, K).transpose(0, 2, 1, 3, 4).reshape(B, T, H, K) for x in (o, dq))
    return o, dq, *(x.reshape(B, G, T, K).transpose(0, 2, 1, 3) for x in (dk, dv))


def distance(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm((jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)).ravel()))


def _finite(number: float) -> float | None:
    """Four digits of it; None for what JSON cannot say."""
    return float(f"{number:.4g}") if math.isfinite(number) else None


def compare(name: str, shape: Shape, per_row: int) -> dict:
    """One cell: the ratio for o, dq, dk and dv; whether all are within LIMIT, and whether a second run is the same."""
    ids = contenders.document_ids(shape, per_row)
    entrant = contenders.contender(name, shape, ids)
    given = contenders.arrays(shape, 100 + per_row, entrant.context)

    def kernel(q, k, v, do, more):
        out, pull = jax.vjp(lambda q, k, v: entrant.run(q, k, v, *more), q, k, v)
        return out, *pull(do)

    with entrant.context():
        compiled = jax.jit(kernel).lower(*given, entrant.more).compile()
        got, again = (jax.device_get(compiled(*given, entrant.more)) for _ in range(2))
    same = all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    plain = contenders.arrays(shape, 100 + per_row)
    ids_BT = jnp.zeros((shape.rows, shape.tokens), jnp.int32) if ids is None else jnp.asarray(ids)
    exact, xla = (jax.jit(by_group, static_argnames="exactly")(*plain, ids_BT, exactly=e) for e in (True, False))
    ratios = {
        which: distance(mine, true) / max(distance(theirs, true), 1e-30)
        for which, mine, theirs, true in zip(NAMES, got, xla, exact, strict=True)
    }
    return {
        "documents": per_row,
        **shape._asdict(),
        "ratios": {which: _finite(ratio) for which, ratio in ratios.items()},
        "relative_error": {
            which: _finite(distance(mine, true) / distance(0, true))
            for which, mine, true in zip(NAMES, got, exact, strict=True)
        },
        "ok": all(ratio <= LIMIT for ratio in ratios.values()),  # a NaN is not
        "repeats_bit_for_bit": same,
    }


def cells_of(name: str, shapes: list[Shape]) -> dict:
    """Every cell of one kernel, or why it cannot run here; for a process of its own."""
    cells = []
    try:
        for shape in shapes:
            for per_row in DOCUMENTS:
                if per_row > 1 and name == "cudnn":
                    continue  # it has no documents
                cells.append(compare(name, shape, per_row))
                emit({"benchmark": "attention_parity", "implementation": name, **cells[-1]})
    except (Unable, ConfigError) as error:
        return {"skipped": str(error)}
    except Exception as error:  # the other kernels are still worth their time; this one is not proven
        return {"ok": False, "cells": cells, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    # Infinity where a NaN was: null in the file, for JSON has neither.
    worst = max(math.inf if ratio is None else ratio for cell in cells for ratio in cell["ratios"].values())
    return {"ok": all(cell["ok"] for cell in cells), "worst_ratio": _finite(worst), "cells": cells}


def report(names: list[str], args: argparse.Namespace, path: Path, common: dict) -> int:
    """Writes `path`; exit status 1 if a kernel is past the limit or nothing was compared."""
    # Two rows tell whether rows are kept apart; more only cost time.
    shapes = [shape._replace(rows=min(shape.rows, 2)) for shape in args.shapes]
    found = {}
    for name in names:
        try:
            found[name] = isolated(cells_of, name, shapes)
        except concurrent.futures.process.BrokenProcessPool:
            found[name] = {"ok": False, "error": "its process ended without an exception"}
    ran = [result["ok"] for result in found.values() if "ok" in result]
    summary = {
        "benchmark": "attention_parity",
        "claim": f"|kernel - float32| is at most {LIMIT:g} times |bfloat16 XLA - float32| for o, dq, dk and dv",
        "ok": bool(ran) and all(ran),
        "all_default_shapes": args.complete,
        **{key: value for key, value in common.items() if key != "everyone"},
        "implementations": found,
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")
    for name, result in found.items():
        verdict = result.get("skipped") or result.get("error") or f"worst ratio {result['worst_ratio']}"
        print(f"{name:18} {'ok' if result.get('ok') else 'skipped' if 'skipped' in result else 'FAILED'}: {verdict}")
    print(f"{'ok' if summary['ok'] else 'FAILED'}: {path}")
    return 0 if summary["ok"] else 1
