"""Work items of a plan under datatrove's executors, for corpora that outgrow one machine.

    from datatrove.executor import SlurmPipelineExecutor
    from tinyllama_jax.data.datatrove_adapter import PrepareItems

    SlurmPipelineExecutor(
        job_name="prepare", pipeline=[PrepareItems("data/slim")], tasks=1000, time="4:00:00", partition="cpu",
        logging_dir="logs/prepare",
    ).run()

The plan is made before (`tinyllama prepare plan`), the manifest written after (`tinyllama prepare finalize`); the bytes
are those of any other way to run the items.  Needs the package datatrove.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from tinyllama_jax.data import plan
from tinyllama_jax.data.prepare import run


class PrepareItems(PipelineStep):
    """Task `rank` of `world_size` makes every world_size-th item.  Its statistics: items, documents, tokens.

    Raises DataError for an item that failed, so that datatrove holds the task for failed and runs it again, and
    Unfinished where duplicates are to be removed and other tasks have not signed their items yet.
    """

    name = "tinyllama_jax items"
    type = "Tokens"

    def __init__(self, store: str | Path):
        super().__init__()
        self.store = str(store)

    def run(self, data: Iterable, rank: int = 0, world_size: int = 1) -> Iterator:
        frozen = plan.load(self.store)
        numbers = range(rank, len(frozen.items), world_size)
        latest = {"documents": 0, "tokens": 0}
        with self.track_time():
            run(
                frozen,
                numbers,
                progress=lambda _, documents, tokens, __: latest.update(documents=documents, tokens=tokens),
            )
        self.stat_update("items", value=len(numbers), unit="task")
        for name, value in latest.items():
            self.stat_update(name, value=value, unit="task")
        yield from data or ()
