"""From token ids to text that may be shown: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoding writes for bytes that are no character, or not one yet


class IncrementalDetokenizer:
    """The text of a growing row of token ids.

    text holds the complete characters so far, num_shown how many of them take() has handed out. As in vLLM, the text
    ends at the first character that completes a stop string, so that it does not depend on how tokens cut it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.tokenizer, self.stop, self.min_tokens = tokenizer, stop, min_tokens
        self.token_ids: list[int] = []
        self.prefix_offset = self.read_offset = 0
        self.text = ""
        self.num_shown = 0

    def add(self, token_id: int, is_last: bool = False) -> str | None:
        """Append a token. Returns the stop string that it completes, or None; text then ends where that begins."""
        self.token_ids.append(token_id)
        return self._extend(flush=is_last)

    def take(self, finished: bool) -> str:
        """The text that can be shown now and has not been; at the end, all that is left."""
        if finished:
            self._extend(flush=True)  # a stop token can leave half a character behind
        end = len(self.text) - (0 if finished else self.num_held_back())
        new_text = self.text[self.num_shown : end]
        self.num_shown = end
        return new_text

    def decode_next(self, flush: bool = False) -> str:
        """The characters that the tokens from read_offset on add: none while they end in half a character.

        They are decoded together with those from prefix_offset on, since some tokenizers drop a space at the start;
        so the offsets move only once there is new text. flush: give out what there is.
        """
        shown = self._decode(self.token_ids[self.prefix_offset : self.read_offset])
        text = self._decode(self.token_ids[self.prefix_offset :])
        if not flush and (len(text) <= len(shown) or text.endswith(REPLACEMENT)):
            return ""
        self.prefix_offset, self.read_offset = self.read_offset, len(self.token_ids)
        return text[len(shown) :]

    def find_stop(self, num_before: int) -> str | None:
        """Look for stop strings that end after the first num_before characters; cut text off where the first begins."""
        found = []
        for stop in self.stop:
            start = self.text.find(stop, max(0, num_before - len(stop) + 1))  # it may begin in earlier tokens
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        self.text = self.text[:start]
        return stop

    def num_held_back(self) -> int:
        """How many characters at the end of text may yet turn out to be the beginning of a stop string."""
        lengths = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _extend(self, flush: bool) -> str | None:
        num_before = len(self.text)
        self.text += self.decode_next(flush)
        return None if len(self.token_ids) <= self.min_tokens else self.find_stop(num_before)

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)  # type: ignore[return-value]
