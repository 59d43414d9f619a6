"""llama.cpp itself: it loads a GGUF file and says what it makes of texts and tokens.

By the package `xllamacpp` (the extra `llamacpp`), whose wheel holds llama.cpp and the server of it.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class LlamaCpp:
    """A file in llama.cpp with its settings as they come (16-bit cache), on one thread; ends with the object."""

    def __init__(self, file: Path, context_tokens: int, vocab_size: int):
        try:
            import xllamacpp
        except ModuleNotFoundError:
            raise ModuleNotFoundError("llama.cpp is missing: pip install 'tinyllama_jax[llamacpp]'") from None

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.port = context_tokens, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)
        self.vocab_size = vocab_size
        self._letter = self.tokens("a")[-1]

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text, in which `<s>` is three letters; special: with what llama.cpp puts before it."""
        body = json.dumps({"content": text, "add_special": special, "parse_special": False}).encode()
        address = self.server.listening_address + "/tokenize"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())["tokens"]

    def log_probabilities(self, prompt: Sequence[int]) -> np.ndarray:
        """float64 [V]: of each token to follow the prompt."""
        reply = self.server.handle_completions(
            {
                "prompt": [int(token) for token in prompt],
                "n_predict": 1,
                "n_probs": self.vocab_size,
                "cache_prompt": True,
                # The probabilities are the model's own.  What is drawn is always the same letter, for an end of the
                # text or a part of a letter would be answered by nothing.
                "logit_bias": [[self._letter, 1e6]],
            }
        )
        reply = json.loads(reply) if isinstance(reply, (str, bytes)) else reply
        if "choices" not in reply:
            raise RuntimeError(f"llama.cpp: {reply}")
        found = np.full(self.vocab_size, np.nan)
        for one in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        if np.isnan(found).any():
            raise RuntimeError(f"llama.cpp left out {np.isnan(found).sum()} of {self.vocab_size} tokens")
        return found

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest continuation of so many tokens."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.log_probabilities(tokens).argmax()))
        return tokens[len(prompt) :]

    def loss(self, tokens: Sequence[int]) -> float:
        """Mean -log p in nats of every token but the first."""
        after = [self.log_probabilities(tokens[:i])[tokens[i]] for i in range(1, len(tokens))]
        return -float(np.mean(after))
