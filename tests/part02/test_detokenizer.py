"""The detokenizer: half characters wait, stop strings are never shown, and token boundaries make no difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.checkpoint import MODELS_DIR
from part02_streaming.detokenizer import IncrementalDetokenizer

CLASS = "detokenizer.py::IncrementalDetokenizer"
LOOK_DECODE = f'Look at {CLASS}.decode_next; README "Half characters".'
LOOK_FIND = f'Look at {CLASS}.find_stop; README "Stop strings".'
LOOK_HOLD = f'Look at {CLASS}.num_held_back; README "Stop strings".'
LOOK_TAKE = f'Look at {CLASS}.add and take; README "Stop strings".'
REPLACEMENT = "\ufffd"
Piece = str | bytes | None

quick = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


class Pieces:
    """A tokenizer whose token n stands for the n-th piece; None is a special token, "▁" a space.

    drops_first_space: like Llama 2's, it drops the space at the start of a text.
    """

    def __init__(self, pieces: Sequence[Piece], drops_first_space: bool = False) -> None:
        self.pieces, self.drops_first_space = pieces, drops_first_space
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens, f"special tokens are not shown. {LOOK_DECODE}"
        self.num_decoded += len(token_ids)
        pieces = [self.pieces[i] or b"" for i in token_ids]
        raw = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
        text = raw.decode("utf-8", errors="replace").replace("▁", " ")
        return text.removeprefix(" ") if self.drops_first_space else text


@dataclass
class Run:
    """The result of a stream: the text shown after each token, and the stop string that ended it."""

    deltas: list[str]
    stop: str | None

    @property
    def text(self) -> str:
        return "".join(self.deltas)


def stream(
    tokenizer: Any, token_ids: Sequence[int], stop: Sequence[str] = (), min_tokens: int = 0, then: str = "length"
) -> Run:
    """Add the tokens one by one, as LLM.stream does. The last one ends it by length, or a stop token follows."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop, min_tokens)
    run = Run([], None)
    for number, token_id in enumerate(token_ids, start=1):
        is_last = number == len(token_ids) and then == "length"
        run.stop = detokenizer.add(token_id, is_last=is_last)
        run.deltas.append(detokenizer.take(finished=run.stop is not None or is_last))
        if run.stop is not None:
            return run
    if then == "stop token":
        run.deltas.append(detokenizer.take(finished=True))
    return run


def stream_pieces(pieces: Sequence[Piece], *args: Any, **options: Any) -> Run:
    return stream(Pieces(pieces), range(len(pieces)), *args, **options)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODELS_DIR / "tiny")


# Half characters

FOX = "🦊".encode()
DELTAS: dict[str, tuple[list[Piece], list[str]]] = {
    "whole characters are shown at once": (["Hel", "lo", " wor", "ld"], ["Hel", "lo", " wor", "ld"]),
    "one token": (["Hello"], ["Hello"]),
    "a letter of two bytes": (["caf", b"\xc3", b"\xa9", "s"], ["caf", "", "é", "s"]),
    "an emoji in four tokens": ([FOX[:1], FOX[1:2], FOX[2:3], FOX[3:]], ["", "", "", "🦊"]),
    "an emoji in two tokens, text around it": (["a", b" " + FOX[:3], FOX[3:] + b"!"], ["a", "", " 🦊!"]),
    "a token with the end of one and the beginning of the next": (
        ["日".encode()[:2], "日本".encode()[2:4], "本".encode()[1:]], ["", "", "日本"]
    ),
    "invalid bytes in the middle": (["a", b"\xff", "b"], ["a", "", "\ufffdb"]),
    "invalid bytes, then a whole character in pieces": (["a", b"\xff", b"\xc3", b"\xa9"], ["a", "", "", "\ufffdé"]),
    "a character broken off by another": (["a", FOX[:2], "b", "c"], ["a", "", "\ufffdb", "c"]),
    "invalid bytes at the end": (["a", b"\xff"], ["a", REPLACEMENT]),
    "half a character at the end": (["a", FOX[:1], FOX[1:3]], ["a", "", REPLACEMENT]),
    "nothing but half a character": ([FOX[:2]], [REPLACEMENT]),
    "a real U+FFFD in the middle": (["a", REPLACEMENT, "b"], ["a", "", "\ufffdb"]),
    "a real U+FFFD at the end": (["a", "b\ufffd"], ["a", "b\ufffd"]),
    "a real U+FFFD inside of a token": (["a", "b\ufffdc", "d"], ["a", "b\ufffdc", "d"]),
    "a special token in the middle": (["a", None, "b"], ["a", "", "b"]),
    "special tokens around": ([None, None, "a", None], ["", "", "a", ""]),
    "a special token inside of a character": (["a", b"\xc3", None, b"\xa9"], ["a", "", "", "é"]),
    "an empty token": (["a", "", "b"], ["a", "", "b"]),
    "no token but special ones": ([None, None], ["", ""]),
}  # fmt: skip


