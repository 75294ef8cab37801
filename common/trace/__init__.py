"""The step trace that `--trace FILE` writes, one JSON object per line: a header, then one line per engine step.

    python -m common.trace view FILE [--chart]       a summary, and a chart with one row per request
    python -m common.trace export FILE OUT.json      for https://ui.perfetto.dev

The schema is the same for all parts and only grows: a new field has a default, and readers skip unknown
fields.
"""

from common.trace.deltas import StepDeltas
from common.trace.files import FLUSH_INTERVAL_S, LIVE_NAME, TraceWriter, read_trace
from common.trace.perfetto import export_perfetto
from common.trace.phases import Phase, step_phases
from common.trace.schema import (
    SCHEMA_VERSION,
    CollectiveTrace,
    RankTrace,
    RequestTrace,
    StepTrace,
    Trace,
    TransferKind,
    TransferTrace,
)

__all__ = [
    "FLUSH_INTERVAL_S", "LIVE_NAME", "SCHEMA_VERSION", "CollectiveTrace", "Phase", "RankTrace", "RequestTrace",
    "StepDeltas", "StepTrace", "Trace", "TraceWriter", "TransferKind", "TransferTrace", "export_perfetto",
    "read_trace", "step_phases",
]  # fmt: skip
