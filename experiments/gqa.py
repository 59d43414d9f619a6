"""Grouped-query attention: what does a smaller cache cost in loss, and what does it buy in speed?

    tinyllama sweep experiments.gqa:gqa_cpu --workdir runs/gqa

Protocol (GQA: arXiv 2305.13245).  `fixed`: key and value heads fall from one for each query head (MHA) to one in all
(MQA), everything else stays, and so the model becomes smaller.  `matched`: the weights that are saved go to d_ff, so
that parameters differ by less than half a per cent, and what is left is the effect of sharing.  All models of a size
train on the same number of tokens with the same learning rate, batch and warm-up, those that OLMo's rule gives to the
MHA model, and a seed gives all of them the same data in the same order: compare within a seed.  On the pod the rate
is halved and doubled for two of them, lest the rate decides.  After training, `tinyllama measure` times prefill and
decoding at pairs of rows and context; the cache takes 2 layers kv_heads head_dim bytes per token and row.

Others found that training alone favours MHA by a few hundredths of a nat at equal size (marin #5151), some thousandths
of a bit per byte for each halving (marin #4371), so that GQA is a decision about inference; and that the best number
of heads depends on the context (arXiv 2503.09579).

On the CPU, models of 0.2M parameters at a context of 128 can show that the cache shrinks as it must, and whether a
difference in loss rises above the noise of three seeds.  They cannot say how large it is at 1B: there one head has 64
dimensions, not 8.  Speeds are those of that CPU, where the cache is a small part of what a step reads.  Prefill is
timed as `generate` does it, with plain attention and the logits of every token, which hides what sharing saves there.
"""

from experiments.scaling import cpu_base, pod_base
from tinyllama_jax.config import Execution, Model, Run, replace
from tinyllama_jax.lab import shapes, sweep
from tinyllama_jax.presets import llama, preset

SEEDS = (0, 1, 2)
CPU_TOKENS = 640 * 1024


def _arms(base: Run, kv_heads: tuple[int, ...], seeds: tuple[int, ...], arms: tuple[str, ...]) -> list[Run]:
    """The base, whose model is the one with MHA, with each number of heads, as the arms say, and each seed.

    MHA is in both arms the same run, and is there once, as `fixed`.
    """
    mha = replace(base.model, kv_heads=base.model.heads)
    runs = []
    for arm in arms:
        for k in kv_heads:
            if arm == "matched" and k == mha.heads and "fixed" in arms:
                continue
            model = replace(mha, kv_heads=k)
            model = shapes.matched(model, mha) if arm == "matched" else model
            runs += [replace(base, name=f"{base.name}-{arm}-kv{k}-seed{s}", model=model, seed=s) for s in seeds]
    return sweep.checked(runs)


def _cpu(arms: tuple[str, ...]) -> list[Run]:
    base = cpu_base("gqa")
    model = replace(llama(3, 64, 8, 8, 176, vocab_size=512, context_tokens=128), compute_dtype="float32")
    base = replace(
        base,
        model=model,
        lr=replace(base.lr, warmup_tokens=CPU_TOKENS // 20),
        evaluation=replace(base.evaluation, decode=("1x128", "8x512")),
        curriculum=(replace(base.curriculum[0], tokens=CPU_TOKENS),),
    )
    return _arms(base, (8, 2, 1), SEEDS, arms)


def gqa_cpu() -> list[Run]:
    """8, 2 and 1 key and value heads beside 8 query heads, three seeds: 9 runs of 0.2M parameters on 0.7M tokens,
    7e12 FLOPs, seven minutes on two cores."""
    return _cpu(("fixed",))


def gqa_cpu_matched() -> list[Run]:
    """The same with the saved weights in d_ff: 2 and 1 heads, and the MHA models again to compare with; 9 runs."""
    return _cpu(("matched",))


def _size(name: str, model: Model, kv_heads: tuple[int, ...], seeds: tuple[int, ...]) -> list[Run]:
    """One size at 20 tokens for each parameter of its MHA model, by the rule for that."""
    mha = replace(model, kv_heads=model.heads)
    base = pod_base("gqa")
    base = replace(
        base,
        evaluation=replace(base.evaluation, decode=("1x2048", "16x2048")),
        execution=Execution(micro_batch_sequences=64, remat="save_dots_and_attention"),
    )
    [derived] = sweep.ladder(base, {name: mha}, (20,), batch_multiple=64)
    return _arms(replace(derived, name=f"gqa-{name}"), kv_heads, seeds, ("fixed", "matched"))


def _at_rate(run: Run, times: float) -> Run:
    lr = replace(run.lr, peak=times * run.lr.peak, end=times * run.lr.end)
    return replace(run, name=f"{run.name}-lr{times:g}", lr=lr)


def gqa_pod() -> list[Run]:
    """Three TinyLlama-shaped sizes of 55M, 243M and 1.1B parameters with 8, 16 and 32 query heads; three seeds of the
    smaller two; the rate halved and doubled for two models of the smallest."""
    smallest = _size("t55", preset("t55"), (8, 4, 2, 1), SEEDS)
    rates = [
        _at_rate(run, times)
        for run in smallest
        if run.name in ("gqa-t55-fixed-kv8-seed0", "gqa-t55-fixed-kv1-seed0")
        for times in (0.5, 2.0)
    ]
    return sweep.checked(
        sweep.chain(
            smallest,
            rates,
            _size("t243", preset("t243"), (16, 8, 4, 2, 1), SEEDS),
            _size("t1100", preset("t1100"), (32, 16, 8, 4, 2, 1), SEEDS[:1]),
        )
    )
