"""What of a text can be spoken while it is still being written."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.ingress.written_text import Granularity, WrittenText, is_speakable


def spoken(pieces: list[str], granularity: Granularity = Granularity.SENTENCE, room: int = 1000) -> list[str]:
    """What is handed out after each piece, and after the end, without what was empty."""
    text = WrittenText(granularity, "en")
    taken = []
    for piece in pieces:
        text.add(piece)
        taken.append(text.take(room))
    text.flush()
    while rest := text.take(room):
        taken.append(rest)
    return [part for part in taken if part]


def test_a_sentence_is_complete_once_something_follows_it() -> None:
    text = WrittenText(Granularity.SENTENCE, "en")
    text.add("It costs 3.")
    assert text.take(100) == ""
    text.add("5 euros. And")
    assert text.take(100) == "It costs 3.5 euros. "
    assert text.take(100) == ""
    text.flush()
    assert text.take(100) == "And"
    assert text.pending == 0


def test_abbreviations_end_nothing() -> None:
    assert spoken(["Dr. ", "Brown ", "is in. ", "He waits."]) == ["Dr. Brown is in. ", "He waits."]


def test_the_end_of_a_line_completes_it() -> None:
    assert spoken(["- one item", "\n- two", " items\n"]) == ["- one item\n", "- two items\n"]


def test_clauses_are_spoken_if_they_are_worth_it() -> None:
    pieces = ["Well, ", "when the rain had ended, ", "we went out."]
    assert spoken(pieces, Granularity.CLAUSE) == ["Well, when the rain had ended, ", "we went out."]


def test_without_granularity_only_a_flush_completes() -> None:
    assert spoken(["One. ", "Two. ", "Three."], Granularity.NONE) == ["One. Two. Three."]


def test_what_has_no_words_goes_with_what_follows() -> None:
    assert spoken(["… !\n", "Hello there.\n"]) == ["… !\nHello there.\n"]
    assert spoken(["…", "!!"]) == []


def test_a_piece_beyond_the_room_is_cut_between_words() -> None:
    parts = spoken(["word " * 10], room=12)
    assert "".join(parts) == "word " * 10
    assert {len(part) for part in parts} == {10}
    assert [len(part) for part in spoken(["x" * 25], room=10)] == [10, 10, 5]


@given(
    st.lists(st.text(st.sampled_from("ab1 .,!?…\n。、あ")), max_size=12),
    st.sampled_from(Granularity),
    st.integers(5, 40),
)
def test_nothing_that_can_be_spoken_is_lost_or_changed(
    pieces: list[str], granularity: Granularity, room: int
) -> None:
    parts = spoken(pieces, granularity, room)
    whole, said = "".join(pieces), "".join(parts)
    assert all(is_speakable(part) and len(part) <= room for part in parts)
    assert [char for char in said if char.isalnum()] == [char for char in whole if char.isalnum()]
