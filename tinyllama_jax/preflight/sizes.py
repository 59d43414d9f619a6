"""Which sizes of memory hold an experiment's step: one device of the target's kind, were it so large."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tinyllama_jax.errors import UsageError
from tinyllama_jax.preflight import search

GB = 10**9  # as memory is sold; a device that is sold as 24 GB has 24 GiB or a little less
# What one GPU holds beside the program: the CUDA context, loaded kernels, cuBLAS and cuDNN.  There is no NCCL.
RESERVE_BYTES = 600 * 10**6


def parse(text: str) -> list[int]:
    """'40,24,16G' -> gigabytes.  Raises UsageError."""
    found = [re.fullmatch(r"([1-9]\d*)G?B?", word.strip(), re.IGNORECASE) for word in text.split(",")]
    if not all(found):
        raise UsageError(f"--memory {text}: write gigabytes of one device, such as 24 or 40,24,16,8,4")
    return [int(match[1]) for match in found]


def answers(gigabytes: Sequence[int], candidates: Sequence[int], start: int, measure) -> list[dict[str, Any]]:
    """For each size: the largest micro-batch that fits, or none, and the bytes that it takes.

    measure: sequences per device -> the compiler's account; asked as rarely as can be.
    """
    rows: list[dict[str, Any]] = []
    known: dict[int, dict[str, Any]] = {}
    for size in sorted(gigabytes, reverse=True):
        usable = size * GB - RESERVE_BYTES

        def total(count: int, usable: int = usable) -> tuple[int, bool]:
            if count not in known:
                known[count] = measure(count)
            account = known[count]
            return account["total"], not account["refused"] and account["total"] <= usable

        best, _ = search.largest(candidates, start, usable, total)
        shown = best or min(known)
        account = {name: known[shown][name] for name in ("total", "state")}
        rows.append(
            {"memory_gb": size, "usable_bytes": usable, "fits": best is not None, "micro_batch": shown, **account}
        )
    return rows