@pytest.mark.parametrize("case", DELTAS)
def test_half_characters_wait(case: str) -> None:
    pieces, expected = DELTAS[case]
    got = stream_pieces(pieces).deltas
    assert got == expected, f"{case}: after the tokens {pieces} expected {expected}, got {got}. {LOOK_DECODE}"


@pytest.mark.parametrize(("pieces", "expected"), [(["a", FOX[:2]], "a\ufffd"), (["a", "b"], "ab"), ([], "")])
def test_the_remaining_text_at_a_stop_token(pieces: list[Piece], expected: str) -> None:
    got = stream_pieces(pieces, then="stop token").text
    assert got == expected, f"{pieces}, then a stop token: expected {expected!r}, got {got!r}. {LOOK_TAKE}"


SPACES: dict[str, tuple[list[Piece], list[str]]] = {
    "words": (["▁Hello", "▁the", "▁world"], ["Hello", " the", " world"]),
    "half words": (["▁Hel", "lo", "▁wor", "ld"], ["Hel", "lo", " wor", "ld"]),
    "spaces first": (["▁", "▁", "▁a"], ["", " ", " a"]),
    "spaces in the middle": (["a", "▁", "▁", "▁b"], ["a", " ", " ", " b"]),
    "a special token before": ([None, "▁Hello", "▁world"], ["", "Hello", " world"]),
    "a special token between": (["▁Hello", None, "▁world"], ["Hello", "", " world"]),
    "three special tokens between": (["▁Hello", None, None, None, "▁world"], ["Hello", "", "", "", " world"]),
    "an emoji between": (["▁a", b" " + FOX[:2], FOX[2:], "▁b"], ["a", "", " 🦊", " b"]),
}


@pytest.mark.parametrize("case", SPACES)
def test_a_tokenizer_that_drops_the_space_at_the_start(case: str) -> None:
    pieces, expected = SPACES[case]
    got = stream(Pieces(pieces, drops_first_space=True), range(len(pieces))).deltas
    assert got == expected, (
        f"{case}: this tokenizer drops a space at the start of what it decodes. After the tokens {pieces} expected "
        f"{expected}, got {got}. {LOOK_DECODE}"
    )


def test_the_work_does_not_grow_with_the_text() -> None:
    tokenizer = Pieces(["word "] * 1000)
    run = stream(tokenizer, range(1000))
    assert run.text == "word " * 1000, f"1000 words were decoded wrongly: {run.text[:50]}…. {LOOK_DECODE}"
    got = tokenizer.num_decoded / 1000
    assert got <= 6, (
        f"for each of 1000 tokens {got:.0f} were decoded, expected 6 at most: only the newest and those that were "
        f"shown just before. {LOOK_DECODE}"
    )


def check_against_decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> None:
    """Joined, the deltas are the whole text; and text that is complete is shown at once."""
    deltas = stream(tokenizer, token_ids).deltas
    for count in range(1, len(token_ids) + 1):
        shown, text = "".join(deltas[:count]), tokenizer.decode(token_ids[:count], skip_special_tokens=True)
        is_whole = count == len(token_ids) or not text.endswith(REPLACEMENT)
        assert shown == text if is_whole else text.startswith(shown), (
            f"after {count} of the tokens {token_ids}, which decode to {text!r}, {shown!r} was shown. {LOOK_DECODE}"
        )


