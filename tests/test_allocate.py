"""The best N and D for a budget: published answers, budgets that cost what they say, and one line for what is wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllama_jax import flops
from tinyllama_jax.cli import main
from tinyllama_jax.config import Model
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab import buildable, laws
from tinyllama_jax.lab.fit import allocate, chinchilla
from tinyllama_jax.lab.fit.allocate import Law, flops_price
from tinyllama_jax.preflight import money, targets

ROOT = Path(__file__).parent.parent
HOFFMANN, EPOCH, C4 = (laws.PUBLISHED[name].law for name in ("hoffmann", "epoch", "c4"))
DRAWN = [{"A": 470 + k, "B": 2000 + 8 * k, "E": 1.80 + 0.002 * k, "alpha": 0.347, "beta": 0.366} for k in range(20)]


def answer(capsys, *argv) -> dict:
    capsys.readouterr()
    assert main(["allocate", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def fitted(tmp_path) -> Path:
    """The file of a fit, with resamples, as `fit chinchilla --out` writes it."""
    value = {
        "law": "E + A/N^alpha + B/D^beta",
        "constants": dict(EPOCH.constants),
        "data": {"points": 60, "N": [1e7, 1e9], "D": [1e9, 1e11], "compute": [6e16, 6e20], "N_column": "parameters"},
        "draws": {name: [one[name] for one in DRAWN] for name in chinchilla.NAMES},
        "warnings": ["N (parameters) spans a factor of 8.0 only"],
    }
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(value))
    return path


# -- what has been published


@pytest.mark.parametrize("law, ratio", [("hoffmann", 59), ("epoch", 18)])
def test_tokens_per_parameter_at_chinchillas_budget(capsys, law, ratio):
    value = answer(capsys, "--law", law, "--flops", 5.76e23)
    assert value["tokens_per_parameter"] == pytest.approx(ratio, abs=0.5)
    assert 6 * value["N"] * value["D"] == pytest.approx(5.76e23)
    exact = chinchilla.optimum(laws.PUBLISHED[law].law.constants, 5.76e23)
    assert [value[k] for k in ("N", "D", "loss")] == pytest.approx([exact[k] for k in ("N", "D", "loss")], rel=1e-4)


def test_repetition_as_published(capsys):
    value = answer(capsys, "--law", "c4", "--flops", 1e22, "--unique", 25e9)
    assert value["N"] == pytest.approx(7.0e9, rel=0.01) and value["D"] == pytest.approx(237e9, rel=0.01)
    assert value["epochs"] == pytest.approx(9.5, abs=0.05)
    fresh = answer(capsys, "--law", "c4", "--flops", 1e22)
    assert fresh["N"] == pytest.approx(9.2e9, rel=0.01) and fresh["D"] == pytest.approx(181e9, rel=0.01)
    assert fresh["epochs"] is None and fresh["loss"] < value["loss"]
    assert value["tinyllama"]["three_trillion"]["loss"] > fresh["tinyllama"]["three_trillion"]["loss"]


def test_inference_moves_the_best_size_down(capsys):
    sizes, losses = [], []
    for tokens in (0, 1e10, 1e11, 1e12, 1e13):
        found = allocate.best(EPOCH, flops_price(tokens), 1e22)
        assert 6 * found["N"] * found["D"] + 2 * found["N"] * tokens == pytest.approx(1e22)
        sizes.append(found["N"])
        losses.append(found["loss"])
    assert sizes == sorted(sizes, reverse=True) and losses == sorted(losses) and sizes[-1] < 0.5 * sizes[0]
    value = answer(capsys, "--law", "epoch", "--flops", 1e22, "--inference", 1e12)
    assert value["N"] == pytest.approx(sizes[3]) and value["budget"]["inference_tokens"] == 1e12
    # Where the budget cannot serve 1.1B parameters there is no such choice, and that is said.
    starved = answer(capsys, "--law", "epoch", "--flops", 1e20, "--inference", 1e12)
    assert starved["tinyllama"]["same_budget"] is None and starved["N"] < 1e20 / 2e12


# -- what another choice costs


def test_deadweight_is_the_compute_that_the_best_choice_saves(capsys):
    value = answer(capsys, "--law", "epoch", "--flops", 1e21)
    same = value["tinyllama"]["same_budget"]
    assert same["N"] == 1_100_048_384 and same["flops"] == pytest.approx(1e21)
    assert same["loss"] > value["loss"] == pytest.approx(same["best_for_the_same"]["loss"])
    cheaper = chinchilla.optimum(EPOCH.constants, (1 - same["deadweight_share"]) * 1e21)
    assert cheaper["loss"] == pytest.approx(same["loss"], abs=1e-7)
    whole = value["tinyllama"]["three_trillion"]
    assert whole["flops"] == pytest.approx(6 * 1_100_048_384 * 3e12) and whole["D"] == 3e12
    assert 0.8 < whole["deadweight_share"] < 0.9, "over-trained on purpose: it is cheap to serve"
    best = chinchilla.optimum(EPOCH.constants, 3e20)
    assert allocate.deadweight(EPOCH, flops_price(), best["N"], best["D"])["deadweight_share"] < 1e-6


def test_the_run_can_be_built_and_is_what_it_says(capsys):
    value = answer(capsys, "--law", "epoch", "--flops", 1e21)
    run = value["run"]
    model = Model(**run["model"])
    counts = flops.parameter_counts(model)
    assert (run["parameters"], run["non_embedding"], run["matmul"]) == tuple(
        counts[name] for name in ("total", "non_embedding", "matmul")
    )
    assert counts["total"] == pytest.approx(value["N"], rel=0.10)
    assert run["tokens"] == run["steps"] * run["batch_tokens"] and run["batch_tokens"] % 2048 == 0
    assert run["flops_6nd"] == pytest.approx(1e21, rel=run["batch_tokens"] / run["tokens"])
    assert run["flops_palm"] == run["tokens"] * flops.flops_per_token(model, 2048, "palm") > run["flops"]
    assert run["loss"] == pytest.approx(float(EPOCH.loss(counts["total"], run["tokens"])))
    assert 0 <= run["deadweight_share"] < 0.01 and (value["lr"], value["steps"]) == (run["lr"], run["steps"])


def test_a_preset_is_taken_where_it_is_near():
    how = {"count": "total", "vocab_size": 32_000, "sequence_tokens": 2048}
    assert buildable.near(1.05e9, **how)[0] == "tinyllama-1.1b"
    assert buildable.near(1.5e8, **how)[0] == "t150"
    name, model = buildable.near(2e9, **how)
    assert name == "" and flops.parameter_counts(model)["total"] == pytest.approx(2e9, rel=0.10)
    other = buildable.near(1.05e9, **how | {"vocab_size": 50_304})
    assert other[0] == "" and other[1].vocab_size == 50_304
    with pytest.raises(ConfigError, match="no Llama with a vocabulary of 32,000 has about 1e\\+05 parameters"):
        buildable.near(1e5, **how)


def test_a_size_that_no_vocabulary_allows_is_said_and_the_rest_answered(capsys):
    value = answer(capsys, "--law", "epoch", "--flops", 1e14)
    assert value["run"] is None and value["lr"] is None and value["N"] > 0
    assert any("no Llama with a vocabulary of 32,000" in w for w in value["warnings"])


# -- dollars


@pytest.mark.parametrize("machine, usd", [("h100:8", 5000), ("a100-40g:2x8", 40_000), ("v5e:4x4", 900)])
def test_dollars_are_what_the_estimate_asks(capsys, machine, usd):
    value = answer(capsys, "--law", "epoch", "--usd", usd, "--target", machine)
    run, target = value["run"], targets.parse(machine)
    built = buildable.run(Model(**run["model"]), run["tokens"], sequence_tokens=2048, rule="olmo", target=target)
    assert built.curriculum[0].tokens == run["tokens"] and built.curriculum[0].batch_tokens == run["batch_tokens"]
    said = money.estimate(built, target)["cost_usd"]["total"]
    assert said == pytest.approx(usd, rel=0.01) and run["usd"] == pytest.approx(said)
    # The curve of prices from which the best size was taken agrees with the estimate of that size.
    assert run["tokens"] * run["parameters"] == pytest.approx(value["N"] * value["D"], rel=0.06)
    assert value["budget"]["price"]["read"] and value["tinyllama"]["same_budget"]["usd"] == pytest.approx(usd, rel=1e-6)


def test_a_higher_price_buys_less(capsys):
    ask = ("--law", "epoch", "--usd", 5000, "--target", "h100:8")
    dear, cheap = (answer(capsys, *ask, "--price", price) for price in (8, 2))
    assert cheap["N"] * cheap["D"] == pytest.approx(4 * dear["N"] * dear["D"], rel=0.08)
    assert cheap["run"]["days"] == pytest.approx(4 * dear["run"]["days"], rel=0.01)


def test_models_that_the_machine_does_not_hold_are_not_bought(capsys):
    value = answer(capsys, "--law", "epoch", "--usd", 100_000, "--target", "a100-40g")
    assert value["N"] * buildable.STATE_BYTES < targets.parse("a100-40g").capacity_bytes
    assert any("a100-40g does not hold larger models" in w for w in value["warnings"])


# -- laws from files


def test_intervals_come_from_the_resamples(capsys, fitted):
    value = answer(capsys, "--law", fitted, "--flops", 1e21)
    every = [chinchilla.optimum(one, 1e21) for one in DRAWN]
    assert value["law"]["draws"] == 20 and value["law"]["count"] == "total"
    for name in ("N", "D"):
        low, high = value["ci95"][name]
        assert low == pytest.approx(min(e[name] for e in every), rel=1e-3)
        assert high == pytest.approx(max(e[name] for e in every), rel=1e-3)
    of_loss = [float(Law(one).loss(value["N"], value["D"])) for one in DRAWN]
    assert value["ci95"]["loss"] == pytest.approx([min(of_loss), max(of_loss)])
    assert value["run"]["loss_ci95"] and value["tinyllama"]["same_budget"]["loss_ci95"]
    assert value["warnings"][0] == "of the fit: N (parameters) spans a factor of 8.0 only"
    assert not any("no intervals" in w for w in value["warnings"])


def test_far_from_the_runs_it_warns_and_says_what_is_within_reach(capsys, fitted):
    near, far = (answer(capsys, "--law", fitted, "--flops", c) for c in (29 * 6e20, 31 * 6e20))
    assert near["extrapolation"]["within"] is None and near["extrapolation"]["times"] == pytest.approx(29)
    assert not any(w.startswith("this is") for w in near["warnings"])
    assert any("this is 31 times the compute of the largest run" in w for w in far["warnings"])
    within = far["extrapolation"]["within"]
    assert within["flops"] == 30 * 6e20 and within["N"] == pytest.approx(
        chinchilla.optimum(EPOCH.constants, 1.8e22)["N"], rel=1e-3
    )
    assert any("TinyLlama's 3T tokens are 33 times" in w for w in far["warnings"])


def test_a_capped_learning_rate_is_said(capsys):
    value = answer(capsys, "--law", "epoch", "--flops", 5e16)
    assert value["lr"] == 0.01 and any("is capped at 0.01" in w for w in value["warnings"])


def test_a_fit_goes_from_csv_to_an_answer_with_intervals(tmp_path, capsys):
    rng = np.random.default_rng(1)
    n, d = 10 ** rng.uniform(7, 9.5, 25), 10 ** rng.uniform(9, 11.5, 25)
    rows = zip(n, d, chinchilla.loss(EPOCH.constants, n, d) * np.exp(0.003 * rng.normal(size=25)), strict=True)
    (tmp_path / "runs.csv").write_text("matmul,tokens,loss\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    argv = ["--csv", str(tmp_path / "runs.csv"), "--n-column", "matmul", "--draws", "40"]
    assert main(["fit", "chinchilla", *argv, "--out", str(tmp_path / "fit.json")]) == 0
    value = answer(capsys, "--law", tmp_path / "fit.json", "--flops", 1e20)
    assert value["law"]["count"] == "matmul" and value["law"]["draws"] == 40
    assert value["tinyllama"]["same_budget"]["N"] == 1_034_420_224
    low, high = value["ci95"]["loss"]
    assert low < value["loss"] < high and high - low < 0.1
    assert value["ci95"]["N"][0] < value["N"] < value["ci95"]["N"][1]


def test_other_laws_are_read_from_their_files(tmp_path):
    """Over-training's form is a surface with equal exponents; the three laws of repetition keep their own."""
    from tinyllama_jax.lab.fit import overtraining, repeated

    own = {"a": 212.0, "b": 367.0, "E": 1.84, "eta": 0.136}
    (tmp_path / "over.json").write_text(json.dumps({"constants": own}))
    law = laws.load(str(tmp_path / "over.json")).law
    n, m = 1e9, 40.0
    assert float(law.loss(n, n * m)) == pytest.approx(float(overtraining.loss(own, 6 * n * n * m, m)))
    penalty = {**repeated.PUBLISHED, "P": 1e-3, "rho": 1.0, "kappa": 0.5}
    (tmp_path / "penalty.json").write_text(json.dumps({"constants": penalty, "draws": {"P": [1e-3, 2e-3]}}))
    found = laws.load(str(tmp_path / "penalty.json"))
    assert [law.constants["P"] for law in found.draws] == [1e-3, 2e-3] and found.law.kind == "penalty"
    surface = float(chinchilla.loss(repeated.PUBLISHED, 1e9, 4e10))
    assert float(found.law.loss(1e9, 4e10, 1e10)) == pytest.approx(surface + 1e-3 * 3 * math.sqrt(0.1))
    own = {"E": 1.8, "a": 60.0, "b": 200.0, "c": 1e-3, "alpha": 0.35, "beta": 0.36, "gamma": 0.4, "delta": 0.4}
    (tmp_path / "saturating.json").write_text(json.dumps({"constants": own}))
    law = laws.load(str(tmp_path / "saturating.json")).law
    h = 60 / 1e9**0.35 + 200 / 4e10**0.36 + 1e-3 * 1e9**0.4 / 1e10**0.4
    expected = 1.8 + (math.log(50257) - 1.8) * h / (1 + h)
    assert law.kind == "saturating" and float(law.loss(1e9, 4e10, 1e10)) == pytest.approx(expected)


