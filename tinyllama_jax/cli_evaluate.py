"""The options of `eval` and `score`."""

from __future__ import annotations

from tinyllama_jax import verbs_evaluate


def add_evaluate(verb, as_json, dtype) -> None:
    sub = verb(
        "eval",
        verbs_evaluate.evaluate,
        "loss and bits per byte per domain, downstream tasks, or how well a long context works, of a checkpoint or "
        "along a run",
        "tinyllama eval runs/demo --corpus notes=~/notes --json\n"
        "  tinyllama eval runs/demo --tasks tinyllama\n"
        "  tinyllama eval runs/demo --tasks my_task --include-path tasks --every-tokens 1000000000 --watch\n"
        "  tinyllama eval runs/demo --passkey 256,512,1024 --rope as-trained,yarn --plots pictures",
    )
    sub.add_argument("checkpoint", metavar="RUN|CKPT")
    loss = sub.add_argument_group("loss and bits per byte")
    loss.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="SOURCE",
        help="text as for `prepare`, or a token store (its validation text); default: the run's own store",
    )
    loss.add_argument("--sequences", type=int, default=0, help="windows per domain (0 = all)")
    loss.add_argument("--sequence-tokens", type=int, default=0, help="window length (0 = the run's)")
    loss.add_argument("--baselines", action="store_true", help="also fit n-grams on the tokens that the run saw")

    tasks = sub.add_argument_group("downstream tasks", "by lm-evaluation-harness: pip install 'tinyllama_jax[eval]'")
    tasks.add_argument(
        "--tasks",
        default="",
        metavar="NAME,...",
        help="its tasks, or suites: tinyllama (the paper's seven, 0-shot), problem-solving, chinese",
    )
    tasks.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with the YAML files of tasks, such as ones whose data are local files (repeatable)",
    )
    tasks.add_argument("--shots", type=int, metavar="N", help="examples before each question (as each task says)")
    tasks.add_argument("--limit", type=int, default=0, metavar="N", help="the first N documents of each task (0 = all)")
    tasks.add_argument("--batch-rows", type=int, default=32, metavar="N", help="rows computed at a time (32)")
    tasks.add_argument(
        "--start",
        default="bos",
        choices=("bos", "as-trained"),
        help="what a text begins with: BOS, as in the harness' own backend, or the mark of the training documents",
    )
    tasks.add_argument("--seed", type=int, default=1234, metavar="N", help="of examples and of sampling (1234)")
    tasks.add_argument(
        "--allow-code-execution", action="store_true", help="run the programs that the model writes (humaneval)"
    )
    tasks.add_argument("--out", default="", metavar="FILE", help="write the answer as JSON here too")
    tasks.add_argument("--samples", default="", metavar="FILE.jsonl", help="write every question and answer here")

    longer = sub.add_argument_group("long contexts", "with --corpus and --sequences as above, and --seed of the keys")
    longer.add_argument(
        "--passkey",
        default="",
        metavar="TOKENS,...",
        help="in rows of so many tokens: is a number, told once in much filler, said and found likelier than others?",
    )
    longer.add_argument(
        "--positions",
        default="",
        metavar="TOKENS,...",
        help="loss by position in windows of these lengths, on the same text; each must divide the longest",
    )
    longer.add_argument(
        "--rope",
        default="",
        metavar="HOW,...",
        help="beyond the length of training: as-trained, linear, ntk, yarn (those that make sense for the model)",
    )
    longer.add_argument(
        "--depths",
        default="0,0.25,0.5,0.75,1",
        metavar="SHARE,...",
        help="of the filler before the number (0,0.25,0.5,0.75,1)",
    )
    longer.add_argument(
        "--keys", type=int, default=10, metavar="N", help="numbers, the same at each depth and length (10)"
    )
    longer.add_argument(
        "--choices", type=int, default=10, metavar="N", help="how many of them are compared where one is asked for (10)"
    )
    longer.add_argument(
        "--plots", default="", metavar="DIR", help="draw passkey.png or positions.png there; `report` draws them too"
    )

    along = sub.add_argument_group(
        "along a run", "results go to RUN/evaluations; set checkpoint.permanent_tokens so that checkpoints are kept"
    )
    along.add_argument(
        "--every-tokens",
        type=int,
        default=0,
        metavar="N",
        help="every kept checkpoint at a multiple of N tokens that has no result yet, and the last one",
    )
    along.add_argument("--watch", action="store_true", help="go on with what is saved until the run has ended")
    dtype(sub)
    as_json(sub)

    sub = verb(
        "score",
        verbs_evaluate.score,
        "negative log-likelihood, in nats, of every predicted token of given rows",
        "tinyllama score runs/demo --tokens rows.npy --json",
    )
    sub.add_argument("checkpoint", metavar="CKPT")
    sub.add_argument("--tokens", required=True, metavar="FILE.npy", help="int32 [batch, time]")
    dtype(sub)
    as_json(sub)
