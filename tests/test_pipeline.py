import threading

import numpy as np
import pytest

from tinyllama_jax.config import ConfigError, Data, DataError, Stage
from tinyllama_jax.data.pipeline import Pipeline
from tinyllama_jax.data.store import Split, SplitWriter
from tinyllama_jax.schedules import Plan

T = 6
DOCUMENT = 5  # tokens per document of the fake store


class FakeSplit:
    """Token i of a source is base + i, so a batch says where its tokens came from."""

    def __init__(self, base, tokens):
        self.base, self.tokens, self.damaged = base, tokens, None

    def windows(self, window_tokens):
        return self.tokens // window_tokens

    def read(self, window_ids, window_tokens):
        if self.damaged is not None and self.damaged in window_ids:
            raise DataError("shard 'a-00000.bin' is damaged at byte 7; prepare the store again")
        place = np.asarray(window_ids)[:, None] * window_tokens + np.arange(window_tokens)
        documents = place // DOCUMENT
        return (self.base + place).astype(np.int32), (documents - documents[:, :1]).astype(np.int32)


class FakeStore:
    path = "data/fake"

    def __init__(self, vocab_size=4000, **tokens):
        self.vocab_size, self.domains = vocab_size, tuple(tokens)
        self._splits = {name: FakeSplit(1000 * i, n) for i, (name, n) in enumerate(tokens.items())}

    def split(self, split, domain):
        assert split == "train"
        return self._splits[domain]


def curriculum(*mixtures, batch=8, tokens=12 * 8 * T):
    mixtures = mixtures or ({"prose": 3.0, "code": 1.0}, {"code": 1.0})
    return Plan(
        tuple(
            Stage(name=f"stage{i}", tokens=tokens, batch_tokens=batch * T, mixture=m) for i, m in enumerate(mixtures)
        ),
        T,
    )


def pipeline(plan=None, store=None, masking=False, vocab_size=4000, **more):
    data = Data(store="data/fake", sequence_tokens=T, document_masking=masking)
    store = store or FakeStore(prose=200, code=130)
    return Pipeline(store, data, plan or curriculum(), 3, vocab_size=vocab_size, **more)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_batch_is_windows_shifted_by_one():
    batch = pipeline().batch(0)
    shapes = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert shapes == {
        "tokens": ("int32", (8, T)),
        "targets": ("int32", (8, T)),
        "documents": ("int32", (8, T)),
        "valid": ("bool", (8, T)),
    }
    assert np.array_equal(batch["targets"], batch["tokens"] + 1)  # the fake's tokens count upwards
    first = batch["tokens"][:, 0] % 1000
    assert (first % (T + 1) == 0).all() and len(set(batch["tokens"][:, 0])) == 8
    assert batch["valid"].all()
    assert all(array.flags.c_contiguous for array in batch.values())


def test_every_token_of_a_source_is_seen_once_an_epoch():
    p = pipeline(curriculum({"prose": 1.0}, batch=7, tokens=4 * 7 * T))  # 28 windows of 28
    starts = np.concatenate([p.batch(step)["tokens"][:, 0] for step in range(4)])
    assert sorted(starts) == [7 * i for i in range(28)]


def test_mixture_decides_the_rows():
    p = pipeline()
    code = [int((p.batch(step)["tokens"][:, 0] >= 1000).sum()) for step in range(24)]
    assert code == [2] * 12 + [8] * 12


