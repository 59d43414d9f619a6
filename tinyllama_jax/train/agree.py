"""One outcome for all processes of a run: what fails in one of them has failed in each.

What is agreed goes through the coordination service (see `Peers`), so it works in any thread and needs no device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinyllama_jax.distributed import Peers
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train import durable


def together(peers: Peers, name: str, seconds: float, work: Callable[[], Any]) -> list:
    """Does `work` in every process; what each found (which JSON can say), by index, once all are done.

    If it raised in any, all raise: Damaged if that was the reason everywhere, else CheckpointError.  A process that
    does not come within `seconds` is named by what `peers.barrier` raises.
    """
    value, error = None, None
    try:
        value = work()
    except Exception as caught:  # whatever orbax or a client of an object store raises: the others must hear of it
        error = caught
    kind = None if error is None else "damaged" if isinstance(error, durable.Damaged) else "failed"
    said = None if error is None else str(error) if isinstance(error, CheckpointError) else durable.one_line(error)
    peers.barrier(name, seconds)
    answers = peers.gather(name, [kind, said, value])
    wrong = [(i, kind, said) for i, (kind, said, _) in enumerate(answers) if kind]
    if wrong:
        i, _, said = next((w for w in wrong if w[1] == "failed"), wrong[0])
        damaged = all(kind == "damaged" for _, kind, _ in wrong)
        text = said if peers.count == 1 or damaged else f"{said} ({peers.names[i]})"
        raise (durable.Damaged if damaged else CheckpointError)(text) from error
    return [value for _, _, value in answers]
