"""Long contexts with TinyLlama-1.1B: what does a longer window cost, and what does it buy?

    tinyllama preflight experiments.context:long_32k --target a100-40g:2x8

Each differs from v1_0 in the length of a window, in RoPE's theta, in hiding packed documents from each other, and in
its length in tokens.  The batch stays at 2,097,152 tokens, so that the curves are over the same optimizer steps.
mesh.context gives each device 4096 tokens of a row.  The kernel is named, because `auto` takes the reference wherever
none is proven, which does not fit; on H100 and H200 `--set execution.attention=hopper` is the other, on TPUs `tpu`.

Theta follows the least base for a length, 0.0424 L^1.628 (Men et al., arXiv 2405.14591): 99 thousand at 8192 tokens,
308 thousand at 16,384, 951 thousand at 32,768; here the next of the round values that others trained with.  Training
at a length from the start needs no interpolation; to lengthen a trained model choose
model.rope=linear, as the `tinyllama-1.1b-code-8k` preset, and fork.
"""

from experiments.tinyllama import v1_0
from tinyllama_jax.config import Execution, LearningRate, Mesh, Run, replace

TOKENS_ON_A_DEVICE = 4096  # of each row
TOKENS_AT_A_TIME = 16 * 16_384  # over 16 devices, as many on each as in v1_0
LENGTH = 20_000_000_000  # tokens of the run: enough to rank lengths, not to match the published model


def _long(tokens: int, theta: float) -> Run:
    run = v1_0()
    batch = run.curriculum[0].batch_tokens
    store = f"data/slimpajama-starcoder-{tokens // 1024}k"
    return replace(
        run,
        name=f"tinyllama-long-{tokens // 1024}k",
        model=replace(run.model, context_tokens=tokens, rope=replace(run.model.rope, theta=theta)),
        data=replace(run.data, store=store, sequence_tokens=tokens, document_masking=True),
        curriculum=(replace(run.curriculum[0], tokens=LENGTH),),
        lr=LearningRate(kind="cosine", peak=4e-4, end=4e-5, warmup_tokens=200 * batch),
        execution=Execution(
            attention="triton", micro_batch_sequences=TOKENS_AT_A_TIME // tokens, remat="save_dots_and_attention"
        ),
        mesh=Mesh(context=tokens // TOKENS_ON_A_DEVICE),
        evaluation=replace(run.evaluation, every_tokens=500 * batch, sequences=128, batch_sequences=16),
        checkpoint=replace(run.checkpoint, permanent_tokens=0),
    )


def long_8k() -> Run:
    """8192 tokens, theta 100,000.  Needs data/slimpajama-starcoder-8k, prepared with windows of 8193 tokens, and 16
    devices: context 2, data 8."""
    return _long(8192, 100_000.0)


def long_16k() -> Run:
    """16,384 tokens, theta 500,000 (Llama 3's, arXiv 2407.21783).  Needs data/slimpajama-starcoder-16k, prepared with
    windows of 16,385 tokens, and 16 devices: context 4, data 4."""
    return _long(16_384, 500_000.0)


def long_32k() -> Run:
    """32,768 tokens, theta 1,000,000 (Code Llama's, arXiv 2308.12950).  Needs data/slimpajama-starcoder-32k, prepared
    with windows of 32,769 tokens, and 16 devices: context 8, data 2."""
    return _long(32_768, 1_000_000.0)
