"""Dense checkpoint in, checkpoint of the family out: read, fit, distil, save.

It puts the parts together; how a layer is fitted and what is learned is theirs. The training is
``training.run``, with another loss.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer

from edge_memllm.errors import RecipeError
from edge_memllm.modeling.configuration import (
    DENSE_BETA,
    ROPE_TYPES,
    MemoryLLMConfig,
    compute_width,
)
from edge_memllm.modeling.data import TokenWindows, read_tokenizer
from edge_memllm.modeling.distillation import DistillationTrainer
from edge_memllm.modeling.fitting import copy_shared, initialize
from edge_memllm.modeling.network import MemoryLLMForCausalLM
from edge_memllm.modeling.recipe import ConversionRecipe
from edge_memllm.modeling.stored_weights import (
    CONFIG_FILE,
    UnusableCheckpointError,
    describing,
    expected_weights,
    network_over,
    read_fields,
    read_network_weights,
)
from edge_memllm.modeling.training import (
    check_target,
    count_parameters,
    has_checkpoint,
    keep_to_quota,
    prepare_tokens,
    process_state,
    run,
    save,
    token_file,
)
from edge_memllm.progress import Progress
from edge_memllm.text import GENERATION_FILE, TOKEN_FILES, TOKENIZER_FILE

# model_type -> what its attention has that plain attention has not.
_ATTENTION: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    MemoryLLMConfig.model_type: {},
}
_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)

# What the dense network has no say in.
_CHOSEN = ("memory_intermediate_size", "memory_norm", "memory_source")


def dense_config(path: Path) -> MemoryLLMConfig:
    """The configuration of the checkpoint in the folder ``path``, as that of a dense network.

    RecipeError names what is missing, and what this network cannot do as the checkpoint does it.
    """
    where = path / CONFIG_FILE
    try:
        fields = read_fields(path)
        kind = fields.get("model_type")
        if not isinstance(kind, str) or kind not in _ATTENTION:
            raise RecipeError(
                f"{where}: model_type is {kind!r}; networks of {', '.join(_ATTENTION)} are "
                "converted."
            )
        with describing(where, "cannot be converted"):
            config = _translated(kind, fields)
            expected_weights(config)
    except UnusableCheckpointError as error:
        raise RecipeError(str(error)) from error
    return config


def dense_network(path: Path) -> MemoryLLMForCausalLM:
    """The checkpoint's network: its weights in ``dense_config``'s shape, frozen, in float32.

    RecipeError names the first that is missing, foreign or cannot be used.
    """
    config = dense_config(path)
    try:
        weights = read_network_weights(path, config)
    except UnusableCheckpointError as error:
        raise RecipeError(str(error)) from error
    return network_over(config, {name: weight.float() for name, weight in weights.items()})


def _translated(kind: str, fields: dict[str, Any]) -> MemoryLLMConfig:
    """Our configuration from that of another family; ValueError says what has no counterpart."""
    if kind == MemoryLLMConfig.model_type:
        return _own_dense(MemoryLLMConfig.from_dict(fields))
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(kind, **{k: v for k, v in fields.items() if k != "model_type"})
    _refuse(kind, theirs)
    return MemoryLLMConfig(
        **{name: getattr(theirs, name) for name in _COPIED},
        **_ATTENTION[kind],
        head_dim=getattr(theirs, "head_dim", None),
        rope_parameters=dict(theirs.rope_parameters),
        pad_token_id=theirs.pad_token_id,
        beta=DENSE_BETA,
    )


def _own_dense(config: MemoryLLMConfig) -> MemoryLLMConfig:
    """One of the family, if it is the dense one."""
    if config.beta != DENSE_BETA:
        raise ValueError(f"it has beta {config.beta}; only beta {DENSE_BETA} is converted.")
    return config


def _refuse(kind: str, theirs: Any) -> None:
    """Name what the network computes and ours cannot."""
    positions = theirs.max_position_embeddings
    window = getattr(theirs, "sliding_window", None)
    if window is not None and window < positions:
        raise ValueError(
            f"its attention has a sliding window of {window} tokens within "
            f"{positions} positions, which the graph has not. Where the model may be used "
            f"without, set max_position_embeddings in its config.json to {window}."
        )
    if theirs.hidden_act != "silu":
        raise ValueError(f"hidden_act is {theirs.hidden_act!r}; only 'silu' is converted.")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(theirs, name, False):
            raise ValueError(f"{name} is true for {kind}: biases of matrices that have none here.")
    rope = theirs.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}; {', '.join(ROPE_TYPES)} are converted."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("its rotary embedding turns a part of each head only.")
    if getattr(theirs, "pretraining_tp", 1) != 1:
        raise ValueError(f"pretraining_tp is {theirs.pretraining_tp}, expected 1.")


def convert(
    dense: Path,
    out: Path,
    recipe: ConversionRecipe,
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Make a student of the dense checkpoint in the folder ``out``; what was reached.

    With ``steps = 0`` the student is fitted and not trained. ``resume`` continues from the newest
    checkpoint under ``out``. ``progress(stage, done, total)`` is called while layers are fitted.
    """
    recipe.validate()
    keep_to_quota()
    original = dense_config(dense)
    config = student_config(original, recipe)
    tokenizer = _read_tokenizer(dense, config)
    boundary = _boundary(dense, config) if recipe.reads_text else None
    check_target(out, resume)
    state = process_state()
    teacher = dense_network(dense).to(state.device)
    with state.main_process_first():
        _carry(dense, out)
        if boundary is not None:
            anew = state.is_main_process and not resume
            prepare_tokens(recipe, tokenizer, boundary, out, anew)
    torch.manual_seed(recipe.training.seed)
    student = MemoryLLMForCausalLM(config).to(state.device)
    if boundary is None or not config.has_memory:
        copy_shared(student, teacher)
    elif not (resume and has_checkpoint(out)):
        text = _fitting_text(recipe, out).to(state.device)
        initialize(student, teacher, text, boundary, progress)
    record: dict[str, Any] = {
        "recipe": recipe.as_dict(),
        "dense": {"path": str(dense), "parameters": count_parameters(teacher)},
        "parameters": count_parameters(student),
    }
    if recipe.training.steps:
        trainer = partial(DistillationTrainer, teacher=teacher, distillation=recipe.conversion)
        record |= run(_unused_allowed(recipe), student, out, resume, trainer)
    save(recipe, student, record, out)
    if state.is_main_process and (dense / GENERATION_FILE).is_file():
        shutil.copyfile(dense / GENERATION_FILE, out / GENERATION_FILE)
    state.wait_for_everyone()
    return record


