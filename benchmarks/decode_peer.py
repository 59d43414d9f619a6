"""Generation by another program, for decode.py: prompts as JSON on stdin, times and answers as JSON on stdout.

    python benchmarks/decode_peer.py transformers|llama.cpp MODEL NEW <prompts.json

Greedy, the same number of tokens for every prompt, after one run that warms up.  Both continue all prompts at
once: transformers in the dtype that the weights are stored in, llama.cpp in its server, with 16-bit cache as it comes.
"""

from __future__ import annotations

import concurrent.futures
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
    import xllamacpp

    params, threads = xllamacpp.CommonParams(), os.cpu_count() or 1
    params.model.path, params.warmup, params.port = path, False, 0
    params.n_parallel, params.n_ctx = len(prompts), len(prompts) * (max(map(len, prompts)) + 256)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def one(prompt: list[int], new: int) -> list[int]:
        wanted = {"n_predict": new, "temperature": 0.0, "ignore_eos": True, "n_probs": 1, "cache_prompt": False}
        reply = server.handle_completions({"prompt": prompt, **wanted})
        reply = json.loads(reply) if isinstance(reply, (str, bytes)) else reply
        return [token["id"] for token in reply["choices"][0]["logprobs"]["content"]]

    def run(new: int) -> list[list[int]]:
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, prompts, [new] * len(prompts)))

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
