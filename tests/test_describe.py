"""What `inspect STORE` prints: the manifest's numbers, documents as text, and what verification found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from store_cases import documents, flip, make_store

from tinyllama_jax.data import durable
from tinyllama_jax.data.describe import describe
from tinyllama_jax.data.store import TokenStore
from tinyllama_jax.data.views import make_view
from tinyllama_jax.errors import DataError

W = 33
TEXTS = [f"tale {i}: the value of x is {i * i}, and so on, and so on.\nThe end." for i in range(60)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Real text in one domain; sets and filters as a corpus has them."""
    folder = tmp_path_factory.mktemp("describe")
    tokenizer = make_store(folder / "any", {"a": documents(10)}, W).tokenizer()
    tales = [tokenizer.encode_document(text, "eos") for text in TEXTS]
    path = Path(make_store(folder / "store", {"tales": tales, "code": documents(90)}, W).path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    total = manifest["groups"][0][2]
    half = {key: n // 4 for key, n in total.items()}
    rest = {key: total[key] - half[key] for key in total}
    manifest["groups"][:1] = [["tales", "RedPajamaBook", half], ["tales", "RedPajamaC4", rest]]
    manifest["recipe"]["filters"] = ["min_chars=1", "exact_duplicates", "near_duplicates=0.8"]
    manifest["removed"] = {"exact_duplicates": 12, "near_duplicates": 3, "empty": 4}
    manifest["source_dropped"] = {"slimpajama": 7}
    durable.write_record(path / "manifest.json", manifest)
    return path


def test_numbers_are_those_of_the_manifest_and_of_the_store(made):
    value, lines = describe(made)
    json.dumps(value)
    store = TokenStore.open(made)
    assert value["manifest_sha256"] == store.manifest_sha256 and value["sources"] == ["tales", "code"]
    assert value["removed"] == {"min_chars=1": 0, "exact_duplicates": 12, "near_duplicates": 3, "empty": 4}
    for domain in store.domains:
        for split in ("train", "validation"):
            part, said = store.split(split, domain), value["domains"][domain][split]
            assert (said["tokens"], said["documents"], said["windows"]) == (
                part.tokens,
                part.documents,
                part.windows(W),
            )
            assert said["dropped_tokens"] == store.manifest["splits"][split][domain]["dropped_tokens"]
    assert sum(about["share"] for about in value["domains"].values()) == pytest.approx(1)
    text = "\n".join(lines)
    assert value["source_dropped"] == {"slimpajama": 7} and "left out by the sources: 7 slimpajama" in text
    assert "left out 12 documents: exact_duplicates" in text and "left out 0 documents: min_chars=1" in text
    assert f"{store.split('train', 'tales').tokens:,}" in text and "source tales" in text and "findings" not in value
    assert value["samples"] == []


def test_shares_of_sets_are_of_their_domain_largest_first(made):
    value, lines = describe(made)
    assert set(value["domains"]["tales"]["groups"]) == {"RedPajamaBook", "RedPajamaC4"}
    at = lines.index("tales, by set or language:")
    assert "RedPajamaC4" in lines[at + 1] and lines[at + 1].endswith(" 75.01 %")
    assert "RedPajamaBook" in lines[at + 2] and lines[at + 2].endswith(" 24.99 %")
    assert not any(line.startswith("code, by set") for line in lines)  # it has one, without a name


def test_histogram_counts_every_document(made):
    value, lines = describe(made)
    given = documents(90)
    given += given[:9]  # held out
    sizes = np.array([d.size for d in given])
    for one in value["domains"]["code"]["lengths"]:
        assert one["documents"] == ((one["from"] <= sizes) & (sizes <= one["to"])).sum() > 0
    assert sum(one["documents"] for one in value["domains"]["code"]["lengths"]) == len(given)
    bars = [line.count("#") for line in lines[lines.index("code, documents by length in tokens:") + 1 :] if "#" in line]
    assert max(bars) == 30 and min(bars) >= 1


def test_samples_are_documents_of_the_store_the_first_one_first(made):
    value, lines = describe(made, samples=5, seed=1)
    assert [s["domain"] for s in value["samples"]] == ["tales"] * 5 + ["code"] * 5
    tales = value["samples"][:5]
    assert TEXTS[0].startswith(tales[0]["text"]) and tales[0]["window"] == 0 and tales[0]["text"].startswith("tale 0")
    assert all(any(sample["text"].strip() in text for text in TEXTS) for sample in tales)
    assert any(line.startswith("   | tale 0: the value") for line in lines)
    assert describe(made, samples=5, seed=1)[0] == value != describe(made, samples=5, seed=2)[0]
    assert len(describe(made, samples=1)[0]["samples"]) == 2


def test_padding_is_no_part_of_a_sample(tmp_path):
    path = make_store(tmp_path / "s", {"a": documents(50, longest=20)}, W, "best_fit").path
    value, _ = describe(path, samples=30)
    assert all(1 <= sample["tokens"] <= 20 for sample in value["samples"])


def test_text_cannot_command_the_terminal(tmp_path):
    tokenizer = make_store(tmp_path / "any", {"a": documents(10)}, W).tokenizer()
    nasty = tokenizer.encode_document("red \x1b[31m text\ttab\n" * 3, "eos")
    path = make_store(tmp_path / "s", {"a": [nasty] * 20}, 17).path
    value, lines = describe(path, samples=8)
    assert any("\x1b" in sample["text"] for sample in value["samples"])
    assert not any("\x1b" in line or "\t" in line or "\n" in line for line in lines)


def test_long_texts_are_cut_on_paper_only(tmp_path):
    tokenizer = make_store(tmp_path / "any", {"a": documents(10)}, W).tokenizer()
    long = tokenizer.encode_document("\n".join("x = 1" for _ in range(400)), "eos")
    path = make_store(tmp_path / "s", {"a": [long, long]}, 512).path
    value, lines = describe(path, samples=1)
    assert value["samples"][0]["text"].count("\n") > 20
    assert lines.count("   | x = 1") == 8 and "   | ..." in lines


def test_view_shows_its_own_tokens_and_what_it_is_a_view_of(made, tmp_path):
    view = make_view(TokenStore.open(made), {"tales": 20 * W}, tmp_path / "view", seed=4)
    value, lines = describe(view, samples=2)
    assert value["view_of"]["path"] == str(made) and value["view_of"]["seed"] == 4
    assert value["domains"]["tales"]["train"]["windows"] == 20 and value["domains"]["tales"]["share"] == 1
    assert [s["domain"] for s in value["samples"]] == ["tales"] * 2  # the other has no window in it
    assert any(f"a view of {made}, seed 4" in line for line in lines) and any(
        "in the whole store" in line for line in lines
    )


def test_store_that_cannot_be_opened_is_one_line(made, tmp_path):
    with pytest.raises(DataError, match="no token store"):
        describe(tmp_path / "none")
    with pytest.raises(DataError, match="no part of a store|missing"):
        copied = Path(shutil.copytree(made, tmp_path / "copy"))
        next((copied / "train" / "code").glob("*.doc")).unlink()
        describe(copied)


def test_findings_are_part_of_the_answer_and_damage_does_not_hide_the_rest(tmp_path):
    path = Path(make_store(tmp_path / "s", {"a": documents(50)}, W).path)
    seen = []
    value, lines = describe(path, verify=True, progress=lambda *a: seen.append(a))
    assert value["findings"] == [] and lines[-1].startswith("verified: every file") and seen[-1][3] == 1
    (path / "more.txt").write_text("mine")
    value, lines = describe(path, verify=True, samples=1)
    assert len(value["findings"]) == 1 and "domains" in value and "verified: 1 findings" in lines
    assert "more.txt" in lines[-1] and value["samples"]
    flip(path / "train" / "a" / "000000-00.bin", 2)
    value, lines = describe(path, verify=True, samples=1)  # the first sample cannot be read any more
    assert len(value["findings"]) == 3 and "domains" in value and value["samples"] == []
    assert lines[0].startswith(str(path)) and "window 0" in lines[-1]
    (path / "manifest.json").write_text("{}")
    value, lines = describe(path, verify=True)
    assert len(value["findings"]) == 1 and "manifest.json" in lines[1] and "domains" not in value
