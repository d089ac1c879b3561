"""Recipe to checkpoint: tokenizer, token files, network, Hugging Face Trainer, saved weights.

One process, several GPUs and FSDP are the same call: ``accelerate launch`` starts more of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from edge_memllm.artifact.atomic import WholeFile, write_whole
from edge_memllm.errors import RecipeError
from edge_memllm.modeling.configuration import MemoryLLMConfig, preset_config
from edge_memllm.modeling.data import (
    END_OF_TEXT,
    TokenWindows,
    byte_tokenizer,
    content_key,
    documents,
    given_tokenizer,
    link_or_copy,
    made_once,
    read_tokenizer,
    save_tokenizer,
    train_tokenizer,
    write_tokens,
)
from edge_memllm.modeling.network import MemoryLLMForCausalLM
from edge_memllm.modeling.recipe import DataRecipe, Recipe
from edge_memllm.modeling.trainer import (
    LanguageModelTrainer,
    TrainingProgress,
    keep_freed_memory,
    training_arguments,
)
from edge_memllm.process.limits import processor_share
from edge_memllm.text import TOKENIZER_FILE

RECORD_FILE = "training.json"
_CHECKPOINTS = "checkpoints"
# What makes a network another one, which cannot go on from where the first was.
_SHAPE = (
    *("beta", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "memory_intermediate_size"),
    *("memory_norm", "memory_source", "memory_sharing"),
    *("tie_word_embeddings", "attention_bias", "qk_norm"),
)


def whole_network(network: MemoryLLMForCausalLM) -> MemoryLLMForCausalLM:
    """The network itself, or where its weights are spread a whole copy on the CPU.

    Every process has to call it; only that of the main one is then of use.
    """
    if not any(isinstance(weight, DTensor) for weight in network.parameters()):
        return network
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(network, options=options)
    whole = MemoryLLMForCausalLM(network.config)
    whole.generation_config = network.generation_config
    if weights:  # there are none in the other processes
        whole.load_state_dict(weights)
    return whole


def keep_to_quota() -> None:
    """Let torch use no more threads than this process gets processors' time for.

    It counts the processors of the machine, whatever share of them a container has.
    """
    share = processor_share()
    if share is not None and torch.get_num_threads() > share:
        torch.set_num_threads(share)


def train(recipe: Recipe, out: Path, resume: bool = False) -> dict[str, Any]:
    """Train what the recipe says into the folder ``out``; what was reached, as plain data.

    With ``steps = 0`` the initialised network is written, untrained. ``resume`` continues from
    the newest checkpoint under ``out``; without it an ``out`` that has one is refused.
    """
    recipe.validate()
    keep_to_quota()
    config = model_config(recipe)
    check_target(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    state = process_state()
    anew = state.is_main_process and not resume
    with state.main_process_first():
        tokenizer = _tokenizer(recipe, config, out, anew)
    _fit(config, tokenizer, recipe)
    torch.manual_seed(recipe.training.seed)
    model = MemoryLLMForCausalLM(config)
    record: dict[str, Any] = {"recipe": recipe.as_dict(), "parameters": count_parameters(model)}
    if recipe.training.steps:
        with state.main_process_first():
            prepare_tokens(recipe, tokenizer, config.bos_token_id, out, anew)
        record |= run(recipe, model, out, resume)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    save(recipe, model, record, out)
    return record


def is_main_process() -> bool:
    """Whether this process speaks for all that train together."""
    return bool(process_state().is_main_process)


def process_state() -> PartialState:
    """This process among those that train together."""
    return PartialState(cpu=not torch.cuda.is_available())


def resumes_on_cpus() -> bool:
    """Whether this transformers resumes in several processes on CPUs: before 5.18 it fails there.

    It loads the optimizer to the device "cpu:0", which torch does not know as a place.
    """
    major, minor = map(int, transformers.__version__.split(".")[:2])
    return (major, minor) >= (5, 18)


def check_resuming(device: torch.device, processes: int) -> None:
    """Refuse to resume where the library cannot."""
    if device.type == "cpu" and processes > 1 and not resumes_on_cpus():
        raise RecipeError(
            f"transformers {transformers.__version__} cannot resume in several processes on CPUs. "
            "Install 5.18 or newer, or resume in one process."
        )


def check_target(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a finished model, or without ``resume`` a started run."""
    if has_checkpoint(out) and not resume:
        raise RecipeError(
            f"{out}: holds the checkpoints of an unfinished run. "
            "Continue it with --resume, or choose another folder."
        )
    if (out / "model.safetensors").exists():
        raise RecipeError(f"{out}: holds a finished model already. Choose another folder.")


