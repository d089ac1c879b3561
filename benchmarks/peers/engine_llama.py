"""llama.cpp as a contender, through the C functions of its Python binding.

Nothing of the binding's own Python runs per token but one call each of ``llama_decode`` and
``llama_get_logits_ith`` and a numpy argmax. Keys and values are float16, weights are repacked for
the processor when they are loaded.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UBATCH = 512


class Engine:
    """A GGUF file; ``mmap`` and ``flash`` (attention) as llama.cpp means them."""

    def __init__(
        self, model: Path, threads: int, context: int, mmap: bool = True, flash: bool = True
    ) -> None:
        from llama_cpp import llama_cpp as library

        self._library = library
        self._quiet = library.llama_log_callback(_discard)  # kept: the library calls it
        library.llama_log_set(self._quiet, ctypes.c_void_p(None))
        library.llama_backend_init()
        load = library.llama_model_default_params()
        load.n_gpu_layers = 0
        load.load_mode = library.LLAMA_LOAD_MODE_MMAP if mmap else library.LLAMA_LOAD_MODE_NONE
        self._model = library.llama_model_load_from_file(str(model).encode(), load)
        if not self._model:
            raise RuntimeError(f"{model}: llama.cpp cannot load it.")
        options = library.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = context
        options.n_ubatch = _UBATCH
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = int(flash)
        options.type_k = options.type_v = library.GGML_TYPE_F16
        options.no_perf = True
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"{model}: llama.cpp makes no context of {context} tokens.")
        self._memory = library.llama_get_memory(self._context)
        self._vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._one = (library.llama_token * 1)()
        self._settings = {"mmap": mmap, "flash_attention": flash, "kv": "f16", "ubatch": _UBATCH}

    def before_step(self) -> None:
        """Nothing precedes a step."""

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        self._library.llama_memory_clear(self._memory, False)
        return self._decode((self._library.llama_token * len(tokens))(*tokens))

    def step(self) -> int:
        """The next token."""
        return self._decode(self._one)

    def finish(self) -> None:
        """Nothing to let go of: the next prompt clears the context."""

    def logits(self) -> NDArray[np.float32]:
        """Logits [V] of the last position."""
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))

    def describe(self) -> dict[str, Any]:
        """What it runs with."""
        told = self._library.llama_print_system_info().decode()
        features = [each.split("=")[0].strip() for each in told.split("|") if "= 1" in each]
        return {**self._settings, "features": " ".join(features).replace("CPU : ", "")}

    def _decode(self, tokens: Any) -> int:
        batch = self._library.llama_batch_get_one(tokens, len(tokens))
        code = self._library.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}.")
        token = int(self.logits().argmax())
        self._one[0] = token
        return token


def _discard(level: int, text: bytes, user_data: object) -> None:
    """What llama.cpp logs while it loads."""
