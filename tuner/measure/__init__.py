"""Timing on the GPU, in a child process that may die.

``Measurer`` is what callers use; it answers with values, never with the child's exceptions. This side imports
neither torch nor CuPy: only the child touches the GPU.
"""

from tuner.measure.measurer import FIRST_STEP, Checked, Contestant, Measurer, Race
from tuner.measure.samples import Failure, Sample, Timing, declare_winner, paired_ratio

__all__ = [
    "FIRST_STEP",
    "Checked",
    "Contestant",
    "Failure",
    "Measurer",
    "Race",
    "Sample",
    "Timing",
    "declare_winner",
    "paired_ratio",
]
