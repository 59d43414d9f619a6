"""Generation by another program, for decode.py: prompts as JSON on stdin, times and answers as JSON on stdout.

    python benchmarks/decode_peer.py transformers|llama.cpp MODEL NEW <prompts.json

Greedy, the same number of tokens for every prompt, after one run that warms up.  transformers continues all prompts at
once in the dtype that they are stored in, llama.cpp one after another, with as many threads as there are processors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable


def transformers(path: str, prompts: list[list[int]]) -> Callable[[int], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype="auto").eval()
    ids = torch.tensor(prompts)

    def run(new: int) -> list[list[int]]:
        with torch.inference_mode():
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                max_length=None,
                pad_token_id=0,
            )
        return answer[:, ids.shape[1] :].tolist()

    return run


def llama_cpp(path: str, prompts: list[list[int]]) -> Callable[[int], list[list[int]]]:
    import llama_cpp

    threads = os.cpu_count() or 1
    longest = max(map(len, prompts))
    model = llama_cpp.Llama(path, n_ctx=longest + 256, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(new: int) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            model.reset()
            tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
            answers.append([next(tokens) for _ in range(new)])
        return answers

    return run


def main() -> None:
    engine, path, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
    run = {"transformers": transformers, "llama.cpp": llama_cpp}[engine](path, json.load(sys.stdin))
    run(new)
    times = []
    for count in (1, new):
        begin = time.perf_counter()
        answers = run(count)
        times.append(time.perf_counter() - begin)
    print(json.dumps({"prefill_s": times[0], "total_s": times[1], "answers": answers}))


if __name__ == "__main__":
    main()
