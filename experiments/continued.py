"""Going on with pretraining: text of another domain or language, and the old text not forgotten.

    tinyllama finetune experiments.continued:domain --base CKPT --data data/law --workdir runs/law

After Ibrahim et al. (arXiv 2403.08763): the learning rate is warmed up again to the peak of the first run and decayed
again, and a small part of the tokens is old text, replayed: 5 % where the new text is of the same language, 25 % where
it is of another one.  How much is forgotten is seen in the run itself, as the loss on `replay/...`.

`domain_cpu` is the same in small, on Python's own text: first its prose, then its code.  How it went is in
experiments/results/continued.json:

    tinyllama train experiments.continued:base_cpu --workdir runs/prose
    tinyllama prepare python --filter keep:domain=code --tokenizer data/python-prose/tokenizer.model \
        --validation-share 0.1 --window-tokens 129 --out data/python-code
    tinyllama finetune experiments.continued:domain_cpu --base runs/prose --workdir runs/code
    tinyllama finetune experiments.continued:domain_cpu_alone --base runs/prose --workdir runs/code-alone
    tinyllama eval runs/code --corpus data/python-prose --corpus data/python-code
"""

from experiments.scaling import cpu_base
from experiments.tinyllama import ADAMW, CONTEXT
from tinyllama_jax.config import Evaluation, Execution, Optimizer, Recipe, Run, replace
from tinyllama_jax.finetune.recipe import FineTune, Text
from tinyllama_jax.lab.shapes import llama


def domain() -> FineTune:
    """TinyLlama-1.1B on one pass over new text of its language, 5 % of the tokens from what it was trained on.

    Needs a store with the base's tokenizer (--data), and data/slimpajama-starcoder to replay.
    """
    return FineTune(
        name="tinyllama-domain",
        text=Text(replay_store="data/slimpajama-starcoder", replay_share=0.05),
        sequence_tokens=CONTEXT,
        document_masking=False,  # as the base
        epochs=1,
        batch_sequences=256,  # ours: a quarter of v1.0's batch, for corpora of some billions of tokens
        lr_kind="cosine",
        lr_peak=4e-4,  # the peak and the end of v1.0's cosine, as the paper went back to those of its first run
        lr_end=4e-5,
        warmup_share=0.01,  # UNVERIFIED: of the paper we could read the abstract and summaries only
        optimizer=ADAMW,
        execution=Execution(micro_batch_sequences=32, remat="save_dots_and_attention"),
        evaluation=Evaluation(sequences=256, batch_sequences=32),
    )


def language() -> FineTune:
    """TinyLlama-1.1B on text of another language, in a vocabulary that has pieces for it; a quarter is old text.

    Needs a store prepared with a tokenizer that `tinyllama prepare tokenizer --base CKPT --train TEXT --pieces N` has
    made (--data).  The old text keeps its ids, and its store need not be made again, unless new pieces are parts of its
    words too (experiments/results).  TinyLlama v1.1 Chinese kept half of the old text and the old vocabulary.
    """
    base = domain()
    return replace(
        base,
        name="tinyllama-language",
        text=replace(base.text, replay_share=0.25),
        new_words="mean",  # UNVERIFIED for so many: TinyLlama's chat models had three new words
    )


PROSE, CODE = "data/python-prose", "data/python-code"


def base_cpu() -> Run:
    """0.2 M parameters on Python's docstrings and help, one and a half million tokens: two minutes on two cores."""
    base = cpu_base("prose")
    batch = base.curriculum[0].batch_tokens
    recipe = Recipe(vocab_size=512, validation_share=0.1, window_tokens=129, filters=("keep:domain=prose",))
    return replace(
        base,
        model=replace(llama(3, 64, 4, 2, 176, vocab_size=512, context_tokens=128), compute_dtype="float32"),
        data=replace(base.data, store=PROSE, recipe=recipe),
        curriculum=(replace(base.curriculum[0], tokens=1500 * batch, mixture={"prose": 1.0}),),
        lr=replace(base.lr, warmup_tokens=60 * batch),
    )


def domain_cpu() -> FineTune:
    """Half a million tokens of Python's code with 5 % prose, warmed up again to the peak of `base_cpu`."""
    base = base_cpu()
    return FineTune(
        name="code",
        text=Text(store=CODE, tokens=500 * base.curriculum[0].batch_tokens, replay_store=PROSE, replay_share=0.05),
        sequence_tokens=base.data.sequence_tokens,
        document_masking=False,
        batch_sequences=8,
        lr_peak=base.lr.peak,
        lr_end=base.lr.end,
        warmup_share=0.02,
        optimizer=Optimizer(decay="matrices"),
        compute_dtype="float32",
        evaluation=base.evaluation,
        checkpoint=base.checkpoint,
    )


def domain_cpu_alone() -> FineTune:
    """The same tokens, none of them prose."""
    run = domain_cpu()
    return replace(run, name="code-alone", text=replace(run.text, replay_store="", replay_share=0.0))
