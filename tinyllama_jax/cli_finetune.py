"""The options of `finetune` and its steps."""

from __future__ import annotations

from tinyllama_jax import verbs_finetune

FINETUNE_STEPS = ("merge",)


def add_finetune(verb, settings, as_json, several) -> None:
    sub = verb(
        "finetune",
        verbs_finetune.finetune,
        "go on from a checkpoint by a recipe: chat, LoRA, QLoRA, DPO, more text, a longer context",
        "tinyllama finetune experiments.finetune:lora --base runs/base --data chat.jsonl --workdir runs/lora\n"
        "  tinyllama finetune experiments.chat:chat_v1_0_dpo --base runs/sft --data prefs.parquet --workdir runs/dpo\n"
        "  tinyllama finetune experiments.continued:domain --base runs/base --data data/law --workdir runs/law\n\n"
        "its adapters as weights of an ordinary model:\n"
        "  tinyllama finetune merge runs/lora@best --out merged",
    )
    sub.add_argument("experiment", metavar="MODULE:FUNCTION", help="what returns a FineTune (finetune/recipe.py)")
    sub.add_argument("--base", default="", metavar="CKPT", help="begin with a run, RUN@STEP, RUN@best or a checkpoint")
    sub.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="examples: jsonl, json, parquet, folders, as [NAME=]PATH[?form=FORM], or docstrings (repeatable); of a "
        "recipe for text its token store",
    )
    sub.add_argument(
        "--validation", action="append", default=[], metavar="FILE", help="examples to hold out (a share of --data)"
    )
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the run directory; resumes what it holds")
    sub.add_argument(
        "--allow-config-change",
        action="store_true",
        help="continue although fields that decide the numbers differ from the checkpoint's",
    )
    several(sub)
    settings(sub)

    sub = verb(
        "finetune merge",
        verbs_finetune.merge,
        "write the base with a run's adapters in it: a checkpoint that needs neither any more",
        "tinyllama finetune merge runs/lora@best --out merged",
    )
    sub.add_argument("checkpoint", metavar="RUN|CKPT", help="of a run with adapters")
    sub.add_argument("--out", required=True, metavar="CKPT")
    as_json(sub)
