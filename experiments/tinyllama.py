"""TinyLlama's published runs (arXiv 2401.02385 and github.com/jzhang38/TinyLlama).

    tinyllama train experiments.tinyllama:v1_1 --workdir runs/v1_1

They need token stores made by `tinyllama prepare` from the corpora named in each docstring.  Values marked
UNVERIFIED are stated in no primary source that we could read; everything else is from the repository's code, its
README and issue threads, or the v1.1 model card.
"""

from tinyllama_jax.config import (
    Checkpoint,
    Data,
    Evaluation,
    Execution,
    Fork,
    LearningRate,
    Mesh,
    Optimizer,
    Run,
    Stage,
    replace,
)
from tinyllama_jax.presets import preset

CONTEXT = 2048
V1_0_BATCH = 1024 * CONTEXT  # 2,097,152 tokens: the code's "512" is per node, and there were two nodes
V1_0_STEPS = 715_256 * 2  # 1,430,512
V1_0_TOKENS = V1_0_STEPS * V1_0_BATCH  # 3,000,001,101,824: about 3.16 passes over 950B tokens
SLIM, STAR = 0.693584, 0.306416  # weights in the code, "7:3" in the README

# AdamW with decay on every parameter, norms and embeddings too: one parameter group in the original.
ADAMW = Optimizer(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decay="all", clip_norm=1.0)

# 16 A100-40G: 8 sequences per device and micro-step, 8 micro-steps.  Weights sharded within a node of 8.  As in the
# original no matrix product and no attention is computed twice; only what lies between them, elementwise, is.
POD = dict(
    execution=Execution(micro_batch_sequences=128, remat="save_dots_and_attention"),
    mesh=Mesh(replica=-1, data=8),
    evaluation=Evaluation(every_tokens=5000 * V1_0_BATCH, sequences=800, batch_sequences=16),
    checkpoint=Checkpoint(temporary_seconds=900, permanent_tokens=5000 * V1_0_BATCH),  # one per ~10B tokens
)


def v1_0() -> Run:
    """TinyLlama-1.1B v1.0 as documented: 3T tokens of SlimPajama without GitHub, and StarCoder, in one stage.

    Needs data/slimpajama-starcoder with domains `slimpajama` and `starcoder`, documents marked by EOS (the code
    since 2023-10-18).  The cosine reaches its end at the last step.
    """
    return Run(
        name="tinyllama-v1.0",
        model=preset("tinyllama-1.1b"),
        data=Data(store="data/slimpajama-starcoder", sequence_tokens=CONTEXT, document_marks="eos"),
        curriculum=(
            Stage(
                name="pretrain",
                tokens=V1_0_TOKENS,
                batch_tokens=V1_0_BATCH,
                mixture={"slimpajama": SLIM, "starcoder": STAR},
            ),
        ),
        lr=LearningRate(kind="cosine", peak=4e-4, end=4e-5, warmup_tokens=2000 * V1_0_BATCH),
        optimizer=ADAMW,
        seed=3407,
        **POD,
    )


def v1_0_as_run() -> Run:
    """What the published v1.0 checkpoints really saw.

    Minimum and maximum learning rate were equal at first, so that the rate stayed at 4e-4 until about 503B tokens
    and then joined the cosine (repaired 2023-09-16).  Documents began with BOS and had no EOS (said by the author):
    prepare the store data/slimpajama-starcoder-bos with `--document-marks bos`.  The weights most likely started
    from PyTorch's default initialisation, because the code's own was a no-op on meta tensors (INFERRED from the
    code and a maintainer's remark, not confirmed).  Not reproduced: the loader's overlap between ranks and the BOS
    filler chunks, both repaired during the run.
    """
    run = v1_0()
    return replace(
        run,
        name="tinyllama-v1.0-as-run",
        model=replace(run.model, init="torch_default"),
        data=replace(run.data, store="data/slimpajama-starcoder-bos", document_marks="bos"),
        lr=replace(run.lr, flat_until_tokens=240_000 * V1_0_BATCH),  # step 240k = 503B tokens
    )


V1_1_BATCH = 1_835_008  # UNVERIFIED: "about 1.8M"; 64 devices x 14 sequences x 2048 fits
V1_1_COOLDOWN_BATCH = 7_340_032  # UNVERIFIED: "7.2M", four times as much
TRILLION = 1_000_000_000_000
BILLION = 1_000_000_000


