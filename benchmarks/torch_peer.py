"""TinyLlama's training step in PyTorch, tuned: what the speed of this project's own step is measured against.

    python benchmarks/torch_peer.py --device cpu --preset cpu --precision fp32 --micro-batches 8
    python benchmarks/torch_peer.py --micro-batches 8,16 --loss chunked --compile-scope block
    python benchmarks/torch_peer.py --attention-bench

Needs PyTorch and no JAX.  One JSON object per micro-batch on stdout, after one per attention backend.  A step is
`--accum` times forward and backward over a micro-batch of random tokens that lie on the device, the clipping of the
gradients' norm at 1.0, and AdamW.  Nothing is computed twice to save memory.

fp32         all in float32, TF32 off
autocast     float32 weights, cast to bfloat16 for the products; the residual stream is bfloat16
bf16-master  the matrices are bfloat16 and have a float32 master each, to which their gradients are added

In all of them the moments, the sum of the gradients over micro-batches, norms, RoPE, softmax and loss are float32.
Of the attention backends that `--attn` allows, the one is taken that is fastest at this shape on this device, with keys
and values as they are or repeated for every query head.

tok_s        tokens of a step over the median step;  tok_s_wall: over all timed steps, by the host's clock
cpu_s        on a CPU: processor time of a step, of all threads (for attention, of a forward and backward pass)
mfu, _causal share of the device's peak in bfloat16, where it is known (tinyllama_jax/flops.py has the conventions)

A configuration that cannot run is a line with `error`.  Exit status 1 when none could.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the package need not be installed beside PyTorch

import torch
from lines import emit, origin, spread
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_model import TinyLlama, attention, load, make_loss

from tinyllama_jax import flops, presets
from tinyllama_jax.config import Model, Rope

SHAPES = {name: cfg for name, cfg in presets.PRESETS.items() if cfg.rope == Rope() and not cfg.tied_embeddings}
SHAPES["tinyllama"] = presets.TINYLLAMA
SHAPES["cpu"] = presets.llama(4, 512, 8, 2, 1408, vocab_size=8192, context_tokens=256)  # enough for two cores
SHAPES["tiny"] = presets.llama(2, 128, 4, 2, 352, vocab_size=512, context_tokens=64)  # for tests
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
LR = 1e-4  # as in train_step.py


def global_norm(tensors: list[Tensor]) -> Tensor:
    if tensors[0].is_cuda:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    # Row by row: of millions of values at once a CPU's float32 sum is off by 1e-4.
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x, dim=-1).norm() for x in tensors]))


def make_step(model: TinyLlama, windows_ABT: Tensor, args: argparse.Namespace) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that takes one optimizer step on windows [A, B, T+1] -> (loss, norm of the gradients)."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)] if args.precision == "bf16-master" else []
    masters = [nn.Parameter(m.weight.detach().clone()) for m in linear]
    for module in linear:
        module.to(torch.bfloat16)
    lows = [module.weight for module in linear]
    updated = masters + [p for p in model.parameters() if p.dtype == torch.float32]
    adam = torch.optim.AdamW(updated, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    loss_of, accum = make_loss(model, args), len(windows_ABT)

    def step() -> tuple[Tensor, Tensor]:
        total = 0.0
        for window_BT in windows_ABT:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "autocast"):
                loss = loss_of(window_BT[:, :-1], window_BT[:, 1:])
            (loss / accum).backward()
            total = total + loss.detach() / accum
            for low, master in zip(lows, masters, strict=True):
                master.grad = low.grad.float() if master.grad is None else master.grad.add_(low.grad)
                low.grad = None
        norm = global_norm([p.grad for p in updated])
        adam.grad_scale = norm.clamp(min=1.0)  # the fused kernel divides by it: clipping without a pass of its own
        adam.step()
        adam.zero_grad(set_to_none=True)
        if lows:
            torch._foreach_copy_([p.detach() for p in lows], [p.detach() for p in masters])
        return total, norm

    return step


def mark(cuda: bool) -> torch.cuda.Event | float:
    """Now: by the GPU's own clock where there is one, without waiting for it."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def timed(function: Callable, count: int, cuda: bool) -> tuple[list[float], list]:
    """Milliseconds of each call, and what the calls returned; the device has finished by then."""
    marks, results = [mark(cuda)], []
    for _ in range(count):
        results.append(function())
        marks.append(mark(cuda))
    if cuda:
        torch.cuda.synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    return [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairs], results


