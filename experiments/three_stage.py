"""TinyLlama v1.1's three stages: do they beat one mixed stage, and does a larger batch cool down like a smaller rate?

    tinyllama sweep experiments.three_stage:three_stage_cpu --workdir runs/three-stage

v1.1 trained 75 % of its tokens on SlimPajama alone, 17.5 % on a mix into which the other sources ramp, and 7.5 % on
that mix with four times the batch under the same cosine, in place of a decay of the rate (model card; arXiv
2401.02385).  Raising the batch and lowering the rate are said to do the same to the noise of the gradient (arXiv
1711.00489).  Four runs for each seed, all on the same tokens in all:

    staged       as v1.1: the cooldown by the batch
    staged-lr    from `staged` where its cooldown begins: the batch stays, the rate goes linearly to zero instead (what
                 a branch of TinyLlama's code offers)
    staged-none  from there too: the batch stays and the cosine goes on
    mixed        one stage, the same cosine and batch, each source with the very share that the stages give it in all

`mixed` sees of each source as many windows as `staged`, and for one seed the same ones: compare it with staged-none,
which differs from it in the order alone; compare the other two with staged-none for the cooldown.  Look at the loss of
each source, not at their mean: the last stages are there for the sources that come late.

On the CPU prose stands for SlimPajama and code for the rest, and the ramp is longer than the card's 1.7 % of its stage,
which would be two steps.  Three seeds say whether an order of data matters at all at 0.2M parameters; how much it
matters at 1.1B, where the sources are far richer, they cannot say.
"""

from experiments.scaling import cpu_base
from experiments.tinyllama import tinyllama_120m
from tinyllama_jax.config import Evaluation, Fork, LearningRate, Run, Stage, replace
from tinyllama_jax.lab import sweep
from tinyllama_jax.presets import llama
from tinyllama_jax.schedules import Plan, learning_rate, mixture_at

SEEDS = (0, 1, 2)
COOLDOWN_BATCHES = 4  # batches of the other stages in one of the cooldown


def _study(base: Run, mixture: dict[str, float], steps: tuple[int, int, int], ramp_steps: int) -> list[Run]:
    """The four runs for each seed.

    base: its one stage gives the batch.  mixture: of the last two stages; the first source is alone in the first, and
    its weight stays while the others ramp in.  steps: of the three stages at the base's batch.
    """
    batch, first = base.curriculum[0].batch_tokens, next(iter(mixture))
    basic = Stage(name="basic", tokens=steps[0] * batch, batch_tokens=batch, mixture={first: 1.0})
    continual = Stage(
        name="continual",
        tokens=steps[1] * batch,
        batch_tokens=batch,
        mixture=mixture,
        ramp_tokens=ramp_steps * batch,
        ramp_from={source: weight if source == first else 0.0 for source, weight in mixture.items()},
    )
    cooldown = Stage(name="cooldown", tokens=steps[2] * batch, batch_tokens=batch, mixture=mixture)
    by_batch = replace(cooldown, batch_tokens=COOLDOWN_BATCHES * batch)
    staged = replace(base, name=f"{base.name}-staged", curriculum=(basic, continual, by_batch))
    plan = Plan(staged.curriculum, staged.data.sequence_tokens)
    begin, end = plan.stages[2].start_tokens, plan.total_tokens
    none = replace(
        staged,
        name=f"{base.name}-staged-none",
        curriculum=(basic, continual, cooldown),
        fork=Fork(run=f"@{staged.name}", tokens=begin),
    )
    to_zero = LearningRate(
        kind="piecewise",
        peak=base.lr.peak,
        end=0.0,
        points=((begin, learning_rate(base.lr, plan)(begin)), (end, 0.0)),
    )
    by_rate = replace(none, name=f"{base.name}-staged-lr", lr=to_zero)
    shares = _windows(plan)
    mixed = replace(
        base,
        name=f"{base.name}-mixed",
        curriculum=(replace(base.curriculum[0], name="mixed", tokens=end, mixture=shares),),
    )
    return sweep.checked(_seeded(run, seed) for seed in SEEDS for run in (staged, by_rate, none, mixed))


def _seeded(run: Run, seed: int) -> Run:
    fork = replace(run.fork, run=f"{run.fork.run}-seed{seed}") if run.fork else None
    return replace(run, name=f"{run.name}-seed{seed}", seed=seed, fork=fork)


def _windows(plan: Plan) -> dict[str, float]:
    """Windows of each source in the whole plan, whole numbers: as weights of one stage they give the same counts."""
    due: dict[str, float] = {}
    for stage in plan.stages:
        for step in range(stage.start_step, stage.end_step):
            middle = stage.start_tokens + (step - stage.start_step + 0.5) * stage.batch_tokens
            for source, share in mixture_at(plan, middle).items():
                due[source] = due.get(source, 0.0) + share * stage.batch_sequences
    whole = {source: float(round(windows)) for source, windows in due.items()}
    first = next(iter(whole))
    whole[first] += plan.total_windows - sum(whole.values())
    return whole


def three_stage_cpu() -> list[Run]:
    """Prose, then code beside it, 0.2M parameters on 0.8M tokens: 6 whole runs and 6 of the last 7.5 %, 7e12 FLOPs, a
    quarter of an hour on two cores."""
    base = cpu_base("three-stage")
    batch = base.curriculum[0].batch_tokens
    base = replace(
        base,
        model=replace(llama(3, 64, 4, 2, 176, vocab_size=512, context_tokens=128), compute_dtype="float32"),
        lr=replace(base.lr, warmup_tokens=40 * batch),
    )
    return _study(base, {"prose": 75.0, "code": 25.0}, (600, 140, 60), 12)


def three_stage_pod() -> list[Run]:
    """TinyLlama-120M through v1.1 Math&Code's stages on 2.5B tokens.  Needs data/v1_1-math-code: slimpajama,
    starcoder, proofpile."""
    base = tinyllama_120m()
    base = replace(
        base,
        name="three-stage-120m",
        data=replace(base.data, store="data/v1_1-math-code", document_marks="any"),
        evaluation=Evaluation(every_tokens=400 * base.curriculum[0].batch_tokens, sequences=1024, batch_sequences=64),
    )
    return _study(base, {"slimpajama": 75.0, "starcoder": 15.0, "proofpile": 10.0}, (3600, 840, 360), 14)
