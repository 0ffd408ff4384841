"""The dispatch table: schema, selection, lookup, reading and writing."""

from tuner.table.lookup import CUT_OFF, Choice, Explanation, explain, lookup, mixes_lengths
from tuner.table.schema import (
    EVIDENCE,
    SCHEMA_VERSION,
    BatchEntry,
    BucketEntry,
    Device,
    Kernel,
    Provenance,
    RunnerUp,
    Table,
    TableError,
    Timing,
    kernel_id,
    table_file_name,
)
from tuner.table.store import export, find, merge, read, read_cubin, verify, write
from tuner.table.substitute import substitute

__all__ = [
    "CUT_OFF",
    "EVIDENCE",
    "SCHEMA_VERSION",
    "BatchEntry",
    "BucketEntry",
    "Choice",
    "Device",
    "Explanation",
    "Kernel",
    "Provenance",
    "RunnerUp",
    "Table",
    "TableError",
    "Timing",
    "explain",
    "export",
    "find",
    "kernel_id",
    "lookup",
    "merge",
    "mixes_lengths",
    "read",
    "read_cubin",
    "substitute",
    "table_file_name",
    "verify",
    "write",
]