TEXTS = {
    "emoji": "Foxes 🦊🦊 and 👩‍👩‍👧‍👦, 🇩🇪 and 🐻.",
    "Chinese and Japanese": "日本語のテキストです。 我们很好,谢谢!",
    "Arabic, Hindi, Greek": "مرحبا بالعالم नमस्ते Καλημέρα",
    "combining marks": "naïve cafe\u0301 Zu\u0308rich – “quoted” …",
    "a real U+FFFD": "a\ufffdb \ufffd\ufffd c\ufffd",
    "code": "def add(a, b):\n    return a + b  # ±\n\n\tx = {1: '½'}\r\n",
    "spaces": "  two  three   \n\n four    ",
    "special tokens": "<|im_start|>user\nHi 🦊<|im_end|>\n<|im_start|>",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_of_the_shipped_tokenizer(tiny: PreTrainedTokenizerBase, kind: str) -> None:
    check_against_decode(tiny, tiny.encode(TEXTS[kind], add_special_tokens=False))


def test_any_token_ids_of_the_shipped_tokenizer(tiny: PreTrainedTokenizerBase) -> None:
    token_ids = st.integers(0, 4095) | st.integers(0, 300) | st.sampled_from(tiny.encode("🦊日é\ufffd"))

    @settings(quick, max_examples=300)
    @given(token_ids=st.lists(token_ids, max_size=20))
    def check(token_ids: list[int]) -> None:
        check_against_decode(tiny, token_ids)

    check()


def test_two_streams_do_not_mix(tiny: PreTrainedTokenizerBase) -> None:
    texts = ["Foxes 🦊 say hello, Nora.", "日本語 and the rest"]
    detokenizers = [IncrementalDetokenizer(tiny), IncrementalDetokenizer(tiny)]
    rows = [tiny.encode(text, add_special_tokens=False) for text in texts]
    got = ["", ""]
    for number in range(max(map(len, rows))):
        for i, row in enumerate(rows):
            if number < len(row):
                detokenizers[i].add(row[number])
                got[i] += detokenizers[i].take(finished=False)
    assert got == texts, f"two streams in turns: expected {texts}, got {got}. {LOOK_DECODE}"


# Stop strings: where they are found

FOUND: dict[str, tuple[str, int, list[str], str | None, str]] = {
    "in the new text": ("abcEND", 3, ["END"], "END", "abc"),
    "more text after it": ("abcENDefg", 3, ["END"], "END", "abc"),
    "all of the text": ("END", 0, ["END"], "END", ""),
    "only its last character is new": ("abcEND", 5, ["END"], "END", "abc"),
    "it begins with the first character of all": ("ENDx", 2, ["END"], "END", ""),
    "it ended before the new text": ("abENDcd", 5, ["END"], None, "abENDcd"),
    "nothing is new": ("abEND", 5, ["END"], None, "abEND"),
    "once before and once in the new text": ("aENDbEND", 4, ["END"], "END", "aENDb"),
    "twice in the new text": ("aENDbEND", 0, ["END"], "END", "a"),
    "it overlaps with one that ended before": ("aaa", 2, ["aa"], "aa", "a"),
    "only a part of it": ("abcEN", 3, ["END"], None, "abcEN"),
    "longer than the text": ("EN", 0, ["ENDING"], None, "EN"),
    "no stop strings": ("abc", 0, [], None, "abc"),
    "one character": ("abc\n", 3, ["\n"], "\n", "abc"),
    "another case": ("abcEND", 3, ["end"], None, "abcEND"),
    "no pattern": ("abc", 0, [".*", "a.c", "[b]"], None, "abc"),
    "a character of four bytes": ("ab🦊c", 2, ["🦊"], "🦊", "ab"),
    "the one that is complete first wins": ("xabyz", 0, ["yz", "ab"], "ab", "x"),
    "not the one that begins first": ("abcdef", 0, ["abcde", "cd"], "cd", "ab"),
    "a prefix of another": ("xabc", 0, ["abc", "ab"], "ab", "x"),
    "both end together: the one that begins first": ("xabc", 0, ["bc", "abc", "c"], "abc", "x"),
    "four of them, the last is there": ("Nora said", 0, ["Bo", "Mia", "Tom", "said"], "said", "Nora "),
    "the same twice": ("xab", 0, ["ab", "ab"], "ab", "x"),
}


@pytest.mark.parametrize("case", FOUND)
def test_find_stop(case: str) -> None:
    text, num_before, stop, expected, left = FOUND[case]
    for strings in (stop, stop[::-1]):
        detokenizer = IncrementalDetokenizer(Pieces([]), strings)
        detokenizer.text = text
        got = detokenizer.find_stop(num_before)
        where = f"{case}: stop strings {strings} in {text!r}, of which {text[num_before:]!r} is new"
        assert got == expected, f"{where}: expected {expected!r}, got {got!r}. {LOOK_FIND}"
        assert detokenizer.text == left, f"{where}: expected {left!r} to be left, got {detokenizer.text!r}. {LOOK_FIND}"


# Stop strings: what is held back

HELD: dict[str, tuple[str, list[str], int]] = {
    "the first character": ("abcE", ["END"], 1),
    "all but the last": ("abcEN", ["END"], 2),
    "a whole one that min_tokens allowed": ("abcEND", ["END"], 0),
    "its end alone is no beginning": ("abcND", ["END"], 0),
    "nothing of it": ("abc", ["END"], 0),
    "a beginning that continued differently": ("abcENE", ["END"], 1),
    "it repeats itself": ("abab", ["ababc"], 4),
    "a whole one that is the beginning of another": ("xab", ["ab", "abc"], 2),
    "a whole one that begins again": ("aa", ["aa"], 1),
    "many of one character": ("aaaa", ["aaab"], 3),
    "the longest of several": ("xab", ["bz", "abz", "c"], 2),
    "the longest, whatever the order": ("xab", ["abz", "bz"], 2),
    "all of the text": ("ab", ["abcdef"], 2),
    "nothing to hold": ("", ["END"], 0),
    "no stop strings": ("abc", [], 0),
    "a stop string of one character": ("abc", ["c"], 0),
    "characters of several bytes": ("ab🦊", ["🦊日"], 1),
}


@pytest.mark.parametrize("case", HELD)
def test_num_held_back(case: str) -> None:
    text, stop, expected = HELD[case]
    for strings in (stop, stop[::-1]):
        detokenizer = IncrementalDetokenizer(Pieces([]), strings)
        detokenizer.text = text
        got = detokenizer.num_held_back()
        assert got == expected, (
            f"{case}: stop strings {strings}: expected the last {expected} characters of {text!r} to wait, got {got}. "
            f"{LOOK_HOLD}"
        )


# Stop strings in a stream

STREAMS: dict[str, tuple[list[Piece], list[str], list[str], str | None]] = {
    "over three tokens": (["ABC", "DEF", "GHI", "JKL"], ["DEFGHIJ"], ["ABC", "", "", ""], "DEFGHIJ"),
    "nearly": (["ABC", "DEF", "GHI", "XKL"], ["DEFGHIJ"], ["ABC", "", "", "DEFGHIXKL"], None),
    "its beginning is the end": (["ABC", "DEF", "GHI"], ["DEFGHIJ"], ["ABC", "", "DEFGHI"], None),
    "inside of one token": (["AB", "CDEFG", "H"], ["DE"], ["AB", "C"], "DE"),
    "the first token": (["DE", "F"], ["DE"], [""], "DE"),
    "one character": (["AB", "C\n", "D"], ["\n"], ["AB", "C"], "\n"),
    "from the middle of one to the middle of the next": (["ABC", "DEF"], ["CD"], ["AB", ""], "CD"),
    "a false beginning, then the real one": (["xEN", "END", "y"], ["END"], ["x", "EN"], "END"),
    "never": (["AB", "CD"], ["ZZ", "YY", "XX", "WW"], ["AB", "CD"], None),
    "two overlap": (["AB", "CD", "EF"], ["CDE", "BC"], ["A", ""], "BC"),
    "one is the beginning of the other": (["A", "B", "C"], ["ABC", "AB"], ["", ""], "AB"),
    "the longer one is no longer possible": (["xA", "B", "D"], ["ABC", "BCD"], ["x", "", "ABD"], None),
    "an emoji in four tokens": (["a", FOX[:1], FOX[1:2], FOX[2:3], FOX[3:]], ["🦊"], ["a", "", "", "", ""], "🦊"),
    "an emoji and a word": (["a", FOX[:2], FOX[2:], "s"], ["🦊s"], ["a", "", "", ""], "🦊s"),
    "complete before half a character": (["ab", b"c" + FOX[:2], FOX[2:]], ["c"], ["ab", "", ""], "c"),
    "complete before half a character, and no more tokens": (["ab", b"c" + FOX[:2]], ["c"], ["ab", ""], "c"),
    "an invalid byte as the last token": (["ab", b"\xff"], [REPLACEMENT], ["ab", ""], REPLACEMENT),
    "a real U+FFFD as the last token": (["ab", REPLACEMENT], ["b\ufffd"], ["a", ""], "b\ufffd"),
    "a special token inside of it": (["aE", None, "ND"], ["END"], ["a", "", ""], "END"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_stop_strings_in_a_stream(case: str) -> None:
    pieces, stop, expected, ended_by = STREAMS[case]
    got = stream_pieces(pieces, stop)
    where = f"{case}: tokens {pieces}, stop strings {stop}"
    assert got.stop == ended_by, f"{where}: expected {ended_by!r} to end it, got {got.stop!r}. {LOOK_FIND}"
    assert got.deltas == expected, (
        f"{where}: expected the text {expected}, got {got.deltas}. Look at {CLASS}.find_stop (what is cut off) and "
        'num_held_back (what waits); README "Stop strings".'
    )


@pytest.mark.parametrize(("pieces", "stop", "expected"), [
    (["ab", "c"], ["cd"], "abc"),
    (["ab", b"c" + FOX[:2]], ["c"], "ab"),
    (["ab", b"c" + FOX[:2]], ["cd"], "abc\ufffd"),
    (["ab", b"\xff"], [REPLACEMENT], "ab"),
])  # fmt: skip
def test_a_stop_token_while_text_is_held_back(pieces: list[Piece], stop: list[str], expected: str) -> None:
    got = stream_pieces(pieces, stop, then="stop token").text
    assert got == expected, (
        f"tokens {pieces}, stop strings {stop}, then a stop token: expected {expected!r}, got {got!r}. {LOOK_TAKE}"
    )


MIN_TOKENS: list[tuple[int, list[str], str | None]] = [
    (0, ["a", ""], "EN"),
    (1, ["a", ""], "EN"),
    (2, ["a", "EN", "D", "x", ""], "EN"),  # complete with token 2 of 2: ignored
    (3, ["a", "EN", "D", "x", ""], "EN"),
    (4, ["a", "EN", "D", "x", ""], "EN"),  # complete with token 5
    (5, ["a", "EN", "D", "x", "EN"], None),
]


@pytest.mark.parametrize(("min_tokens", "expected", "ended_by"), MIN_TOKENS)
def test_min_tokens_ignores_early_stop_strings(min_tokens: int, expected: list[str], ended_by: str | None) -> None:
    pieces: list[Piece] = ["a", "EN", "D", "x", "EN"]
    got = stream_pieces(pieces, ["EN"], min_tokens)
    assert (got.deltas, got.stop) == (expected, ended_by), (
        f"tokens {pieces}, stop string 'EN', min_tokens={min_tokens}: one that is complete with the first {min_tokens} "
        f"tokens is text like any other. Expected {expected} and {ended_by!r}, got {got.deltas} and {got.stop!r}. "
        f"{LOOK_TAKE}"
    )


def test_min_tokens_counts_where_a_stop_string_ends() -> None:
    got = stream_pieces(["aE", "N", "D", "x"], ["END"], min_tokens=2)
    assert (got.text, got.stop) == ("a", "END"), (
        f"'END' begins within min_tokens=2 and is complete with token 3: expected 'a' and 'END', got {got}. {LOOK_FIND}"
    )
    got = stream_pieces(["a", "aa", "a", "x"], ["aa"], min_tokens=2)
    assert (got.text, got.stop) == ("aa", "aa"), (
        f"'aaa' after min_tokens=2 and one more 'a': the last two end it. Expected 'aa' twice, got {got}. {LOOK_FIND}"
    )


# Any text, any cut, any stop strings

ALPHABET = st.sampled_from("ab \né日🦊\ufffd")


def cut_by_hand(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, and that string: the longest, if several end there."""
    for end in range(len(text) + 1):
        if found := [string for string in stop if text[:end].endswith(string)]:
            string = max(found, key=len)
            return text[: end - len(string)], string
    return text, None


def held_by_hand(text: str, stop: Sequence[str]) -> int:
    """The characters at the end of the text that are the beginning of a stop string, at most."""
    return max(n for n in range(len(text) + 1) for s in stop if n < len(s) and s.startswith(text[len(text) - n :]))


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[list[bytes], list[str]]:
    """A text as tokens that may cut its characters in pieces, and stop strings, most of them out of the text."""
    text = draw(st.text(ALPHABET, max_size=24))
    stop = draw(st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=2))
    for _ in range(draw(st.integers(0, 2)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        stop.append(text[start : start + draw(st.integers(1, 6))])
    raw = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    return [raw[a:b] for a, b in zip(cuts, cuts[1:], strict=False)], stop


@pytest.mark.parametrize("then", ["length", "stop token"])
def test_the_text_does_not_depend_on_token_boundaries(then: str) -> None:
    @settings(quick, max_examples=600)
    @given(case=cut_texts())
    def check(case: tuple[list[bytes], list[str]]) -> None:
        pieces, stop = case
        text = b"".join(pieces).decode()
        expected, ended_by = cut_by_hand(text, stop)
        got = stream_pieces(pieces, stop, then=then)
        where = f"the text {text!r} in the tokens {pieces} with stop strings {stop}"
        look = f'Look at {CLASS}.find_stop and num_held_back; README "Stop strings".'
        assert got.text == expected, f"{where}: expected {expected!r}, got {got.deltas}. {look}"
        assert got.stop == ended_by or (then == "stop token" and got.stop is None), (
            f"{where}: expected {ended_by!r} to end it, got {got.stop!r}. {look}"
        )
        for count in range(len(got.deltas)):
            shown = "".join(got.deltas[:count])
            assert expected.startswith(shown), f"{where}: {shown!r} was shown, but the text is {expected!r}. {look}"

    check()


def test_nothing_is_held_back_needlessly() -> None:
    """Cut between characters and without U+FFFD, all is known at once: the stop, and what cannot be part of one."""

    @settings(quick, max_examples=300)
    @given(
        pieces=st.lists(st.text("abc🦊", min_size=1, max_size=5), min_size=1, max_size=8),
        stop=st.lists(st.text("abc🦊", min_size=2, max_size=4), min_size=1, max_size=4),
    )
    def check(pieces: list[str], stop: list[str]) -> None:
        got = stream_pieces(pieces, stop)
        for count in range(1, len(got.deltas) + 1):
            shown, text = "".join(got.deltas[:count]), "".join(pieces[:count])
            expected, ended_by = cut_by_hand(text, stop)
            is_last = ended_by is not None or count == len(pieces)
            expected = expected[: len(expected) - (0 if is_last else held_by_hand(text, stop))]
            assert shown == expected, (
                f"after the tokens {pieces[:count]} with stop strings {stop} expected {expected!r} to be shown, got "
                f"{shown!r}. {LOOK_HOLD}"
            )
            assert is_last == (count == len(got.deltas)), (
                f"the tokens {pieces} with stop strings {stop} must end with token {count}, got {got}. {LOOK_FIND}"
            )

    check()
