"""Fixtures for all parts. Nothing here touches the network."""

from __future__ import annotations

import os

from hypothesis.internal.conjecture import providers

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# Hypothesis likes to draw constants that it finds in the modules loaded so far, so what a test draws would depend on
# which tests ran before it in the same process.
_no_constants = providers.Constants()
providers._get_local_constants = lambda: _no_constants
