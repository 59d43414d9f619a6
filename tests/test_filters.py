"""Filters: each word does what it says, and a wrong one is answered with the right one."""

import numpy as np
import pytest

from tinyllama_jax.data import sources
from tinyllama_jax.data.filters import Filters, parse
from tinyllama_jax.errors import ConfigError, DataError


def document(text="", fields=None, tokens=None) -> sources.Document:
    return sources.Document("web", text, "corpus/a.jsonl:7", fields=fields or {}, tokens=tokens)


def test_no_filter_keeps_everything():
    none = parse(())
    assert none == Filters() and not none.any_duplicates
    assert none.refusal(document("")) is None


@pytest.mark.parametrize(
    ("word", "kept", "refused"),
    [
        ("min_chars=3", ["abc", "äöü", "\U0001f600" * 3], ["", "ab", "\U0001f600" * 2]),
        ("max_chars=3", ["", "abc", "語" * 3], ["abcd", "語" * 4]),
        ("min_chars=0", ["", "a"], []),
    ],
)
def test_length_is_counted_in_characters(word, kept, refused):
    filters = parse((word,))
    assert [filters.refusal(document(text)) for text in kept] == [None] * len(kept)
    assert [filters.refusal(document(text)) for text in refused] == [word] * len(refused)


@pytest.mark.parametrize(
    ("word", "kept", "refused"),
    [
        ("keep:lang=en,de", ["en", "de"], ["fr", "", "EN", "en,de", "e"]),
        ("drop:lang=en,de", ["fr", "", "EN", "en,de", "e"], ["en", "de"]),
        ("keep:lang=en,", ["en", ""], ["de"]),
        ("drop:lang=a=b", ["a", "b"], ["a=b"]),
    ],
)
def test_fields_are_compared_exactly(word, kept, refused):
    filters = parse((word,))
    assert [filters.refusal(document(fields={"lang": value})) for value in kept] == [None] * len(kept)
    assert [filters.refusal(document(fields={"lang": value})) for value in refused] == [word] * len(refused)


def test_dotted_fields():
    filters = parse(("drop:meta.redpajama_set_name=RedPajamaGithub",))
    assert filters.refusal(document(fields={"meta.redpajama_set_name": "RedPajamaC4"})) is None
    assert filters.refusal(document(fields={"meta.redpajama_set_name": "RedPajamaGithub"}))


def test_the_first_filter_that_refuses_is_named():
    words = ("max_chars=5", "min_chars=2", "keep:lang=en")
    filters = parse(words)
    assert filters.refusal(document("123456", {"lang": "fr"})) == "max_chars=5"
    assert filters.refusal(document("1", {"lang": "fr"})) == "min_chars=2"
    assert filters.refusal(document("123", {"lang": "fr"})) == "keep:lang=en"
    assert filters.refusal(document("123", {"lang": "en"})) is None
    assert parse(words[::-1]).refusal(document("123456", {"lang": "fr"})) == "keep:lang=en"


def test_filters_of_all_documents_refuse_none_by_itself():
    filters = parse(("exact_duplicates", "near_duplicates=0.8", "near_duplicates=0.80"))
    assert (filters.exact, filters.near, filters.any_duplicates, filters.tests) == (True, 0.8, True, ())
    assert filters.refusal(document("")) is None
    assert parse(("exact_duplicates",)) == Filters(exact=True)
    assert parse(("near_duplicates=1",)) == Filters(near=1.0)
    assert parse(("exact_duplicates",)).any_duplicates and parse(("near_duplicates=1",)).any_duplicates


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("min_char=3", "did you mean 'min_chars'?"),
        ("near_duplicate=0.8", "did you mean 'near_duplicates'?"),
        ("quality", "there are: min_chars, max_chars, keep, drop, exact_duplicates, near_duplicates"),
        ("", "there are: min_chars"),
        ("=3", "there are: min_chars"),
        ("min_chars", "write it like min_chars=200"),
        ("min_chars:lang=3", "write it like min_chars=200"),
        ("min_chars=", "'' is no number of characters"),
        ("min_chars=-1", "'-1' is no number of characters"),
        ("min_chars=2e3", "'2e3' is no number of characters"),
        ("max_chars=1_000", "'1_000' is no number of characters"),
        ("min_chars=" + "9" * 5000, "write it like min_chars=200"),
        ("keep", "write it like keep:lang=en,de"),
        ("keep:lang", "write it like keep:lang=en,de"),
        ("keep=en", "write it like keep:lang=en,de"),
        ("drop:=en", "write it like drop:lang=en,de"),
        ("exact_duplicates=1", "write it like exact_duplicates"),
        ("exact_duplicates=", "write it like exact_duplicates"),
        ("near_duplicates", "write it like near_duplicates=0.8"),
        *((f"near_duplicates={value}", "is no number in (0, 1]") for value in ("0", "1.01", "-1", "nan", "inf", "80%")),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(word, part):
    with pytest.raises(ConfigError) as error:
        parse(("min_chars=1", word))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_two_similarities_contradict_each_other():
    with pytest.raises(ConfigError, match="contradicts near_duplicates=0.8"):
        parse(("near_duplicates=0.8", "near_duplicates=0.7"))


@pytest.mark.parametrize("word", ["keep:language=en", "drop:language=en"])
def test_a_field_that_is_not_there_is_an_error(word):
    filters = parse((word,))
    with pytest.raises(DataError, match=r"^corpus/a.jsonl:7: has no field 'language' for .*\?fields=language"):
        filters.refusal(document("text"))
    with pytest.raises(DataError, match="did you mean 'lang'"):
        filters.refusal(document("text", {"lang": "en", "meta.source": "x"}))
    with pytest.raises(DataError, match=r"it has: group, stars"):
        filters.refusal(document("text", {"stars": "3", "group": "x"}))


def test_tokens_have_no_length_in_characters():
    with pytest.raises(DataError, match="corpus/a.jsonl:7: holds tokens and no text, so max_chars"):
        parse(("max_chars=10",)).refusal(document(tokens=np.arange(5)))
