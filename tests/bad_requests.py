"""Requests that every server of the course refuses, and strategies that make up more."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")
NO_BOOL: list[object] = ["true", "", 0, 1, 1.5, [], {}]
# By field, in an otherwise good request that asks for two tokens.
WRONG_VALUES: dict[str, list[object]] = {
    "max_tokens": ["5", 1.5, True, [], {}, 0, -1, -(10**30), "", NAN],
    "min_tokens": ["5", 1.5, False, True, [], {}, -1, 3, 10**30, "", 20.5],
    "temperature": ["1", True, [], {}, -0.1, 2.01, -1, 10**400, NAN, INF, -INF, ""],
    "top_k": ["5", 1.5, True, [], {}, -2],
    "top_p": ["1", True, [], {}, -0.1, 0, 1.1, 10**400, NAN, INF],
    "seed": ["5", 1.5, True, [], {}, -(2**63) - 1, 2**63],
    "stop_token_ids": ["5", 5, {}, True, [1.5], ["5"], [True], [None], [[1]], [-1], [10**30], [1] * 129],
    "stop": [5, True, {}, {"a": 1}, [5], [None], [["a"]], [""], "", ["a", ""], ["a"] * 17, "x" * 1001, ["a", 1]],
    "ignore_eos": NO_BOOL,
    "stream": NO_BOOL,
}
STREAM_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "stream is false": ({"stream": False, "stream_options": {}}, "stream_options"),
    "a list": ({"stream": True, "stream_options": []}, "stream_options"),
    "true": ({"stream": True, "stream_options": True}, "stream_options"),
    "text": ({"stream": True, "stream_options": "include_usage"}, "stream_options"),
    "unknown option": ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
    **{
        f"include_usage is {value!r}": (
            {"stream": True, "stream_options": {"include_usage": value}}, "stream_options.include_usage"
        )
        for value in NO_BOOL
    },
}  # fmt: skip
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"prompt=Hi",
    "cut short": b'{"prompt": "Hi"',
    "two values": b"{} {}",
    "trailing comma": b'{"prompt": "Hi",}',
    "text": b'"Hi"',
    "null": b"null",
    "a number": b"5",
    "a list": b'[{"prompt": "Hi"}]',
    "NaN": b"NaN",
    "deeply nested lists": b"[" * 100_000,
    "deeply nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "invalid UTF-8": b'{"prompt": "\xff\xfe\x80"}',
    "UTF-8 cut in a character": '{"prompt": "ä'.encode()[:-1],
    "random bytes": bytes(range(256)),
    "UTF-16 without an end": b"\x00{\x00",
}

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
BUDGET: dict[str, Any] = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def any_bytes(good: bytes) -> st.SearchStrategy[bytes]:
    """Bytes, or a good body with up to three bytes put in somewhere."""
    places = st.tuples(st.integers(0, len(good)), st.binary(max_size=3))
    return st.binary(max_size=50) | places.map(lambda p: good[: p[0]] + p[1] + good[p[0] :])
