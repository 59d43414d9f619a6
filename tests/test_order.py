# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import lines
import ramp

from experiments.tinyllama import v1_1_math_code
from tinyllama_jax.config import Stage
from tinyllama_jax.data.order import SHUFFLED_BLOCKS, Order, _in_blocks
from tinyllama_jax.data.permutation import round_keys
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.schedules import Plan, mixture_at

SEQUENCE = 4


def stage(name, steps, batch, mixture, ramp_steps=0, **more):
    batch_tokens = batch * SEQUENCE
    return Stage(
        name=name,
        tokens=steps * batch_tokens,
        batch_tokens=batch_tokens,
        mixture=mixture,
        ramp_tokens=ramp_steps * batch_tokens,
        **more,
    )


CURRICULUM = (
    stage("one", 7, 8, {"slim": 75.0}),
    stage("two", 20, 8, {"slim": 75.0, "star": 15.0, "proof": 10.0}, ramp_steps=9),
    stage("three", 6, 32, {"star": 1.0, "proof": 2.0, "wiki": 0.7}),
)
WINDOWS = {"slim": 61, "star": 17, "proof": 1000, "wiki": 5}


def order(curriculum=CURRICULUM, windows=WINDOWS, seed=1, epochs="reshuffle"):
    return Order(Plan(curriculum, SEQUENCE), windows, seed, epochs)


def named_rows(o, step, *part):
    source, window = o.rows(step, *part)
    return [(o.sources[s], w) for s, w in zip(source.tolist(), window.tolist(), strict=True)]


def replay_counts(o):
    """Walks the whole run row by row: (names, ideal running share, real running count) after each row."""
    count = np.zeros(len(o.sources), np.int64)
    for step in range(o.plan.total_steps):
        assert o.counts(step) == dict(zip(o.sources, count.tolist(), strict=True))
        source, window = o.rows(step)
        yield step, source, window
        count += np.bincount(source, minlength=len(o.sources))
    assert o.counts(o.plan.total_steps) == dict(zip(o.sources, count.tolist(), strict=True))


@pytest.mark.parametrize("epochs", ["reshuffle", "replay"])
def test_every_source_is_consumed_without_gap_or_repeat(epochs):
    o = order(epochs=epochs)
    seen = {name: [] for name in o.sources}
    for _, source, window in replay_counts(o):
        for s, w in zip(source.tolist(), window.tolist(), strict=True):
            seen[o.sources[s]].append(w)
    for name, windows in seen.items():
        size = WINDOWS[name]
        passes = [windows[i : i + size] for i in range(0, len(windows), size)]
        for full in passes[:-1]:
            assert sorted(full) == list(range(size))
        assert len(set(passes[-1])) == len(passes[-1])
        for first, second in zip(passes, passes[1:], strict=False):
            same = first[: len(second)] == second
            assert same if epochs == "replay" else (not same or size < 6)
    assert len(seen["slim"]) > 61 and len(seen["wiki"]) > 10  # so that epochs were really crossed


def test_first_epoch_is_the_same_for_reshuffle_and_replay():
    one, other = order(epochs="reshuffle"), order(epochs="replay")
    assert named_rows(one, 0) == named_rows(other, 0)
    assert any(named_rows(one, t) != named_rows(other, t) for t in range(one.plan.total_steps))


