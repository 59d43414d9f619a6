"""The proof of the data at a hundredth of its size, and that it fails where a claim does not hold."""

# ruff: noqa: E402  (benchmarks/ is a folder of programs, put on the path first)

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import corpus
import proof_data

from tinyllama_jax.data import durable
from tinyllama_jax.data.sources import parse

ROOT = Path(__file__).parent.parent
FEW = corpus.HARD._replace(with_large=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    assert corpus.make(out, 400, 3, FEW) == {"slimpajama": 280, "starcoder": 120}
    return out


def test_the_corpus_is_a_function_of_its_seed(small, tmp_path):
    for seed, name in ((3, "same"), (4, "other")):
        corpus.make(tmp_path / name, 400, seed, FEW)
    first, same, other = (proof_data.digests(folder) for folder in (small, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first.keys() == other.keys() and len(set(first.values()) & set(other.values())) == 1  # the issues


def test_the_corpus_lies_in_the_layouts_with_all_that_is_hard(small):
    found = {}
    for spec in (f"slimpajama:{small}/slimpajama?drop=", f"starcoder:{small}/starcoder"):
        source = parse(spec)
        found[source.layout] = [d for given in source.inputs() for d in source.documents(given)]
    assert {layout: len(documents) for layout, documents in found.items()} == {"slimpajama": 280, "starcoder": 120}
    assert {d.group for d in found["starcoder"]} == set(corpus.LANGUAGES)
    assert {"RedPajamaCommonCrawl", "RedPajamaGithub"} <= {d.group for d in found["slimpajama"]} <= set(corpus.SETS)
    texts = [d.text for documents in found.values() for d in documents]
    assert any(not text.strip() for text in texts)
    sizes = sorted(map(len, texts))
    assert sizes[len(sizes) // 2] < 1000 and sizes[-1] > 20 * sizes[len(sizes) // 2]
    every = corpus.large(0)
    assert len(set(every)) == corpus.SCALARS and abs(len(every.encode()) / corpus.LARGE_BYTES - 1) < 0.01


@pytest.fixture(scope="module")
def proven(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("proof")
    return folder, proof_data.prove(folder, 10_000, seed=1)


@pytest.mark.slow
def test_the_claims_hold_at_a_hundredth_of_the_size(proven):
    _, found = proven
    assert len(found["kills"]) == 10 and {kill["killed"] for kill in found["kills"]} == {"process group", "one worker"}
    done = [kill["items_done"] for kill in found["kills"]]
    assert done == sorted(done) and done[-1] > found["items"] // 3
    documents = sum(counts[key] for counts in found["compared"].values() for key in ("decoded", "cut", "dropped"))
    assert documents + sum(found["left_out"].values()) == 10_000
    assert sum(counts["decoded"] for counts in found["compared"].values()) > 0.9 * documents


@pytest.mark.slow
def test_what_does_not_agree_fails(proven, tmp_path):
    folder, found = proven
    store = shutil.copytree(folder / "one", tmp_path / "store")
    plan = json.loads((store / "plan.json").read_bytes())
    number = max(i for i, item in enumerate(plan["items"]) if item["source"] == 0)  # the small ones come last
    proof_data.compare(store, number)

    root = tmp_path / "slimpajama"
    for path, *_ in plan["items"][number]["inputs"]:
        lines = zstandard.ZstdDecompressor().stream_reader((folder / "corpus/slimpajama" / path).open("rb")).read()
        records = [json.loads(line) for line in lines.splitlines()]
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        records[0]["meta"]["redpajama_set_name"] = "RedPajamaC4"
        records[0]["text"] = "Something else."
        (root / path).write_bytes(zstandard.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    plan["recipe"]["sources"][0] = f"slimpajama:{root}"
    (store / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(proof_data.Failed, match="other tokens"):
        proof_data.compare(store, number)

    manifest = json.loads((folder / "one" / "manifest.json").read_bytes())
    manifest["splits"]["train"]["starcoder"]["dropped_tokens"] += 1
    durable.write_record(store / "manifest.json", {k: v for k, v in manifest.items() if k != "checksum"})
    shutil.copyfile(folder / "one" / "plan.json", store / "plan.json")
    with pytest.raises(proof_data.Failed, match="train/starcoder: the manifest counts .* dropped_tokens"):
        proof_data.check(store, found["items"])


@pytest.mark.slow
def test_the_speeds_are_of_the_same_tokens():
    command = [sys.executable, ROOT / "benchmarks/prepare.py", "--documents", "400", "--rounds", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["tokens"] > 100_000 and len(line["tokens_per_s"]) == 5
    assert line["prepare_over_sentencepiece"]["n"] == 1 and 0 < line["prepare_over_sentencepiece"]["median"] < 2
