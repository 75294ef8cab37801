"""OpenAI's HTTP API over one engine: the complete, hardened version of part 2's server.

The path of a request: guards.py reads its body, protocol.py checks it and builds an ApiRequest, generation.py opens one
engine stream per choice, responses.py turns their outputs into JSON, and streaming.py sends it and watches for a client
disconnect. errors.py turns errors into responses, metrics.py counts.
"""

from common.openai_app.app import AppOptions, create_app

__all__ = ["AppOptions", "create_app"]
