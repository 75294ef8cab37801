"""Log probabilities in the forms of both APIs, and the text of a single token."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Any

from common.answer_text import special_tokens
from common.openai_app.protocol import ApiRequest
from common.outputs import CompletionOutput, Logprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        self._texts, self._shows_special = texts, not request.params.skip_special_tokens
        self._pending: list[tuple[int, dict[int, Logprob] | None]] = []
        self._offsets: list[int] = []  # of the pending tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text_offset = 0

    def add(self, output: CompletionOutput) -> None:
        self._pending += zip(output.token_ids, output.logprobs or [], strict=True)
        self._offsets += [self._advance(token_id) for token_id in output.token_ids]

    def add_prompt(self, text: str, token_ids: list[int], logprobs: list[dict[int, Logprob] | None]) -> None:
        """Of the prompt, which the choice's text begins with."""
        self._pending += zip(token_ids, logprobs, strict=True)
        for token_id in token_ids:
            self._offsets.append(self._text_offset)
            piece = self._decoder.decode(self._texts.bytes_of(token_id))
            for shown in (piece, piece.lstrip(" ")):  # the tokenizer may have added a space, or a special token
                if text.startswith(shown, self._text_offset):
                    self._text_offset += len(shown)
                    break
        self._text_offset = len(text)

    def take(self) -> dict[str, Any] | None:
        """What was added since the last call, or None if there is nothing."""
        pending, self._pending = self._pending, []
        offsets, self._offsets = self._offsets, []
        if not pending:
            return None
        if self._is_chat:
            return {"content": [self._chat_entry(token_id, logprobs) for token_id, logprobs in pending if logprobs]}
        return {
            "tokens": [self._texts.text_of(token_id) for token_id, _ in pending],
            "token_logprobs": [logprobs and _finite(logprobs[token_id]) for token_id, logprobs in pending],
            "top_logprobs": [
                logprobs and {self._texts.text_of(other): _finite(logprob) for other, logprob in logprobs.items()}
                for _, logprobs in pending
            ],
            "text_offset": offsets,
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
        if self._shows_special or not self._texts.is_special(token_id):
            self._text_offset += len(self._decoder.decode(self._texts.bytes_of(token_id)))
        return offset


def describe_prompt(
    texts: TokenTexts, logprobs: list[dict[int, Logprob] | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """prompt_logprobs in vLLM's form: for each token of the prompt but the first, that token and the likeliest ones."""
    return [None if entry is None else _describe_entry(texts, entry) for entry in logprobs]


def _describe_entry(texts: TokenTexts, entry: dict[int, Logprob]) -> dict[str, dict[str, Any]]:
    return {
        str(token_id): {
            "logprob": _finite(logprob), "rank": logprob.rank, "decoded_token": texts.text_of(token_id),
        }
        for token_id, logprob in entry.items()
    }  # fmt: skip


def _finite(logprob: Logprob) -> float:
    return max(MIN_LOGPROB, logprob.logprob)


def _byte_level_alphabet() -> dict[str, int]:
    """Maps each character of byte-level BPE to its byte (the inverse of GPT-2's bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
