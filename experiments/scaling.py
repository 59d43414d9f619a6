"""Scaling laws: how large a model, on how much data, for how much compute?

    tinyllama sweep experiments.scaling:isoflop_cpu --workdir runs/isoflop --dry-run
    tinyllama sweep experiments.scaling:isoflop_cpu --workdir runs/isoflop
    tinyllama fit isoflop --runs runs/isoflop

`isoflop`: at each of several budgets models from a fourth to four times the expected best size, so that each budget has
a minimum of its own (arXiv 2203.15556, approach 2).  `ladder`: sizes over one and a half decades times tokens per
parameter, the D axis of a size from one trunk with decays (WSD), for a surface (approach 3).  Learning rate, batch
and warm-up follow from N and D by OLMo's rule (lab/rules.py), so that no size is favoured.

On the CPU a vocabulary of 512 leaves the weights to the layers; the numbers prove the pipeline and say nothing about
models a thousand times as large.
"""

import math
import sysconfig

from tinyllama_jax.config import (
    Checkpoint,
    Data,
    Evaluation,
    LearningRate,
    Model,
    Optimizer,
    Recipe,
    Run,
    Stage,
    replace,
)
from tinyllama_jax.lab import shapes, sweep
from tinyllama_jax.presets import llama, preset

SPREAD = 4.0  # sizes from a fourth of the expected best to four times it
TOGETHER = 8  # sequences that a pod's batches are multiples of, for up to so many devices


def cpu_base(name: str) -> Run:
    """What the small studies share: the Python corpus at a vocabulary of 512, a quarter of it prose."""
    length = 128
    return Run(
        name=name,
        model=small(48),
        data=Data(
            store="data/python-512",
            sequence_tokens=length,
            recipe=Recipe(vocab_size=512, validation_share=0.1, window_tokens=length + 1),
        ),
        curriculum=(Stage(name="main", tokens=2**20, batch_tokens=8 * length, mixture={"prose": 0.25, "code": 0.75}),),
        lr=LearningRate(kind="cosine", peak=1e-2, end=1e-3),
        optimizer=Optimizer(decay="matrices"),
        checkpoint=Checkpoint(temporary_seconds=60, keep_temporary=1),
        evaluation=Evaluation(sequences=384, batch_sequences=64, every_tokens=2**17),  # eight times, at any length
    )


def pod_base(name: str) -> Run:
    """What the large ones share: TinyLlama's data and vocabulary."""
    length = 2048
    return Run(
        name=name,
        model=preset("t150"),
        data=Data(store="data/slimpajama-starcoder", sequence_tokens=length),
        curriculum=(
            Stage(
                name="main",
                tokens=10**9,
                batch_tokens=256 * length,
                mixture={"slimpajama": 0.693584, "starcoder": 0.306416},
            ),
        ),
        lr=LearningRate(kind="cosine", peak=1e-3, end=1e-4),
        optimizer=Optimizer(decay="matrices"),
        checkpoint=Checkpoint(temporary_seconds=600, keep_temporary=1),
        evaluation=Evaluation(
            sequences=1024, batch_sequences=64, every_tokens=5 * 10**7
        ),  # twenty times, at any length
    )


