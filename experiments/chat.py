"""The recipes of TinyLlama's chat models.

    tinyllama finetune experiments.chat:chat_v1_0_sft --base runs/v1_0 --data ultrachat/train_sft \\
        --validation ultrachat/test_sft --workdir runs/sft
    tinyllama finetune experiments.chat:chat_v1_0_dpo --base runs/sft --data ultrafeedback/train_prefs \\
        --validation ultrafeedback/test_prefs --workdir runs/dpo

Chat-v1.0 was made with the alignment handbook's recipe for Zephyr "without changing any hyper-parameter"
(jzhang38/TinyLlama issue 137): that of 2023-11-21, the one in force when it was made.  How many GPUs were used is
UNVERIFIED; the batches are those of the eight that the recipe is for.
"""

from tinyllama_jax.config import Evaluation, Examples, Execution, Optimizer, Preference
from tinyllama_jax.finetune.recipe import FineTune

QUESTIONS = (
    "How many helicopters can a human eat in one sitting?",  # the question of Zephyr's model card
    "Write a short poem about the sea.",
    "What is the capital of France?",
)


def chat_v0_1() -> FineTune:
    """Chat-v0.1 (sft/script.sh, sft/finetune.py): openassistant-guanaco, 5 epochs, batch 16, constant 1e-5.

    The script's warm-up ratio of 0.05 is ignored by its constant schedule, and so it is here.  Inputs are empty and the
    whole dialogue is the output, so that both speakers are learned.  v0.2 and v0.3 are the same with
    --set examples.form=messages --set examples.template=chatml
    --set 'examples.new_tokens=["[PAD]","<|im_start|>","<|im_end|>"]', on oasst_top1_2023-08-25.
    """
    return FineTune(
        name="tinyllama-chat-v0.1",
        examples=Examples(
            sources=("openassistant_best_replies_train.jsonl",),
            form="text",  # "### Human: ... ### Assistant: ..." in one column
            template="v0_1",
            loss_on="all",
            packing="single",
            new_tokens=("[PAD]",),  # 32,001 words
        ),
        sequence_tokens=512,  # target_max_len
        document_masking=False,  # one dialogue to a window
        epochs=5,
        batch_sequences=16,  # 4 GPUs with 4 each
        lr_kind="constant",
        lr_peak=1e-5,
        optimizer=Optimizer(beta1=0.9, beta2=0.999, weight_decay=0.0, clip_norm=1.0),
        compute_dtype="float32",  # neither bf16 nor fp16 is asked for
        new_words="mean",
        evaluations=5,  # one per epoch
        evaluation=Evaluation(sequences=512, keep_best=True, sample_tokens=128),
        questions=QUESTIONS,
        seed=42,  # of the data; of the trainer 0
        execution=Execution(micro_batch_sequences=4, remat="full"),
    )


def chat_v1_0_sft() -> FineTune:
    """The first step of Chat-v1.0: ultrachat_200k, one epoch, batch 512, cosine from 2e-5 without warm-up.

    Dialogues are put in a row and cut every 2048 tokens, all tokens are learned, and an empty system message is
    inserted where there is none.
    """
    return FineTune(
        name="tinyllama-chat-v1.0-sft",
        examples=Examples(
            sources=("ultrachat_200k/train_sft",),
            validation_sources=("ultrachat_200k/test_sft",),
            form="messages",
            template="zephyr",
            loss_on="all",
            empty_system=True,
            packing="concatenated",
        ),
        sequence_tokens=2048,
        document_masking=False,
        epochs=1,
        batch_sequences=512,  # 32 per GPU, 2 at a time, on 8 GPUs
        lr_kind="cosine",
        lr_peak=2e-5,
        optimizer=Optimizer(beta1=0.9, beta2=0.999, weight_decay=0.0, clip_norm=1.0),
        evaluation=Evaluation(sequences=512, keep_best=True, sample_tokens=256, sample_top_p=0.95),
        questions=QUESTIONS,
        seed=42,
        execution=Execution(micro_batch_sequences=8, remat="save_dots_and_attention"),
    )


def chat_v1_0_dpo() -> FineTune:
    """The second: ultrafeedback_binarized, three epochs, batch 64, RMSprop, 5e-7 down a line after a tenth of warm-up.

    A pair is one window of both answers with their prompt, each at most 1024 tokens, the prompt at most 512 of them.
    (From 2024-01-10 on the handbook has beta 0.01, one epoch, AdamW, cosine and batch 128: after Chat-v1.0.)
    """
    return FineTune(
        name="tinyllama-chat-v1.0",
        examples=Examples(
            sources=("ultrafeedback_binarized/train_prefs",),
            validation_sources=("ultrafeedback_binarized/test_prefs",),
            form="preference",
            template="zephyr",
            empty_system=True,
            packing="single",
            longest_prompt_tokens=512,
        ),
        preference=Preference(loss="sigmoid", beta=0.1),
        sequence_tokens=2048,
        epochs=3,
        batch_sequences=64,
        lr_kind="linear",
        lr_peak=5e-7,
        warmup_share=0.1,
        optimizer=Optimizer(kind="rmsprop", beta2=0.99, weight_decay=0.0, clip_norm=1.0),
        evaluation=Evaluation(sequences=512, keep_best=True, sample_tokens=256, sample_top_p=0.95),
        questions=QUESTIONS,
        seed=42,
        execution=Execution(micro_batch_sequences=8, remat="save_dots_and_attention"),
    )
