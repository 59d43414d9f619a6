"""The configurations among which the fastest training step is looked for, and what the peer's is measured against.

    python benchmarks/train_step.py experiments.speed:cpu

All of a list take the same optimizer step on the same batch.  They are measured, not trained: no token store is read.
"""

from tinyllama_jax.config import (
    Checkpoint,
    Data,
    Evaluation,
    Execution,
    LearningRate,
    Mesh,
    Model,
    Recipe,
    Run,
    Stage,
    replace,
)
from tinyllama_jax.presets import preset

CPU_MODEL = Model(  # small enough for two cores, wide enough that products of matrices decide
    vocab_size=8192,
    d_model=512,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=64,
    d_ff=1408,
    context_tokens=256,
    compute_dtype="float32",
)


def step(name: str, model: Model, sequences: int, execution: Execution) -> Run:
    """A Run of steps of `sequences` rows on one device."""
    tokens = sequences * model.context_tokens
    return Run(
        name=name,
        model=model,
        data=Data(store="none: random tokens", sequence_tokens=model.context_tokens),
        curriculum=(Stage(name="main", tokens=tokens, batch_tokens=tokens, mixture={"random": 1.0}),),
        lr=LearningRate(kind="constant"),
        execution=execution,
        mesh=Mesh(replica=1, data=1),
    )


def cpu() -> list[Run]:
    """8 rows of 256 tokens of a model of 20M parameters in float32."""
    base = Execution(attention="blocks", scan_layers=False)
    changes = {
        "blocks": {},
        "blocks-in-a-loop": {"scan_layers": True},
        "reference": {"attention": "reference"},
        "xla": {"attention": "xla"},
    }
    return [step(name, CPU_MODEL, 8, replace(base, **change)) for name, change in changes.items()]


def cpu_best() -> list[Run]:
    """The first of them, to be measured against the peer by turns."""
    return cpu()[:1]


def host() -> Run:
    """400 steps with next to nothing to compute: what is left is what the loop itself costs."""
    tokens = 4 * 64
    tiny = replace(CPU_MODEL, d_model=16, layers=1, heads=1, kv_heads=1, head_dim=16, d_ff=16)
    return replace(
        step("host", tiny, 4, Execution()),
        data=Data(store="runs/speed-store", sequence_tokens=64, recipe=Recipe(sources=("python",), vocab_size=4096)),
        curriculum=(Stage(name="main", tokens=400 * tokens, batch_tokens=tokens, mixture={"prose": 0.3, "code": 0.7}),),
        lr=LearningRate(peak=1e-3, end=1e-4, warmup_tokens=8 * tokens),
        checkpoint=Checkpoint(temporary_seconds=0, temporary_steps=100),
        evaluation=Evaluation(sequences=4, batch_sequences=4),
    )


def _gpu(name: str, micro: int, *, accumulate: int = 1, **execution) -> Run:
    """TinyLlama-1.1B on one GPU: `accumulate` micro-batches of `micro` rows of 2048 tokens to a step."""
    how = {"remat": "save_dots_and_attention", "scan_layers": False} | execution
    return step(name, preset("tinyllama-1.1b"), micro * accumulate, Execution(micro_batch_sequences=micro, **how))


def gpu() -> list[Run]:
    """The search on one GPU of 80 GB or more, the most promising first; what does not fit is a line that says so.

    Unrolled, nothing need be computed again: 16 rows take 59 GiB, where a loop over the layers takes 117
    (benchmarks/results/compiled.jsonl).

    Between a loop over the layers and none, what is kept for the backward pass, how many tokens a matrix product gets,
    the attention, how often the optimizer runs, and the size of the loss's chunks.
    """
    return [
        _gpu("16-keep-all", 16, remat="none"),
        _gpu("16", 16),
        _gpu("8-keep-all", 8, remat="none"),
        _gpu("32-keep-all", 32, remat="none"),
        _gpu("16-loop", 16, scan_layers=True),
        _gpu("8", 8),
        _gpu("32", 32),
        _gpu("16-hopper", 16, attention="hopper"),
        _gpu("16-triton", 16, attention="triton"),
        _gpu("16-x4", 16, accumulate=4),
        _gpu("16-chunk-8192", 16, loss_chunk_tokens=8192),
        _gpu("16-save-dots", 16, remat="save_dots"),
        _gpu("16-full", 16, remat="full"),
        _gpu("16-deterministic", 16, deterministic=True),
    ]


def gpu_best() -> list[Run]:
    """Two of them, to be measured against the peer by turns."""
    return [run for run in gpu() if run.name in ("16-keep-all", "16")]


def gpu_flags() -> Run:
    """One of them, for the flags of the compiler."""
    return gpu()[0]


def gpu_train() -> Run:
    """64 real steps of 131,072 tokens on one GPU: the text of this Python, records, checkpoints.

    A model of 32,000 words on a vocabulary of 4096 costs what it costs on its own.
    """
    run = _gpu("gpu-train", 16, accumulate=4)
    tokens = run.curriculum[0].batch_tokens
    return replace(
        run,
        data=Data(store="runs/speed-store", recipe=Recipe(sources=("python",), vocab_size=4096)),
        curriculum=(Stage(name="main", tokens=64 * tokens, batch_tokens=tokens, mixture={"prose": 0.3, "code": 0.7}),),
        lr=LearningRate(peak=4e-4, end=4e-5, warmup_tokens=8 * tokens),
        checkpoint=Checkpoint(temporary_seconds=0, temporary_steps=24),
        evaluation=Evaluation(sequences=16, batch_sequences=8),
    )


def exact() -> Run:
    """80 steps of the 120M model in bfloat16, to be killed and continued with the same bits."""
    tokens = 16 * 2048
    return replace(
        gpu_train(),
        name="exact",
        model=preset("tinyllama-120m"),
        curriculum=(Stage(name="main", tokens=80 * tokens, batch_tokens=tokens, mixture={"prose": 0.3, "code": 0.7}),),
        lr=LearningRate(peak=1e-3, end=1e-4, warmup_tokens=8 * tokens),
        execution=Execution(deterministic=True, remat="save_dots_and_attention", micro_batch_sequences=8),
        checkpoint=Checkpoint(temporary_seconds=0, temporary_steps=20),
    )
