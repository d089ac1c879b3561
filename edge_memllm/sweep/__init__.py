"""Many codecs for one model: what each costs and what it saves, in one run that can be resumed.

Functions and dataclasses; they know nothing of the command line.
"""

from edge_memllm.sweep.plan import Plan, ResultsFolder, SweepRequest, load_results, make_plan
from edge_memllm.sweep.sweep import Sweep, run_sweep

__all__ = [
    "Plan",
    "ResultsFolder",
    "Sweep",
    "SweepRequest",
    "load_results",
    "make_plan",
    "run_sweep",
]
