"""Small runs for one ordinary machine; they make their own data from the Python standard library."""

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
)

PROMPTS = (
    "Return a new",
    "If the argument",
    "def __init__(self",
    "class Error(Exception):",
)


def demo() -> Run:
    """A TinyLlama through the three stages of v1.1 in miniature, in about four minutes on two CPU cores.

    Like v1.1 Math&Code: a basic stage that is mostly prose, a stage in which code ramps up, and a cooldown with
    four times the batch under the same cosine.
    """
    batch = 8 * 256
    return Run(
        name="demo",
        model=Model(
            vocab_size=2048,
            d_model=128,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=32,
            d_ff=352,
            context_tokens=256,
            compute_dtype="float32",  # a CPU gains little from bfloat16, and exact resumption is easier to see
        ),
        data=Data(
            store="data/python-2048",
            sequence_tokens=256,
            recipe=Recipe(vocab_size=2048, validation_share=0.1, window_tokens=257),
        ),
        curriculum=(
            Stage(name="basic", tokens=750 * batch, batch_tokens=batch, mixture={"prose": 0.6, "code": 0.4}),
            Stage(
                name="continual",
                tokens=300 * batch,
                batch_tokens=batch,
                mixture={"prose": 0.4, "code": 0.6},
                ramp_tokens=100 * batch,
            ),
            Stage(name="cooldown", tokens=160 * batch, batch_tokens=4 * batch, mixture={"prose": 0.4, "code": 0.6}),
        ),
        lr=LearningRate(kind="cosine", peak=5e-3, end=2e-4, warmup_tokens=60 * batch),
        optimizer=Optimizer(beta2=0.98),
        checkpoint=Checkpoint(temporary_seconds=30),
        evaluation=Evaluation(every_tokens=100 * batch, sequences=48, prompts=PROMPTS),
    )


def tiny() -> Run:
    """270 steps in about half a minute, across two stage borders and a batch change, saving often.

    For tests of the machinery; it learns little.
    """
    batch = 8 * 128
    return Run(
        name="tiny",
        model=Model(
            vocab_size=1024,
            d_model=64,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            d_ff=176,
            context_tokens=128,
            compute_dtype="float32",
        ),
        data=Data(store="data/python-1024", sequence_tokens=128, recipe=Recipe(vocab_size=1024, window_tokens=129)),
        curriculum=(
            Stage(name="basic", tokens=120 * batch, batch_tokens=batch, mixture={"prose": 1.0}),
            Stage(
                name="continual",
                tokens=90 * batch,
                batch_tokens=batch,
                mixture={"prose": 0.5, "code": 0.5},
                ramp_tokens=40 * batch,
            ),
            Stage(name="cooldown", tokens=120 * batch, batch_tokens=2 * batch, mixture={"prose": 0.5, "code": 0.5}),
        ),
        lr=LearningRate(kind="cosine", peak=3e-3, end=3e-4, warmup_tokens=20 * batch),
        checkpoint=Checkpoint(temporary_seconds=0, temporary_steps=10),
        evaluation=Evaluation(every_tokens=90 * batch, sequences=8, prompts=PROMPTS[:1], sample_tokens=16),
    )
