"""Turn token ids into text that can be shown: no half characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.answer_text import REPLACEMENT, end_of_prompt
from common.sampling_params import SamplingParams


class IncrementalDetokenizer:
    """The text of a growing list of token ids.

    The list begins with the prompt's last tokens, which are not shown: the answer continues their text. text holds the
    complete characters so far; num_shown counts those that take() has returned. As in vLLM, the first character that
    completes a stop string ends the text, so the result does not depend on token boundaries. include_stop_str: whether
    the text keeps the stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop, self.min_tokens = decoder_of(tokenizer), params.stop, params.min_tokens
        self.include_stop_str = params.include_stop_str_in_output
        self.skip_special_tokens = params.skip_special_tokens
        self.token_ids, self.read_offset = end_of_prompt(tokenizer, prompt_token_ids, self.skip_special_tokens)
        self.prefix_offset, self.num_prompt_tokens = 0, len(self.token_ids)
        self.text = ""
        self.num_shown = 0

    def add(self, token_id: int, is_last: bool = False) -> str | None:
        """Append a token. If it completes a stop string, cut the text there and return the string; else return None."""
        self.token_ids.append(token_id)
        return self._extend(flush=is_last)

    def take(self, finished: bool) -> str:
        """The new text that can be shown; at the end, all remaining text."""
        if finished and len(self.token_ids) > self.num_prompt_tokens:
            self._extend(flush=True)  # before a stop token, the text may end in half a character
        end = len(self.text) - (0 if finished else self.num_held_back())
        new_text = self.text[self.num_shown : end]
        self.num_shown = end
        return new_text

    def decode_next(self, flush: bool = False) -> str:
        """The characters that the tokens from read_offset on add; none while they end in half a character.

        These tokens are decoded together with those from prefix_offset on, because some tokenizers drop a leading
        space. The offsets move only when there is new text. flush: return half a character too.
        """
        shown = self._decode(self.token_ids[self.prefix_offset : self.read_offset])
        text = self._decode(self.token_ids[self.prefix_offset :])
        if not flush and (len(text) <= len(shown) or text.endswith(REPLACEMENT)):
            return ""
        self.prefix_offset, self.read_offset = self.read_offset, len(self.token_ids)
        return text[len(shown) :]

    def find_stop(self, num_before: int) -> str | None:
        """Find the first stop string that ends after num_before characters, and cut the text before or after it."""
        found = []
        for stop in self.stop:
            start = self.text.find(stop, max(0, num_before - len(stop) + 1))  # it may begin in earlier tokens
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        end, start, stop = min(found)
        self.text = self.text[: end if self.include_stop_str else start]
        return stop

    def num_held_back(self) -> int:
        """How many characters at the end of text may be the beginning of a stop string that must not be shown."""
        if self.include_stop_str:
            return 0
        lengths = (n for stop in self.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _extend(self, flush: bool) -> str | None:
        num_before = len(self.text)
        self.text += self.decode_next(flush)
        num_tokens = len(self.token_ids) - self.num_prompt_tokens
        return None if num_tokens <= self.min_tokens else self.find_stop(num_before)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens)
        return text


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What decodes as the tokenizer does, but faster if it can be: with a few tokens, transformers' decode() takes most
    of its time around the call of the library in Rust."""
    if isinstance(tokenizer, PreTrainedTokenizerFast) and not tokenizer.clean_up_tokenization_spaces:
        return tokenizer.backend_tokenizer
    return tokenizer
