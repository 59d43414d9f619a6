"""The largest micro-batch that fits, with as few compilations as can decide it.

A device's memory is nearly a straight line in the sequences it works on at a time, so two compilations foretell the
rest.  What a foretelling leaves in doubt is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A candidate that the line puts this far over the capacity is taken not to fit without being compiled.
CERTAIN = 1.25


def largest(
    candidates: Sequence[int], start: int, capacity: int, total: Callable[[int], tuple[int, bool]]
) -> tuple[int | None, list[int]]:
    """(the largest of `candidates` that fits or None, those measured in order).

    candidates   sequences per device, increasing
    start        the one to begin with
    total        candidate -> (bytes that it needs, whether it fits); slow.  Fitting is taken to be monotone.
    """
    needs: dict[int, int] = {}
    fitting, failing = [], []

    def try_(candidate: int) -> None:
        needs[candidate], fits = total(candidate)
        (fitting if fits else failing).append(candidate)

    try_(start)
    while True:
        below, above = max(fitting, default=0), min(failing, default=candidates[-1] + 1)
        between = [c for c in candidates if below < c < above]
        if not between:
            return below or None, list(needs)
        if len(needs) == 1:
            # A neighbour, to have a line; below when the first did not fit, since there is no telling how far.
            try_(between[0] if fitting else between[len(between) // 2])
            continue
        (x0, y0), (x1, y1) = _nearest_two(needs, below, above)
        slope = (y1 - y0) / (x1 - x0)
        expected = {c: y0 + slope * (c - x0) for c in between}
        hopeful = [c for c in between if expected[c] <= capacity]
        if not hopeful and slope > 0 and expected[between[0]] > CERTAIN * capacity:
            return below or None, list(needs)
        try_(hopeful[-1] if hopeful else between[0])


def _nearest_two(needs: dict[int, int], below: int, above: int) -> list[tuple[int, int]]:
    """The two measurements nearest to the open interval, those that fit before those that did not."""
    return sorted(needs.items(), key=lambda item: (item[0] >= above, abs(item[0] - below)))[:2]