def model_config(recipe: Recipe) -> MemoryLLMConfig:
    """The network's shape: the preset of ``[model]`` with its other keys in place of fields."""
    fields = {"preset": "tiny", **recipe.model}
    known = MemoryLLMConfig().to_dict()
    for key in fields:
        if key != "preset" and key not in known:
            raise RecipeError(f"[model] unknown key {key!r}; known are preset, {', '.join(known)}.")
    try:
        config = preset_config(fields.pop("preset"), **fields)
    except StrictDataclassError as error:
        raise RecipeError(f"[model] {error.__cause__ or error}") from error
    except ValueError as error:
        raise RecipeError(f"[model] {error}") from error
    if config.max_position_embeddings < recipe.data.sequence_length and recipe.training.steps:
        raise RecipeError(
            f"[data] sequence_length is {recipe.data.sequence_length}, beyond the network's "
            f"max_position_embeddings ({config.max_position_embeddings})."
        )
    return config


def _tokenizer(recipe: Recipe, config: MemoryLLMConfig, out: Path, anew: bool) -> Tokenizer:
    """The tokenizer in ``out``, made ``anew`` or where there is none."""
    path = out / TOKENIZER_FILE
    if path.exists() and not anew:
        return read_tokenizer(path)
    if recipe.tokenizer.path is not None:
        tokenizer = given_tokenizer(Path(recipe.tokenizer.path))
    elif recipe.data.train:
        tokenizer = _learned_tokenizer(recipe)
    else:
        tokenizer = byte_tokenizer(config.vocab_size)
    save_tokenizer(tokenizer, out, config.max_position_embeddings)
    return tokenizer


def _learned_tokenizer(recipe: Recipe) -> Tokenizer:
    data, size = recipe.data, recipe.tokenizer.vocab_size

    def learn() -> Tokenizer:
        return train_tokenizer(documents(data.train, data), size)

    if data.cache is None:
        return learn()
    key = content_key(data.train, data.document_start, data.text_field, size)
    path = Path(data.cache) / f"tokenizer-{key}.json"
    made_once(path, lambda file: file.write(learn().to_str(pretty=True).encode()))
    return read_tokenizer(path)