# -- what is wrong is one line


@pytest.mark.parametrize(
    "argv, status, said",
    [
        ("--law epoch", 2, "give one budget: --flops C, or --usd X with --target MACHINE"),
        ("--law epoch --flops 1e20 --usd 5 --target h100", 2, "give one budget"),
        ("--law epoch --usd 5", 2, "--usd needs --target MACHINE"),
        ("--law epoch --usd 5 --target h100 --inference 1e9", 2, "--inference is counted in FLOPs"),
        ("--law epoch --flops 1e20 --price 2", 2, "--price is that of a device of --target MACHINE"),
        ("--law epoch --usd 5 --target h1000", 2, "--target h1000: not a target"),
        ("--law epoch --usd 5 --target h100 --price -1", 2, "--price -1: must be a number above 0"),
        ("--law epoch --flops=-1e20", 2, "--flops -1e+20: must be a number above 0"),
        ("--law epoch --flops nan", 2, "--flops nan: must be a number above 0"),
        ("--law epoch --flops much", 2, "argument --flops: invalid float value: 'much'"),
        ("--law epoch --flops 1e20 --inference inf", 2, "--inference inf: must be a number of tokens"),
        ("--law epoch --flops 1e20 --vocab-size 0", 2, "--vocab-size 0: at least 2"),
        ("--law epoch --flops 1e20 --rule olmoe", 2, "argument --rule: invalid choice: 'olmoe'"),
        ("--flops 1e20", 2, "the following arguments are required: --law"),
        ("--law epoch --flops 1e20 --unique 1e9", 78, "the law epoch has no R_D and R_N"),
        ("--law c4 --flops 1e20 --unique 0", 2, "--unique 0: must be a number above 0"),
        ("--law epoch --flops 10", 78, "pays for no training at all"),
        ("--law epoch --flops 1e40", 78, "no law reaches that far"),
        ("--law epok --flops 1e20", 78, "there is no such file, and published laws are hoffmann, epoch, c4"),
        ("--law FILE:{ --flops 1e20", 78, "is not JSON"),
        ("--law FILE:[] --flops 1e20", 78, "has no constants"),
        ('--law FILE:{"constants":{"N":0.5,"D":0.5}} --flops 1e20', 78, "the law has no A, B, E, alpha, beta"),
        ('--law FILE:{"constants":{"A":null}} --flops 1e20', 78, "the constant A is None, not a finite number"),
        (
            '--law FILE:{"constants":{"A":1,"B":1,"E":1,"alpha":-1,"beta":1}} --flops 1e20',
            78,
            "the constant alpha is -1; it must be above 0",
        ),
        (
            '--law FILE:{"constants":{"A":1,"B":1,"E":1,"alpha":1,"beta":1},"draws":{"A":[1,2],"B":[1]}} --flops 1e20',
            78,
            "have different lengths",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, argv, status, said):
    words = argv.split()
    for i, word in enumerate(words):
        if word.startswith("FILE:"):
            (tmp_path / "law.json").write_text(word[5:])
            words[i] = str(tmp_path / "law.json")
    assert main(["allocate", *words]) == status
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_the_program_itself_answers_in_text_and_without_jax(tmp_path):
    code = "import sys; from tinyllama_jax.cli import main; status = main(sys.argv[1:])"
    code += "; print('jax' in sys.modules); sys.exit(status)"
    argv = [sys.executable, "-c", code, "allocate", "--law", "epoch"]
    done = subprocess.run([*argv, "--usd", "5000", "--target", "h100:8"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("False\n")
    for text in (
        "best          N ",
        "to build",
        "learning rate",
        "on h100:8",
        "TinyLlama, 3T",
        "warning: no intervals",
    ):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 220
    wrong = subprocess.run([*argv, "--flops", "1e20", "--unique", "5"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 78 and wrong.stderr.count("\n") == 1