def windows(cfg: Model, rows: int, args: argparse.Namespace) -> Tensor:
    """Windows [accum, rows, T+1]: those of `--load`, or random ones."""
    count, length = args.accum * rows, cfg.context_tokens + 1
    if args.load is None:
        found = torch.randint(cfg.vocab_size, (count, length))
    else:
        found = torch.tensor(json.loads((args.load / "windows.json").read_text()))[:count]
    return found.view(args.accum, rows, length).to(args.device)


def measure(cfg: Model, rows: int, repeat: bool, args: argparse.Namespace) -> dict:
    cuda = args.device == "cuda"
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = TinyLlama(cfg, torch.float32 if args.precision == "fp32" else torch.bfloat16, repeat)
    if args.load is not None:
        load(model, args.load)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = make_step(model, windows(cfg, rows, args), args)
    first_ms, first = timed(step, 1, cuda)
    timed(step, args.warmup, cuda)
    cpu, wall = time.process_time(), time.perf_counter()
    ms, results = timed(step, args.steps, cuda)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    (loss_first, norm_first), (loss_last, norm_last) = ([x.item() for x in pair] for pair in (first[0], results[-1]))
    tokens, length = rows * args.accum * cfg.context_tokens, cfg.context_tokens
    rate = 1e3 * tokens / statistics.median(ms)
    peak = flops.peak_flops(torch.cuda.get_device_name()) if cuda else None
    work = {convention: flops.flops_per_token(cfg, length, convention) for convention in ("palm", "causal")}
    number = lambda x: float(f"{x:.8g}")  # noqa: E731
    return {
        "tok_s": number(rate),
        "tok_s_wall": number(tokens * args.steps / wall),
        "step_ms": spread(ms),
        "cpu_s": None if cuda else number(cpu / args.steps),
        "tflops": number(rate * work["palm"] / 1e12),
        "mfu": round(rate * work["palm"] / peak, 4) if peak else None,
        "mfu_causal": round(rate * work["causal"] / peak, 4) if peak else None,
        "flops_per_token": work,
        "peak_mem_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
        "first_step_s": number(first_ms[0] / 1e3),
        "loss_first": number(loss_first),
        "loss_last": number(loss_last),
        "grad_norm_first": number(norm_first),
        "grad_norm_last": number(norm_last),
        "params": sum(p.numel() for p in model.parameters()),
    }


