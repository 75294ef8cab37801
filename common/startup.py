"""Garbage collection while a process starts.

Python's collector looks at all objects again and again while they become more. torch and transformers create half a
million objects that stay, so a fifth of the time of their imports goes there. And at the process's end, it looks at
all of them once more, which takes a second.
"""

from __future__ import annotations

import gc


def begin() -> None:
    """Before the imports: no collections."""
    gc.disable()


def end() -> None:
    """Once the process is ready: collect from now on, but never look at what exists now. (vLLM does the same, because a
    collection makes a pause in all streams of tokens.) Without begin(), this does nothing."""
    if not gc.isenabled():
        gc.enable()
        gc.freeze()
