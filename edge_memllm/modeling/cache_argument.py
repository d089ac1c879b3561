"""What transformers calls the keys and values of the text so far: it renamed them.

`past_key_values` was renamed to `cache` between 5.11 and 5.24, in arguments and in outputs.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast

from edge_memllm.errors import RequestError

OLD, NEW = "past_key_values", "cache"
# The name in the installed version.
CACHE = NEW if NEW in {field.name for field in fields(BaseModelOutputWithPast)} else OLD

C = TypeVar("C")


def one_cache(cache: C | None, past_key_values: C | None) -> C | None:
    """Return what was given under either name. Raises `RequestError` for both."""
    if cache is not None and past_key_values is not None:
        raise RequestError(
            f"{NEW} and {OLD} are two names of one argument, and both are given. Give {CACHE}, as "
            "the installed transformers does."
        )
    return past_key_values if cache is None else cache
