"""What `generate --draft` does."""

from __future__ import annotations

import argparse
import dataclasses
import time

from tinyllama_jax.errors import CheckFailed, UsageError
from tinyllama_jax.train import saved

DRAFT_TOKENS = 4


def asked_for(args: argparse.Namespace) -> bool:
    """Whether there is a draft.  Raises UsageError for options that mean nothing without one."""
    for option, given in (("--draft-tokens", args.draft_tokens is not None), ("--self-check", args.self_check)):
        if given and not args.draft:
            raise UsageError(f"{option} goes with --draft CKPT")
    if args.draft and args.slide:
        raise UsageError("--slide does not go with --draft: guesses are judged within the context")
    if args.draft and args.self_check and args.stop:
        raise UsageError("--self-check compares whole answers; leave --stop out")
    return bool(args.draft)


def generate(args: argparse.Namespace) -> None:
    for checkpoint in (args.checkpoint, args.draft):
        saved.resolve(checkpoint)  # before jax is imported
    from tinyllama_jax import verbs_generate

    given = verbs_generate.read_given(args)
    from tinyllama_jax.generate.load import load_serving, serving_mesh
    from tinyllama_jax.generate.sampling import Sampling
    from tinyllama_jax.generate.speculative import speculate
    from tinyllama_jax.generate.speculative_published import published
    from tinyllama_jax.generate.vocabularies import common_ids
    from tinyllama_jax.sharding import computing

    how = Sampling(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Sampling) if hasattr(args, f.name)})
    mesh = serving_mesh(args.checkpoint, args.draft)
    with computing(mesh, args.dtype):
        target, draft = (
            load_serving(text, mesh, dtype=args.dtype, weights=args.weights) for text in (args.checkpoint, args.draft)
        )
        common = common_ids(target, draft)
        tokenizer, prompts, shown = verbs_generate.encoded(target, given, args.stop)
        stop_ids = (tokenizer.eos_id,) if tokenizer and not args.ignore_eos else ()

        def run(on_tokens=None):
            return speculate(
                target,
                draft,
                prompts,
                max_new_tokens=args.max_new_tokens,
                draft_tokens=DRAFT_TOKENS if args.draft_tokens is None else args.draft_tokens,
                how=how,
                stop_ids=stop_ids,
                common=common,
                rows=args.rows,
                on_tokens=on_tokens,
            )

        if args.self_check:
            run()  # so that what is timed is compiled
        telling = verbs_generate.Telling(tokenizer, prompts, args.stop, aloud=not args.json and len(prompts) == 1)
        found, seconds = _timed(lambda: run(telling))
        value = {"tokens": found.answers, "text": telling.finish(), "prompt_tokens": prompts}
        told = {
            "proposed": found.proposed,
            "accepted": found.accepted,
            "acceptance_rate": found.acceptance_rate,
            "tokens_per_round": found.tokens_per_round,
            "seconds": seconds,
            "seconds_are_of": "a second call, all compiled" if args.self_check else "one call, compilation included",
        }
        failure = _check(told, args, target, prompts, found, how, stop_ids) if args.self_check else None
    value["speculative"] = told | {"published": published()}
    verbs_generate.show(args, value, shown, told=telling.aloud)
    if not args.json:
        print("\n".join(_lines(value["speculative"])))
    if failure:
        raise CheckFailed(failure)


def _timed(function):
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def _check(told: dict, args: argparse.Namespace, target, prompts, found, how, stop_ids) -> str | None:
    """Decodes plainly and puts into `told` how that compares; -> what is wrong, in one line, or None."""
    from tinyllama_jax.config import Execution
    from tinyllama_jax.generate import sample, speculative_check

    options = {f: value for f, value in dataclasses.asdict(how).items() if f != "stream"}
    options |= {"max_new_tokens": args.max_new_tokens, "rows": args.rows, "eos_id": next(iter(stop_ids), None)}
    plainly = lambda: sample.generate(target.params, target.model, Execution(), prompts, **options)  # noqa: E731
    plainly()  # so that what is timed is compiled
    plain, told["plain_seconds"] = _timed(plainly)
    # Sampled answers end where they end: seconds of a token are compared.
    speeds = [sum(map(len, a)) / s for a, s in ((found.answers, told["seconds"]), (plain, told["plain_seconds"]))]
    told["speed_up"] = speeds[0] / speeds[1]
    if how.temperature > 0:
        told["check"] = check = speculative_check.sampled(target, prompts, found, how)
        wrong = next((name for name, part in check.items() if not part["holds"]), None)
        return wrong and (
            f"--self-check: {wrong} sums to {check[wrong]['measured']:.2f}, which is further than "
            f"{check[wrong]['within']:.2f} from {check[wrong]['expected']:.2f}: not the target's distribution"
        )
    different = speculative_check.first_difference(plain, found.answers)
    told["identical"] = different is None
    if different is None:
        return None
    row, place = different
    line = f"--self-check: row {row}, new token {place}: plain decoding gives "
    if place >= min(len(plain[row]), len(found.answers[row])):
        return line + f"{len(plain[row])} tokens, speculative decoding {len(found.answers[row])}"
    one, other = plain[row][place], found.answers[row][place]
    ids = [*prompts[row], *plain[row][:place]]
    gap = speculative_check.gap(target, ids, one, other, how.repetition_penalty)
    return line + f"{one}, speculative decoding {other}; their logits differ by {gap:.2g} in {args.dtype}"


def _lines(value: dict) -> list[str]:
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
    for row in value["published"]:
        said = f"speed-up {row['speed_up']}" if "speed_up" in row else f"{100 * row['acceptance_rate']:.1f} % accepted"
        lines.append(f"  {row['target']}: {said} ({row['setting']})")
    return lines
