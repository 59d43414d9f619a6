import dataclasses
import threading

import jax
import numpy as np
import pytest

from tinyllama_jax import config
from tinyllama_jax.config import Data, Stage
from tinyllama_jax.data.pipeline import Pipeline, positions
from tinyllama_jax.data.shards import ShardWriter
from tinyllama_jax.data.storage import Storage
from tinyllama_jax.data.store import TokenStore, Windows
from tinyllama_jax.data.windows import packer
from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.schedules import Plan
from tinyllama_jax.sharding import make_mesh
from tinyllama_jax.train.step import put_batch

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
        return Windows(
            (self.base + place).astype(np.int32),
            (documents - documents[:, :1]).astype(np.int32),
            np.full(len(place), window_tokens, np.int32),
        )


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


def pipeline(plan=None, store=None, masking=False, vocab_size=4000, data=None, **more):
    data = dataclasses.replace(data or Data(store="data/fake"), sequence_tokens=T, document_masking=masking)
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
        "positions": ("int32", (8, T)),
        "valid": ("bool", (8, T)),
    }
    assert np.array_equal(batch["targets"], batch["tokens"] + 1)  # the fake's tokens count upwards
    first = batch["tokens"][:, 0] % 1000
    assert (first % (T + 1) == 0).all() and len(set(batch["tokens"][:, 0])) == 8
    assert batch["valid"].all()
    assert (batch["positions"] == np.arange(T)).all()
    assert all(array.flags.c_contiguous for name, array in batch.items() if name != "positions")


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
    # A window that begins inside of a document counts from its own begin.
    begin = np.maximum(place // DOCUMENT * DOCUMENT, place[:, :1])
    assert np.array_equal(batch["positions"], place - begin)


def test_positions_begin_anew_with_each_document():
    documents = np.array([[0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
    found = positions(documents, True)
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 1, 0, 0, 1, 2], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert positions(documents, False).tolist() == [[0, 1, 2, 3, 4, 5]] * 3


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_hosts_together_see_the_same_rows_in_the_same_order(processes):
    whole = pipeline()
    hosts = [pipeline(process_index=i, process_count=processes) for i in range(processes)]
    for step in (0, 5, 11, 12, 23):
        parts = [host.batch(step) for host in hosts]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert same(joined, whole.batch(step)) and all(len(part["tokens"]) == 8 // processes for part in parts)


@pytest.mark.parametrize(("devices", "replicas"), [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2)])
def test_devices_together_hold_the_same_global_batch(devices, replicas):
    mesh = make_mesh(config.Mesh(replica=replicas, data=-1), jax.devices()[:devices])
    for step in (0, 11, 23):
        batch = pipeline(masking=True).batch(step)
        for accumulation in (1, 8 // devices):
            placed = put_batch(batch, accumulation, mesh, documents=True)
            assert {len(array.sharding.device_set) for array in placed.values()} == {devices}
            for name, array in placed.items():
                # What the devices hold, put together again by the place of each part.
                whole = np.zeros(array.shape, array.dtype)
                for shard in array.addressable_shards:
                    assert shard.data.shape == (accumulation, 8 // accumulation // devices, T)
                    whole[shard.index] = shard.data
                assert np.array_equal(whole.reshape(8, T), batch[name])


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


def on_disk(folder, packing="none", **tokens):
    """The fake store's documents as a real store: windows of T + 1 tokens in shards of 5."""
    dtype, entries = np.dtype("<u2"), {}
    for name, fake in FakeStore(**tokens)._splits.items():
        (folder / "train" / name).mkdir(parents=True)
        writer, packed = ShardWriter(folder / "train" / name, 0, T + 1, dtype, 5), packer(packing, T + 1)
        for begin in range(0, fake.tokens, DOCUMENT):
            document = np.arange(begin, min(begin + DOCUMENT, fake.tokens), dtype=np.int32) + fake.base
            for block in packed.add(document):
                writer.add(*block)
        for block in packed.finish():
            writer.add(*block)
        writer.close()
        shards = [dataclasses.asdict(shard) for shard in writer.shards]
        entries[name] = {"tokens": fake.tokens, "documents": 0, "bytes": 0, "shards": shards}
    manifest = {
        "tokenizer": {"vocab_size": 4000},
        "window_tokens": T + 1,
        "dtype": dtype.str,
        "packing": packing,
        "splits": {"train": entries},
    }
    return TokenStore(Storage(folder), manifest, "")


def test_with_a_real_store_on_disk(tmp_path):
    store = on_disk(tmp_path, prose=200, code=130)
    reference = pipeline(masking=True)
    for step, batch in pipeline(store=store, masking=True).iterate(0, 24):
        assert same(batch, reference.batch(step))

    shard = tmp_path / "train" / "code" / "000000-01.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"code/000000-01.bin: window 4 differs from its checksum"):
        list(pipeline(store=store).iterate(0, 24))
    assert not prefetch_threads()


@pytest.mark.parametrize("masking", [False, True])
def test_padding_of_packed_windows_is_never_predicted(tmp_path, masking):
    store = on_disk(tmp_path, "best_fit", prose=200, code=130)
    p = pipeline(curriculum({"prose": 1.0}, batch=8, tokens=5 * 8 * T), store, masking)
    windows = [
        part for step in range(5) for _, part in p.windows(step)
    ]  # 40 documents of 5 in windows of 7: one in each
    assert all((w.used_N == DOCUMENT).all() for w in windows)
    assert sorted(w for part in windows for w in part.tokens_NT[:, 0]) == list(range(0, 200, DOCUMENT))
    for step in range(5):
        batch = p.batch(step)
        assert batch["valid"].tolist() == [[True] * (DOCUMENT - 1) + [False] * (T - DOCUMENT + 1)] * 8
        assert (batch["targets"][:, DOCUMENT - 1 :] == 0).all() and (batch["targets"][:, : DOCUMENT - 1] > 0).all()


def test_packed_windows_have_one_length(tmp_path):
    store, longer = on_disk(tmp_path, "best_fit", prose=200), T + 1
    plan = Plan((Stage(name="s", tokens=8 * longer, batch_tokens=8 * longer, mixture={"prose": 1.0}),), longer)
    with pytest.raises(ConfigError, match=f"set data.sequence_tokens={T}"):
        Pipeline(store, Data(store="data/fake", sequence_tokens=longer), plan, 3, vocab_size=4000)


def test_blocks_and_skips_of_the_configuration_reach_the_order():
    plain = pipeline()
    data = Data(store="data/fake", shuffle_block_windows=4, skip_ranges=((3, 5),))
    order = pipeline(data=data).order
    assert order.block_windows == 4 and plain.order.block_windows == 1
    skipping = pipeline(data=dataclasses.replace(data, shuffle_block_windows=1))
    assert same(skipping.batch(2), plain.batch(2)) and not same(skipping.batch(3), plain.batch(3))
    code = np.concatenate([plain.batch(step)["tokens"][:, 0] for step in range(12)])
    code = code[code >= 1000]  # two of each batch, in the order of the source
    stepped = np.concatenate([skipping.batch(step)["tokens"][:, 0] for step in range(10)])
    assert stepped[stepped >= 1000].tolist() == [*code[:6], *code[10:]]
    blocks = np.sort([w for step in range(4) for w in pipeline(data=data).batch(step)["tokens"][:, 0] if w < 1000])
    assert (np.diff(blocks) == T + 1).mean() > 0.5


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