def small(d_model: int) -> Model:
    """A Llama as wide as sixteen times its layers, at a vocabulary of 512: 3 k weights beside the embeddings at a width
    of 16, 200 k at 64.  Every head has its own keys and values: few heads divide by groups only now and then."""
    layers, d_ff = max(1, round(d_model / 16)), 16 * round(d_model / 6)
    model = llama(layers, d_model, d_model // 8, d_model // 8, d_ff, vocab_size=512, context_tokens=128)
    return replace(model, compute_dtype="float32")


def _smalls(*widths: int) -> dict[str, Model]:
    return {f"w{width}": small(width) for width in widths}


def isoflop_cpu() -> list[Run]:
    """Four budgets of 5 sizes with two seeds, 2.5e11 to 2e12 FLOPs, 20 k to 270 k parameters: an hour on two cores.

    The corpus has 4.8 M tokens at this vocabulary, which the smallest model of the largest budget sees one and a half
    times.
    """
    sizes = {
        2.5e11: _smalls(16, 24, 32, 40, 48),
        5e11: _smalls(24, 32, 40, 48, 56),
        1e12: _smalls(24, 32, 40, 48, 56),
        2e12: _smalls(32, 40, 48, 56, 64),
    }
    # A quarter of the rule's batch: with all of it the larger sizes take so few steps that these decide.
    runs = sweep.isoflop(cpu_base("isoflop"), list(sizes), sizes.__getitem__, batch_times=0.25)
    return sweep.checked(sweep.product(runs, {"seed": [0, 1]}))


def isoflop_cpu_rates() -> list[Run]:
    """Half and twice the learning rate at both ends of a budget, far from where the rule was made: if one of them is
    better there and not here, the sizes were not tuned alike."""
    names = ("isoflop-c5e+11-w24", "isoflop-c5e+11-w56")
    ends = [run for run in isoflop_cpu() if run.name.rpartition("-")[0] in names]
    rates = [
        replace(
            run, name=f"{run.name}-x{times:g}", lr=replace(run.lr, peak=times * run.lr.peak, end=times * run.lr.end)
        )
        for run in ends
        for times in (0.5, 2)
    ]
    return sweep.checked(rates)


def isoflop_pod() -> list[Run]:
    """Six budgets of 7 sizes, 1e18 to 2.4e20 FLOPs, a threefold apart; 23 M to 5.7 B parameters."""
    budgets = [1e18 * 3**i for i in range(6)]

    def models(budget: float) -> dict[str, Model]:
        best = math.sqrt(budget / 120)
        wanted = [best * SPREAD ** (i / 3 - 1) for i in range(7)]  # evenly spaced in their logarithm
        return {f"n{n:.2g}": shapes.near(n, vocab_size=32_000, context_tokens=2048) for n in wanted}

    return sweep.checked(sweep.isoflop(pod_base("isoflop"), budgets, models, batch_multiple=TOGETHER))


def isoflop_gpu() -> list[Run]:
    """Four budgets of 5 sizes, 1e15 to 8e15 FLOPs, 3 M to 22 M parameters: half an hour on one H200 or H100.

    The text is that of the packages installed beside this one; `sweep --dry-run` says how often it is seen.
    """
    budgets, length, vocabulary = [1e15, 2e15, 4e15, 8e15], 512, 4096
    packages = sysconfig.get_path("purelib")
    base = cpu_base("isoflop")
    base = replace(
        base,
        data=replace(
            base.data,
            store=f"data/packages-{vocabulary}",
            sequence_tokens=length,
            recipe=Recipe(sources=(f"code=files:{packages}",), vocab_size=vocabulary, window_tokens=length + 1),
        ),
        model=shapes.near(3e6, vocab_size=vocabulary, context_tokens=length),
        curriculum=(replace(base.curriculum[0], batch_tokens=8 * length, mixture={"code": 1.0}),),
    )

    def models(budget: float) -> dict[str, Model]:
        wanted = [math.sqrt(budget / 120) * 3 ** (i / 2 - 1) for i in range(5)]
        return {
            f"n{n:.2g}": shapes.near(n, vocab_size=vocabulary, context_tokens=length, head_dim=32, width_per_layer=40)
            for n in wanted
        }

    return sweep.checked(sweep.isoflop(base, budgets, models))


def ladder_cpu() -> list[Run]:
    """Four sizes, each with decays at 4, 12 and 36 tokens per parameter from one trunk."""
    return _ladder(cpu_base("ladder"), _smalls(16, 24, 40, 56), (4, 12, 36))


def ladder_pod() -> list[Run]:
    """TinyLlama-shaped sizes of 15 M to 489 M parameters with decays at 5 to 160 tokens per parameter."""
    names = ("t15", "t37", "t79", "t150", "t331", "t489")
    return _ladder(pod_base("ladder"), {name: preset(name) for name in names}, (5, 10, 20, 40, 80, 160), TOGETHER)


def _ladder(base: Run, models: dict[str, Model], multiples: tuple[float, ...], together: int = 1) -> list[Run]:
    """A trunk and its decays for each model; the rule looks at the longest."""
    base = replace(base, lr=replace(base.lr, kind="wsd", end=0.0, decay_tokens=1))
    longest = sweep.ladder(base, models, (max(multiples),), batch_multiple=together)
    at = [multiple / max(multiples) for multiple in multiples]  # of the longest
    return sweep.checked(
        sweep.each(longest, lambda run: sweep.decays(run, [round(share * run.curriculum[0].tokens) for share in at]))
    )
