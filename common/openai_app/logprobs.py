"""Log probabilities in the forms of both APIs, and the text of a single token."""

from __future__ import annotations

import codecs
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.answer_text import special_tokens
from common.openai_app.protocol import ApiRequest
from common.outputs import CompletionOutput, Logprob

MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON cannot express
REPLACEMENT = "\ufffd"  # what decoding produces for bytes that are not a character
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # a single byte in the vocabularies of SentencePiece


class TokenTexts:
    """The bytes and the printable form of single tokens. A token can be half a character, so only bytes are exact."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(special_tokens(tokenizer).values())
        self._byte_of_char = _byte_level_alphabet()
        self._cache: dict[int, bytes] = {}

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def bytes_of(self, token_id: int) -> bytes:
        if token_id not in self._cache:
            self._cache[token_id] = self._decode(token_id)
        return self._cache[token_id]

    def text_of(self, token_id: int) -> str:
        r"""The token's text; for half a character OpenAI's form, `bytes:\xe4`."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + raw.decode(errors="backslashreplace")

    def _decode(self, token_id: int) -> bytes:
        text = str(self._tokenizer.decode([token_id]))
        piece = str(self._tokenizer.convert_ids_to_tokens(token_id) or "")  # None beyond the tokenizer's vocabulary
        if REPLACEMENT in text:
            return self._piece_bytes(piece, text)
        # SentencePiece drops the leading space of a text, but this token is not at the start of one.
        lost_space = piece.startswith("▁") and not text.startswith(" ")
        return (" " * lost_space + text).encode()

    def _piece_bytes(self, piece: str, text: str) -> bytes:
        if match := BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(match[1])
        if all(char in self._byte_of_char for char in piece):
            return bytes(self._byte_of_char[char] for char in piece)
        return text.encode()


class LogprobsWriter:
    """One choice's log probabilities: add outputs as they arrive, take the collected entries with the next chunk."""

    def __init__(self, request: ApiRequest, texts: TokenTexts) -> None:
        assert request.params.logprobs is not None, "created only for requests with logprobs"
        self._is_chat, self._num_top = request.is_chat, request.params.logprobs
        self._texts = texts
        self._pending: list[tuple[int, dict[int, Logprob]]] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text_offset = 0

    def add(self, output: CompletionOutput) -> None:
        self._pending += zip(output.token_ids, output.logprobs or [], strict=True)

    def take(self) -> dict[str, Any] | None:
        """What was added since the last call, or None if there is nothing."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        if self._is_chat:
            return {"content": [self._chat_entry(token_id, logprobs) for token_id, logprobs in pending]}
        return {
            "tokens": [self._texts.text_of(token_id) for token_id, _ in pending],
            "token_logprobs": [_finite(logprobs[token_id]) for token_id, logprobs in pending],
            "top_logprobs": [
                {self._texts.text_of(other): _finite(logprob) for other, logprob in logprobs.items()}
                for _, logprobs in pending
            ],
            "text_offset": [self._advance(token_id) for token_id, _ in pending],
        }

    def _chat_entry(self, token_id: int, logprobs: dict[int, Logprob]) -> dict[str, Any]:
        top = sorted((logprob.rank, other) for other, logprob in logprobs.items() if logprob.rank <= self._num_top)
        del top[self._num_top :]  # the sampled token may have the same rank as another
        return {
            **self._chat_token(token_id, logprobs[token_id]),
            "top_logprobs": [self._chat_token(other, logprobs[other]) for _, other in top],
        }

    def _chat_token(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        text, raw = self._texts.text_of(token_id), self._texts.bytes_of(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}

    def _advance(self, token_id: int) -> int:
        """Where in the choice's text this token begins, in characters; the next one begins after it."""
        offset = self._text_offset
        if not self._texts.is_special(token_id):  # special tokens are not in the text
            self._text_offset += len(self._decoder.decode(self._texts.bytes_of(token_id)))
        return offset


def _finite(logprob: Logprob) -> float:
    return max(MIN_LOGPROB, logprob.logprob)


def _byte_level_alphabet() -> dict[str, int]:
    """Maps each character of byte-level BPE to its byte (the inverse of GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
