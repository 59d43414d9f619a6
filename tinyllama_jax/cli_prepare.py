"""The options of `prepare` and its steps."""

from __future__ import annotations

from tinyllama_jax import verbs_data

# Steps of `prepare`, each with a help of its own: a first argument that is one of them is no source.
PREPARE_STEPS = ("plan", "run", "finalize", "view", "tokenizer")


def add_prepare(verb, as_json) -> None:
    def recipe(sub) -> None:
        sub.add_argument(
            "sources",
            nargs="+",
            metavar="SOURCE",
            help="python, or [DOMAIN=][LAYOUT:]PATH[?key=value&key=value]; layouts: files (the default: txt, md, py, "
            "jsonl[.gz|.zst], parquet, in folders or alone), slimpajama, starcoder, skypile, proofpile, tfds, litpkds",
        )
        sub.add_argument("--out", required=True, metavar="DIR")
        sub.add_argument(
            "--tokenizer", default="", metavar="FILE", help="tokenizer.model or tokenizer.json; else one is trained"
        )
        sub.add_argument("--vocab-size", type=int, default=2048, help="of the trained tokenizer (2048)")
        sub.add_argument("--document-marks", default="eos", choices=("eos", "bos", "both", "none"), help="(eos)")
        sub.add_argument("--validation-share", type=float, default=0.05, help="share of documents held out (0.05)")
        sub.add_argument(
            "--filter",
            dest="filters",
            action="append",
            default=[],
            metavar="FILTER",
            help="leave documents out: min_chars=N, max_chars=N, keep:FIELD=a,b, drop:FIELD=a,b, exact_duplicates, "
            "near_duplicates=0.8 (repeatable)",
        )
        sub.add_argument("--window-tokens", type=int, default=2049, metavar="N", help="length of the windows (2049)")
        sub.add_argument(
            "--packing",
            default="none",
            choices=("none", "best_fit"),
            help="none: documents in a row, cut where a window ends; best_fit: windows of whole documents (none)",
        )
        sub.add_argument("--item-bytes", default="256M", metavar="N", help="input that a worker takes at a time (256M)")
        as_json(sub)

    def workers(sub) -> None:
        sub.add_argument("--workers", type=int, default=0, metavar="N", help="processes (0 = one for each core)")

    sub = verb(
        "prepare",
        verbs_data.prepare,
        "turn text into a token store: tokens, document index, checksums, manifest; goes on where it was stopped",
        "tinyllama prepare python notes=~/notes wiki.jsonl.zst --out data/mine --vocab-size 4096\n\n"
        "its steps, for many machines (each has a --help):\n"
        "  tinyllama prepare plan SOURCE... --out DIR\n"
        "  tinyllama prepare run --out DIR --items a:b\n"
        "  tinyllama prepare finalize --out DIR\n"
        "a part of a store, with exactly so many unique tokens:\n"
        "  tinyllama prepare view STORE --tokens 100M --out DIR\n"
        "a tokenizer with more words, whose old ids stay:\n"
        "  tinyllama prepare tokenizer --base DIR --add '<|im_start|>' --out DIR",
    )
    recipe(sub)
    workers(sub)

    sub = verb(
        "prepare plan",
        verbs_data.plan,
        "list the inputs, group them into work items, settle the tokenizer, and freeze all that",
        "tinyllama prepare plan slim=slimpajama:/data/SlimPajama --tokenizer llama/tokenizer.model --out data/slim",
    )
    recipe(sub)

    sub = verb(
        "prepare run",
        verbs_data.run,
        "make work items of a plan; those that are done are left as they are",
        "tinyllama prepare run --out data/slim --items $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
    )
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument(
        "--items", default=":", metavar="A:B|I/N", help="items A to B-1, or the I-th of N shares, from 0 (all of them)"
    )
    workers(sub)
    as_json(sub)

    sub = verb(
        "prepare finalize",
        verbs_data.finalize,
        "check that every item is done and write the manifest",
        "tinyllama prepare finalize --out data/slim",
    )
    sub.add_argument("--out", required=True, metavar="DIR")
    as_json(sub)

    sub = verb(
        "prepare view",
        verbs_data.view,
        "part of a store with a budget of unique tokens; smaller budgets lie inside larger ones of the same seed",
        "tinyllama prepare view data/slim --tokens 400M --out data/slim-400M",
    )
    sub.add_argument("store", metavar="STORE")
    sub.add_argument(
        "--tokens",
        nargs="+",
        required=True,
        metavar="N",
        help="budget of unique training tokens, such as 100M, shared out in proportion; or DOMAIN=N for each domain",
    )
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--seed", type=int, default=0, help="which windows (0)")
    as_json(sub)

    sub = verb(
        "prepare tokenizer",
        verbs_data.tokenizer,
        "a tokenizer with more words: control tokens, or pieces learned from text; the old ids keep their meaning",
        "tinyllama prepare tokenizer --base runs/base --add '<|im_start|>' --add '<|im_end|>' --out data/chatml\n"
        "  tinyllama prepare tokenizer --base llama/tokenizer.model --train wiki.zh.jsonl --pieces 8000 --out data/zh",
    )
    sub.add_argument(
        "--base", required=True, metavar="DIR|FILE", help="tokenizer folder or file, or a run or checkpoint with one"
    )
    sub.add_argument(
        "--add", action="append", default=[], metavar="TOKEN", help="control token, which no text yields (repeatable)"
    )
    sub.add_argument(
        "--train", nargs="+", default=[], metavar="SOURCE", help="learn pieces from this text; sources as of prepare"
    )
    sub.add_argument("--pieces", type=int, default=0, metavar="N", help="how many; needs --train")
    sub.add_argument("--out", required=True, metavar="DIR")
    as_json(sub)
