"""`EdgeMemLLMForCausalLM`: an artifact where transformers and Optimum expect a model.

`generate`, its samplers, streamers and stopping criteria are transformers' own; each step asks the
artifact for logits. Tensors are on the CPU, wherever the graph runs.

Scripts and libraries pass options of `from_pretrained` whatever the model is. A value that asks for
nothing, or for what is the case with every artifact, is taken; any other is refused by name.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from optimum.modeling_base import OptimizedModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from edge_memllm.artifact.atomic import not_written, whole_folder
from edge_memllm.artifact.manifest import MANIFEST_NAME, Manifest
from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.checked_values import is_integer, wrong_value
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.hub import artifact_folder, checkpoint_folder
from edge_memllm.hub.names import HubModel, explained, import_hub
from edge_memllm.huggingface.generating import Generating, GenerationCache, StepInputs
from edge_memllm.loading import load
from edge_memllm.model import Model
from edge_memllm.modeling.configuration import CACHE, one_cache


class EdgeMemLLMConfig(PreTrainedConfig):
    """Shape of an exported model, under Hugging Face's names. The manifest is its only source."""

    model_type = "edge_memllm_artifact"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]

    @classmethod
    def from_manifest(cls, model: ModelSpec, folder: Path) -> EdgeMemLLMConfig:
        """Make the configuration of the artifact in `folder`, which a tokenizer is loaded from."""
        config = cls(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.caches[0].kv_heads,
            head_dim=model.caches[0].head_dim,
            max_position_embeddings=model.max_position_embeddings,
            architecture=model.architecture,
            details=dict(model.details),
            identity=model.identity,
            **_special_tokens(model),
        )
        config.name_or_path = str(folder)
        return config


def generation_config(manifest: Manifest, folder: Path) -> GenerationConfig:
    """Return the defaults of `generate`: the artifact's `generation_config.json`, if it has one.

    Tokens that begin and end a text are the manifest's. The file was checked when it was loaded.
    """
    settings: dict[str, Any] = {}
    if GENERATION_CONFIG_NAME in manifest.files:
        settings = json.loads((folder / GENERATION_CONFIG_NAME).read_bytes())
    return GenerationConfig.from_dict(settings | _special_tokens(manifest.model))


def _special_tokens(model: ModelSpec) -> dict[str, Any]:
    ends = list(model.eos_token_ids)
    return {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }


def copy_artifact(manifest: Manifest, source: Path, target: Path) -> None:
    """Copy all files to the folder `target`, which must be new or empty: all of them or none."""
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(
            f"{target}: is not an empty folder, and nothing is replaced. Save into a new one."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(target) as draft:
            for name in (*manifest.files, MANIFEST_NAME):
                shutil.copyfile(source / name, draft / name)
    except OSError as error:
        raise not_written(target, error) from error


def upload_artifact(
    manifest: Manifest,
    source: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload the artifact in one commit, so that nobody sees half of it; return its address."""
    hub = import_hub()
    model = HubModel(repo_id, revision)
    with explained(model, "repository"):
        api = hub.HfApi(library_name="edge-memllm", token=token)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=source,
            allow_patterns=[*manifest.files, MANIFEST_NAME],
            revision=revision,
            commit_message=commit_message,
        )
    return str(made)


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