def test_random_access_equals_sequential():
    o, fresh = order(), order()
    everything = [named_rows(o, step) for step in range(o.plan.total_steps)]
    for step in np.random.default_rng(0).permutation(o.plan.total_steps):
        assert named_rows(fresh, step) == everything[step]
        size = len(everything[step])
        for start, stop in [(0, size // 2), (size // 2, size), (3, 3), (5, 6)]:
            assert named_rows(fresh, step, start, stop) == everything[step][start:stop]


def deviation(o):
    """Largest distance of any source's running count from its ideal share, after any row of the run."""
    ideal, count, worst = np.zeros(len(o.sources)), np.zeros(len(o.sources)), 0.0
    for step, source, _ in replay_counts(o):
        planned = o.plan.at_step(step)
        share = mixture_at(o.plan, o.plan.tokens_at(step) + planned.batch_tokens / 2)
        share = np.array([share.get(name, 0.0) for name in o.sources])
        rows = np.arange(1, len(source) + 1)[:, None]
        real = count + np.cumsum(source[:, None] == np.arange(len(o.sources)), axis=0)
        worst = max(worst, np.abs(real - ideal - rows * share).max())
        ideal, count = ideal + len(source) * share, real[-1]
    return worst


def random_curriculum(rng, sources):
    stages, names = [], [f"s{i}" for i in range(sources)]
    for number in range(rng.integers(1, 6)):
        weights = rng.dirichlet([0.4] * sources) * rng.choice([0, 1], sources, p=[0.2, 0.8])
        weights[rng.integers(sources)] += 0.05
        steps = int(rng.integers(1, 60))
        mixture = dict(zip(names, weights.tolist(), strict=True))
        ramp_from = dict(zip(names, rng.dirichlet([0.4] * sources).tolist(), strict=True))
        stages.append(stage(f"{number}", steps, int(rng.integers(1, 40)), mixture, steps, ramp_from=ramp_from))
    return tuple(stages)


ROUNDED = 2**-20  # shares are multiples of 2**-40, and what they are compared with are floats


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_no_source_strays_a_window_from_its_share_at_any_row_of_ramps(seed, sources):
    o = order(random_curriculum(np.random.default_rng(seed), sources), {f"s{i}": 1000 for i in range(sources)})
    assert deviation(o) < 1 + ROUNDED


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.00001, 1), min_size=2, max_size=12), st.integers(1, 40))
def test_no_source_strays_a_window_from_its_share_at_any_row_of_a_constant_mixture(weights, batch):
    mixture = {f"s{i}": weight for i, weight in enumerate(weights)}
    o = order((stage("x", 60, batch, mixture),), dict.fromkeys(mixture, 1000))
    assert deviation(o) < 1 + ROUNDED


MIXTURES = {
    "TinyLlama v1.0": {"slim": 0.693584, "star": 0.306416},
    "TinyLlama v1.1": {"slim": 75.0, "star": 15.0, "proof": 10.0},
    "a large one and many small ones": {"large": 1.0} | {f"small{i:02d}": 1e-5 * (1 + i % 3) for i in range(30)},
    "forty alike": {f"s{i:02d}": 1.0 for i in range(40)},
    "falling by half": {f"s{i:02d}": 0.5**i for i in range(16)},
    "falling by two thirds, to one window in a million": {f"s{i:02d}": 0.3**i for i in range(12)},
    "one rare, thirty hardly there": {"large": 1.0, "rare": 2e-4} | {f"tiny{i:02d}": 1e-7 for i in range(30)},
}


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES)
def test_every_prefix_of_a_million_draws_keeps_every_share_to_a_window(weights):
    assert largest_distance(weights, 0, 1 << 20) < 1 + 2**-20


@pytest.mark.parametrize("name", ["TinyLlama v1.1", "a large one and many small ones", "falling by half"])
def test_and_so_do_draws_after_the_first_billion(name):
    assert largest_distance(MIXTURES[name], 10**9, 1 << 17) < 1 + 2**-10


