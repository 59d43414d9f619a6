"""Rotary positions: how much of a head should turn, how slowly, and what is left beyond the context of training?

    tinyllama sweep experiments.rope:rope_cpu --workdir runs/rope

Protocol.  Models differ in `model.rope` alone: theta, the share of each head that turns (`partial`), or no positions
at all (NoPE: arXiv 2305.19466).  A seed gives all of them the same weights at the start and the same data in the same
order: compare within a seed.  With ample data differences at the training length are small, so that three seeds say
what noise is.  After training, `tinyllama measure` takes the loss on the same held-out text in windows up to four (on
the pod eight) times as long: with the angles that go on beyond those of training, and, where RoPE turns whole heads,
with position interpolation (arXiv 2306.15595), NTK-aware scaling and YaRN (arXiv 2309.00071), without fine-tuning.
Look at the loss by position too: a mean hides where it breaks.

Theta has a lower bound for a context: 0.0424 L^1.628 (arXiv 2405.14591): 114 at 128 tokens, 1.0e4 at 2048.  TinyLlama's
10,000 lies on the bound for its 2048 tokens, and far above that for 128: on the CPU half of the dimensions hardly turn
within a window, and a larger theta changes little there.  Others found that a larger base helps within the context and
hurts beyond it.

Not here: NoPE in some layers only and ALiBi, which the model does not have; retrieval, which loss does not show.  On
the CPU, models of 0.2M parameters show the order of the treatments beyond the context, which is a matter of angles;
the losses themselves say nothing about models a thousand times as large.
"""

from experiments.scaling import cpu_base, pod_base
from tinyllama_jax.config import Execution, Rope, Run, replace
from tinyllama_jax.lab import sweep
from tinyllama_jax.presets import llama, preset

SEEDS = (0, 1, 2)
CPU_TOKENS = 640 * 1024


def _study(base: Run, ropes: dict[str, Rope], seeds: tuple[int, ...]) -> list[Run]:
    return sweep.checked(
        replace(base, name=f"{base.name}-{kind}-seed{seed}", model=replace(base.model, rope=rope), seed=seed)
        for kind, rope in ropes.items()
        for seed in seeds
    )


def rope_cpu() -> list[Run]:
    """As in TinyLlama, half of each head, none, and a theta of 500,000 (Llama 3's), three seeds: 12 runs of 0.2M
    parameters on 0.7M tokens, 9e12 FLOPs, six minutes on two cores."""
    base = cpu_base("rope")
    model = replace(llama(3, 64, 4, 2, 176, vocab_size=512, context_tokens=128), compute_dtype="float32")
    base = replace(
        base,
        model=model,
        lr=replace(base.lr, warmup_tokens=CPU_TOKENS // 20),
        evaluation=replace(base.evaluation, sequences=384, beyond_tokens=(256, 512)),
        curriculum=(replace(base.curriculum[0], tokens=CPU_TOKENS),),
    )
    ropes = {
        "default": Rope(),
        "partial": Rope(kind="partial", fraction=0.5),
        "nope": Rope(kind="none"),
        "theta5e5": Rope(theta=5e5),
    }
    return _study(base, ropes, SEEDS)


def rope_pod() -> list[Run]:
    """150M parameters at 20 tokens a parameter: theta 1e3 to 1e6, a quarter and half of each head, and none."""
    [base] = sweep.ladder(pod_base("rope"), {"t150": preset("t150")}, (20,), batch_multiple=64)
    base = replace(
        base,
        name="rope-t150",
        evaluation=replace(base.evaluation, beyond_tokens=(4096, 8192, 16_384)),
        execution=Execution(micro_batch_sequences=64, remat="save_dots_and_attention"),
    )
    ropes = {f"theta{theta:.0e}".replace("e+0", "e"): Rope(theta=theta) for theta in (1e3, 1e4, 1e5, 5e5, 1e6)}
    ropes |= {f"fraction{share:g}": Rope(kind="partial", fraction=share) for share in (0.25, 0.5)}  # 1 is theta1e4
    return _study(base, ropes | {"nope": Rope(kind="none")}, SEEDS)
