"""What `generate --draft` does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from tinyllama_jax.errors import CheckFailed, DataError, UsageError, UserError
from tinyllama_jax.train import saved

DRAFT_TOKENS = 4


def asked_for(args: argparse.Namespace) -> bool:
    """Whether there is a draft.  Raises UsageError for options that mean nothing without one."""
    for option, given in (("--draft-tokens", args.draft_tokens is not None), ("--self-check", args.self_check)):
        if given and not args.draft:
            raise UsageError(f"{option} goes with --draft CKPT")
    return bool(args.draft)


def generate(args: argparse.Namespace) -> None:
    for checkpoint in (args.checkpoint, args.draft):
        saved.resolve(checkpoint)  # before jax is imported
    from tinyllama_jax.verbs_generate import load_rows

    rows = None if args.tokens is None else load_rows(args.tokens)
    if rows is not None and (rows.ndim != 2 or rows.dtype.kind not in "iu"):
        raise DataError(f"--tokens {args.tokens}: must be integers [batch, time], not {rows.dtype} {list(rows.shape)}")
    from tinyllama_jax.generate.load import load_serving, prompt_tokens, serving_mesh
    from tinyllama_jax.generate.sampling import Sampling
    from tinyllama_jax.generate.speculative import speculate
    from tinyllama_jax.generate.vocabularies import common_ids
    from tinyllama_jax.sharding import computing

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling) if hasattr(args, f.name)}
    how = Sampling(**given)
    mesh = serving_mesh(args.checkpoint, args.draft)
    with computing(mesh, args.dtype):
        target, draft = (load_serving(text, mesh, dtype=args.dtype) for text in (args.checkpoint, args.draft))
        common = common_ids(target, draft)
        try:
            tokenizer = target.tokenizer()
        except UserError:
            if rows is None:
                raise
            tokenizer = None  # ids in, ids out
        if rows is None:
            prompts = [prompt_tokens(tokenizer, target.marks, text) for text in args.prompt]
        else:
            prompts = rows.tolist()
        stop_ids = (tokenizer.eos_id,) if tokenizer and not args.ignore_eos else ()
        found, seconds = _timed(
            lambda: speculate(
                target,
                draft,
                prompts,
                max_new_tokens=args.max_new_tokens,
                draft_tokens=DRAFT_TOKENS if args.draft_tokens is None else args.draft_tokens,
                how=how,
                stop_ids=stop_ids,
                common=common,
            ),
            twice=args.self_check,
        )
        value = {
            "proposed": found.proposed,
            "accepted": found.accepted,
            "acceptance_rate": found.acceptance_rate,
            "tokens_per_round": found.tokens_per_round,
            "seconds": seconds,
            "seconds_are_of": "a second call, all compiled" if args.self_check else "one call, compilation included",
        }
        failure = _check(value, target, prompts, found, how, stop_ids, args.max_new_tokens) if args.self_check else None
    from tinyllama_jax.generate.speculative_published import published

    # Decoded behind the prompt: a continuation decoded alone loses the space that it may begin with.
    texts = [
        tokenizer.decode(prompt + ids).removeprefix(tokenizer.decode(prompt)) if tokenizer else None
        for prompt, ids in zip(prompts, found.answers, strict=True)
    ]
    if args.json:
        value |= {"published": published()}
        print(json.dumps({"tokens": found.answers, "text": texts, "prompt_tokens": prompts, "speculative": value}))
    else:
        shown = args.prompt if rows is None else [""] * len(prompts)
        for i, row in enumerate(found.answers):
            print(f"[{i}] {shown[i]}{texts[i]}" if tokenizer else f"[{i}] {row}")
        print("\n".join(_lines(value, published())))
    if failure:
        raise CheckFailed(failure)


def _timed(function, twice: bool):
    """What it returns and its seconds; of a second call where asked for, when all is compiled."""
    if twice:
        function()
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def _check(value: dict, target, prompts, found, how, stop_ids, max_new_tokens: int) -> str | None:
    """Decodes plainly and puts into `value` how that compares; -> what is wrong, in one line, or None."""
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import sample, speculative_check

    sampling = dataclasses.asdict(how)
    sampling.pop("stream")
    plain, value["plain_seconds"] = _timed(
        lambda: sample.generate(
            target.params,
            target.model,
            Execution(),
            prompts,
            max_new_tokens=max_new_tokens,
            eos_id=stop_ids[0] if stop_ids else None,
            rows=len(prompts),
            **sampling,
        ),
        twice=True,
    )
    # Sampled answers end where they end: seconds of a token are compared.
    speeds = [sum(map(len, a)) / s for a, s in ((found.answers, value["seconds"]), (plain, value["plain_seconds"]))]
    value["speed_up"] = speeds[0] / speeds[1]
    if how.temperature > 0:
        value["check"] = check = speculative_check.sampled(target, prompts, found, how)
        wrong = next((name for name, part in check.items() if not part["holds"]), None)
        return wrong and (
            f"--self-check: {wrong} sums to {check[wrong]['measured']:.2f}, which is further than "
            f"{check[wrong]['within']:.2f} from {check[wrong]['expected']:.2f}: not the target's distribution"
        )
    different = speculative_check.first_difference(plain, found.answers)
    value["identical"] = different is None
    if different is None:
        return None
    row, place = different
    one, other = (answers[row][place : place + 1] for answers in (plain, found.answers))
    return f"--self-check: row {row}, new token {place}: plain decoding gives {one}, speculative decoding {other}"


def _lines(value: dict, rows: list[dict]) -> list[str]:
    rate = "none proposed" if value["acceptance_rate"] is None else f"{100 * value['acceptance_rate']:.1f} %"
    lines = [
        f"speculative: {value['accepted']} of {value['proposed']} drafted tokens accepted ({rate}), "
        f"{value['tokens_per_round']:.2f} tokens a round, {value['seconds']:.2f} s ({value['seconds_are_of']})"
    ]
    if "speed_up" in value:
        lines.append(f"plain: {value['plain_seconds']:.2f} s; speed-up {value['speed_up']:.2f}")
    if "identical" in value:
        lines.append("every token is that of plain greedy decoding" if value["identical"] else "NOT the plain tokens")
    for name, part in value.get("check", {}).items():
        verdict = "holds" if part["holds"] else "DOES NOT HOLD"
        lines.append(
            f"{name}: {part['measured']:.2f}, expected {part['expected']:.2f} within {part['within']:.2f}: {verdict}"
        )
    lines.append("published, on other machines:")
    for row in rows:
        said = f"speed-up {row['speed_up']}" if "speed_up" in row else f"{100 * row['acceptance_rate']:.1f} % accepted"
        lines.append(f"  {row['target']}: {said} ({row['setting']})")
    return lines