def test_document_masking_hides_targets_of_another_document():
    batch = pipeline(masking=True).batch(0)
    place = batch["tokens"] % 1000
    assert np.array_equal(batch["valid"], place // DOCUMENT == (place + 1) // DOCUMENT)
    assert not batch["valid"].all()
    assert np.array_equal(batch["documents"], place // DOCUMENT - place[:, :1] // DOCUMENT)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_hosts_together_see_the_same_rows_in_the_same_order(processes):
    whole = pipeline()
    hosts = [pipeline(process_index=i, process_count=processes) for i in range(processes)]
    for step in (0, 5, 11, 12, 23):
        parts = [host.batch(step) for host in hosts]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert same(joined, whole.batch(step)) and all(len(part["tokens"]) == 8 // processes for part in parts)


@pytest.mark.parametrize(("start", "stop"), [(0, 24), (7, 15), (23, 24), (5, 5), (24, 24)])
def test_iteration_equals_random_access_from_any_step(start, stop):
    reference = pipeline()
    steps = []
    for step, batch in pipeline().iterate(start, stop):
        assert same(batch, reference.batch(step))
        steps.append(step)
    assert steps == list(range(start, stop))


def test_seeking_does_not_depend_on_what_was_read_before():
    p = pipeline()
    late = p.batch(20)
    p.batch(3)
    assert same(p.batch(20), late) and same(pipeline().batch(20), late)
    assert not same(p.batch(19), late)


def prefetch_threads():
    return [t for t in threading.enumerate() if "prefetch" in t.name]


def test_leaving_early_ends_the_thread():
    iterator = pipeline().iterate(0, 24)
    assert next(iterator)[0] == 0
    assert len(prefetch_threads()) == 1
    iterator.close()
    assert not prefetch_threads()


def test_damage_found_by_the_thread_reaches_the_consumer_as_itself():
    store = FakeStore(prose=200, code=130)
    reference = pipeline(store=store)
    bad_step = 9
    store.split("train", "prose").damaged = min(reference.batch(bad_step)["tokens"][:, 0]) // (T + 1)
    steps = []
    with pytest.raises(DataError, match="damaged at byte 7"):
        for step, _ in pipeline(store=store).iterate(bad_step - 2, 24):
            steps.append(step)
    assert steps == [bad_step - 2, bad_step - 1]
    assert not prefetch_threads()


def test_iterating_outside_the_run():
    for start, stop in [(-1, 3), (0, 25), (4, 3)]:
        with pytest.raises(IndexError):
            pipeline().iterate(start, stop)


def test_with_the_real_store_on_disk(tmp_path):
    store, dtype, entries = FakeStore(prose=200, code=130), np.dtype("<u2"), {}
    for name in store.domains:
        fake = store.split("train", name)
        writer = SplitWriter(tmp_path / name, dtype, shard_tokens=64)  # windows straddle shards
        for begin in range(0, fake.tokens, DOCUMENT):
            writer.add(np.arange(begin, min(begin + DOCUMENT, fake.tokens)) + fake.base, text_bytes=1)
        entries[name] = writer.entry()
        store._splits[name] = Split(tmp_path / name, entries[name], dtype)
    reference = pipeline(masking=True)
    for step, batch in pipeline(store=store, masking=True).iterate(0, 24):
        assert same(batch, reference.batch(step))

    shard = tmp_path / "code" / "00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    store._splits["code"] = Split(tmp_path / "code", entries["code"], dtype)  # nothing checked yet
    with pytest.raises(DataError, match=r"code/00001.bin.*CRC32"):
        list(pipeline(store=store).iterate(0, 24))
    assert not prefetch_threads()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pipeline(curriculum({"prosa": 1.0})), "no source 'prosa'; did you mean 'prose'"),
        (lambda: pipeline(curriculum({"xyz": 1.0})), "no source 'xyz'; it has 'prose', 'code'"),
        (lambda: pipeline(store=FakeStore(prose=200, code=T)), "'code' has 6 training tokens, fewer than one window"),
        (lambda: pipeline(vocab_size=3999), "vocabulary of 4000, model.vocab_size is 3999"),
        (lambda: pipeline(process_count=3), "8 sequences per batch cannot be divided among 3 processes"),
        (lambda: pipeline(process_index=2, process_count=2), "process 2 of 2"),
    ],
)
def test_contradictions_are_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
