"""Real Redis servers for tests: skipped where there is none, and said so."""

from __future__ import annotations

import pytest

from part12_cpu_offloading.lab.redis_server import is_installed

needs_redis = pytest.mark.skipif(
    not is_installed(), reason="redis-server is not installed (Debian: apt-get install redis-server)"
)
