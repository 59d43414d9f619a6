"""A checkpoint as a model of lm-evaluation-harness: what its Hugging Face backend answers, computed here.

Importing this needs the package lm_eval (harness.require says how to get it), and nothing of PyTorch.

Text becomes tokens as in the harness' backend: BOS before every text (`start="bos"`), context and continuation encoded
together and split where the context's own encoding ends, spaces at the context's end counted as the continuation's.
Text is only ever text here: `<s>` inside a prompt is three characters and not the BOS token.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tinyllama_jax.config import Execution
from tinyllama_jax.errors import DataError
from tinyllama_jax.evaluate.likelihood import Pair, log_likelihoods
from tinyllama_jax.generate import sample
from tinyllama_jax.generate.load import Loaded

GENERATED_TOKENS = 256  # where a task does not say, as in the harness' backend
SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}  # what a task may ask of generation
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}  # or ask, if it means nothing

Start = Literal["bos", "as-trained"]


class Model(TemplateLM):
    """start: what a text begins with: `bos`, as in the harness' backend; `as-trained`, the mark that the documents of
    the training data began with or that ended the one before (none, when they had none).
    batch_rows: rows computed at a time; seed: of sampling; on_done(kind, done, total): how far it is."""

    def __init__(
        self,
        loaded: Loaded,
        mesh: Mesh,
        *,
        start: Start = "bos",
        batch_rows: int = 32,
        seed: int = 0,
        on_done: Callable[[str, int, int], object] = lambda kind, done, total: None,
    ):
        super().__init__()
        self._loaded, self._mesh, self._execution = loaded, mesh, Execution()
        self._text = loaded.tokenizer()
        self._rows, self._seed, self._on_done = batch_rows, seed, on_done
        marks = "bos" if start == "bos" else loaded.marks
        bos, eos = self._text.bos_id, self._text.eos_id
        self._start = {"bos": [bos], "both": [bos], "eos": [eos], "none": []}[marks]
        # The harness' backend lets a whole text begin with BOS once as a token and once more as what precedes it.
        self._whole_start = self._start if start == "bos" else []
        self.max_length = loaded.model.context_tokens

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        return self._start[0] if self._start else self._text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return (self._start if add_special_tokens is not False else []) + self._text.encode(string)

    # -- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = True, **kwargs) -> list[tuple[float, bool]]:
        """Of [(texts, context ids, continuation ids)]."""
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        return [tuple(found) for found in self._log_likelihoods("loglikelihood", pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts: cut into windows of the model's context, each token predicted once."""
        pairs, of_request = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self._whole_start + self._text.encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                of_request.append(i)
        sums = [0.0] * len(requests)
        for i, found in zip(of_request, self._log_likelihoods("loglikelihood_rolling", pairs), strict=True):
            sums[i] += found.log_likelihood
        return sums

    def _log_likelihoods(self, kind: str, pairs: Sequence[Pair]):
        done = 0

        def on_rows(answered: int) -> None:
            nonlocal done
            done += answered
            self._on_done(kind, done, len(pairs))

        loaded = self._loaded
        return log_likelihoods(
            loaded.params,
            loaded.model,
            self._execution,
            self._mesh,
            pairs,
            batch_rows=self._rows,
            on_rows=on_rows,
        )

    # -- text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to the first of the stop strings, which is left out, or max_gen_toks tokens.

        Raises DataError for options that generation here does not know, and where no room is left for a prompt.
        """
        alike = defaultdict(list)  # options -> requests
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(i)
        answers, done = [""] * len(requests), 0
        for options, group in alike.items():
            prompts = [requests[i].args[0] for i in group]
            for place, text in self._continued(prompts, json.loads(options)):
                answers[group[place]] = text
                done += 1
                self._on_done("generate_until", done, len(requests))
        return answers

    def _continued(self, prompts: Sequence[str], options: dict) -> Iterator[tuple[int, str]]:
        """(index, text) of every prompt, the longest first."""
        options = normalize_gen_kwargs(options, GENERATED_TOKENS)
        new, until = options.pop("max_gen_toks"), handle_stop_sequences(options.pop("until"), eos=None)
        sampling = {name: options.pop(name) for name in SAMPLING & options.keys()}
        strange = {name: value for name, value in options.items() if NEUTRAL.get(name) != value}
        if strange:
            raise DataError(f"a task asks for generation with {strange}, which is not known here; known: {SAMPLING}")
        room = self.max_length - new
        if room < 1:
            raise DataError(
                f"a task asks for {new} new tokens, and the model's context is {self.max_length}; "
                "set generation_kwargs.max_gen_toks in a copy of the task"
            )
        encoded = [self.tok_encode(prompt)[-room:] for prompt in prompts]
        # The longest first: neighbours are of one bucket of lengths.
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]), reverse=True)

        def ends(ids: list[int]) -> bool:
            text = self._text.decode(ids)
            return any(stop in text for stop in until if stop)

        for i, ids in zip(order, self._generate([encoded[i] for i in order], new, sampling, ends), strict=True):
            yield i, postprocess_generated_text(self._text.decode(ids), until, None)

    def _generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: dict, ends: Callable[[list[int]], bool]
    ) -> list[list[int]]:
        """The one place that generates: answers to `prompts`, each until EOS, `ends` or `new_tokens` tokens."""
        answers: list[list[int]] = [[] for _ in prompts]

        def on_tokens(row: int, tokens: list[int]) -> bool:
            answers[row] += tokens
            return ends(answers[row])

        sampled = sampling.get("do_sample", False)
        return sample.generate(
            self._loaded.params,
            self._loaded.model,
            self._execution,
            prompts,
            max_new_tokens=new_tokens,
            temperature=sampling.get("temperature", 0.0) if sampled else 0.0,
            top_k=int(sampling.get("top_k") or 0) if sampled else 0,
            top_p=sampling.get("top_p", 1.0) if sampled else 1.0,
            seed=self._seed,
            eos_id=self._text.eos_id,
            rows=self._rows,
            on_tokens=on_tokens,
        )