def student_config(dense: MemoryLLMConfig, recipe: ConversionRecipe) -> MemoryLLMConfig:
    """The dense network's shape with the student's choices; RecipeError for impossible ones."""
    chosen = dict(recipe.model)
    fields = {k: v for k, v in dense.to_dict().items() if k not in _CHOSEN}
    try:
        if chosen["beta"] != DENSE_BETA:
            width = min(compute_width(dense.hidden_size, chosen["beta"]), dense.intermediate_size)
            chosen = {"intermediate_size": width, **chosen}
        config = MemoryLLMConfig.from_dict({**fields, **chosen})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise RecipeError(f"[model] {error.__cause__ or error}") from error
    if config.intermediate_size > dense.intermediate_size:
        raise RecipeError(
            f"[model] intermediate_size is {config.intermediate_size}, but the dense network has "
            f"{dense.intermediate_size} neurons to choose from."
        )
    if not config.has_memory and config.intermediate_size != dense.intermediate_size:
        raise RecipeError(
            f"[model] intermediate_size is {config.intermediate_size}, but a dense student (beta "
            f"{DENSE_BETA}) keeps all {dense.intermediate_size} neurons. Leave it out."
        )
    if config.max_position_embeddings < recipe.data.sequence_length and recipe.reads_text:
        raise RecipeError(
            f"[data] sequence_length is {recipe.data.sequence_length}, beyond the network's "
            f"max_position_embeddings ({config.max_position_embeddings})."
        )
    return config


def _read_tokenizer(dense: Path, config: MemoryLLMConfig) -> Tokenizer:
    path = dense / TOKENIZER_FILE
    if not path.is_file():
        raise RecipeError(
            f"{path}: no such file. Save the tokenizer in this form first: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    tokenizer = read_tokenizer(path)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise RecipeError(
            f"{path}: has {tokenizer.get_vocab_size()} tokens, the network {config.vocab_size}. "
            "Give the network's own tokenizer."
        )
    return tokenizer


def _boundary(dense: Path, config: MemoryLLMConfig) -> int:
    """The token in front of each document: that which begins a text, or else ends one."""
    ends = config.eos_token_id
    candidates = [config.bos_token_id, *(ends if isinstance(ends, list) else [ends])]
    boundary = next((token for token in candidates if token is not None), None)
    if boundary is None:
        raise RecipeError(
            f"{dense / 'config.json'}: has neither bos_token_id nor eos_token_id, so nothing can "
            "mark where documents begin. Add the one that its tokenizer uses."
        )
    return boundary


def _carry(dense: Path, out: Path) -> None:
    """Copy what belongs to the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKEN_FILES:
        if (dense / name).is_file():
            shutil.copyfile(dense / name, out / name)


def _unused_allowed(recipe: ConversionRecipe) -> ConversionRecipe:
    """The recipe, told that layers which the dense ones stand in for get no gradient."""
    if not recipe.conversion.layers_per_stage:
        return recipe
    return replace(recipe, trainer={"ddp_find_unused_parameters": True, **recipe.trainer})


def _fitting_text(recipe: ConversionRecipe, out: Path) -> torch.Tensor:
    """Windows [W, T] of the training text, as many as ``fit_tokens`` allow."""
    length = recipe.data.sequence_length
    first = recipe.data.boundary_first
    windows = TokenWindows(token_file(out, "train"), length, boundary_first=first)
    count = min(len(windows), recipe.conversion.fit_tokens // length)
    return torch.stack([windows[number]["input_ids"] for number in range(count)])