def largest_distance(weights, start, draws):
    """Of any source's draws from what it is due, at any prefix; shares are rounded to multiples of 2**-40."""
    rows, worst = 1 << 14, 0.0
    first = start // rows
    o = order((stage("x", (start + draws) // rows, rows, weights),), dict.fromkeys(weights, 10**9))
    count = np.array(list(o.counts(first).values()))
    for step in range(first, (start + draws) // rows):
        source, _ = o.rows(step)
        drawn = np.arange(1, rows + 1) + step * rows
        for index, name in enumerate(o.sources):
            running = count[index] + np.cumsum(source == index, dtype=np.int32)
            worst = max(worst, np.abs(running - drawn * (weights[name] / sum(weights.values()))).max())
            count[index] = running[-1]
    assert list(o.counts((start + draws) // rows).values()) == count.tolist()
    return worst


def test_a_short_phase_with_a_rare_source_is_walked_only_as_far_as_it_goes():
    started = time.perf_counter()
    o = order(tuple(stage(str(i), 50, 8, {"slim": 1.0, "star": 3e-6}) for i in range(5)))
    assert o.counts(250)["slim"] + o.counts(250)["star"] == 2000
    assert time.perf_counter() - started < 5  # 0.3 s on an idle core; all frames to their ends would take 5


def test_the_ramp_of_v1_1_math_code_follows_its_formula_at_every_row():
    """Every sixth batch here; all of them are in benchmarks/results/ramp_v1_1_math_code.json."""
    found = ramp.measure(v1_1_math_code(), every=6)
    assert found.tokens_S[0] == 1_835_008 and found.tokens_S[-1] > 5.99e9 and len(found.tokens_S) == 545
    assert found.low_SN.min() > -ramp.ALLOWED and found.high_SN.max() < ramp.ALLOWED
    assert found.high_SN.max() > 0.5 and found.low_SN.min() < -0.5  # rounding to whole windows is seen
    rows = 896
    assert np.abs(found.share_SN - found.formula_SN).max() < 2 / rows
    assert found.formula_SN[-1] == pytest.approx([0.75, 0.15, 0.1], abs=1e-3)
    recorded = json.loads((lines.RESULTS / "ramp_v1_1_math_code.json").read_text())
    assert recorded["batches"] == 3270 and max(recorded["farthest_from_due_windows"].values()) <= ramp.ALLOWED


def test_counts_and_epochs():
    o = order()
    assert o.counts(0) == {"proof": 0, "slim": 0, "star": 0, "wiki": 0}
    assert o.counts(7) == {"proof": 0, "slim": 56, "star": 0, "wiki": 0}
    assert o.epoch(7)["slim"] == pytest.approx(56 / 61)


def test_skipped_steps_are_stepped_over_and_nothing_else_moves():
    plain, skipping = order(), order_skipping((12, 15), (29, 30))
    for step in range(12):
        assert named_rows(skipping, step) == named_rows(plain, step)
    # What a step trains on is decided by the mixture of that step; the windows are the next ones of each source.
    queue = {name: [] for name in plain.sources}
    for step in range(plain.plan.total_steps):
        for name, window in named_rows(plain, step):
            queue[name].append(window)
    for name in plain.sources:
        real = [w for step in range(33) for n, w in named_rows(skipping, step) if n == name]
        c = {step: plain.counts(step)[name] for step in (12, 15, 29, 30)}
        gone, later = c[15] - c[12], c[30] - c[29]
        expected = queue[name][: c[12]] + queue[name][c[15] : c[29] + gone] + queue[name][c[29] + gone + later :]
        shared = min(len(real), len(expected))
        assert real[:shared] == expected[:shared] and shared >= len(expected)
    assert skipping.counts(33) == plain.counts(33)
    assert skipping.epoch(33)["slim"] > plain.epoch(33)["slim"]


def order_skipping(*ranges, **more):
    return Order(Plan(CURRICULUM, SEQUENCE), WINDOWS, 1, skip_ranges=ranges, **more)


@pytest.mark.parametrize(
    ("bad", "message"),
    [((5, 9), "border at step 7"), ((9, 9), "first < end"), ((30, 99), "the run's 33"), ((-1, 2), "run")],
)
def test_a_range_that_cannot_be_skipped_is_one_line(bad, message):
    with pytest.raises(ConfigError, match=message):
        order_skipping(bad)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(2, 70), st.integers(0, 3))
def test_block_shuffle_is_a_permutation(size, block, epoch):
    keys = round_keys(3, "s", epoch)
    out = _in_blocks(np.arange(size), size, block, keys, lambda part: round_keys(3, "s", epoch, part))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_block_shuffle_reads_in_runs_and_still_mixes():
    size, block = 1_000_003, 64
    o = Order(Plan((stage("x", 256, 256, {"s": 1.0}),), SEQUENCE), {"s": size}, 1, block_windows=block)
    windows = np.concatenate([o.rows(step)[1] for step in range(256)])
    assert len(np.unique(windows)) == windows.size
    span = np.sort(windows[: block * SHUFFLED_BLOCKS])
    assert np.sum(np.diff(span) != 1) < SHUFFLED_BLOCKS  # a thousand windows from sixteen places
    assert np.abs(np.diff(windows)).mean() > size / 5  # neighbours in the order are not neighbours in the store
    assert not np.array_equal(windows, order_of_epoch(size, block, 1)[: windows.size])


def order_of_epoch(size, block, epoch):
    keys = round_keys(1, "s", epoch)
    return _in_blocks(np.arange(size), size, block, keys, lambda part: round_keys(1, "s", epoch, part))


def test_editing_the_future_does_not_move_the_past():
    past = order(CURRICULUM[:2])
    futures = [
        CURRICULUM,
        (*CURRICULUM[:2], stage("three", 3, 16, {"aaa": 50.0, "slim": 50.0}, ramp_steps=2)),
        (CURRICULUM[0], stage("two", 99, 8, CURRICULUM[1].mixture, ramp_steps=9), *CURRICULUM[2:]),
    ]
    for future in futures:
        edited = order(future, WINDOWS | {"aaa": 50, "unused": 9})
        for step in range(past.plan.total_steps):
            assert named_rows(edited, step) == named_rows(past, step)


def test_the_fingerprint_knows_the_past_and_nothing_else():
    past = order().fingerprint(20)
    longer = (*CURRICULUM[:2], stage("three", 60, 16, {"slim": 90.0}, ramp_steps=2))
    assert order(longer).fingerprint(20) == past
    first = stage("one", 7, 8, {"slim": 75.0, "star": 1.0})
    others = [
        order(seed=2),
        order(windows=WINDOWS | {"star": 18}),
        order((first, *CURRICULUM[1:])),
        order_skipping((12, 15)),
        Order(Plan(CURRICULUM, SEQUENCE), WINDOWS, 1, block_windows=4),
    ]
    assert len({past, order().fingerprint(19), *(other.fingerprint(20) for other in others)}) == 2 + len(others)
    assert order_skipping((20, 25)).fingerprint(20) == past  # from there on it is another one
    assert order_skipping((20, 25)).fingerprint(21) != order().fingerprint(21)


def test_adding_or_renaming_a_source_keeps_the_order_within_the_others():
    def consumed(o, name):
        rows = [row for step in range(o.plan.total_steps) for row in named_rows(o, step)]
        return [w for n, w in rows if n == name]

    base = order((stage("x", 40, 8, {"b": 1.0, "c": 1.0}),), {"b": 40, "c": 30})
    added = order((stage("x", 60, 8, {"a": 0.5, "b": 1.0, "c": 1.0}),), {"a": 7, "b": 40, "c": 30})
    renamed = order((stage("x", 40, 8, {"b": 1.0, "a": 1.0}),), {"b": 40, "a": 30})
    reference = consumed(base, "b")
    for other in (consumed(added, "b"), consumed(renamed, "b")):
        shared = min(len(reference), len(other))
        assert shared > 100 and other[:shared] == reference[:shared]
    assert consumed(base, "c")[:30] != consumed(renamed, "a")[:30]


def test_seeds_give_different_orders():
    assert named_rows(order(seed=1), 0) != named_rows(order(seed=2), 0)


def test_missing_source_is_one_line():
    with pytest.raises(ConfigError, match="'wiki' has no training window"):
        order(windows={k: v for k, v in WINDOWS.items() if k != "wiki"})


def test_outside_the_run_or_the_batch():
    o = order()
    for call in (lambda: o.rows(33), lambda: o.rows(-1), lambda: o.rows(0, 0, 9), lambda: o.counts(34)):
        with pytest.raises(IndexError):
            call()


def test_scale_of_tinyllama():
    """3T tokens, 1.6M steps, a ramp of 3.3k batches: a small table, built at once, and cheap rows anywhere."""
    batch, weights = 1_835_008, {"slim": 75.0, "star": 15.0, "proof": 10.0}
    curriculum = (
        Stage(name="one", tokens=15 * 10**11, batch_tokens=batch, mixture={"slim": 75.0}),
        Stage(name="two", tokens=135 * 10**10, batch_tokens=batch, mixture=weights, ramp_tokens=6 * 10**9),
        Stage(name="three", tokens=15 * 10**10, batch_tokens=4 * batch, mixture=weights),
    )
    started = time.perf_counter()
    o = Order(Plan(curriculum, 2048), {"slim": 464_000_000, "star": 140_000_000, "proof": 25_000_000}, 1, "reshuffle")
    assert time.perf_counter() - started < 5  # 0.04 s on an idle core
    last = o.plan.total_steps
    assert sum(o.counts(last).values()) == o.plan.total_windows > 1_464_000_000
    second = o.plan.stages[1].start_step
    one, two = o.counts(second + 3270), o.counts(last)
    rows = sum(two.values()) - sum(one.values())
    for name, weight in weights.items():  # after the ramp the share is exact over a billion windows
        assert abs(two[name] - one[name] - rows * weight / 100) < 2
    o.rows(last - 2)
    times = []
    for step in (1_000_000, np.int64(last - 1), 5):
        started = time.perf_counter()
        source, window = o.rows(step, 0, 896)
        times.append(time.perf_counter() - started)
        assert window.min() >= 0 and (window < np.array([25e6, 464e6, 140e6])[source]).all()
    assert min(times) < 0.1  # 0.3 ms on an idle core


def test_a_ramp_over_millions_of_steps_keeps_a_small_table():
    started = time.perf_counter()
    o = order((stage("x", 3_000_000, 2, {"a": 1.0, "b": 1.0}, 3_000_000, ramp_from={"a": 1.0}),), {"a": 9, "b": 9})
    assert time.perf_counter() - started < 5
    counts = o.counts(3_000_000)
    # weight of b is u at point u of the ramp, its share u / (1 + u): the integral from 0 to 1 is 1 - ln 2
    assert counts["b"] / 6_000_000 == pytest.approx(1 - np.log(2), abs=1e-6)
