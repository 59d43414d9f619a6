"""What was published of TinyLlama as a draft, to be shown beside a measurement.  Other machines and models."""

from __future__ import annotations

_ASSISTED = {
    "source": "github.com/jzhang38/TinyLlama, speculative_decoding/: assisted generation of Hugging Face transformers",
    "setting": "draft TinyLlama-1.1B-Chat v0.1 in float16, target guanaco in int8, one A40, 512 new tokens, one prompt",
}
_LLAMA_CPP = {
    "source": "github.com/jzhang38/TinyLlama, speculative_decoding/: llama.cpp",
    "setting": "draft TinyLlama-1.1B python v0.1 in q4_0, target CodeLlama-7B in float16, greedy, 8 drafted, a Mac",
}
PUBLISHED = (
    _ASSISTED | {"target": "guanaco 7B", "plain_seconds": 69, "seconds": 38},
    _ASSISTED | {"target": "guanaco 13B", "plain_seconds": 84, "seconds": 45},
    _ASSISTED | {"target": "guanaco 33B", "plain_seconds": 109, "seconds": 62},
    _LLAMA_CPP | {"target": "CodeLlama-7B, a Python prompt", "proposed": 317, "accepted": 195, "tokens_per_s": 33.5},
    _LLAMA_CPP | {"target": "CodeLlama-7B, a C prompt", "proposed": 278, "accepted": 200, "tokens_per_s": 40.1},
)


def published() -> list[dict]:
    """The rows with what follows from them: speed_up, or acceptance_rate (accepted of proposed)."""
    rows = []
    for row in PUBLISHED:
        if "seconds" in row:
            rows.append(row | {"speed_up": round(row["plain_seconds"] / row["seconds"], 2)})
        else:
            rows.append(row | {"acceptance_rate": round(row["accepted"] / row["proposed"], 3)})
    return rows
