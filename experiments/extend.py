"""Lengthening TinyLlama-1.1B from 2048 tokens to 8192 and 16,384 by a short fine-tune, in three ways, and a small copy.

    tinyllama finetune experiments.extend:yarn_8k --base tinyllama-1.1b-3t --workdir runs/yarn-8k
    tinyllama eval runs/yarn-8k --positions 2048,4096,8192 --corpus books=~/books
    tinyllama eval runs/yarn-8k --passkey 2048,4096,8192

linear  position interpolation (arXiv 2306.15595), which is also how TinyLlama's own code-8k model reads 8192 tokens
ntk     theta raised once ("NTK-aware" scaling, compared in arXiv 2309.00071, section 3.1)
yarn    arXiv 2309.00071, sections 3.2 to 3.4

Compare each with the base under the same RoPE without a fine-tune, `eval --rope linear,ntk,yarn`, and look at the loss
by position and at retrieval: a low mean alone does not show that the far text is read.

Of the numbers below, steps, batch, rate, warmup, decay and AdamW's betas are the papers', who tuned them for 7B and
13B parameters: that they suit 1.1B is UNVERIFIED.  So is the schedule behind the warmup, which neither paper tells: it
is constant here.  Both warm up over 20 steps, the first paper from a tenth of the peak, and here from 0.
"""

from tinyllama_jax.config import Checkpoint, Evaluation, Execution, Optimizer, Rope
from tinyllama_jax.finetune.recipe import FineTune, Text

BASE_TOKENS = 2048
# Both papers: AdamW with betas 0.9 and 0.95 and no weight decay (2306.15595, section 3.1; 2309.00071, section 4.1).
OPTIMIZER = Optimizer(beta2=0.95, weight_decay=0.0)
TOKENS_AT_A_TIME = 16 * 8192  # over 8 devices, as many on each as in tinyllama:v1_0; UNVERIFIED on real devices


def _lengthened(kind: str, tokens: int, steps: int, sequences: int, factor: float) -> FineTune:
    return FineTune(
        name=f"tinyllama-{kind}-{tokens // 1024}k",
        # Another text than the papers' (the Pile; PG-19): what the base was trained on, so that only length is new.
        text=Text(store=f"data/slimpajama-starcoder-{tokens // 1024}k", tokens=steps * sequences * tokens),
        sequence_tokens=tokens,
        context_tokens=tokens,
        # Neighbouring documents are seen, as in v1_0; the papers' rows were whole books or cut at 64k, UNVERIFIED here.
        document_masking=False,
        batch_sequences=sequences,
        lr_kind="constant",
        lr_peak=2e-5,  # both papers, for 7B and 13B
        warmup_steps=20,  # both papers
        optimizer=OPTIMIZER,
        rope=Rope(kind=kind, factor=factor, original_context_tokens=BASE_TOKENS),
        evaluations=4,
        evaluation=Evaluation(sequences=64, batch_sequences=8),
        # The kernel is named, because `auto` takes one that does not fit where none is proven (experiments/context.py).
        execution=Execution(
            attention="triton", micro_batch_sequences=TOKENS_AT_A_TIME // tokens, remat="save_dots_and_attention"
        ),
    )


def _linear(tokens: int) -> FineTune:
    # 2306.15595, section 3.1: 1000 steps; batches of 64 to 8192 tokens, of 128 to longer ones.
    return _lengthened("linear", tokens, 1000, 64 if tokens <= 8192 else 128, tokens / BASE_TOKENS)


def _ntk(tokens: int) -> FineTune:
    # 2309.00071, section 3.1: some dimensions turn further than in training, so that the factor must be larger than
    # the stretch.  Twice as large is UNVERIFIED; at 8192 tokens theta becomes 85 thousand, close to the least base of
    # arXiv 2405.14591 for that length (experiments/context.py).  Steps and batch as for yarn: UNVERIFIED.
    return _lengthened("ntk", tokens, 400, 64, 2 * tokens / BASE_TOKENS)


def _yarn(tokens: int) -> FineTune:
    # 2309.00071, section 4.1: 400 steps of 64 sequences, for a stretch of 16 with windows of 64k tokens.
    return _lengthened("yarn", tokens, 400, 64, tokens / BASE_TOKENS)


def linear_8k() -> FineTune:
    """524M tokens in windows of 8192.  Needs data/slimpajama-starcoder-8k (windows of 8193 tokens, as for
    experiments.context:long_8k) or any store prepared without packing, and 8 devices."""
    return _linear(8192)


def linear_16k() -> FineTune:
    """2.1G tokens in windows of 16,384.  Needs data/slimpajama-starcoder-16k and 8 devices."""
    return _linear(16_384)


def ntk_8k() -> FineTune:
    """210M tokens in windows of 8192; data and devices as for linear_8k."""
    return _ntk(8192)


def ntk_16k() -> FineTune:
    """419M tokens in windows of 16,384; data and devices as for linear_16k."""
    return _ntk(16_384)


def yarn_8k() -> FineTune:
    """210M tokens in windows of 8192; data and devices as for linear_8k."""
    return _yarn(8192)


def yarn_16k() -> FineTune:
    """419M tokens in windows of 16,384; data and devices as for linear_16k."""
    return _yarn(16_384)


CPU_TOKENS, CPU_STEPS, CPU_SEQUENCES = 1024, 100, 8


def _cpu(kind: str) -> FineTune:
    """From the 256 tokens of experiments.smoke:demo to 1024, on its own store: documents stand there in a row."""
    factor = CPU_TOKENS / 256 * (2 if kind == "ntk" else 1)
    rope = None if kind == "as-trained" else Rope(kind=kind, factor=factor, original_context_tokens=256)
    return FineTune(
        name=f"extend-cpu-{kind}",
        text=Text(store="data/python-2048", tokens=CPU_STEPS * CPU_SEQUENCES * CPU_TOKENS),
        sequence_tokens=CPU_TOKENS,
        context_tokens=CPU_TOKENS,
        document_masking=False,
        batch_sequences=CPU_SEQUENCES,
        lr_kind="constant",
        lr_peak=5e-4,  # a tenth of the demo's peak; not tuned
        warmup_steps=10,
        optimizer=OPTIMIZER,
        rope=rope,
        compute_dtype="float32",
        evaluations=2,
        evaluation=Evaluation(sequences=12),
        checkpoint=Checkpoint(temporary_seconds=60),
    )


def cpu_as_trained() -> FineTune:
    """The demo's model trained on in windows of 1024 tokens, RoPE left alone: 0.8M tokens, two minutes on two cores."""
    return _cpu("as-trained")


def cpu_linear() -> FineTune:
    """The same, its positions interpolated."""
    return _cpu("linear")


def cpu_ntk() -> FineTune:
    """The same, its theta raised for twice the stretch, as in ntk_8k."""
    return _cpu("ntk")


def cpu_yarn() -> FineTune:
    """The same with YaRN."""
    return _cpu("yarn")
