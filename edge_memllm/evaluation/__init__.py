"""What an artifact is worth: against another one, and on tasks.

Functions take an open model and return figures; they know nothing of the command line. The
adapter for lm-evaluation-harness is in `edge_memllm.evaluation.harness`, imported by whom has it.
"""

from edge_memllm.evaluation.divergence import Divergence, combine_divergences, measure_divergence
from edge_memllm.evaluation.items import Item, Kind
from edge_memllm.evaluation.task_files import Task, read_tasks
from edge_memllm.evaluation.tasks import Score, TaskResult, mean_result, measure_task
from edge_memllm.perplexity import Perplexity, combine, measure_perplexity

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