def _fit(config: MemoryLLMConfig, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Give the network the tokenizer's boundary token, and its size unless one was asked for."""
    boundary = tokenizer.token_to_id(END_OF_TEXT)
    config.bos_token_id = config.eos_token_id = boundary
    size = tokenizer.get_vocab_size()
    if "vocab_size" not in recipe.model:
        config.vocab_size = size
    elif config.vocab_size < size:
        raise RecipeError(
            f"[model] vocab_size is {config.vocab_size}, but the tokenizer has {size} tokens. "
            "Leave vocab_size out of [model] to follow the tokenizer."
        )


def prepare_tokens(
    recipe: Recipe, tokenizer: Tokenizer, boundary: int, out: Path, anew: bool
) -> None:
    """Write the token files of both splits under ``out``: ``anew``, or where there are none.

    ``boundary`` is the token in front of each document. What a run left that was refused before
    its first checkpoint may be of another text: only later processes and resumes read it.
    """
    for split, paths in (("train", recipe.data.train), ("valid", recipe.data.valid)):
        if anew:
            token_file(out, split).unlink(missing_ok=True)
        if paths:
            _write_split(recipe.data, paths, tokenizer, boundary, token_file(out, split))


def token_file(out: Path, split: str) -> Path:
    """Where the tokens of the split "train" or "valid" are, while a run lasts."""
    return out / _CHECKPOINTS / f"{split}.npy"


def _write_split(
    data: DataRecipe, paths: Sequence[str], tokenizer: Tokenizer, boundary: int, path: Path
) -> None:
    """The tokens of one split, written anew or taken from the cache."""

    def write(file: WholeFile) -> None:
        write_tokens(documents(paths, data), tokenizer, boundary, file)

    if path.exists():
        return
    if data.cache is None:
        made_once(path, write)
        return
    key = content_key(paths, data.document_start, data.text_field, tokenizer.to_str(), boundary)
    link_or_copy(made_once(Path(data.cache) / f"tokens-{key}.npy", write), path)


def has_checkpoint(out: Path) -> bool:
    """Whether a run in the folder ``out`` has saved something to continue from."""
    return any((out / _CHECKPOINTS).glob("checkpoint-*"))


def run(
    recipe: Recipe,
    model: MemoryLLMForCausalLM,
    out: Path,
    resume: bool,
    make_trainer: Callable[..., LanguageModelTrainer] = LanguageModelTrainer,
) -> dict[str, Any]:
    """Train ``model`` on the token files under ``out``; what was reached, as plain data."""
    training, folder = recipe.training, out / _CHECKPOINTS
    length = recipe.data.sequence_length
    first = recipe.data.boundary_first
    train_file, valid_file = (token_file(out, split) for split in ("train", "valid"))
    windows = TokenWindows(train_file, length, "The training text", boundary_first=first)
    valid = None
    if recipe.data.valid:
        valid = TokenWindows(valid_file, length, "The validation text", boundary_first=first)
    arguments = training_arguments(recipe, folder)
    if len(windows) < training.batch_size * arguments.world_size:
        raise RecipeError(
            f"The training text holds {len(windows)} sequences of {length} tokens, fewer than one "
            f"batch of {training.batch_size * arguments.world_size}. Give more text or a smaller "
            "[training] batch_size."
        )
    if arguments.device.type == "cpu":
        keep_freed_memory()
    tokens_per_step = (
        length * training.batch_size * training.gradient_accumulation_steps * arguments.world_size
    )
    progress = TrainingProgress(tokens_per_step)
    trainer = make_trainer(
        model=model,
        args=arguments,
        train_dataset=windows,
        eval_dataset=valid,
        callbacks=[progress],
        z_loss=training.z_loss,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    resumed = resume and has_checkpoint(out)
    if resumed:
        check_resuming(arguments.device, arguments.world_size)
        _check_same_network(model.config, folder)
    with _saving(folder):
        trainer.train(resume_from_checkpoint=resumed)
    history = _history(trainer.state.log_history, tokens_per_step)
    if valid is not None and not (history and "valid_loss" in history[-1]):
        trainer.evaluate()
        history = _history(trainer.state.log_history, tokens_per_step)
    result: dict[str, Any] = {
        "tokens_seen": trainer.state.global_step * tokens_per_step,
        "training_tokens": len(windows.tokens),
        "device": arguments.device.type,
        "precision": "bf16" if arguments.bf16 else "fp32",
        "history": history,
    }
    if valid is not None:
        result["valid_loss"] = history[-1]["valid_loss"]
    return result


def _check_same_network(config: MemoryLLMConfig, folder: Path) -> None:
    """Refuse to go on with the checkpoints of another network, naming the first difference."""
    saved = get_last_checkpoint(folder)
    if saved is None:
        return
    before, now = MemoryLLMConfig.from_pretrained(saved).to_dict(), config.to_dict()
    for name in _SHAPE:
        if before[name] != now[name]:
            raise RecipeError(
                f"{saved}: is of a network with {name} {before[name]}, now it is {now[name]}. "
                "Resume with the settings of before, or choose another folder."
            )


def _history(log: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, Any]]:
    """The losses of the whole run; Trainer's log goes through checkpoints and resumes."""
    names = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}
    names["eval_loss"] = "valid_loss"
    return [
        {"step": entry["step"], "tokens": entry["step"] * tokens_per_step}
        | {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry}
        for entry in log
        if "loss" in entry or "eval_loss" in entry
    ]


def save(recipe: Recipe, model: MemoryLLMForCausalLM, record: dict[str, Any], out: Path) -> None:
    """Write the trained weights and the record of the run; every process has to call it."""
    model = whole_network(model)
    state = process_state()
    if state.is_main_process:
        model.to(getattr(torch, recipe.training.save_dtype))
        _check_finite(model)
        model.config.use_cache = True  # Trainer turns it off, and it would stay off in config.json
        write_whole(out / RECORD_FILE, json.dumps(record, indent=1) + "\n")
        with _saving(out):
            model.save_pretrained(out)
    state.wait_for_everyone()


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Say in our words what a library says that cannot write weights."""
    try:
        yield
    except SafetensorError as error:
        raise RecipeError(
            f"{folder}: weights cannot be written ({error}). Free some space, or choose another "
            "disk."
        ) from error


def _check_finite(model: torch.nn.Module) -> None:
    bad: Sequence[str] = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise RecipeError(
            f"{bad[0]} holds NaN or infinity after training. Lower the learning rate, or set "
            '[training] save_dtype = "float32".'
        )


def count_parameters(model: torch.nn.Module) -> int:
    """Numbers in all weights; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
