"""What each optimisation is worth: one setting at a time is changed from a base, everything else stays.

    python benchmarks/train_step.py experiments.effectiveness:gpu --out effectiveness.jsonl

The first Run of a list is the base; the others are named after what they change.  All take the same step on the same
batch: the settings decide how the numbers are computed, not which.  They are measured, not trained: no token store is
read.
"""

from experiments.speed import step
from tinyllama_jax.config import Execution, Model, Run, replace
from tinyllama_jax.presets import preset

ALL_TOKENS = 2**30  # more than a device's tokens: their logits all exist at the same time


def _one_at_a_time(base: Run, attentions: tuple[str, ...], remats: tuple[str, ...]) -> list[Run]:
    """The base, and a Run for each other value of attention, remat, the chunk of the loss, and the loop over layers."""
    execution = base.execution
    changes = {f"attention-{name}": {"attention": name} for name in attentions if name != execution.attention}
    changes |= {f"remat-{policy}": {"remat": policy} for policy in remats if policy != execution.remat}
    changes["loss-of-all-tokens"] = {"loss_chunk_tokens": ALL_TOKENS}
    changes["layers-unrolled" if execution.scan_layers else "layers-in-a-loop"] = {
        "scan_layers": not execution.scan_layers
    }
    return [base] + [
        replace(base, name=name, execution=replace(execution, **change)) for name, change in changes.items()
    ]


REMATS = ("none", "full", "save_dots", "save_dots_and_attention")


def gpu() -> list[Run]:
    """TinyLlama-1.1B on one GPU, 8 sequences of 2048 tokens a step, as on each of TinyLlama's A100s.

    The base takes what `auto` chooses.  What the GPU's memory or kind refuses is a line that says so.
    """
    execution = Execution(attention="auto", remat="save_dots_and_attention")
    base = step("base", preset("tinyllama-1.1b"), 8, execution)
    return _one_at_a_time(base, ("reference", "xla", "cudnn", "triton", "hopper"), REMATS)


def tpu() -> list[Run]:
    """TinyLlama-1.1B on one TPU chip with at least 32 GB (v4, v5p, v6e), 4 sequences of 2048 tokens a step.

    State and gradients alone are 17.6 GB, more than a v5e chip has.
    """
    execution = Execution(attention="auto", remat="full")
    base = step("base", preset("tinyllama-1.1b"), 4, execution)
    return _one_at_a_time(base, ("reference", "xla", "splash", "tpu"), REMATS)


def cpu() -> list[Run]:
    """A model of 5M parameters on two CPU cores, with what runs there; 4 sequences of 256 tokens a step."""
    model = Model(
        vocab_size=8192,
        d_model=192,
        layers=4,
        heads=6,
        kv_heads=2,
        head_dim=32,
        d_ff=512,
        context_tokens=256,
        compute_dtype="float32",
    )
    base = step("base", model, 4, Execution(attention="reference", loss_chunk_tokens=128))
    return _one_at_a_time(base, ("blocks", "xla"), REMATS)
