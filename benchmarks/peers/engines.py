"""Every runtime as a contender sees it: a prompt in, greedy tokens out, one at a time.

A library is imported when its engine is made, so that no process needs what it does not run.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.page_cache import drop

_UBATCH = 512  # of llama.cpp


class Engine:
    """What is asked of a runtime. Made with a model's path, threads, and tokens of context."""

    def before_step(self) -> None:
        """Done before each step, off the clock."""

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        raise NotImplementedError

    def step(self) -> int:
        """The next token."""
        raise NotImplementedError

    def finish(self) -> None:
        """Let go of the last answer."""

    def logits(self) -> NDArray[np.float32] | None:
        """Logits [V] of the last position, of runtimes that tell them.

        edge-memllm's public API does not; its export compares them with the checkpoint's.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """What it runs with."""
        return {}


class EdgeMemLLM(Engine):
    """edge-memllm through its public API; ``cold``: its table leaves the page cache before steps.

    The dense baseline goes the same way; its records hold the embedding alone. ``options`` are
    those of `edge_memllm.load`.
    """

    def __init__(
        self, model: Path, threads: int, context: int, cold: bool = False, **options: Any
    ) -> None:
        import edge_memllm

        self._model = edge_memllm.load(model, device="cpu", threads=threads, **options)
        self._pieces: Generator[Any, None, None] | None = None
        table = model / self._model.manifest.table.file
        self._evict = partial(drop, table) if cold else _nothing

    def before_step(self) -> None:
        """Done before each step, off the clock."""
        self._evict()

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        import edge_memllm

        self.finish()
        self._pieces = self._model.stream(
            tokens,
            max_new_tokens=new_tokens,
            sampling=edge_memllm.Sampling(),
            seed=0,
            ignore_eos=True,
        )
        return self.step()

    def step(self) -> int:
        """The next token."""
        assert self._pieces is not None
        return int(next(self._pieces).token)

    def finish(self) -> None:
        """Let go of the last answer."""
        if self._pieces is not None:
            self._pieces.close()
            self._pieces = None

    def describe(self) -> dict[str, Any]:
        """What it runs with."""
        return {
            "runtime": self._model.runtime.name,
            "reader": self._model.reader,
            "graph": self._model.manifest.graph.weights,
            "table": self._model.manifest.table.codec,
            "prefill_chunk": self._model.prefill_chunk,
        }


def _nothing() -> None:
    """What precedes a step with a warm table."""


class LlamaCpp(Engine):
    """A GGUF file through llama.cpp's C functions; ``mmap`` and ``flash`` as llama.cpp means them.

    ``lazy``: rows of a table of per-layer embeddings are read where they are mapped, also from
    tables of less than 4 GiB. ``cold`` is the place of that table in the file, offset and length,
    which leaves the page cache before steps.

    Nothing of the binding's own Python runs per token but one call each of ``llama_decode`` and
    ``llama_get_logits_ith`` and a numpy argmax. Keys and values are float16, weights are repacked
    for the processor when they are loaded.
    """

    def __init__(
        self,
        model: Path,
        threads: int,
        context: int,
        mmap: bool = True,
        flash: bool = True,
        lazy: bool = False,
        cold: tuple[int, int] | None = None,
    ) -> None:
        from benchmarks.peers.llama_library import is_compiled, llama_library

        self._library = library = llama_library()
        self._quiet = library.llama_log_callback(_discard)  # kept: the library calls it
        library.llama_log_set(self._quiet, ctypes.c_void_p(None))
        library.llama_backend_init()
        load = library.llama_model_default_params()
        load.n_gpu_layers = 0
        load.load_mode = library.LLAMA_LOAD_MODE_MMAP if mmap else library.LLAMA_LOAD_MODE_NONE
        if lazy or hasattr(library, "LLAMA_LAZY_MODE_ON"):  # releases before September 2026: none
            mode = library.LLAMA_LAZY_MODE_ON if lazy else library.LLAMA_LAZY_MODE_OFF
            load.lazy_mode = mode
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
        self._settings["lazy"] = lazy
        self._settings["build"] = "compiled here" if is_compiled() else "prebuilt"
        self._evict = _nothing if cold is None else partial(drop, model, *cold)

    def before_step(self) -> None:
        """Done before each step, off the clock."""
        self._evict()

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        self._library.llama_memory_clear(self._memory, False)
        return self._decode((self._library.llama_token * len(tokens))(*tokens))

    def step(self) -> int:
        """The next token."""
        return self._decode(self._one)

    def logits(self) -> NDArray[np.float32]:
        """Logits [V] of the last position."""
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))

    def scores(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [T, V] behind each of some tokens, from an empty cache."""
        self._library.llama_memory_clear(self._memory, False)
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = 1
        code = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}.")
        pointer = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (len(tokens), self._vocabulary)).copy()

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


class GenAI(Engine):
    """onnxruntime-genai's generator on a folder of its model builder, with its own choice of token.

    Keys and values are float32, the only type that the builder offers on a CPU, in a buffer that
    is shared between steps. ``keep_logits``: copy them before each token is chosen, as they cannot
    be had afterwards.
    """

    def __init__(self, model: Path, threads: int, context: int, keep_logits: bool = False) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the library is loaded
        import onnxruntime_genai

        self._library = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        self._generator: Any = None
        self._keep_logits = keep_logits
        self._logits: NDArray[np.float32] | None = None
        self._settings = {**options, "kv": "float32", "past_present_share_buffer": True}

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        self.finish()
        options = self._library.GeneratorParams(self._model)
        options.set_search_options(
            do_sample=False,
            max_length=len(tokens) + new_tokens,
            past_present_share_buffer=True,
        )
        self._generator = self._library.Generator(self._model, options)
        self._generator.append_tokens(np.asarray(tokens, np.int32))
        return self.step()

    def step(self) -> int:
        """The next token; the first one after a prompt takes its logits as they are."""
        if self._keep_logits:
            self._logits = np.array(self._generator.get_logits(), np.float32).reshape(-1)
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def finish(self) -> None:
        """Let go of the last answer."""
        self._generator = None

    def logits(self) -> NDArray[np.float32] | None:
        """Logits [V] of the last position, if they are kept."""
        return self._logits

    def describe(self) -> dict[str, Any]:
        """What it runs with."""
        return dict(self._settings)


class Judge(Engine):
    """transformers' Llama in float32, computed from the start for every token: slow and simple.

    What the contenders' answers are held against.
    """

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._tokens: list[int] = []
        self._logits: NDArray[np.float32] = np.empty(0, np.float32)

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        self._tokens = list(tokens)
        return self.step()

    def step(self) -> int:
        """The next token."""
        with self._torch.inference_mode():
            outputs = self._model(self._torch.tensor([self._tokens]), use_cache=False)
        self._logits = outputs.logits[0, -1].numpy()
        self._tokens.append(int(self._logits.argmax()))
        return self._tokens[-1]

    def logits(self) -> NDArray[np.float32]:
        """Logits [V] of the last position."""
        return self._logits


ENGINES: dict[str, Callable[..., Engine]] = {
    "edge": EdgeMemLLM,
    "llama": LlamaCpp,
    "genai": GenAI,
    "judge": Judge,
}
