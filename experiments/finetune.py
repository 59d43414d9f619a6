"""Fine-tuning TinyLlama-1.1B on instructions: all weights, LoRA, QLoRA, a prefix.

    tinyllama finetune experiments.finetune:lora --base CKPT --data alpaca.json --workdir runs/lora

`full`, `lora` and `qlora` have the numbers of litgpt's presets for tiny-llama (config_hub/finetune, with Alpaca-2k; it
reports validation losses of 1.088, 1.039 and 1.056), `prefix` those of the paper that it comes from, where it has any.
"""

from tinyllama_jax.config import Adapter, Evaluation, Examples, Execution, Optimizer, replace
from tinyllama_jax.finetune.recipe import FineTune

EVERYWHERE = ("attention.*", "mlp.*", "head")
QUESTIONS = ("Recommend a movie for me to watch during the weekend and explain the reason.",)  # litgpt's test prompt


def full() -> FineTune:
    """All weights: batch 32, one epoch, 2e-4 down to 6e-5."""
    return FineTune(
        name="tinyllama-full",
        examples=Examples(sources=("alpaca.json",), template="alpaca", loss_on="all", packing="single"),
        sequence_tokens=512,
        document_masking=False,  # one example to a window
        batch_sequences=32,
        epochs=1,
        lr_kind="cosine",
        lr_peak=2e-4,
        lr_end=6e-5,
        # litgpt says 1000 steps of warm-up, more than an epoch of Alpaca-2k has; a tenth of the run is UNVERIFIED.
        warmup_share=0.1,
        optimizer=Optimizer(beta1=0.9, beta2=0.95, weight_decay=0.0),
        evaluation=Evaluation(sequences=100, keep_best=True, sample_temperature=0.8, sample_tokens=100),
        questions=QUESTIONS,
        seed=1337,  # UNVERIFIED
        execution=Execution(micro_batch_sequences=4, remat="save_dots_and_attention"),
    )


def lora() -> FineTune:
    """LoRA of rank 32, alpha 16, dropout 0.05 on every matrix: batch 8, three epochs."""
    return replace(
        full(),
        name="tinyllama-lora",
        adapter=Adapter(rank=32, alpha=16.0, dropout=0.05, targets=EVERYWHERE, base_weights="bfloat16"),
        batch_sequences=8,
        epochs=3,
        lr_end=0.0,  # UNVERIFIED
        execution=Execution(micro_batch_sequences=4, remat="save_dots_and_attention"),
    )


def qlora() -> FineTune:
    """The same beside a base in 4 bits (nf4, arXiv 2305.14314): less than 4 GB on one GPU."""
    base = lora()
    return replace(
        base,
        name="tinyllama-qlora",
        adapter=replace(base.adapter, base_weights="nf4"),
        execution=Execution(micro_batch_sequences=1, remat="full"),
    )


def prefix() -> FineTune:
    """Prefix tuning (arXiv 2101.00190): 30 keys and values before every row, in every layer.

    Length, rate and epochs within the paper's ranges for its smaller tasks; for TinyLlama UNVERIFIED.
    """
    return replace(
        lora(),
        name="tinyllama-prefix",
        adapter=Adapter(method="prefix", prefix_tokens=30),
        epochs=5,
        lr_kind="linear",
        lr_peak=5e-4,
    )