def attention_rows(cfg: Model, rows: int, args: argparse.Namespace) -> list[dict]:
    """Every backend that `--attn` allows alone, with keys and values as they are and repeated; forward and backward.

    TFLOP/s count the causal half: 2 B H T^2 K forward, 3.5 times that with backward, recomputed scores included.
    """
    T, cuda, found = cfg.context_tokens, args.device == "cuda", []
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    shapes = [(rows, T, heads, cfg.head_dim) for heads in (cfg.heads, cfg.kv_heads, cfg.kv_heads)]
    q, k, v = (torch.randn(s, device=args.device, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes)
    slope, work = torch.randn_like(q), 2.0 * rows * cfg.heads * T**2 * cfg.head_dim
    for name in BACKENDS if args.attn == "auto" else [args.attn]:
        for repeat in (False, True):
            line = {"bench": "attention", "backend": name, "gqa": "repeated" if repeat else "native"}
            line |= {"rows": rows, "tokens": T, "heads": cfg.heads, "kv_heads": cfg.kv_heads, "head_dim": cfg.head_dim}
            line["dtype"] = str(dtype).removeprefix("torch.")

            def forward(repeat=repeat):
                return attention(q, k, v, repeat)

            def both(forward=forward):
                return torch.autograd.grad(forward(), (q, k, v), slope)

            try:
                with sdpa_kernel(BACKENDS[name]):
                    for what, function, times in (("fwd", torch.no_grad()(forward), 1), ("fwdbwd", both, 3.5)):
                        timed(function, 2, cuda)
                        cpu = time.process_time()
                        ms, _ = timed(function, 10, cuda)
                        line["cpu_s"] = None if cuda else (time.process_time() - cpu) / len(ms)
                        tflops = times * work / statistics.median(ms) / 1e9
                        line |= {f"{what}_ms": spread(ms), f"{what}_tflops": float(f"{tflops:.4g}")}
            except RuntimeError as error:  # not for this device, dtype or shape, or no memory for it
                line["error"] = " ".join(str(error).split())[:200]
            found.append(line)
    return found


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="tinyllama-1.1b", choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--precision", default="autocast", choices=["fp32", "autocast", "bf16-master"])
    parser.add_argument("--micro-batches", default="8", metavar="N,N", help="rows of each forward and backward pass")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches of a step (1)")
    modes = ["none", "default", "max-autotune-no-cudagraphs", "reduce-overhead"]
    parser.add_argument("--compile", default="default", choices=modes)
    parser.add_argument("--compile-scope", default="model", choices=["model", "block"])
    parser.add_argument("--loss", default="full", choices=["full", "chunked"])
    parser.add_argument("--loss-chunks", type=int, default=8, help="of --loss chunked (8)")
    parser.add_argument("--attn", default="auto", choices=["auto", *BACKENDS])
    parser.add_argument("--attention-bench", action="store_true", help="measure attention alone, and no step")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps after the first that are not counted (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--load", type=Path, metavar="FOLDER", help="weights and windows to start from (versus_torch.py)"
    )
    args = parser.parse_args(words)
    try:
        args.micro_batches = [int(word) for word in args.micro_batches.split(",")]
    except ValueError:
        parser.error(f"--micro-batches {args.micro_batches}: give whole numbers with commas between them")
    if min(*args.micro_batches, args.accum, args.steps, args.loss_chunks) < 1 or args.warmup < 0:
        parser.error("--micro-batches, --accum, --steps and --loss-chunks must be positive, --warmup not negative")
    if args.compile == "reduce-overhead" and args.accum > 1:
        parser.error(
            "--compile reduce-overhead: a CUDA graph writes each micro-batch's gradients to one place; --accum 1"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    return args


def main() -> int:
    args = arguments()
    cuda, cfg = args.device == "cuda", SHAPES[args.preset]
    torch.set_float32_matmul_precision("highest")
    common = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if cuda else "cpu"}
    common |= {"threads": torch.get_num_threads(), **origin()}
    measured = attention_rows(cfg, args.micro_batches[0], args)
    for line in measured:
        emit(line | common)
    usable = [line for line in measured if "error" not in line]
    if args.attention_bench or not usable:
        return int(not usable)
    # Other programs disturb processor time the least.
    best = min(usable, key=lambda line: line["fwdbwd_ms"]["min"] if cuda else line["cpu_s"])
    done = 0
    for rows in args.micro_batches:
        line = {"bench": "train", "preset": args.preset, "micro_batch": rows, "accum": args.accum}
        line |= {"seq": cfg.context_tokens, "precision": args.precision, "compile": args.compile}
        line |= {"compile_scope": args.compile_scope, "loss": args.loss, "attn": best["backend"], "gqa": best["gqa"]}
        try:
            # For all of it, so that tracing for the compiler sees it as well.
            with sdpa_kernel(BACKENDS[best["backend"]]):
                line |= {"error": None} | measure(cfg, rows, best["gqa"] == "repeated", args)
            done += 1
        except RuntimeError as error:  # no memory, or a compiler that fails: said, and on to the next
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        emit(line | common)
        torch._dynamo.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return int(done == 0)


if __name__ == "__main__":
    sys.exit(main())