def _v1_1(name: str, mixture: dict[str, float], store: str) -> Run:
    return Run(
        name=name,
        model=preset("tinyllama-1.1b"),
        # UNVERIFIED: whether GitHub was still dropped from SlimPajama, and how documents were marked.
        data=Data(store=store, sequence_tokens=CONTEXT),
        curriculum=(
            Stage(name="basic", tokens=1_500 * BILLION, batch_tokens=V1_1_BATCH, mixture={"slimpajama": 1.0}),
            Stage(
                name="continual",
                tokens=350 * BILLION,
                batch_tokens=V1_1_BATCH,
                mixture=mixture,
                # The card: over the first ~6B tokens the domain corpora's share rises linearly while SlimPajama is
                # left alone, so its weight stays and the others grow from zero.
                ramp_tokens=6 * BILLION if len(mixture) > 1 else 0,
                ramp_from={source: weight if source == "slimpajama" else 0.0 for source, weight in mixture.items()}
                if len(mixture) > 1
                else {},
            ),
            # The cooldown keeps the cosine and raises the batch instead.
            Stage(name="cooldown", tokens=150 * BILLION, batch_tokens=V1_1_COOLDOWN_BATCH, mixture=mixture),
        ),
        # UNVERIFIED: no v1.1 learning rate is published; v1.0's values with the cosine over all 2T tokens.
        lr=LearningRate(kind="cosine", peak=4e-4, end=4e-5, warmup_tokens=2000 * V1_1_BATCH),
        optimizer=ADAMW,
        seed=3407,
        # 7 sequences per device and micro-step on 64 devices.
        execution=Execution(micro_batch_sequences=448, remat="save_dots_and_attention"),
        mesh=Mesh(replica=-1, data=4),  # weights sharded within a node of four A100-40G, replicated across nodes
        evaluation=Evaluation(every_tokens=5000 * V1_1_BATCH, sequences=896, batch_sequences=64),
        checkpoint=Checkpoint(temporary_seconds=900, permanent_tokens=10 * BILLION),
    )


def v1_1() -> Run:
    """TinyLlama-1.1B v1.1: 2T tokens of SlimPajama in three stages.  Needs data/slimpajama."""
    return _v1_1("tinyllama-v1.1", {"slimpajama": 100.0}, "data/slimpajama")


def _forked(run: Run) -> Run:
    """From v1.1's checkpoint at the end of its first stage, which all variants share."""
    first = run.curriculum[0]
    shared = -(-first.tokens // first.batch_tokens) * first.batch_tokens
    return replace(run, fork=Fork(run="runs/v1_1", tokens=shared))


def v1_1_math_code() -> Run:
    """v1.1 Math&Code: forks from v1.1 at 1.5T.  Needs data/v1_1-math-code: slimpajama, starcoder, proofpile."""
    mixture = {"slimpajama": 75.0, "starcoder": 15.0, "proofpile": 10.0}  # UNVERIFIED: which Proof-Pile
    return _forked(_v1_1("tinyllama-v1.1-math-code", mixture, "data/v1_1-math-code"))


def v1_1_chinese() -> Run:
    """v1.1 Chinese: forks from v1.1 at 1.5T.  Needs data/v1_1-chinese: slimpajama, skypile."""
    return _forked(_v1_1("tinyllama-v1.1-chinese", {"slimpajama": 50.0, "skypile": 50.0}, "data/v1_1-chinese"))


def tinyllama_120m() -> Run:
    """The 120M model (multi-query attention) on v1.0's data for about 20 tokens per parameter.

    The architecture is the repository's.  The repository has no recipe for it: batch, learning rate and length are
    ours (its debug recipe for an 85M model uses 6e-4 -> 6e-5 with 200 warm-up steps).
    """
    run = v1_0()
    batch = 256 * CONTEXT
    return replace(
        run,
        name="tinyllama-120m",
        model=preset("tinyllama-120m"),
        curriculum=(replace(run.curriculum[0], tokens=2_400_000_000, batch_tokens=batch),),
        lr=LearningRate(kind="cosine", peak=6e-4, end=6e-5, warmup_tokens=200 * batch),
        # For one A100-40G, or up to 32 devices.
        execution=Execution(micro_batch_sequences=32, remat="save_dots_and_attention"),
        mesh=Mesh(),
        evaluation=Evaluation(every_tokens=200 * batch, sequences=256, batch_sequences=64),
        checkpoint=Checkpoint(temporary_seconds=300),
    )
