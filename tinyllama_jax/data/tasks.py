"""What workers do with an item: sign its documents where duplicates are looked for, make its shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tinyllama_jax.data import duplicates, items, workers
from tinyllama_jax.data.plan import ITEMS, Plan, Progress, is_empty
from tinyllama_jax.errors import DataError, Unfinished

SIGN = "sign"


def work(frozen: Plan, task: Callable, numbers: Sequence[int], processes: int, phase: str, progress: Progress) -> None:
    """Runs a task for each numbered item.  Raises DataError naming the first that failed, when all were tried."""
    report = _Counted(frozen, numbers, phase, progress)
    failed = workers.each(frozen.folder, task, numbers, min(processes, len(numbers)), report)
    if failed:
        number, error = failed[0]
        more = f" ({len(failed) - 1} more items failed)" if failed[1:] else ""
        raise DataError(f"item {number}: {error}{more}; finished items are kept") from error


def tokenize(state: dict, number: int, report: items.Report) -> None:
    frozen: Plan = state["plan"]
    if "tokenizer" not in state:
        state["tokenizer"] = frozen.tokenizer()
    removed = {}
    if frozen.filters.any_duplicates:
        removed = duplicates.read_removals(_removals(frozen, number), frozen.sha256)
    items.run(frozen, frozen.items[number], state["tokenizer"], removed, report)


def find_duplicates(frozen: Plan, numbers: Sequence[int], processes: int, progress: Progress) -> None:
    """Settles what is a duplicate of what: a decision over all items, so all of them are signed first.

    Raises Unfinished while items beyond `numbers` are not signed.
    """
    if all(_is_settled(frozen, n) for n in numbers):
        return
    everything = range(len(frozen.items))
    work(frozen, sign, [n for n in numbers if not _is_signed(frozen, n)], processes, SIGN, progress)
    unsigned = [n for n in everything if not _is_signed(frozen, n)]
    if unsigned:
        raise Unfinished(
            f"{frozen.folder}: {len(unsigned)} of {len(frozen.items)} items are not signed yet, and duplicates are "
            "found among all of them; start this again when the tasks of the other items have signed theirs"
        )
    signed = [_signatures(frozen, n) for n in everything]
    for number, removed in enumerate(duplicates.removals(signed, frozen.filters, frozen.sha256)):
        duplicates.write_removals(_removals(frozen, number), removed, frozen.sha256)


def sign(state: dict, number: int, report: items.Report) -> None:
    frozen: Plan = state["plan"]
    item = frozen.items[number]
    passed = items.Passed(item, report)

    def documents():
        for place, (given, document) in enumerate(frozen.documents(item)):
            passed.document(given, 0, len(document.text))
            if not is_empty(document) and frozen.filters.refusal(document) is None:
                yield place, document

    duplicates.sign(documents(), frozen.filters).write(_signatures(frozen, number), frozen.sha256)
    passed.end()


def _is_signed(frozen: Plan, number: int) -> bool:
    return duplicates.is_signed(_signatures(frozen, number), frozen.sha256)


def _is_settled(frozen: Plan, number: int) -> bool:
    """Whether it is known what is to be removed from the item: in this plan, and not only in one that was before."""
    try:
        duplicates.read_removals(_removals(frozen, number), frozen.sha256)
    except DataError:
        return False
    return True


def _signatures(frozen: Plan, number: int) -> Path:
    return frozen.folder / ITEMS / f"{number:06d}.sig"


def _removals(frozen: Plan, number: int) -> Path:
    return frozen.folder / ITEMS / f"{number:06d}.dup"


class _Counted:
    """Adds up what workers report, for `progress`."""

    def __init__(self, frozen: Plan, numbers: Sequence[int], phase: str, progress: Progress):
        self._total = max(1, sum(frozen.items[n].bytes for n in numbers))
        self._phase, self._progress = phase, progress
        self._documents = self._tokens = self._bytes = 0

    def __call__(self, documents: int, tokens: int, n_bytes: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._bytes += n_bytes
        self._progress(self._phase, self._documents, self._tokens, self._bytes / self._total)
