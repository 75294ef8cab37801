"""OpenAI's HTTP API over one engine: what part 2 writes out for a lesson, complete and hardened.

A request's way: guards.py reads its body, protocol.py checks it and makes an ApiRequest, generation.py opens one engine
stream for each choice, responses.py turns their outputs into JSON, streaming.py sends that and watches for a client
that goes away. errors.py says how each error goes out, metrics.py counts.
"""

from common.openai_app.app import AppOptions, create_app

__all__ = ["AppOptions", "create_app"]
