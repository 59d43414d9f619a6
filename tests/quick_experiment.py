"""A run of 24 steps that takes seconds, for tests; also a user's own module outside `experiments`."""

from pathlib import Path

from tinyllama_jax.config import (
    Checkpoint,
    Data,
    Evaluation,
    LearningRate,
    Model,
    Run,
    Stage,
)

BATCH = 4 * 32


def quick_command(store, workdir, *settings) -> list[str]:
    """`train` with this experiment, in batches of eight rows: tests have eight devices."""
    settings = (
        f"data.store={store}",
        "curriculum.basic.batch_tokens=256",
        "curriculum.continual.batch_tokens=256",
        *settings,
    )
    argv = ["train", "quick_experiment:quick", "--experiment-path", str(Path(__file__).parent)]
    return [*argv, "--workdir", str(workdir), *(word for s in settings for word in ("--set", s))]


def quick() -> Run:
    """Three stages, a ramp and a batch change.  `data.store` must be set; there is no recipe."""
    return Run(
        name="quick",
        model=Model(
            vocab_size=512,
            d_model=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            d_ff=64,
            context_tokens=64,
            compute_dtype="float32",
        ),
        data=Data(store="set data.store", sequence_tokens=32),
        curriculum=(
            Stage(name="basic", tokens=8 * BATCH, batch_tokens=BATCH, mixture={"prose": 1.0}),
            Stage(
                name="continual",
                tokens=8 * BATCH,
                batch_tokens=BATCH,
                mixture={"prose": 0.5, "code": 0.5},
                ramp_tokens=4 * BATCH,
            ),
            Stage(name="cooldown", tokens=16 * BATCH, batch_tokens=2 * BATCH, mixture={"prose": 0.5, "code": 0.5}),
        ),
        lr=LearningRate(peak=1e-2, end=1e-3, warmup_tokens=4 * BATCH),
        checkpoint=Checkpoint(temporary_seconds=0, temporary_steps=5),
        evaluation=Evaluation(sequences=4, batch_sequences=4, prompts=("The",), sample_tokens=8),
    )
