"""The text of an answer: what its tokens add to the text of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NUM_PROMPT_TOKENS = 5  # vLLM's: enough for a tokenizer that decodes a token differently at the start of a text
REPLACEMENT = "\ufffd"  # what decoding produces for bytes that are not (or not yet) a character


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All tokens that are not part of the text; tokenizer.all_special_tokens has only some of them."""
    return {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def end_of_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True
) -> tuple[list[int], int]:
    """The prompt's last tokens, and how many of them form whole characters: the answer's text begins after these.

    A prompt of token ids may end in the middle of a character; the answer then begins with the rest of its bytes.
    """
    tail = list(prompt_token_ids[-NUM_PROMPT_TOKENS:])
    end = len(tail)
    while end and str(tokenizer.decode(tail[:end], skip_special_tokens=skip_special_tokens)).endswith(REPLACEMENT):
        end -= 1
    return tail, end


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """The answer's text, decoded together with the prompt's last tokens.

    Decoded alone, a tokenizer like Llama 2's would drop the space before the first word.
    """
    if not token_ids:
        return ""
    tail, end = end_of_prompt(tokenizer, prompt_token_ids)
    before = str(tokenizer.decode(tail[:end], skip_special_tokens=True))
    return str(tokenizer.decode([*tail, *token_ids], skip_special_tokens=True))[len(before) :]
