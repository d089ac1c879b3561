"""What callers of transformers' `from_pretrained` pass along, beside the options of `load`.

Scripts and libraries name these whatever the model is. A value that asks for nothing, or for what
is the case with every artifact, is taken; any other is refused, and so is a name nobody knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from edge_memllm.errors import RequestError
from edge_memllm.loading import load


class _Option(NamedTuple):
    """Values that are taken, by their names, and why others are not."""

    taken: tuple[str, ...]
    reason: str


_NO_CODE = "an artifact holds no code, and none is run"
_STORED = "how weights are stored was chosen at export (graph_weights, table_codec)"
_PLACED = "an artifact is on one device, chosen by device ('cpu', 'cuda' or 'auto')"
_FILES = "an artifact's files are those that its manifest names"
_OPTIONS: dict[str, _Option] = {
    "trust_remote_code": _Option(("None", "False", "True"), _NO_CODE),
    "code_revision": _Option(("None", "'main'"), _NO_CODE),
    "custom_generate": _Option(("None",), _NO_CODE),
    "low_cpu_mem_usage": _Option(("None", "False", "True"), "expected True or False"),
    "dtype": _Option(
        ("None", "'auto'", "'float32'", "torch.float32"),
        "logits are float32, and what the graph computes in was chosen at export (graph_weights)",
    ),
    "attn_implementation": _Option(("None",), "the graph has an attention of its own"),
    "use_flash_attention_2": _Option(("None", "False"), "the graph has an attention of its own"),
    "experts_implementation": _Option(("None",), "the graph has no experts"),
    "use_kernels": _Option(("None", "False"), "the graph has kernels of its own"),
    "allow_all_kernels": _Option(("None", "False"), "the graph has kernels of its own"),
    "kernel_config": _Option(("None",), "the graph has kernels of its own"),
    "tqdm_class": _Option(("None",), "give progress, a function"),
    "quantization_config": _Option(("None",), _STORED),
    "load_in_8bit": _Option(("None", "False"), _STORED),
    "load_in_4bit": _Option(("None", "False"), _STORED),
    "device_mesh": _Option(("None",), _PLACED),
    "tp_plan": _Option(("None",), _PLACED),
    "tp_size": _Option(("None", "1"), _PLACED),
    "distributed_config": _Option(("None",), _PLACED),
    "max_memory": _Option(("None",), "give memory_limit or vram_limit"),
    "offload_folder": _Option(("None",), "the table stays on storage anyway"),
    "offload_state_dict": _Option(("None", "False"), "the table stays on storage anyway"),
    "offload_buffers": _Option(("None", "False"), "the table stays on storage anyway"),
    "config": _Option(("None",), "the manifest says what the model is"),
    "generation_config": _Option(("None",), "give it to generate, or export it with the model"),
    "state_dict": _Option(("None",), _FILES),
    "key_mapping": _Option(("None",), _FILES),
    "ignore_mismatched_sizes": _Option(("None", "False"), _FILES),
    "weights_only": _Option(("None", "True"), "pickles are never read"),
    "use_safetensors": _Option(("None", "True"), "pickles are never read"),
    "from_tf": _Option(("None", "False"), _FILES),
    "from_flax": _Option(("None", "False"), _FILES),
    "gguf_file": _Option(("None",), _FILES),
    "variant": _Option(("None",), _FILES),
    "subfolder": _Option(("None", "''", "'.'"), "give the folder of the artifact itself"),
    "adapter_kwargs": _Option(("None", "{}"), "give overlays instead (docs/overlays.md)"),
    "adapter_name": _Option(("None", "'default'"), "give overlays instead (docs/overlays.md)"),
    "output_loading_info": _Option(("None", "False"), "the model alone is returned"),
    "resume_download": _Option(("None", "False", "True"), "expected True or False"),
    "proxies": _Option(("None", "{}"), "set HTTPS_PROXY in the environment"),
    "mirror": _Option(("None",), "set HF_ENDPOINT in the environment"),
    "use_cache": _Option(("None", "True"), "give it to generate"),
    "use_io_binding": _Option(("None", "True"), "the runtime always binds its buffers"),
    "provider": _Option(("None",), _PLACED),
    "session_options": _Option(("None",), "give threads, memory_limit or packed_cache"),
}
# Older names of the same.
_OPTIONS["torch_dtype"] = _OPTIONS["dtype"]
_LOAD = tuple(inspect.signature(load).parameters)[1:]


def loading_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `edge_memllm.load` among `given`.

    `device_map` stands for `device` where it names one device. Raises `RequestError` for a value
    that cannot be met, and for a name that is neither `load`'s nor one of transformers.
    """
    keywords = {name: value for name, value in given.items() if name in _LOAD}
    for name, value in given.items():
        if name in _LOAD or (name.startswith("_") and value is None):
            continue
        if name == "device_map":
            _place(keywords, value)
        elif name not in _OPTIONS:
            raise RequestError(
                f"{name}: there is no such option. There are {', '.join(_LOAD)}, and for the Hub "
                "revision, cache_dir, token, local_files_only and force_download."
            )
        elif _shown(value) not in _OPTIONS[name].taken:
            raise RequestError(f"{name} is {_shown(value)}: {_OPTIONS[name].reason}. Leave it out.")
    return keywords


def _place(keywords: dict[str, Any], device_map: object) -> None:
    """Set `device` to the one device that a map names for the whole model."""
    if device_map is None:
        return
    whole = device_map
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        whole = device_map[""]
    device = "cuda" if whole == 0 and whole is not False else str(whole)
    device = {"cuda:0": "cuda"}.get(device, device)
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device_map is {_shown(device_map)}: {_PLACED}. Leave it out.")
    chosen = keywords.setdefault("device", device)
    if chosen != device:
        raise RequestError(
            f"device_map is {_shown(device_map)} and device is {_shown(chosen)}. Give one of them."
        )


def _shown(value: object) -> str:
    return f"{value!r:.80}"
