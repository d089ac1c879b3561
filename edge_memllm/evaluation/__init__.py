"""What an artifact is worth: against another one, and on tasks.

Functions take an open model and return figures; they know nothing of the command line. The
adapter for lm-evaluation-harness is in `edge_memllm.evaluation.harness`, imported by whom has it.
"""

from edge_memllm.evaluation.perplexity import (
    Divergence,
    Perplexity,
    combine,
    combine_divergences,
    measure_divergence,
    measure_perplexity,
)
from edge_memllm.evaluation.task_files import Item, Kind, Task, read_tasks
from edge_memllm.evaluation.tasks import Score, TaskResult, mean_result, measure_task

__all__ = [
    "Divergence",
    "Item",
    "Kind",
    "Perplexity",
    "Score",
    "Task",
    "TaskResult",
    "combine",
    "combine_divergences",
    "mean_result",
    "measure_divergence",
    "measure_perplexity",
    "measure_task",
    "read_tasks",
]
