"""Which of llama.cpp's checks do not apply to a server of texts that has one model, and why.

Every check that no rule names applies. The first rule that names one counts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SLOW = "marked slow there: wants a real model of the Hub, of 1 to 8 GB"


class Rule(NamedTuple):
    """A pattern of pytest's names, and why those do not apply."""

    pattern: str
    reason: str


RULES = (
    Rule(r"test_embedding\.py|embedding_prompt", "embeddings: refused here, with the reason"),
    Rule(r"test_rerank\.py", "reranking"),
    Rule(r"test_vision_api\.py|local_media_file|multimodal_model", "images, for a model that sees"),
    Rule(r"test_slot_save\.py", "slots saved to files by request"),
    Rule(r"test_kv_keep_only_active\.py", "a cache of idle slots in main memory, told by its log"),
    Rule(r"test_lora\.py", "LoRA files"),
    Rule(r"test_infill\.py", "filling in the middle, with a model trained for it"),
    Rule(r"test_router\.py|test_stream\.py", "the router: processes by name, presets, downloads"),
    Rule(r"cors_origins_", "an option of the router, started without any model"),
    Rule(r"test_mcp_servers\.py", "a client of MCP in the server"),
    Rule(r"test_tools_builtin\.py", "tools that the server runs: shell, files"),
    Rule(r"test_proxy\.py|cors_proxy", "a proxy for the page"),
    Rule(r"test_compat_gcp\.py", "the protocol of Google's Vertex AI"),
    Rule(
        r"test_metrics_(disabled|prometheus|prompt_processed|predicted_total)|sleep_(read|metrics)",
        "metrics by its names: /metrics is always there, and its names begin with edge_memllm_",
    ),
    Rule(r"load_split_model", "a model in several GGUF files of the Hub"),
    Rule(r"backend_sampling", "sampling on a GPU, compared with itself"),
    Rule(r"synth|with_and_without_draft", "a draft model whose acceptance is made up"),
    Rule(r"ctx_shift_enabled|with_ctx_shift", "contexts that are shifted: off there by default"),
    Rule(r"test_cache_vs_nocache_prompt", "skipped there: does not hold for llama.cpp either"),
)


def reason_against(name: str, *, slow: bool) -> str | None:
    """Return why a check does not apply, or None."""
    found = next((each.reason for each in RULES if re.search(each.pattern, name)), None)
    return SLOW if found is None and slow else found
