"""Speed of generation by rows and context, beside what the memory's bandwidth allows, and beside other programs.

    python benchmarks/decode.py --preset tinyllama-1.1b --dtype bfloat16 --pairs 1x512,8x512,64x1024,256x1024
    python benchmarks/decode.py --preset tinyllama-120m --pairs 1x256,8x256 --new 32 \\
        --transformers .venv/full/bin/python --llama-cpp .venv/llamacpp/bin/python

Random weights, the same for all sides; a pair is ROWSxCONTEXT, and every row has a prompt of CONTEXT - NEW tokens and
gets NEW more, greedily.  Ours goes through the engine that `generate` and `serve` use.  A side's answer with one new
token is its prefill; what longer answers take beyond that is its decoding.  The best of `--rounds`, sides by turns,
each round of a side a process of its own.

bound_tokens_per_s: rows / ((weights + rows x mean context x cache bytes per token) / bandwidth), where the bandwidth is
that of a large array copied or read, in the same run, and the weights those that every token is multiplied with.

One JSON line per pair and side; `same_tokens` is the share of the answers' tokens that are ours (llama.cpp's server
keeps 16-bit keys and values, and leaves out tokens that are no text).  Exit status 1 when a
side failed, or ours is slower than `--minimum`, such as 1x512=1200.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from lines import ROOT, device, emit, isolated, origin

from tinyllama_jax import weights
from tinyllama_jax.config import Execution, Mesh, Model, replace
from tinyllama_jax.errors import UserError
from tinyllama_jax.generate import speed
from tinyllama_jax.generate.engine import Engine, Request
from tinyllama_jax.generate.sampling import Sampling
from tinyllama_jax.interop.hf import read_hf, write_hf
from tinyllama_jax.model import quantized, transformer
from tinyllama_jax.presets import preset
from tinyllama_jax.sharding import computing, make_mesh

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}  # scales apart
PEER = ROOT / "benchmarks" / "decode_peer.py"


def write_model(folder: Path, model: Model) -> None:
    """Random weights, sharp enough that no two sides see a tie where the other does not."""
    with jax.set_mesh(make_mesh(Mesh(), jax.devices()[:1])):
        params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
        write_hf(jax.tree.map(lambda x: np.asarray(x) * (3 if x.ndim > 2 else 1), params), model, folder)


def prompts(model: Model, rows: int, tokens: int) -> list[list[int]]:
    return np.random.default_rng(rows).integers(3, model.vocab_size, (rows, tokens)).tolist()


def ours(folder: Path, rows: int, context: int, new: int, dtype: str, kept: str) -> dict:
    """{prefill_s, total_s, answers} through the engine, after one that compiles."""
    model, params = read_hf(folder)
    model = replace(model, compute_dtype=dtype)
    with computing(make_mesh(Mesh(), jax.devices()[:1]), dtype):
        params = jax.jit(quantized.serving, static_argnums=(1, 2))(params, model, kept)
        engine = Engine(params, model, Execution(), rows=rows, context_tokens=context)
        given = prompts(model, rows, context - new)

        def seconds(count: int) -> tuple[float, list[list[int]]]:
            begin = time.perf_counter()
            numbers = [
                engine.add(Request(prompt=tuple(p), max_new_tokens=count, sampling=Sampling(temperature=0)))
                for p in given
            ]
            answers: dict[int, list[int]] = {number: [] for number in numbers}
            while engine.busy:
                for piece in engine.step():
                    answers[piece.number] += piece.tokens
            return time.perf_counter() - begin, list(answers.values())

        for count in (1, new):
            seconds(count)
        return {"prefill_s": seconds(1)[0], **dict(zip(("total_s", "answers"), seconds(new), strict=True))}


def theirs(python: str, engine: str, file: Path, given: list[list[int]], new: int) -> dict:
    """The same of another program, in its Python; {error} when there is nothing."""
    words = [python, str(PEER), engine, str(file), str(new)]
    done = subprocess.run(words, input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["ended without a word"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def bandwidth(size: int) -> float:
    """Bytes per second of an array of so many bytes, the best of ten: copied (read and written), or read as a matrix
    that a vector is multiplied with, whichever is more.  On a CPU a copy's new pages cost more than the copy."""
    columns = 4096
    x = jnp.zeros((size // 4 // columns, columns), jnp.float32)
    programs = {2: jax.jit(lambda x, y: x + y), 1: jax.jit(lambda x, y: x @ jnp.full(columns, y, jnp.float32))}
    best = 0.0
    for passes, program in programs.items():
        for i in range(11):
            begin = time.perf_counter()
            jax.block_until_ready(program(x, np.float32(i)))
            if i:
                best = max(best, passes * x.nbytes / (time.perf_counter() - begin))
    return best


def bound(model: Model, rows: int, context: float, rate: float, dtype: str, kept: str) -> float:
    """Tokens per second at which the memory would be busy with nothing else (Pope et al., arXiv 2211.05102)."""
    itself = dtype if kept == "dtype" else kept
    layers = sum(np.prod(shape) for path, shape in weights.shapes(model).items() if path[0] == "layers")
    head = model.d_model * model.vocab_size * (BYTES[dtype] if model.tied_embeddings else BYTES[itself])
    cache = rows * context * speed.cache_bytes_per_token(replace(model, compute_dtype=dtype))
    return float(rows * rate / (layers * BYTES[itself] + head + cache))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tinyllama-120m")
    parser.add_argument("--pairs", default="1x256,8x256", metavar="ROWSxCONTEXT,...")
    parser.add_argument("--new", type=int, default=32, metavar="N", help="tokens per answer (32)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", default="dtype", choices=("dtype", "int8", "int4"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--copy-gib", type=float, default=1.0, help="size of the array that is copied and read")
    parser.add_argument("--transformers", metavar="PYTHON", help="a Python that has torch and transformers")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python that has xllamacpp")
    parser.add_argument("--minimum", action="append", default=[], metavar="PAIR=TOKENS_PER_S")
    parser.add_argument("--out", metavar="FILE.jsonl")
    args = parser.parse_args(argv)
    try:
        model = replace(preset(args.preset), compute_dtype=args.dtype)
        pairs = [speed.pair(text) for text in args.pairs.split(",")]
        least = {speed.pair(k): float(v) for k, v in (text.split("=") for text in args.minimum)}
    except (UserError, ValueError) as error:
        print(f"decode.py: {error}", file=sys.stderr)
        return 2
    if any(not args.new < context <= model.context_tokens for _, context in pairs):
        print(f"decode.py: a context holds --new={args.new} tokens and a prompt, {model.context_tokens} at most")
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as folder, open(args.out or "/dev/null", "a") as out:
        hf, gguf = Path(folder) / "hf", Path(folder) / "model.gguf"
        isolated(write_model, hf, model)
        if args.llama_cpp:
            isolated(write_gguf, hf, gguf, args.dtype)
        about, rate = isolated(device), isolated(bandwidth, int(args.copy_gib * 2**30))
        for rows, context in pairs:
            sides = {"ours": lambda r=rows, c=context: isolated(ours, hf, r, c, args.new, args.dtype, args.weights)}
            given = prompts(model, rows, context - args.new)
            for name, python, file in (
                ("transformers", args.transformers, hf),
                ("llama.cpp", args.llama_cpp, gguf),
            ):
                if python:
                    sides[name] = lambda g=given, n=name, p=python, f=file: theirs(p, n, f, g, args.new)
            found: dict[str, list[dict]] = {name: [] for name in sides}
            for _ in range(args.rounds):
                for name, measure in sides.items():
                    found[name].append(measure())
            limit = bound(model, rows, context - args.new / 2, rate, args.dtype, args.weights)
            answers = found["ours"][0]["answers"]
            for name, times in found.items():
                line = {"benchmark": "decode", "side": name, "preset": args.preset, "dtype": args.dtype}
                line |= {"weights": args.weights if name == "ours" else "dtype", "rows": rows, "context": context}
                line |= {"new": args.new, "device": about, **origin()}
                if errors := [t["error"] for t in times if "error" in t]:
                    failed = True
                    emit(line | {"error": errors[0]}, out)
                    continue
                prefill_s = min(t["prefill_s"] for t in times)
                decode_s = min(t["total_s"] for t in times) - prefill_s
                speed_ = rows * (args.new - 1) / decode_s
                pairs_of_ids = (zip(a, b, strict=False) for a, b in zip(answers, times[0]["answers"], strict=True))
                same = sum(x == y for ids in pairs_of_ids for x, y in ids) / (rows * args.new)
                line |= {"tokens_per_s": speed_, "prefill_tokens_per_s": rows * (context - args.new) / prefill_s}
                line |= {"bandwidth_bytes_per_s": rate, "bound_tokens_per_s": limit, "share_of_bound": speed_ / limit}
                emit(line | {"same_tokens": same}, out)
                if name == "ours" and speed_ < least.get((rows, context), 0):
                    failed = True
                    print(f"decode.py: {rows}x{context}: {speed_:.0f} tokens/s are below {least[rows, context]:.0f}")
    return int(failed)


def write_gguf(hf: Path, file: Path, dtype: str) -> None:
    """The same weights for llama.cpp, with any tokenizer: it is given ids, but does not start without one."""
    from tinyllama_jax.data.tokenizer import train_bpe
    from tinyllama_jax.interop import gguf

    model, params = read_hf(hf)
    folder = file.parent / "tokenizer"
    folder.mkdir()
    train_bpe([path.read_text() for path in Path(__file__).parent.glob("*.py")], 512, folder / "tokenizer.model")
    kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    gguf.write_gguf(params, model, file, kind=kind, tokenizer_folder=folder)


if __name__ == "__main__":
    sys.exit(main())
