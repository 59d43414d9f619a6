"""Speculative decoding beside plain decoding, and beside what its papers predict.

    python benchmarks/speculative.py --out benchmarks/results/speculative_cpu.json      # ten minutes on two cores

Trains a target and a draft through the command line on one store, the draft with fewer and narrower layers, unless they
are named (`--target CKPT --draft CKPT`).  Then for each number K of drafted tokens, greedy and at temperature 1: every
way is called once to compile and `--repeats` times by turns; medians count.  Answers are held against plain ones:
greedy tokens must be the same, and sampled ones what speculative_check.py says.

Two predictions, from the acceptance a that was measured and the cost c of a draft's step over a target's step:

    paper      (1 - a^(K+1)) / ((1 - a) (K c + 1))          arXiv 2211.17192, theorem 3.8
    with v     (1 - a^(K+1)) / ((1 - a) (K c + v))          v: the target's call with K + 1 tokens over its step

The paper takes v for 1: true where reading the weights is what takes the time (an accelerator with few rows), and not
where arithmetic does (a CPU, or many rows).  It pays where the prediction is above 1.  Prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from lines import ROOT, conclude, device, origin, spread

sys.path.insert(0, str(ROOT))

PROMPTS = ("Return a new", "If the argument", "def __init__(self", "class Error(Exception):")


def pair_command(draft: bool, steps: int, store: str, workdir: Path) -> list[str]:
    """`train` of one of the two: the same store, vocabulary, batches and schedule."""
    sizes = {"d_model": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 32, "d_ff": 176}
    if not draft:
        sizes = {"d_model": 192, "layers": 6, "heads": 6, "kv_heads": 2, "head_dim": 32, "d_ff": 512}
    basic, continual, cooldown = steps * 4 // 10, steps * 3 // 10, steps * 3 // 10
    batch = 8 * 128
    changes = {f"model.{name}": value for name, value in sizes.items()} | {
        "data.store": store,
        "curriculum.basic.tokens": basic * batch,
        "curriculum.continual.tokens": continual * batch,
        "curriculum.cooldown.tokens": cooldown * 2 * batch,
        "evaluation.every_tokens": steps * batch,
        "checkpoint.temporary_steps": steps,
        "lr.peak": 3e-3 if draft else 1e-3,
    }
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["train", "experiments.smoke:tiny", "--workdir", str(workdir), *words]


def made_pair(steps: int, folder: Path) -> tuple[str, str]:
    from tinyllama_jax.cli import main as tinyllama

    for name in ("target", "draft"):
        command = pair_command(name == "draft", steps, str(folder / "store"), folder / name)
        if not (folder / name / "checkpoints").is_dir() and (status := tinyllama(command)):
            raise SystemExit(f"speculative: training the {name} ended with {status}")
    return str(folder / "target"), str(folder / "draft")


def costs(target, draft, rows: int, slots: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of a step of each, and of the target's call with so many tokens; each a compiled program of its own."""
    import jax
    import jax.numpy as jnp

    from tinyllama_jax.model import cached

    def seconds(of, count: int) -> float:
        def step(params, cache, start):
            positions_BT = start + jnp.broadcast_to(jnp.arange(count), (rows, count))
            logits, cache = cached.decode(params, jnp.ones((rows, count), jnp.int32), of.model, cache, positions_BT)
            return jnp.argmax(logits, axis=-1), cache

        compiled = jax.jit(step, donate_argnums=1)
        cache, taken = jax.jit(lambda: cached.init_cache(of.model, rows, slots))(), []
        for i in range(repeats + 1):
            begin = time.perf_counter()
            chosen, cache = jax.block_until_ready(compiled(of.params, cache, jnp.int32(slots // 2)))
            taken += [time.perf_counter() - begin] if i else []
        return statistics.median(taken)

    return {"target_s": seconds(target, 1), "draft_s": seconds(draft, 1), "verify_s": seconds(target, tokens)}


def measure(target, draft, tokenizer, args, temperature: float, K: int) -> dict:
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import sample, speculative_check
    from tinyllama_jax.generate import speculative_rule as rule
    from tinyllama_jax.generate.engine import bucket
    from tinyllama_jax.generate.load import prompt_tokens
    from tinyllama_jax.generate.sampling import Sampling
    from tinyllama_jax.generate.speculative import speculate

    prompts = [prompt_tokens(tokenizer, target.marks, text) for text in PROMPTS[: args.rows]]
    new, how = args.new_tokens, Sampling(temperature=temperature)
    plainly = lambda: sample.generate(  # noqa: E731
        target.params, target.model, Execution(), prompts, max_new_tokens=new, temperature=temperature
    )
    drafted = lambda: speculate(  # noqa: E731
        target, draft, prompts, max_new_tokens=new, draft_tokens=K, how=how
    )
    plain, found = plainly(), drafted()  # compiled by now
    times: dict = {plainly: [], drafted: []}
    for way in [plainly, drafted] * args.repeats:
        begin = time.perf_counter()
        way()
        times[way].append(time.perf_counter() - begin)
    plain_s, seconds = map(statistics.median, times.values())
    cost = costs(target, draft, len(prompts), bucket(max(map(len, prompts)) + new, 1 << 30), K + 1, 5 * args.repeats)
    c, v, a = cost["draft_s"] / cost["target_s"], cost["verify_s"] / cost["target_s"], found.acceptance
    if temperature:
        checks = speculative_check.sampled(target, prompts, found, how)
        right = all(part["holds"] for part in checks.values())
    else:
        right = plain == found.answers
    return {
        "temperature": temperature,
        "draft_tokens": K,
        "rows": len(prompts),
        "new_tokens": new,
        "answers_are_right": right,
        "proposed": found.proposed,
        "accepted": found.accepted,
        "acceptance_rate": found.acceptance_rate,
        "acceptance": a,
        "tokens_per_round": {"measured": found.tokens_per_round, "predicted": rule.expected_tokens(a, K)},
        "plain_s": spread(times[plainly]),
        "seconds": spread(times[drafted]),
        "cost": c,
        "verify": v,
        **cost,
        # Rows of a batch that have ended wait for the others: rounds that a row has no use of count as time.
        "idle": 1 - found.rounds / (found.calls * len(prompts)),
        "speed_up": {
            # Sampled answers are others than plain ones, but as long: nothing ends them early.
            "measured": plain_s / seconds,
            "paper": rule.expected_speed_up(a, K, c),
            "with_v": rule.expected_speed_up(a, K, c, v),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", metavar="CKPT")
    parser.add_argument("--draft", metavar="CKPT")
    parser.add_argument("--steps", type=int, default=250, help="of training where none are named (250)")
    parser.add_argument("--folder", type=Path, default=Path("runs/speculative"), help="of what is trained")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--rows", type=int, default=1, choices=range(1, len(PROMPTS) + 1), help="prompts (1)")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path("runs/speculative/measured.json"))
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft go together")
    if args.target is None:
        args.target, args.draft = made_pair(args.steps, args.folder)

    import jax

    from tinyllama_jax.generate.load import load_serving, serving_mesh
    from tinyllama_jax.generate.speculative_published import published
    from tinyllama_jax.generate.vocabularies import common_ids
    from tinyllama_jax.sharding import computing

    mesh = serving_mesh(args.target, args.draft)
    with computing(mesh, args.dtype):
        target, draft = (load_serving(text, mesh, dtype=args.dtype) for text in (args.target, args.draft))
        common_ids(target, draft)
        measured = [
            measure(target, draft, target.tokenizer(), args, temperature, K)
            for temperature in (0.0, 1.0)
            for K in args.draft_tokens
        ]
    parameters = [sum(x.size for x in jax.tree.leaves(of.params)) for of in (target, draft)]
    record = {
        "benchmark": "speculative",
        "claim": "greedy answers are those of plain decoding, sampled ones pass the checks",
        **origin(),
        "device": device(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),  # 1 is this process; more are others that disturb it
        "dtype": args.dtype,
        "parameters": dict(zip(("target", "draft"), parameters, strict=True)),
        "measured": measured,
        "published": published(),
    }
    failed = [
        f"K = {m['draft_tokens']}, temperature {m['temperature']}: wrong answers"
        for m in measured
        if not m["answers_are_right"]
    ]
    return conclude(record, failed, args.out)


if __name__ == "__main__":
    sys.exit(main())
