"""`EdgeMemLLMForCausalLM`: an artifact where transformers and Optimum expect a model.

`generate`, its samplers, streamers and stopping criteria are transformers' own; each step asks the
artifact for logits. Tensors are on the CPU, wherever the graph runs.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
from optimum.modeling_base import OptimizedModel
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from edge_memllm.checked_values import is_integer, wrong_value
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.hub import artifact_folder, checkpoint_folder
from edge_memllm.huggingface.cache import GenerationCache
from edge_memllm.huggingface.configuration import EdgeMemLLMConfig, generation_config
from edge_memllm.huggingface.generating import Generating
from edge_memllm.huggingface.inputs import StepInputs
from edge_memllm.huggingface.loading_options import loading_keywords
from edge_memllm.huggingface.publishing import copy_artifact, upload_artifact
from edge_memllm.loading import load
from edge_memllm.model import Model
from edge_memllm.modeling.cache_argument import CACHE, one_cache


class EdgeMemLLMForCausalLM(OptimizedModel, Generating):
    """An exported model behind the face of a transformers model; `from_pretrained` makes one.

    Close it, use it in a with-statement, or let it go. `model` is the `edge_memllm.Model` inside,
    `path` its folder, from which `AutoTokenizer.from_pretrained` loads the tokenizer.
    """

    config_class = EdgeMemLLMConfig
    auto_model_class = AutoModelForCausalLM
    base_model_prefix = "edge_memllm"

    def __init__(self, model: Model, path: Path) -> None:
        """Take over a loaded model and name the folder it was loaded from."""
        super().__init__(model, EdgeMemLLMConfig.from_manifest(model.manifest.model, path))
        self.path = path
        self.generation_config = generation_config(model.manifest, path)
        self._opened = ExitStack()
        self._opened.callback(model.close)
        self._finalizer = weakref.finalize(self, self._opened.close)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        export: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        export_options: Mapping[str, Any] | None = None,
        **loading: Any,
    ) -> Self:
        """Load an artifact: a folder, or a model of the Hugging Face Hub such as `org/name`.

        With `export`, `model_id` is a checkpoint, which is exported first, into a temporary
        folder that `save_pretrained` makes lasting; `export_options` are those of
        `edge_memllm_export.export_model`. `revision`, `cache_dir`, `token`, `local_files_only`
        and `force_download` are for the Hub, see `edge_memllm.hub`; `loading` takes the options
        of `edge_memllm.load`: device, reader, threads, memory_limit and the others. Of
        transformers' own, such as `device_map`, `dtype` and `trust_remote_code`, it takes values
        that ask for what is the case.

        Raises `RequestError` for an option that cannot be met and for `export_options` without
        `export`, and what loading, downloading and exporting raise.
        """
        loading = loading_keywords(loading)
        hub: dict[str, Any] = {
            "revision": None if revision == "main" else revision,  # what None is, for folders too
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        if export:
            return cls._exported(checkpoint_folder(model_id, **hub), export_options or {}, loading)
        if export_options is not None:
            raise RequestError("export_options are given, and export is not. Give export=True.")
        return cls._loaded(artifact_folder(model_id, **hub), loading)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: GenerationCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        past_key_values: GenerationCache | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Feed `input_ids` [B, T] and return logits [B, K, V] in float32.

        `attention_mask` [B, columns so far + T] marks padding by 0, which must be on the left; at
        padding, logits are zeros. `cache` is what this model returned for the columns before, and
        `past_key_values` the older name of it. `logits_to_keep` is K, the number of last columns,
        0 for all T. `use_cache` False keeps nothing.

        Raises `RequestError` for what cannot be done: ids beyond the vocabulary, padding on the
        right, a text longer than the context, a cache of another kind.
        """
        held = self._cache(one_cache(cache, past_key_values), input_ids)
        inputs = StepInputs.checked(
            input_ids, attention_mask, held.get_seq_length(), self.config.vocab_size
        )
        keep = _kept(logits_to_keep, inputs.width)
        try:
            logits = torch.from_numpy(held.append(inputs.tokens, inputs.padding, keep))
        finally:
            if use_cache is False:
                held.close()
        kept = None if use_cache is False else held
        output = CausalLMOutputWithPast(logits=logits, **{CACHE: kept})
        return output if return_dict else output.to_tuple()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **upload: Any
    ) -> None:
        """Copy the artifact, tokenizer included, into a folder that is new or empty.

        With `push_to_hub` also upload it; `upload` takes `repo_id` and the options of
        `push_to_hub`. Raises `RequestError` when the folder holds something, when
        `generation_config` was changed (an artifact's files are as its manifest says), or for
        `upload` without `push_to_hub`.
        """
        if upload and not push_to_hub:
            raise RequestError(
                f"{', '.join(upload)}: only for an upload. Give push_to_hub=True, or leave it out."
            )
        self._save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(**upload)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload an edge-memllm artifact",
    ) -> str:
        """Upload the artifact in one commit, making the repository if needed; return its address.

        Raises `RequestError` when `generation_config` was changed, `ArtifactError` when the Hub
        refuses or cannot be reached.
        """
        self._refuse_changes()
        return upload_artifact(
            self.model.manifest,
            self.path,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    def close(self) -> None:
        """Free what is open; a temporary export is removed."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @classmethod
    def _loaded(cls, folder: Path, loading: Mapping[str, Any]) -> Self:
        return cls(load(folder, **loading), folder)

    @classmethod
    def _exported(
        cls, checkpoint: Path, options: Mapping[str, Any], loading: Mapping[str, Any]
    ) -> Self:
        try:
            from edge_memllm_export import export_model
        except ModuleNotFoundError as error:
            raise missing_extra(error.name or "onnx_ir", "export") from error
        with ExitStack() as opened:
            temporary = opened.enter_context(TemporaryDirectory(prefix="edge-memllm-"))
            folder = Path(temporary) / "artifact"
            export_model(checkpoint, folder, **options)
            made = cls._loaded(folder, loading)
            made._opened.push(opened.pop_all())
        return made

    def _cache(self, past: object, input_ids: torch.Tensor) -> GenerationCache:
        """Return the cache to append to: the one that was given, or a new one."""
        batch = len(input_ids)
        if past is None:
            return GenerationCache(self.model, batch)
        if not isinstance(past, GenerationCache):
            raise RequestError(
                f"{CACHE} is a {type(past).__name__}, expected what this model returned: "
                "its keys and values stay in the runtime."
            )
        if past.batch != batch:
            raise RequestError(f"input_ids has {batch} rows and {CACHE} {past.batch} sequences.")
        return past

    def _save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        self._refuse_changes()
        copy_artifact(self.model.manifest, self.path, Path(save_directory))

    def _refuse_changes(self) -> None:
        stored = generation_config(self.model.manifest, self.path).to_diff_dict()
        if self.generation_config.to_diff_dict() != stored:
            raise RequestError(
                f"{self.path}: generation_config was changed, and the files of an artifact are as "
                "its manifest says. Change generation_config.json of the checkpoint and export it."
            )


def _kept(logits_to_keep: object, width: int) -> int:
    """Return how many of the last `width` columns get logits."""
    if not is_integer(logits_to_keep) or logits_to_keep < 0:
        raise wrong_value("logits_to_keep", logits_to_keep, "a number of tokens, 0 for all")
    return min(logits_to_keep or width, width)
