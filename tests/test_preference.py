"""Preferences: the losses by hand, answers of packed rows alone and on meshes, references that are kept, validation."""

import functools
import json
import math
import os

import jax
import numpy as np
import pair_store
import pytest
from pair_store import MODEL, WINDOW

from tinyllama_jax import config, sharding
from tinyllama_jax.config import Data, Evaluation, Examples, Execution, Preference, Run, Stage, Start, replace
from tinyllama_jax.distributed import Peers
from tinyllama_jax.errors import CheckpointError, ConfigError, DataError
from tinyllama_jax.finetune import preference, reference
from tinyllama_jax.finetune.pairs import AnswerLogps, PairValidator, batches
from tinyllama_jax.model import transformer

EXECUTION = Execution(loss_chunk_tokens=40)
RUN = Run(
    name="pairs",
    model=MODEL,
    data=Data(
        store="pairs",
        sequence_tokens=WINDOW - 1,
        document_masking=True,
        examples=Examples(sources=("pairs.jsonl",), form="preference", packing="single"),
    ),
    curriculum=(Stage(name="all", tokens=96 * 2, batch_tokens=96, mixture={"good": 1.0}),),
    start=Start(checkpoint="base"),
    preference=Preference(),
    execution=EXECUTION,
    evaluation=Evaluation(batch_sequences=4),
)


def mesh_of(*shape):
    """replica, data, context, tensor."""
    return sharding.make_mesh(
        config.Mesh(**dict(zip(sharding.AXES, shape, strict=True))), jax.devices()[: math.prod(shape)]
    )


@functools.cache
def host_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(MODEL, jax.random.key(0)))
    return jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape) + (s.ndim == 1)).astype(np.float32), shapes)


def weights(mesh, seed=0):
    params = host_weights(seed)
    return jax.tree.map(jax.device_put, params, sharding.param_shardings(params, mesh))


def by_hand(policy, ref, tokens, loss, beta, smoothing):
    ratio = policy - ref
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    margin = beta * (ratio[0] - ratio[1])
    if loss == "ipo":
        return (ratio[0] / tokens[0] - ratio[1] / tokens[1] - 1 / (2 * beta)) ** 2
    return -(1 - smoothing) * math.log(sigmoid(margin)) - smoothing * math.log(sigmoid(-margin))


