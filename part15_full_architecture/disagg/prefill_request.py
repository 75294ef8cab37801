"""The request that makes a prefill engine compute a prompt, and nothing else."""

from __future__ import annotations

import json

from common.errors import FieldError
from common.openai_app.fields import SAMPLING
from common.request_body import parse_json

# What concerns the answer only. All other fields stay: they decide which tokens the prompt has, or the engine refuses
# them, as the decode engine will.
OF_THE_ANSWER = SAMPLING - {"cache_salt"} | {
    "stream", "stream_options", "best_of", "return_token_ids", "top_logprobs", "max_completion_tokens",
    "max_output_tokens", "echo",
}  # fmt: skip
# With these, the prompt has other tokens after the change of max_tokens, or the answer needs a pass over all of it.
LOCAL_ONLY = ("truncate_prompt_tokens", "prompt_logprobs", "echo")


def prefill_body(path: str, body: bytes) -> bytes | None:
    """The body of the same request for one token, which ends as soon as the prompt is computed. It is a stream: then
    the response's headers come when the request is accepted.

    None if a decode engine has to compute the prompt itself, or if the body is no JSON object.
    """
    try:
        given = parse_json(body)
        if any(given.get(name) is not None and given[name] is not False for name in LOCAL_ONLY):  # 0 is a value
            return None
        kept = {name: value for name, value in given.items() if name not in OF_THE_ANSWER}
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        return json.dumps({**kept, "stream": True, limit: 1, "temperature": 0, "ignore_eos": True}).encode()
    except (FieldError, RecursionError):
        return None
