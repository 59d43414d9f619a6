"""A base stretched without training beside fine-tunes of it, from what `eval` kept of each: one JSON, two pictures.

    python benchmarks/context_extension.py runs/demo runs/as_trained runs/linear runs/ntk runs/yarn \
        --out experiments/results/context_extension.json

The first run is the base; a fine-tune goes by its RoPE.  Of each there must be `eval RUN --positions LENGTHS` and
`eval RUN --passkey LENGTHS`, under the same conditions: the same text, the same keys.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lines import ROOT, origin

sys.path.insert(0, str(ROOT))

from tinyllama_jax.data.durable import write, write_json  # noqa: E402
from tinyllama_jax.lab import context_plots  # noqa: E402
from tinyllama_jax.lab.draw import last, png  # noqa: E402
from tinyllama_jax.lab.runs import Run  # noqa: E402

SECTIONS = ("positions", "passkey")


def joined(base: Path, tuned: list[Path]) -> dict[str, Any]:
    """As one result of evaluate/longer.py, the fine-tuned runs' treatments named `ROPE, fine-tuned`.

    Raises SystemExit with a line that says what is missing or does not fit.
    """
    value: dict[str, Any] = {"provenance": {}}
    for section in SECTIONS:
        first = kept(base, section)
        value |= {"trained_tokens": first["trained_tokens"], section: dict(first[section])}
        conditions = {name: x for name, x in first["provenance"][section].items() if name != "step"}
        for path in tuned:
            run, found = Run(path), kept(path, section)
            if {name: x for name, x in found["provenance"][section].items() if name != "step"} != conditions:
                raise SystemExit(f"{path}: {section} was measured under other conditions than of {base}")
            kind = run.config["model"]["rope"]["kind"]
            name = ("as-trained" if kind == "default" else kind) + context_plots.TUNED
            value[section][name] = found[section]["as-trained"]
        value["provenance"][section] = conditions
    return value


def kept(path: Path, section: str) -> dict[str, Any]:
    found = context_plots.kept(Run(path), section)
    if found is None:
        raise SystemExit(f"{path}: nothing is kept of `tinyllama eval {path} --{section} LENGTHS`")
    return found


def about(path: Path) -> dict[str, Any]:
    """What was trained, and how it ended."""
    run = Run(path)
    validation = {domain: last(run.column(f"domains.{domain}.loss", "validation")) for domain in run.domains}
    rope = {k: run.config["model"]["rope"][k] for k in ("kind", "theta", "factor", "original_context_tokens")}
    return {
        "name": run.name,
        "fingerprint": run.info.get("fingerprint"),
        "rope": rope,
        "sequence_tokens": run.config["data"]["sequence_tokens"],
        "steps": run.step,
        "tokens": run.tokens,
        "seconds_in_steps": round(float(run.column("timing.step_s").sum()), 1),
        "validation": validation,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="the run that was lengthened")
    parser.add_argument("tuned", type=Path, nargs="+", help="fine-tunes of it")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--how", action="append", default=[], metavar="COMMAND", help="written down (repeatable)")
    args = parser.parse_args()
    value = joined(args.base, args.tuned)
    runs = {path.name: about(path) for path in (args.base, *args.tuned)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {**origin(), "commands": args.how, "runs": runs, **value})
    for section, figure in context_plots.figures(value).items():
        write(args.out.with_name(f"{args.out.stem}_{section}.png"), png(figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
