"""Long texts encoded in parts, with the ids that the whole would have.

Byte-pair encoding joins, among all neighbours that make a piece, the best (by score, then the leftmost), until none is
left.  So a sequence of pieces is the encoding of its text exactly when each two neighbours are the encoding of theirs:
the first join across a border would have happened with these two alone, for up to it neither knew of anything beyond
them.  And so two encodings that share a piece at the same place can be joined there: all neighbours come from one of
them.  A part therefore begins at a piece of the part before and must begin with that very piece; where it does not,
for the text behind it reaches back, it is made again from an earlier place with twice as much text.

Time per character then no longer grows with the text (a queue of all neighbours falls out of the caches), and neither
does memory (about 50 bytes for each character in SentencePiece, 500 in tokenizers).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PART_BYTES = 1 << 16  # of UTF-8; encoded as fast as short texts, and much longer than any piece

Encode = Callable[[bytes], np.ndarray]


def encode_in_parts(data: bytes, first: Encode, further: Encode, sizes: np.ndarray, part_bytes: int) -> np.ndarray:
    """int32 ids of a text, the same as first(data).

    data: UTF-8.  first encodes the beginning of a text, with what is put before every text (at most one space);
    further encodes what follows, without it.  Both are byte-pair encodings by one vocabulary.
    sizes [V]: UTF-8 bytes of the text that each id stands for; all ids of a text sum up to its length.
    """
    joined: list[tuple[int, int | None, np.ndarray]] = []  # begin, the piece it must begin with, ids up to the join
    start, required = 0, None
    end, part = _made(data, 0, part_bytes, first, further)
    while True:
        if required is not None and part[0] != required:
            start, required, _ = joined.pop()
            end, part = _made(data, start, 2 * end - start, first, further)
        elif end == len(data):
            return np.concatenate([*(ids for *_, ids in joined), part])
        else:
            place, at = _join(data, start, end, part, sizes)
            if at > start:
                joined.append((start, required, part[:place]))
                start, required = at, part[place]
                end, part = _made(data, start, end + part_bytes, first, further)
            else:
                end, part = _made(data, start, 2 * end - start, first, further)


def _made(data: bytes, start: int, end: int, first: Encode, further: Encode) -> tuple[int, np.ndarray]:
    """-> (end, ids) of the part from start to about there."""
    end = min(end, len(data))
    while not _begins_character(data, end):
        end += 1
    return end, (further if start else first)(data[start:end])


def _join(data: bytes, start: int, end: int, part: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """-> (place among the part's ids, and in the data) for the next part to begin; (0, start) when there is none.

    It lies so far before the end that the characters from there on to be joined are whole, and what they are joined
    to is unlikely to change with what follows.
    """
    begins = np.cumsum(sizes[part]) - sizes[part]
    begins += end - begins[-1] - sizes[part[-1]]  # counted from the end: the space before is no part of the text
    place = int(np.searchsorted(begins, end - 4 * int(sizes.max()), "right")) - 1
    while place > 0 and not _begins_character(data, int(begins[place])):
        place -= 1  # a character without a piece has an id for each byte
    return (place, int(begins[place])) if place > 0 else (0, start)


def _begins_character(data: bytes, place: int) -> bool:
    return place >= len(data) or data[place] & 0xC0 != 0x80
