"""Mixed precision: how many bits each layer of each class of tokens gets, for a target in size.

See docs/quantisation.md. Functions and dataclasses over a runtime; no command line, no files.
"""

from edge_memllm.mixed_precision.planning import (
    ExactModel,
    MixedPlan,
    Sizing,
    Target,
    plan_allocation,
    target_of,
)

__all__ = ["ExactModel", "MixedPlan", "Sizing", "Target", "plan_allocation", "target_of"]
