"""The C functions of llama.cpp: of the compiled package, or else of a prebuilt one.

llama-cpp-python comes as source and binds everything. The wheels of xllamacpp are prebuilt for
processors of the last ten years; their one shared library has the same functions, which it does not
offer to Python. Those that are needed are bound here, under the names that llama-cpp-python gives
them, and a changed layout of their structures is noticed by the defaults that are not in place.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_UINT, _INT, _FLOAT, _BOOL, _POINTER = (
    *(ctypes.c_uint32, ctypes.c_int32, ctypes.c_float, ctypes.c_bool, ctypes.c_void_p),
)


class _ModelParams(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("devices", "tensor_buft_overrides")),
        *((name, _INT) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode")),
        ("main_gpu", _INT),
        *((name, _POINTER) for name in ("tensor_split", "progress_callback", "user_data")),
        ("kv_overrides", _POINTER),
        *((name, _BOOL) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        *((name, _BOOL) for name in ("no_host", "no_alloc", "load_mtp")),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        *((name, _UINT) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, _UINT) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, _INT) for name in ("n_threads", "n_threads_batch", "ctx_type")),
        *((name, _INT) for name in ("rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", _INT),
        *((name, _FLOAT) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, _FLOAT) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", _UINT),
        ("defrag_thold", _FLOAT),
        *((name, _POINTER) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, _INT) for name in ("type_k", "type_v")),
        *((name, _POINTER) for name in ("abort_callback", "abort_callback_data")),
        *((name, _BOOL) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload")),
        *((name, _BOOL) for name in ("swa_full", "kv_unified")),
        ("samplers", _POINTER),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", _POINTER),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", _INT),
        ("token", ctypes.POINTER(_INT)),
        ("embd", _POINTER),
        ("pos", ctypes.POINTER(_INT)),
        ("n_seq_id", ctypes.POINTER(_INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOGITS = ctypes.POINTER(ctypes.c_float)
# Name: (result, arguments).
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_batch_free": (None, (_Batch,)),
    "llama_batch_get_one": (_Batch, (ctypes.POINTER(_INT), _INT)),
    "llama_batch_init": (_Batch, (_INT, _INT, _INT)),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits": (_LOGITS, (_POINTER,)),
    "llama_get_logits_ith": (_LOGITS, (_POINTER, _INT)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextParams)),
    "llama_log_set": (None, (_POINTER, _POINTER)),
    "llama_memory_clear": (None, (_POINTER, _BOOL)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _ModelParams)),
    "llama_print_system_info": (ctypes.c_char_p, ()),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
}
_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "type_k": 1, "type_v": 1}


def llama_library() -> Any:
    """Return llama.cpp's functions, as attributes. Raises `ImportError` where neither is there."""
    if find_spec("llama_cpp") is not None:
        from llama_cpp import llama_cpp

        return llama_cpp
    return _Prebuilt(_prebuilt_file())


def is_compiled() -> bool:
    """Whether `llama_library` returns those compiled for this processor."""
    return find_spec("llama_cpp") is not None


def _prebuilt_file() -> Path:
    found = find_spec("xllamacpp")
    for folder in (found and found.submodule_search_locations) or []:
        for file in Path(folder).glob("xllamacpp*.so"):
            return file
    raise ImportError(
        "llama.cpp: not here, expected it compiled or prebuilt: pip install xllamacpp"
    )


class _Prebuilt:
    """Functions and names of llama.cpp, as llama-cpp-python has them."""

    LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MMAP = 0, 1
    LLAMA_LAZY_MODE_OFF, LLAMA_LAZY_MODE_ON = 0, 2
    GGML_TYPE_F16 = 1
    llama_token = _INT
    llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        defaults = self.llama_context_default_params()
        found = {name: getattr(defaults, name) for name in _DEFAULTS}
        if found != _DEFAULTS:
            raise ImportError(
                f"{file.name}: its context has {found} by default, expected {_DEFAULTS}: its "
                "structures are not those that are bound here. Take the version of the page."
            )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: only the compiled package has it, llama-cpp-python.")
