"""The text of an answer: what its tokens add to the text of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

NUM_PROMPT_TOKENS = 5  # vLLM's: enough for a tokenizer that decodes a token differently at the start of a text
REPLACEMENT = "\ufffd"  # what decoding produces for bytes that are not a character, or not yet


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that are not part of the text, which are more than those in tokenizer.all_special_tokens."""
    return {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def end_of_prompt(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int]) -> tuple[list[int], int]:
    """The prompt's last tokens, and how many of them end with a whole character: the answer's text begins there.

    A prompt of token ids may stop within a character, whose other bytes are then the answer's first.
    """
    tail = list(prompt_token_ids[-NUM_PROMPT_TOKENS:])
    end = len(tail)
    while end and str(tokenizer.decode(tail[:end], skip_special_tokens=True)).endswith(REPLACEMENT):
        end -= 1
    return tail, end


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """The answer's text, decoded behind the prompt's last tokens.

    Alone, a tokenizer of Llama 2's kind would drop the space before its first word.
    """
    if not token_ids:
        return ""
    tail, end = end_of_prompt(tokenizer, prompt_token_ids)
    before = str(tokenizer.decode(tail[:end], skip_special_tokens=True))
    return str(tokenizer.decode([*tail, *token_ids], skip_special_tokens=True))[len(before) :]
