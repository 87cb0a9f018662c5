"""Cleaning, language and splitting."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import InputEmpty
from serve_app.router.text import clean, find_language, is_speakable, split

CASES = {
    "en": "Dr. Smith paid $3.50 to J. K. Rowling. Then he left! Did he?",
    "de": "Das kostet 3,50 Euro. Z. B. heute.",
    "ja": "こんにちは。お元気ですか？はい。",
    "zh": "你好。今天天气很好！你呢？",
    "hi": "नमस्ते। आप कैसे हैं?",
}


@pytest.mark.parametrize("language", CASES)
def test_sentences_are_found_and_nothing_is_lost(language: str) -> None:
    text = CASES[language]
    pieces = split(text, language, 250)
    assert "".join(pieces) == text
    assert 2 <= len(pieces) <= 4


@given(st.text(min_size=1, max_size=400), st.integers(min_value=5, max_value=80))
@settings(max_examples=300, deadline=None)
def test_splitting_is_lossless_and_bounded(text: str, limit: int) -> None:
    try:
        text = clean(text)
    except InputEmpty:
        return
    pieces = split(text, "en", limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert all(pieces)


def test_long_sentence_is_cut_at_a_clause_then_at_a_word() -> None:
    clauses = "one two three four five, six seven eight nine ten eleven twelve"
    assert split(clauses, "en", 40)[0] == "one two three four five, "
    words = "one two three four five six seven eight nine ten eleven twelve"
    pieces = split(words, "en", 20)
    assert all(piece == pieces[-1] or piece.endswith(" ") for piece in pieces)
    assert split("x" * 45, "en", 20) == ["x" * 20, "x" * 20, "x" * 5]


def test_pieces_without_words_join_their_neighbour() -> None:
    pieces = split("Wait... !!! What? — Yes.", "en", 250)
    assert all(is_speakable(piece) for piece in pieces)


@pytest.mark.parametrize(
    "text",
    [
        "." * 99_999 + "a",
        "a." * 50_000,
        "(" * 50_000 + "a" + ")" * 50_000,
        "1" * 100_000,
        "1," * 50_000,
        "a" + "\u0301" * 99_999,
        "a, " * 33_333,
        "Dr. " * 25_000,
        "\u0b95\u0bcd" * 50_000,
        "\ufdfa" * 20_000,
    ],
    ids=[
        "dots",
        "initials",
        "nested",
        "digits",
        "commas",
        "marks",
        "list",
        "titles",
        "conjuncts",
        "ligature",
    ],
)
def test_a16_texts_made_to_take_long_do_not(text: str) -> None:
    began_s = time.process_time()
    cleaned = clean(text)
    find_language(cleaned, ("en",))
    pieces = split(cleaned, "en", 250)
    # Milliseconds here; what is quadratic in a text of this length takes minutes.
    assert time.process_time() - began_s < 10
    assert "".join(pieces) == cleaned
    assert all(len(piece) <= 250 for piece in pieces)


@pytest.mark.parametrize("text", ["", "  \n", "…!!", "🎉", "\u0000\u0001", "\ufeff", "\ud800"])
def test_nothing_to_speak(text: str) -> None:
    with pytest.raises(InputEmpty):
        clean(text)


def test_clean_normalises_and_drops_what_cannot_be_spoken() -> None:
    assert clean("\ufeffCafe\u0301\x07 no\ud800ir ") == "Café  no ir"
    assert clean("two\nlines") == "two\nlines"


@pytest.mark.parametrize(
    ("text", "spoken", "expected"),
    [
        ("Hello.", ("en",), "en"),
        ("Bonjour", ("en",), "en"),
        ("Guten Morgen, wie geht es dir heute?", ("en",), "de"),
        ("Guten Morgen, wie geht es dir heute?", ("en", "de"), "de"),
        ("Привет", ("en",), "ru"),
        ("こんにちは", ("en",), "ja"),
        ("Hello.", ("en", "it"), "en"),
        ("Hola", ("en", "es"), "es"),
        ("OK 123", ("de", "en"), "de"),
        ("Xyzzy plugh", ("en",), "en"),
    ],
)
def test_language(text: str, spoken: tuple[str, ...], expected: str) -> None:
    assert find_language(text, spoken) == expected
