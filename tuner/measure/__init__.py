"""Timing on the GPU, in a child process that may die (the protocol of docs on measuring).

``Measurer`` is what callers use; it answers with values, never with the child's exceptions.
"""

from tuner.measure.samples import Failure, Sample, Timing, declare_winner, paired_ratio
from tuner.measure.measurer import Contestant, Measurer, Race

__all__ = ["Contestant", "Failure", "Measurer", "Race", "Sample", "Timing", "declare_winner", "paired_ratio"]
