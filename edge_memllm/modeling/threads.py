"""How many threads torch computes with."""

from __future__ import annotations

import torch

from edge_memllm.control_groups import processor_share


def keep_to_quota() -> None:
    """Let torch use no more threads than this process gets processors' time for.

    It counts the processors of the machine, whatever share of them a container has.
    """
    share = processor_share()
    if share is not None and torch.get_num_threads() > share:
        torch.set_num_threads(share)
