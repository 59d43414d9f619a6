"""How well the estimate of `preflight` foretells published speeds: each by one other number, TinyLlama's by each.

    python benchmarks/roofline.py        a second; needs no device and no compiler

Writes results/roofline.json.  `tinyllama` is what v1_0 on 16 A100-40G is foretold to do, calibrated with the nearest
published number of another system; no constant of the model was fitted to TinyLlama's own, which is 24 thousand tokens
a second on each GPU and 90 days (its README, and arXiv 2401.02385).  `anchors` has for every published number what the
model makes of it uncalibrated, what it would foretell for TinyLlama, and its leave-one-out error: foretold with the
median efficiency of the other numbers of its family of cards.
"""

import json
import statistics
import sys

from lines import RESULTS, ROOT, origin

sys.path.insert(0, str(ROOT))

from experiments.tinyllama import v1_0
from tinyllama_jax.preflight import money
from tinyllama_jax.preflight.anchors import ANCHORS, NEAREST, family, leave_one_out

TARGET = "a100-40g:2x8"
PUBLISHED = {"tokens_per_s_per_device": 24_000, "days": 90}
WHY = (
    "the same card, 1B parameters, 2048 tokens, 8 sequences per device in 8 micro-batches, weights sharded within one "
    "machine of 8; another code base and another architecture"
)


def foretold(anchor: str) -> dict:
    value = money.estimate(v1_0(), TARGET, calibration=anchor)
    errors = {f"{name}_error": value[name] / published - 1 for name, published in PUBLISHED.items()}
    return {name: value[name] for name in PUBLISHED} | errors


def result() -> dict:
    rows = [
        {
            "anchor": anchor.name,
            "family": family(anchor.target),
            "target": anchor.target,
            "source": anchor.source,
            "note": anchor.note,
            "tokens_per_s_per_device": anchor.tokens_per_s,
            "modelled": anchor.modelled(),
            "efficiency": anchor.efficiency,
            "leave_one_out_error": leave_one_out(anchor.name),
            "tinyllama": foretold(anchor.name),
        }
        for anchor in ANCHORS.values()
    ]
    chosen = NEAREST[TARGET.partition(":")[0]]
    value = money.estimate(v1_0(), TARGET)
    errors = {name: [abs(r["leave_one_out_error"]) for r in rows if r["family"] == name] for name in ("a100", "h100")}
    errors["tpu"] = [abs(r["leave_one_out_error"]) for r in rows if r["family"] == "tpu"]
    return {
        "benchmark": "roofline",
        "tinyllama": {"experiment": "experiments.tinyllama:v1_0", "target": TARGET, "published": PUBLISHED}
        | {"anchor": chosen, "why": WHY}
        | foretold(chosen)
        | {name: value[name] for name in ("mfu", "step_seconds", "parts", "assumptions")},
        "leave_one_out": {
            name: {"anchors": len(e), "median": statistics.median(e), "worst": max(e)} for name, e in errors.items()
        },
        "anchors": rows,
    }


def main() -> None:
    value = result()
    (RESULTS / "roofline.json").write_text(json.dumps(value | origin(), indent=1) + "\n")
    line = value["tinyllama"]
    print(
        f"{line['tokens_per_s_per_device']:,.0f} tokens/s per GPU ({line['tokens_per_s_per_device_error']:+.1%}), "
        f"{line['days']:.1f} days ({line['days_error']:+.1%}), by {line['anchor']}"
    )
    for row in value["anchors"]:
        text = f"{row['efficiency']:.3f} of the model, leave-one-out {row['leave_one_out_error']:+.1%}"
        by_it = row["tinyllama"]["tokens_per_s_per_device_error"]
        print(f"{row['anchor']:<32}{text}, TinyLlama by it {by_it:+.1%}")


if __name__ == "__main__":
    main()