@pytest.mark.parametrize(("loss", "beta", "smoothing"), [("sigmoid", 0.1, 0), ("sigmoid", 0.5, 0.2), ("ipo", 0.3, 0)])
def test_losses_and_metrics_by_hand(loss, beta, smoothing):
    rng = np.random.default_rng(0)
    policy, ref = rng.normal(-20, 3, (2, 6, 2)).astype(np.float32)
    ref[0] = policy[0]  # as before the first step
    tokens = rng.integers(1, 9, (6, 2)).astype(np.float32)
    options = Preference(loss=loss, beta=beta, label_smoothing=smoothing)
    found, metrics = jax.jit(functools.partial(preference.losses, preference=options))(policy, ref, tokens)
    expected = [by_hand(*row, loss, beta, smoothing) for row in zip(policy, ref, tokens, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    ratio = policy - ref
    np.testing.assert_allclose(metrics["margin"], beta * (ratio[:, 0] - ratio[:, 1]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], [0.5, *(ratio[1:, 0] > ratio[1:, 1])])
    np.testing.assert_allclose(metrics["chosen_reward"], beta * ratio[:, 0], rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected_reward"], beta * ratio[:, 1], rtol=1e-5)
    np.testing.assert_allclose(metrics["chosen_nll"], -policy[:, 0] / tokens[:, 0], rtol=1e-5)
    d = (ratio / tokens).astype(np.float64)
    np.testing.assert_allclose(metrics["kl"], (np.exp(-d) - 1 + d).mean(1), rtol=1e-4)
    assert metrics["kl"][0] == 0 and (np.asarray(metrics["kl"])[1:] > 0).all()
    assert metrics.keys() == set(preference.METRICS)


def test_gradients_pass_through_the_policy_alone_and_stay_finite_far_away():
    policy, ref = np.array([[[-900.0, -10.0]], [[-10.0, -900.0]]], np.float32)
    for options in (Preference(), Preference(label_smoothing=0.1), Preference(loss="ipo")):
        loss = lambda p, r, options=options: preference.losses(p, r, np.full((1, 2), 5.0), options)[0].sum()  # noqa: E731
        by_policy, by_reference = jax.jit(jax.grad(loss, argnums=(0, 1)))(policy, ref)
        assert np.isfinite(by_policy).all() and by_policy[0, 0] < 0 < by_policy[0, 1]
        assert not by_reference.any()


def test_answers_in_one_row_are_what_they_are_alone():
    rng, mesh = np.random.default_rng(1), mesh_of(1, 1, 1, 1)
    pairs = [pair_store.pair(rng) for _ in range(5)]
    windows = pair_store.windows_of(pairs)
    with jax.set_mesh(mesh):
        params = weights(mesh)
        measure = AnswerLogps(MODEL, EXECUTION, mesh, batch_sequences=4)
        found = measure(params, windows)
        padding = np.arange(WINDOW) >= windows.used_N[:, None]
        other = windows._replace(tokens_NT=np.where(padding, 7, windows.tokens_NT))
        np.testing.assert_array_equal(measure(params, other), found)
        alone = [prompt + answer for prompt, *answers in pairs for answer in answers]
        tokens_NT = np.array([row + [0] * (WINDOW - len(row)) for row in alone], np.int32)
        logits_NTV = jax.jit(functools.partial(transformer.logits, cfg=MODEL, execution=EXECUTION))(params, tokens_NT)
        [(count, batch)] = batches(windows, 6, mesh)
        tokens = jax.jit(preference.answer_tokens)(batch)
    logps_NTV = np.asarray(logits_NTV) - np.logaddexp.reduce(logits_NTV, axis=2, keepdims=True)
    for n, (value, row) in enumerate(zip(found.ravel(), alone, strict=True)):
        answer = range(len(pairs[n // 2][0]), len(row))
        assert value == pytest.approx(sum(logps_NTV[n, t - 1, row[t]] for t in answer), rel=1e-5)
    np.testing.assert_array_equal(tokens, [[len(c), len(r)] for _, c, r in pairs] + [[0, 0]])
    assert found.shape == (5, 2) and found.dtype == np.float32 and count == 5


STEP = jax.jit(
    functools.partial(
        jax.value_and_grad(preference.micro_loss, has_aux=True),
        model=MODEL,
        execution=EXECUTION,
        preference=Preference(label_smoothing=0.1),
    ),
    compiler_options={"xla_backend_optimization_level": 0},  # compiled in half the time
)


def micro_loss_on(shape):
    """Loss, metrics and gradients of eight pairs."""
    mesh = mesh_of(*shape)
    windows = pair_store.store(train=8).split("train", "good").read(np.arange(8), WINDOW)
    reference_N2 = np.random.default_rng(2).normal(-20, 1, (8, 2)).astype(np.float32)
    with jax.set_mesh(mesh):
        [(_, batch)] = batches(windows._replace(reference_N2=reference_N2), 8, mesh)
        return jax.device_get(STEP(weights(mesh), batch))


@pytest.mark.slow
def test_a_mesh_of_everything_gives_the_same_loss_and_gradients():
    """Rows over `data`, tokens over `context`, heads and vocabulary over `tensor`."""
    (loss, metrics), gradients = micro_loss_on((1, 1, 1, 1))
    (same_loss, same_metrics), same_gradients = micro_loss_on((1, 2, 2, 2))
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(same_metrics[name], value, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), same_gradients, gradients)
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradients)) > 0.1


def kept(store, workdir, run=RUN, base="b", make=None, **others):
    """The store with references, computed on one device from weights 0 or what `make` makes."""
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        make = make or (lambda: weights(mesh))
        return reference.references(store, run, make, mesh, workdir, base=base, **others)


def of(store):
    return {
        (split, domain): store.split(split, domain)
        .read(np.arange(99)[: store.split(split, domain).windows(WINDOW)], WINDOW)
        .reference_N2
        for split in reference.SPLITS
        for domain in store.domains
    }


def never():
    raise AssertionError("computed though it lay there")


def test_references_are_computed_once_and_are_those_of_the_start(tmp_path, capsys):
    store, said = pair_store.store(), []
    first = of(kept(store, tmp_path, progress=lambda *line: said.append(line)))
    assert [x.shape for x in first.values()] == [(9, 2), (3, 2), (5, 2), (0, 2)]
    mesh = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(mesh):
        measure = AnswerLogps(MODEL, EXECUTION, mesh, batch_sequences=4)
        windows = store.split("validation", "good").read(np.arange(5), WINDOW)
        np.testing.assert_array_equal(first["validation", "good"], measure(weights(mesh), windows))
    assert said[-1][0] == "references" and said[-1][1] == 34 and said[-1][3] == 1.0
    again = of(kept(store, tmp_path, make=never))
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [reference.RECORD, reference.ARRAYS]
    assert not capsys.readouterr().err


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (reference.ARRAYS, flip, "differs from its checksum in reference.json"),
        (reference.ARRAYS, truncate, "differs from its checksum in reference.json"),
        (reference.ARRAYS, os.unlink, "reference.npz is missing"),
        (reference.RECORD, truncate, "reference.json cannot be read"),
        (
            reference.RECORD,
            lambda path: path.write_text(path.read_text().replace('"seed": 3', '"seed": 4')),
            "checksum",
        ),
    ],
)
def test_damaged_references_are_named_and_computed_again(tmp_path, capsys, name, damage, words):
    store = pair_store.store()
    first = of(kept(store, tmp_path))
    damage(tmp_path / name)
    again = of(kept(store, tmp_path))
    said = capsys.readouterr().err
    assert words in said and "computed again" in said and said.count("\n") == 1
    for key, value in first.items():
        np.testing.assert_array_equal(again[key], value)
    kept(store, tmp_path, make=never)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(base="c"), "another base"),
        (dict(store=pair_store.store(seed=1)), "another store"),
        (dict(run=replace(RUN, model=replace(MODEL, dropout=0.1))), "another model"),
        (dict(run=replace(RUN, adapter=config.Adapter(base_weights="nf4"))), "another adapter"),
    ],
)
def test_references_of_something_else_are_not_taken(tmp_path, capsys, change, words):
    kept(pair_store.store(), tmp_path)
    before = json.loads((tmp_path / reference.RECORD).read_text())["made_from"]
    mesh = mesh_of(1, 1, 1, 1)
    kept(**{"store": pair_store.store(), "workdir": tmp_path, "make": lambda: weights(mesh, 1)} | change)
    assert words in capsys.readouterr().err
    assert json.loads((tmp_path / reference.RECORD).read_text())["made_from"] != before


