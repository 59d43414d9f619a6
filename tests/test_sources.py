"""Sources: what a spec names, in which order it is read, and what each corpus's layout means."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tinyllama_jax.data import layouts
from tinyllama_jax.data.sources import Document, Input, Source, open_source, parse
from tinyllama_jax.errors import DataError, UsageError


def complaint(spec, kind=DataError) -> str:
    with pytest.raises(kind) as caught:
        list(documents(spec))
    message = str(caught.value)
    assert "\n" not in message
    return message


def documents(spec) -> list[Document]:
    source = parse(str(spec))
    return [document for given in source.inputs() for document in source.documents(given)]


def texts(spec) -> list[str]:
    return [document.text for document in documents(spec)]


def paths(spec) -> list[str]:
    return [given.path for given in parse(str(spec)).inputs()]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, *records) -> Path:
    data = "".join(json.dumps({"text": r} if isinstance(r, str) else r) + "\n" for r in records).encode()
    pack = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    return write(path, pack(data))


def parquet(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# --- specs ---


def test_domain_is_the_stem_or_what_is_written_before_the_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tales.v2.jsonl", '{"text": "a"}')
    write(tmp_path / "x=y" / "a.txt", "a")
    assert documents("tales.v2.jsonl") == [Document("tales.v2", "a", "tales.v2.jsonl:1")]
    assert [d.domain for d in documents("web=tales.v2.jsonl")] == ["web"]
    assert [d.domain for d in documents("eq=x=y")] == ["eq"]
    assert "DOMAIN=x=y" in complaint("x=y")  # an existing path is a path; its name is no domain
    assert parse("a.parquet").domain == parse("a.jsonl.gz").domain == "a"


def test_a_spec_has_domain_layout_path_and_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = parse("math=proofpile:/corpora/pp?split=validation&subsets=arxiv")
    assert (source.domain, source.layout, source.path) == ("math", "proofpile", Path("/corpora/pp"))
    assert source.options == {"split": "validation", "subsets": "arxiv", "fields": ""}
    assert source.spec == "math=proofpile:/corpora/pp?split=validation&subsets=arxiv"
    plain = parse("/corpora/web?text=body&fields=lang,meta.url")
    assert (plain.layout, plain.text_column, plain.fields) == ("files", "body", ("lang", "meta.url"))
    assert type(parse("files:/corpora/web")) is Source
    assert parse("slimpajama:sp?drop=").drop == ()


def test_names_that_look_like_specs_are_paths_where_they_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "slimpajama:odd?drop=x.jsonl", "a")
    jsonl(tmp_path / "what?.jsonl", {"body": "b"})
    assert texts("odd=slimpajama:odd?drop=x.jsonl") == ["a"]
    assert texts("odd=what?.jsonl?text=body") == ["b"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("x=slimpyjama:/a", ("slimpyjama", "'slimpajama'")),
        ("gs://bucket/a", ("'gs'", "files, ")),
        ("a.jsonl?txet=body", ("txet", "'text'")),
        ("a.jsonl?text=a&text=b", ("text", "twice")),
        ("a.jsonl?text", ("text=VALUE",)),
        ("starcoder:/a?drop=x", ("'drop'", "languages")),
        ("slimpajama:/a?drop=RedpajamaGitHub", ("RedpajamaGitHub", "'RedPajamaGithub'")),
        ("litpkds:/a?marks=eso", ("eso", "'eos'")),
        ("litpkds:/a?bos=one", ("bos='one'", "whole number")),
    ],
)
def test_a_wrong_spec_is_answered_with_what_was_perhaps_meant(spec, words):
    message = complaint(spec, UsageError)
    assert all(word in message for word in words), message


def test_missing_and_unusable_paths_are_named(tmp_path):
    assert str(tmp_path / "none") in complaint(tmp_path / "none")
    message = complaint(write(tmp_path / "a.docx", "x"))
    assert "a.docx" in message and ".jsonl.zst" in message
    (tmp_path / "empty").mkdir()
    for layout in layouts.LAYOUTS:
        assert "empty" in complaint(f"{layout}:{tmp_path / 'empty'}")


# --- folders ---


def test_folder_is_read_recursively_in_sorted_order_without_hidden_names(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "a.txt", "B.txt", ".git/x.txt", "a/.hidden.txt", "picture.png"):
        write(tmp_path / name, name)
    jsonl(tmp_path / "c.jsonl", "line")
    expected = ["B.txt", "a/b/c.py", "a/z.md", "a.txt", "b.txt", "c.jsonl"]
    assert paths(tmp_path) == expected == sorted(expected, key=lambda path: path.split("/"))
    assert [Path(d.origin).relative_to(tmp_path).as_posix() for d in documents(tmp_path)][-1] == "c.jsonl:1"
    assert all(given.bytes == (tmp_path / given.path).stat().st_size for given in parse(str(tmp_path)).inputs())


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "corpus" / "a" / "x.txt", "x")
    write(tmp_path / "elsewhere" / "y.txt", "y")
    (tmp_path / "corpus" / "a" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    (tmp_path / "corpus" / "z.txt").symlink_to(tmp_path / "elsewhere" / "y.txt")
    assert paths(tmp_path / "corpus") == ["a/x.txt", "b/y.txt", "z.txt"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    assert "b.txt" in complaint(tmp_path)
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for ever
    assert "pipe.txt" in complaint(tmp_path)


def test_an_input_that_went_or_changed_is_named(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", "one", "two")
    source = parse(str(tmp_path))
    (given,) = source.inputs()
    assert given == Input("a.jsonl", file.stat().st_size, 0, 1)
    assert [d.text for d in source.documents(given)] == [d.text for d in source.documents(given)] == ["one", "two"]
    jsonl(file, "one", "two", "three")
    with pytest.raises(DataError, match=f"{file}: has {file.stat().st_size} bytes and had {given.bytes}"):
        source.documents(given)
    file.unlink()
    with pytest.raises(DataError, match=str(file)):
        source.size(given)


def test_text_is_kept_as_written_and_empty_ones_are_documents_too(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbf  two\r\nlines \n\n")
    write(tmp_path / "b.txt", " \n\t")
    write(tmp_path / "c.txt", "")
    assert texts(tmp_path) == ["  two\r\nlines \n\n", " \n\t", ""]
    assert [d.text for d in open_source(str(tmp_path))] == ["  two\r\nlines \n\n"]


def test_evaluation_needs_text(tmp_path):
    blank = write(tmp_path / "blank.txt", "\n \n")
    with pytest.raises(DataError, match="blank.txt: holds no text"):
        list(open_source(str(blank)))
    with pytest.raises(DataError, match="none"):
        open_source(str(tmp_path / "none"))  # before the first document is asked for
    with pytest.raises(DataError, match="tokens and no text"):
        open_source(f"litpkds:{tmp_path}")


def test_columns_group_and_fields_of_any_files(tmp_path):
    jsonl(tmp_path / "a.jsonl.gz", {"body": "a", "lang": "en", "meta": {"n": 1}}, {"body": "b", "lang": None})
    parquet(tmp_path / "b.parquet", {"body": ["c"], "lang": ["de"], "meta": [{"n": 2}]})
    found = documents(f"web={tmp_path}?text=body&group=lang&fields=meta.n")
    assert [(d.text, d.group) for d in found] == [("a", "en"), ("b", ""), ("c", "de")]
    assert [dict(d.fields) for d in found] == [
        {"meta.n": "1", "lang": "en"},
        {"lang": ""},
        {"meta.n": "2", "lang": "de"},
    ]
    write(tmp_path / "plain" / "a.txt", "a")
    assert "?text= out" in complaint(f"{tmp_path / 'plain'}?text=body")


# --- corpora ---


@pytest.fixture
def slimpajama(tmp_path) -> Path:
    def row(text, name):
        return {"text": text, "meta": {"redpajama_set_name": f"RedPajama{name}"}}

    jsonl(tmp_path / "train/chunk2/b.jsonl.zst", row("wiki", "Wikipedia"), row("code", "Github"))
    jsonl(tmp_path / "train/chunk10/a.jsonl.zst", row("web", "C4"), row("more code", "Github"), row("", "Book"))
    jsonl(tmp_path / "validation/chunk1/v.jsonl.zst", row("held out", "C4"))
    write(tmp_path / "README.md", "not text of the corpus")
    return tmp_path


def test_slimpajama_drops_github_and_counts_it(slimpajama):
    source = parse(f"slim=slimpajama:{slimpajama}")
    assert [given.path for given in source.inputs()] == ["train/chunk10/a.jsonl.zst", "train/chunk2/b.jsonl.zst"]
    found = [document for given in source.inputs() for document in source.documents(given)]
    assert [(d.text, d.group) for d in found] == [
        ("web", "RedPajamaC4"),
        ("", "RedPajamaBook"),
        ("wiki", "RedPajamaWikipedia"),
    ]
    assert all(d.domain == "slim" and d.fields["meta.redpajama_set_name"] == d.group for d in found)
    assert source.dropped == {"drop=RedPajamaGithub": 2}


def test_slimpajama_sets_and_splits_can_be_chosen(slimpajama):
    assert texts(f"slimpajama:{slimpajama}?drop=") == ["web", "more code", "", "wiki", "code"]
    assert texts(f"slimpajama:{slimpajama}?drop=RedPajamaC4,RedPajamaGithub") == ["", "wiki"]
    assert texts(f"slimpajama:{slimpajama}?split=validation") == ["held out"]
    assert texts(f"slimpajama:{slimpajama}/train/chunk2") == ["wiki"]
    assert "no file" in complaint(f"slimpajama:{slimpajama}?split=test")
    jsonl(slimpajama / "train/chunk3/c.jsonl.zst", "another corpus")
    assert "c.jsonl.zst:1: has no field meta.redpajama_set_name" in complaint(f"slimpajama:{slimpajama}")


@pytest.fixture
def starcoder(tmp_path) -> Path:
    stars = {"max_stars_count": [3]}
    parquet(tmp_path / "python/train-00000-of-00002.parquet", {"id": ["0"], "content": ["p0"]} | stars)
    parquet(tmp_path / "python/train-00001-of-00002.parquet", {"id": ["1"], "content": ["p1"]} | stars)
    parquet(tmp_path / "c-sharp/train-00000-of-00001.parquet", {"content": ["c#"]} | stars)
    parquet(tmp_path / "git-commits-cleaned/train-0.parquet", {"content": ["commit"], "old_file": ["a"]})
    parquet(tmp_path / "jupyter-structured-clean-dedup/train-0.parquet", {"path": ["x"], "content": ["notebook"]})
    parquet(tmp_path / "github-issues-filtered-structured/train-0.parquet", {"repo": ["x"], "body": ["issue"]})
    return tmp_path


def test_starcoder_reads_languages_and_the_other_folders_when_named(starcoder):
    found = documents(f"code=starcoder:{starcoder}?fields=max_stars_count")
    assert [(d.text, d.group) for d in found] == [("c#", "c-sharp"), ("p0", "python"), ("p1", "python")]
    assert {d.fields["max_stars_count"] for d in found} == {"3"}
    assert texts(f"starcoder:{starcoder}?languages=python") == ["p0", "p1"]
    assert texts(f"starcoder:{starcoder}?languages=git-commits-cleaned,c*") == ["c#", "commit"]
    assert [d.group for d in documents(f"starcoder:{starcoder}?languages=j*")] == ["jupyter-structured-clean-dedup"]
    message = complaint(f"starcoder:{starcoder}?languages=*")
    assert "no column 'content', it has 'repo', 'body'" in message
    assert texts(f"starcoder:{starcoder}?languages=github*&text=body") == ["issue"]
    assert "'pyhton'" in complaint(f"starcoder:{starcoder}?languages=pyhton")
    assert "language" in complaint(f"starcoder:{starcoder}/python")


def test_a_truncated_parquet_file_of_starcoder_is_an_error(starcoder):
    file = starcoder / "c-sharp/train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert str(file) in complaint(f"starcoder:{starcoder}")


def test_skypile_and_proofpile(tmp_path):
    jsonl(tmp_path / "sky/data/2020-40_zh_head_0000.jsonl", "\u4f60\u597d", "\u4e16\u754c")
    assert [(d.text, d.domain, d.group) for d in documents(f"zh=skypile:{tmp_path / 'sky'}")] == [
        ("\u4f60\u597d", "zh", ""),
        ("\u4e16\u754c", "zh", ""),
    ]
    for subset in ("arxiv", "open-web-math", "algebraic-stack"):
        for split in ("train", "test"):
            jsonl(tmp_path / f"pp/{subset}/{split}/{subset}0000.jsonl.zst", f"{subset} {split}")
    found = documents(f"proofpile:{tmp_path / 'pp'}")
    assert [(d.text, d.group) for d in found] == [
        (f"{subset} train", subset) for subset in ("algebraic-stack", "arxiv", "open-web-math")
    ]
    assert texts(f"proofpile:{tmp_path / 'pp'}?split=test&subsets=arxiv") == ["arxiv test"]
    assert "'arxive'" in complaint(f"proofpile:{tmp_path / 'pp'}?subsets=arxive")


# --- TensorFlow Datasets ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """1000 rows in array_record, and the same in parquet beside it; TensorFlow is not needed for either."""
    import tensorflow_datasets as tfds

    class Tales(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"story": tfds.features.Text(), "meta": {"lang": tfds.features.Text(), "n": np.int64}}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(1000), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for n in range(count):
                yield n, {"story": f"\u00e9 tale {n} " * 20, "meta": {"lang": "en", "n": n}}

    folders = {}
    for form in ("array_record", "parquet"):
        builder = Tales(data_dir=tmp_path_factory.mktemp(form), file_format=form)
        builder.download_and_prepare()
        folders[form] = Path(builder.data_dir)
    return folders["array_record"], folders["parquet"]


def test_tfds_rows_in_parts(prepared, monkeypatch):
    spec = f"tfds:{prepared[0]}?text=story&group=meta.lang&fields=meta.n"
    whole = documents("tales=" + spec)
    assert sorted(int(d.fields["meta.n"]) for d in whole) == list(range(1000))
    assert all(d.text == f"\u00e9 tale {d.fields['meta.n']} " * 20 and d.group == "en" for d in whole)
    assert whole[7].origin.endswith("tales-train.array_record-00000-of-00001#7")
    source = parse("tales=" + spec)
    size = (prepared[0] / source.inputs()[0].path).stat().st_size
    monkeypatch.setattr(layouts, "PART_BYTES", size // 7 + 1)
    inputs = source.inputs()
    assert [given.part for given in inputs] == list(range(7)) and sum(given.bytes for given in inputs) == size
    assert [d for given in inputs for d in source.documents(given)] == whole
    assert "part 3 of 7" in source.where(inputs[2])
    assert len(documents(f"t=tfds:{prepared[0]}?text=story&split=test")) == 3


def test_tfds_that_cannot_be_read_is_refused_with_the_reason(prepared, tmp_path):
    assert "miscounts" in complaint(f"t=tfds:{prepared[1]}?text=story")
    message = complaint(f"t=tfds:{prepared[0]}")
    assert "no feature 'text'" in message and "'meta'" in message and "'story'" in message
    assert "'train', 'test'" in complaint(f"t=tfds:{prepared[0]}?split=train[:5%]")
    record = json.loads((prepared[0] / "dataset_info.json").read_text())
    shutil.copytree(prepared[0], tmp_path / "copy")
    write(tmp_path / "copy" / "dataset_info.json", json.dumps(record | {"fileFormat": "tfrecord"}))
    assert "only TensorFlow reads" in complaint(f"t=tfds:{tmp_path / 'copy'}?text=story")
    write(tmp_path / "copy" / "dataset_info.json", "{")
    assert "dataset_info.json" in complaint(f"t=tfds:{tmp_path / 'copy'}?text=story")


def test_damaged_array_record_is_refused(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared[0], folder)
    file = folder / "tales-train.array_record-00000-of-00001"
    whole = file.read_bytes()
    for cut in (0, 100, 1 << 16, (1 << 16) + 500, len(whole) - 10):
        assert str(file) in complaint(f"t=tfds:{write(file, whole[:cut]).parent}?text=story"), cut
    write(file, whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert "damaged" in complaint(f"t=tfds:{folder}?text=story")
    file.unlink()
    assert str(file) in complaint(f"t=tfds:{folder}?text=story")
