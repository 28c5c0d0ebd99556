"""Stop strings across any borders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.text.stream import StopStrings

WORDS = st.text("ab.", min_size=1, max_size=4)


def pushed(stops, pieces):
    """(shown piece by piece, whether it stopped)."""
    filter_, shown, stopped = StopStrings(stops), [], False
    for piece in pieces:
        text, stopped = filter_.push(piece)
        shown.append(text)
    return [*shown, filter_.finish()], stopped


def naive(stops, text):
    """The whole text at once: up to the stop string that is complete first, the longest of them."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(derandomize=True, max_examples=500)
@given(stops=st.lists(WORDS, max_size=3), pieces=st.lists(st.text("ab.", max_size=5), max_size=8))
def test_pushing_pieces_equals_searching_the_whole_text(stops, pieces):
    shown, stopped = pushed(stops, pieces)
    assert ("".join(shown), stopped) == naive(stops, "".join(pieces))


@settings(derandomize=True, max_examples=300)
@given(stops=st.lists(WORDS, min_size=1, max_size=3), text=st.text("ab.", max_size=12))
def test_only_a_possible_prefix_of_a_stop_string_is_buffered(stops, text):
    """What is shown after each character is all but the longest tail that may still matter."""
    filter_ = StopStrings(stops)
    shown = ""
    for count, character in enumerate(text, 1):
        new, stopped = filter_.push(character)
        shown += new
        if stopped:
            return
        tails = [text[place:count] for place in range(count + 1)]
        held = next(tail for tail in tails if any(s.startswith(tail) for s in stops))
        assert shown + held == text[:count]


def test_without_stop_strings_text_is_not_buffered():
    assert pushed([], ["ab", "", "c"]) == (["ab", "", "c", ""], False)


def test_a_stop_string_across_three_pieces_is_found_and_later_text_dropped():
    assert pushed(["###"], ["a#", "#", "#b", "c"]) == (["a", "", "", "", ""], True)


def test_a_buffered_prefix_of_a_stop_string_is_returned_by_finish():
    assert pushed(["###"], ["a##"]) == (["a", "##"], False)


def test_the_longest_of_the_stop_strings_that_end_together_is_removed():
    assert pushed(["b", "ab", "xab"], ["1ab2"]) == (["1", ""], True)


def test_an_empty_stop_string_raises():
    with pytest.raises(UserError, match="empty"):
        StopStrings(["a", ""])
