"""The curve of v1.0, as documented and as it was run, at a size that one machine trains.

    tinyllama sweep experiments.curves:v1_0_pod --workdir runs/curves

Two runs differ in what the published v1.0 checkpoints really saw (experiments/tinyllama.py, `v1_0_as_run`): the
learning rate was flat for the first 503B of 3T tokens and then joined the cosine; documents began with BOS instead of
ending with EOS; the weights most likely started from PyTorch's defaults.  Here these take the same share of a shorter
run, for three seeds.  On the pod each cause is there alone too (`-flat`, `-bos`, `-init`).  Not reproduced: the overlap
between the ranks' files, the chunks filled with BOS, and the 1.0T to 1.5T that were trained twice.

What to expect: while the rate is flat the as-run loss lies above, for a high rate costs loss until it falls; after that
both follow one curve, and the difference at the end is small beside what they differ in on the way.  BOS and EOS stores
count other marks among their tokens, so that their losses are not of the very same text: compare bits per byte.

No loss value of TinyLlama is published as text; its Weights & Biases project is.  Export the curve from there as CSV
and lay it beside a run of the real thing with `tinyllama report RUN --reference FILE.csv`.  Beside these small runs
it shows the shape only: where the rate begins to fall, where the batch of data changes, not the height.
"""

from experiments.scaling import cpu_base
from experiments.tinyllama import V1_0_TOKENS, tinyllama_120m, v1_0_as_run
from tinyllama_jax.config import Evaluation, Run, replace
from tinyllama_jax.lab import sweep
from tinyllama_jax.presets import llama

SEEDS = (0, 1, 2)
FLAT_SHARE = v1_0_as_run().lr.flat_until_tokens / V1_0_TOKENS  # 16.8 %: 503B of 3T


def _study(documented: Run, bos: Run, causes: tuple[str, ...]) -> list[Run]:
    """Both runs and those of single causes, for each seed.

    documented: v1.0 as documented, which reads a store with EOS; bos: a run with the data that has BOS.
    """
    [stage] = documented.curriculum
    flat = replace(documented.lr, flat_until_tokens=round(FLAT_SHARE * stage.tokens))
    changes = {
        "flat": {"lr": flat},
        "bos": {"data": bos.data},
        "init": {"model": replace(documented.model, init=v1_0_as_run().model.init)},
    }
    runs = {"v1.0": documented}
    runs |= {f"v1.0-{cause}": replace(documented, **changes[cause]) for cause in causes}
    runs["v1.0-as-run"] = replace(documented, **{field: value for c in changes.values() for field, value in c.items()})
    return sweep.checked(
        replace(run, name=f"{documented.name}-{name}-seed{seed}", seed=seed)
        for name, run in runs.items()
        for seed in SEEDS
    )


def v1_0_cpu() -> list[Run]:
    """Both, 0.2M parameters on 0.8M tokens: 6 runs, 6e12 FLOPs, ten minutes on two cores.  The BOS store is
    data/python-512-bos, made like the other."""
    base = cpu_base("curves")
    tokens = 768 * base.curriculum[0].batch_tokens
    base = replace(
        base,
        model=replace(llama(3, 64, 4, 2, 176, vocab_size=512, context_tokens=128), compute_dtype="float32"),
        curriculum=(replace(base.curriculum[0], tokens=tokens),),
        lr=replace(base.lr, warmup_tokens=tokens // 20),
        evaluation=replace(base.evaluation, every_tokens=tokens // 16, sequences=64),
    )
    data = replace(base.data, document_marks="eos")
    bos = replace(
        data,
        store=f"{data.store}-bos",
        document_marks="bos",
        recipe=replace(data.recipe, document_marks="bos"),
    )
    return _study(replace(base, data=data), replace(base, data=bos), ())


def v1_0_pod() -> list[Run]:
    """TinyLlama-120M on 2.4B tokens of v1.0's data, 15 runs.  Needs data/slimpajama-starcoder and, prepared with
    `--document-marks bos`, data/slimpajama-starcoder-bos."""
    base = tinyllama_120m()
    batch = base.curriculum[0].batch_tokens
    base = replace(
        base,
        name="curves-120m",
        evaluation=Evaluation(every_tokens=100 * batch, sequences=1024, batch_sequences=64),
    )
    bos = replace(base, data=v1_0_as_run().data)
    return _study(base, bos, ("flat", "bos", "init"))
