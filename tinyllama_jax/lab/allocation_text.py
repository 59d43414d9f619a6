"""The answer of `allocate` as text for a person."""

from __future__ import annotations

from typing import Any


def lines(value: dict[str, Any]) -> list[str]:
    law, budget = value["law"], value["budget"]
    rows = [
        ("law", f"{law['name']}: {law['source']}; N counts {law['count'].replace('_', '-')} parameters"),
        ("budget", _budget(budget)),
        ("best", f"N {_n(value, 'N')}, D {_n(value, 'D')}, {_n(value, 'tokens_per_parameter')} tokens a parameter"),
        ("", f"loss {value['loss']:.4f}{_interval(value['ci95'].get('loss'), '.4f')}{_epochs(value)}"),
    ]
    if value["run"]:
        rows += _run(value["run"], budget)
    rows += _tinyllama(value["tinyllama"])
    if within := value["extrapolation"]["within"]:
        text = f"{within['flops']:.3g} FLOPs: N {within['N']:.4g}, D {within['D']:.4g}, loss {within['loss']:.4f}"
        rows.append(("within reach", text))
    return [f"{label:<14}{text}" for label, text in rows] + [f"warning: {text}" for text in value["warnings"]]


def _n(value: dict, name: str) -> str:
    return f"{value[name]:.4g}{_interval(value['ci95'].get(name))}"


def _interval(ends: list[float] | None, form: str = ".3g") -> str:
    return f" (95 %: {ends[0]:{form}} to {ends[1]:{form}})" if ends else ""


def _epochs(value: dict) -> str:
    return "" if value["epochs"] is None else f", {value['epochs']:.2f} epochs"


def _budget(budget: dict) -> str:
    if "flops" in budget:
        text = f"{budget['flops']:.4g} FLOPs, 6 N a token"
    else:
        price = budget["price"]
        dated = f" ({price['what']}; {price['source']}, {price['read']})" if "source" in price else " (as given)"
        text = f"${budget['usd']:,.0f} on {budget['target']} at ${price['usd']:.2f} a device and hour{dated}"
    if budget["inference_tokens"]:
        text += f", and 2 N for each of {budget['inference_tokens']:.3g} tokens of inference"
    if budget["unique_tokens"] is not None:
        text += f"; {budget['unique_tokens']:.4g} unique tokens"
    return text


def _run(run: dict, budget: dict) -> list[tuple[str, str]]:
    model = run["model"]
    shape = f"{model['layers']} layers of {model['d_model']}, heads {model['heads']}/{model['kv_heads']}"
    rows = [
        ("to build", f"{run['preset'] or 'a Llama'}: {shape} of {model['head_dim']}, d_ff {model['d_ff']}"),
        ("", f"N {run['parameters']:,} in all, {run['non_embedding']:,} non-embedding, {run['matmul']:,} in products"),
        ("", f"D {run['tokens']:,} in {run['steps']:,} steps of {run['batch_tokens']:,} tokens{_epochs(run)}"),
        ("", f"learning rate {run['lr']:.4g}, warm-up {run['warmup_tokens']:,} tokens ({run['rule']})"),
        (
            "",
            f"loss {run['loss']:.4f}{_interval(run['loss_ci95'], '.4f')}; {100 * run['deadweight_share']:.2g} % of the "
            "budget lost by its size",
        ),
    ]
    if "usd" in run:
        rows.append(("", f"${run['usd']:,.0f} and {run['days']:.3g} days on {run['target']}"))
    return rows


def _tinyllama(of: dict) -> list[tuple[str, str]]:
    """What the two choices of 1.1B parameters cost."""
    rows = []
    for label, name in (("instead, 1.1B", "same_budget"), ("TinyLlama, 3T", "three_trillion")):
        at = of[name]
        if at is None:
            rows.append((label, "the budget pays for no token of it"))
            continue
        spent = f"{at['flops']:.3g} FLOPs" if "flops" in at else f"${at['usd']:,.0f}"
        best = at["best_for_the_same"]
        rows += [
            (label, f"D {at['D']:.4g} for {spent}: loss {at['loss']:.4f}{_interval(at['loss_ci95'], '.4f')}"),
            (
                "",
                f"{100 * at['deadweight_share']:.1f} % of it could be saved at the same loss; spent best: N "
                f"{best['N']:.3g}, D {best['D']:.3g}, loss {best['loss']:.4f}",
            ),
        ]
    return rows
