"""Many codecs for one model: what each costs and what it saves, in one run that can be resumed.

Functions and dataclasses; they know nothing of the command line.
"""

from edge_memllm.sweep.plan import Plan, SweepRequest, make_plan
from edge_memllm.sweep.results import ResultsFolder, load_results
from edge_memllm.sweep.running import Sweep, run_sweep

__all__ = [
    "Plan",
    "ResultsFolder",
    "Sweep",
    "SweepRequest",
    "load_results",
    "make_plan",
    "run_sweep",
]