def test_where_the_base_lies_and_how_a_run_goes_on_do_not_matter(tmp_path):
    kept(pair_store.store(), tmp_path)
    moved = replace(RUN, start=Start(checkpoint="elsewhere/base"), preference=Preference(beta=0.5))
    kept(pair_store.store(), tmp_path, run=moved, make=never)


def test_weights_without_numbers_are_refused(tmp_path):
    mesh = mesh_of(1, 1, 1, 1)
    broken = lambda: jax.tree.map(lambda x: x * np.nan, weights(mesh))  # noqa: E731
    with pytest.raises(CheckpointError, match=r"start.checkpoint=base: gives pair 0 of train/good no finite"):
        kept(pair_store.store(), tmp_path, make=broken)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / reference.ARRAYS).mkdir()
    with pytest.raises(ConfigError, match="the references cannot be written"):
        kept(pair_store.store(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [reference.ARRAYS]


class Told:
    """The link of a process that is not the first: what it is told."""

    def __init__(self, value):
        self.value = value

    def tell(self, name, value):
        return self.value


def test_another_process_takes_the_file_of_the_first(tmp_path):
    store = pair_store.store()
    first = of(kept(store, tmp_path))
    checksum = json.loads((tmp_path / reference.RECORD).read_text())["sha256"]
    peers = Peers(1, 2, ("process 0", "process 1"), Told(checksum))
    np.testing.assert_array_equal(
        of(kept(store, tmp_path, make=never, peers=peers))["train", "good"], first["train", "good"]
    )
    with pytest.raises(DataError, match="one that all processes share"):
        kept(store, tmp_path / "mine", make=never, peers=peers)
    flip(tmp_path / reference.ARRAYS)
    with pytest.raises(DataError, match="differs from its checksum"):
        kept(store, tmp_path, make=never, peers=peers)


def test_validation_is_the_mean_over_pairs_on_any_mesh(tmp_path):
    mesh, store = mesh_of(2, 2, 1, 2), kept(pair_store.store(), tmp_path)
    windows = {"good": store.split("validation", "good").read(np.arange(5), WINDOW)}
    options = Preference(beta=0.2)
    with jax.set_mesh(mesh):
        validator = PairValidator(windows, MODEL, EXECUTION, mesh, options, batch_sequences=4)
        start, moved = validator(weights(mesh))["good"], validator(weights(mesh, 1))["good"]
    one = mesh_of(1, 1, 1, 1)
    with jax.set_mesh(one):
        policy = AnswerLogps(MODEL, EXECUTION, one, batch_sequences=4)(weights(one, 1), windows["good"])
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-5) and start["margin"] == pytest.approx(0, abs=1e-5)
    assert start["kl"] == pytest.approx(0, abs=1e-9) and start["loss_se"] < 1e-5
    counts = np.stack([windows["good"].learned_NT.sum(1)] * 2, 1)  # both together: enough for sigmoid's loss
    loss, metrics = preference.losses(policy, windows["good"].reference_N2, counts.astype(np.float32), options)
    assert moved["loss"] == pytest.approx(float(loss.mean()), rel=1e-4)
    assert moved["loss_se"] == pytest.approx(float(np.std(loss, ddof=1)) / math.sqrt(5), rel=1e-3)
    for name in ("margin", "accuracy", "chosen_reward", "rejected_reward"):
        assert moved[name] == pytest.approx(float(metrics[name].mean()), rel=1e-4)
    assert moved["pairs"] == 5 and moved["tokens"] == windows["good"].learned_NT.sum()
    assert moved["kl"] > 0 and moved["chosen_nll"] > 0


def test_training_moves_the_margin(tmp_path):
    """Plain gradient descent on the pairs' own loss: from log 2 down, every pair right in the end."""
    mesh = mesh_of(1, 1, 1, 1)
    store = kept(pair_store.store(train=8), tmp_path)
    windows = store.split("train", "good").read(np.arange(8), WINDOW)
    with jax.set_mesh(mesh):
        params, [(_, batch)] = weights(mesh), batches(windows, 8, mesh)
        losses = []
        for _ in range(15):
            (loss, metrics), gradients = STEP(params, batch)
            losses.append(float(loss) / 8)
            params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.6 and metrics["accuracy"] == 8 and metrics["kl"] > 0
