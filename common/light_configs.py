"""Configs of models without their code.

transformers checks a config's values; for a few models, also the name of an activation function. To know the names, it
imports these functions, and with them what loads, shards and compiles models: more than a second and 150 MB in each
process that only reads a config.json. Without torch it checks all but these names, and so it does here.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from types import ModuleType

FUNCTIONS, CHECKS = "transformers.activations", "transformers.utils.type_validators"


def import_checks() -> None:
    """Import what checks a config's values, without the functions. Call it before a config is read.

    If the functions have been imported already, or if another version of transformers takes more from their module, it
    changes nothing.
    """
    if FUNCTIONS in sys.modules:
        return
    stand_in = ModuleType(FUNCTIONS)
    stand_in.ACT2FN = {}  # type: ignore[attr-defined]
    sys.modules[FUNCTIONS] = stand_in
    try:
        with suppress(ImportError):
            importlib.import_module(CHECKS)
    finally:
        del sys.modules[FUNCTIONS]
