"""The files of a checkpoint folder: its configuration, its weights, and the network over them.

Where weights are looked for, and which of their names stand for the same, is as in transformers'
`from_pretrained`. What that makes up for by random values or passes over with a warning is refused
by name: a weight that is missing, of no use or of another shape, and a tied head that differs.
Weights are never copied as a whole: they are views of the files' pages, in the dtype on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edge_memllm.modeling.configuration import MemoryLLMConfig
from edge_memllm.modeling.network import MemoryLLMForCausalLM

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Weights = dict[str, torch.Tensor]
# A stored weight's name -> what the network calls it; None for another network's.
NameOf = Callable[[str], str | None]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_POINTER = b"version https://git-lfs"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BASE = "model."
# Constants that older releases of transformers wrote beside the weights.
_CONSTANT = "rotary_emb.inv_freq"


class UnusableCheckpointError(ValueError):
    """The folder holds no network that can be used; callers say so by an error of their own."""


def read_fields(path: Path) -> dict[str, Any]:
    """The content of the folder's config.json.

    UnusableCheckpointError where there is none, and for what no network here can be made of,
    whatever its kind: quantised weights.
    """
    if not path.is_dir():
        raise UnusableCheckpointError(
            f"{path}: no such folder. Give the folder of a trained checkpoint, or a GGUF file."
        )
    where = path / CONFIG_FILE
    if not where.is_file():
        raise UnusableCheckpointError(
            f"{where}: no such file. A checkpoint folder holds {CONFIG_FILE}."
        )
    fields = read_json(where)
    for key in ("quantization_config", "compression_config"):
        if fields.get(key) is not None:
            raise _quantised(f"{where}: has a {key}{_method(fields[key])}")
    return fields


@contextmanager
def describing(where: Path, wrong: str) -> Iterator[None]:
    """Say of the configuration ``where`` that it is ``wrong`` when it makes the libraries stumble.

    They raise whatever they stumble over: KeyError, ZeroDivisionError, AssertionError, ...
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        kind = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
        raise UnusableCheckpointError(f"{where}: {wrong}: {kind}{reason}") from error


def read_json(where: Path) -> dict[str, Any]:
    """The object in a JSON file of the folder; UnusableCheckpointError where there is none."""
    refuse_pointer(where)
    try:
        content = where.read_bytes()
    except OSError as error:
        raise UnusableCheckpointError(f"{where}: cannot be read ({error.strerror}).") from error
    return json_object(content, where)


def json_object(content: bytes, where: Path) -> dict[str, Any]:
    """The object that JSON says; UnusableCheckpointError names ``where`` if it says none."""
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnusableCheckpointError(f"{where}: this is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UnusableCheckpointError(f"{where}: expected a JSON object at the top.")
    return found


def refuse_pointer(where: Path) -> None:
    """UnusableCheckpointError for a file that git cloned without what it stands for."""
    try:
        with where.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise UnusableCheckpointError(f"{where}: cannot be read ({error.strerror}).") from error
    if pointer:
        raise UnusableCheckpointError(
            f"{where}: this is a Git LFS pointer, not the file it stands for. "
            "Fetch the file: run 'git lfs install' and 'git lfs pull' in that folder."
        )


def read_weights(
    path: Path,
    expected: Mapping[str, torch.Tensor],
    *,
    tied: bool,
    described: str,
    named: NameOf = str,
) -> Weights:
    """The folder's weights, mapped, which are those that ``expected`` names, in their shapes.

    ``tied`` says that the head is the embedding; it is not among them. ``named`` tells apart what
    lies among weights of other networks. UnusableCheckpointError names the first that is missing,
    foreign, misshapen, quantised or not finite, and what else keeps them from being read; in it the
    network is the one that is ``described``.
    """
    stored = _mapped(path).items()
    found = {own: weight for name, weight in stored if (own := named(name)) is not None}
    for name, weight in found.items():
        if weight.dtype not in _DTYPES:
            raise _quantised(f"{path}: {name} is {weight.dtype}")
    weights = _renamed(found, expected)
    weights = _without_head(path, weights) if tied else weights
    _check_names(path, weights, expected, described)
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise UnusableCheckpointError(
                f"{path}: {name} is {list(weight.shape)}, {CONFIG_FILE} makes it "
                f"{list(expected[name].shape)}."
            )
        if not _finite(weight):
            raise UnusableCheckpointError(
                f"{path}: {name} holds NaN or infinity. The checkpoint is damaged, or its training "
                "failed; take an earlier one."
            )
    return weights


def read_network_weights(path: Path, config: MemoryLLMConfig) -> Weights:
    """The folder's weights for the network of ``config``; see `read_weights`."""
    return read_weights(
        path,
        expected_weights(config),
        tied=config.tie_word_embeddings,
        described=network_described(config),
    )


def network_described(config: MemoryLLMConfig) -> str:
    """What errors call the network of a configuration."""
    return f"beta {config.beta}, {config.num_hidden_layers} layers"


def expected_weights(config: MemoryLLMConfig) -> Weights:
    """Names and shapes of the weights a network of this configuration has; no memory."""
    with torch.device("meta"):
        return dict(MemoryLLMForCausalLM(config).named_parameters())


def network_over(config: MemoryLLMConfig, weights: Mapping[str, torch.Tensor]) -> Any:
    """The network of ``config`` that reads these very ``weights``, frozen, for evaluation."""
    with torch.device("meta"):
        network = MemoryLLMForCausalLM(config)
    network.load_state_dict(dict(weights), strict=False, assign=True)
    network.tie_weights()
    # Not a weight, so not among those assigned: made again, outside of the meta device.
    network.model.rotary_emb = type(network.model.rotary_emb)(config)
    return network.requires_grad_(False).eval()


def _mapped(path: Path) -> Weights:
    """All tensors of the checkpoint's one file, else of those that its index names."""
    weights: Weights = {}
    for file in _files(path):
        refuse_pointer(file)
        for name, tensor in _mapped_file(file).items():
            if name in weights and not _equal(weights[name], tensor):
                raise UnusableCheckpointError(
                    f"{file}: holds {name}, which another file of the checkpoint holds with other "
                    "values. Two sets of weights are mixed; copy one of them anew."
                )
            if not name.endswith(_CONSTANT):
                weights[name] = tensor
    return weights


def _files(path: Path) -> list[Path]:
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE]
    index = path / INDEX_FILE
    if not index.is_file():
        raise _no_weights(path)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise UnusableCheckpointError(f"{index}: expected 'weight_map' to name a file per weight.")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name:
            raise UnusableCheckpointError(
                f"{index}: a file name has a folder in it ({name!r}), expected none."
            )
        if not (path / name).is_file():
            raise UnusableCheckpointError(
                f"{path / name}: no such file, and {INDEX_FILE} names it. Copy it as well."
            )
    return [path / name for name in files]


def _no_weights(path: Path) -> UnusableCheckpointError:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return UnusableCheckpointError(
            f"{path}: found {pickles[0]} but no {SINGLE_FILE}. Pickled weights are not read, "
            "because loading them runs code from the file. Where you trust it, convert it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers writes "
            "safetensors."
        )
    return UnusableCheckpointError(
        f"{path}: found no weights, expected {SINGLE_FILE} or {INDEX_FILE}."
    )


def _mapped_file(where: Path) -> Weights:
    try:
        with safe_open(where, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UnusableCheckpointError(
            f"{where}: cannot be read as safetensors ({error})."
        ) from error


def _renamed(found: Weights, expected: Mapping[str, torch.Tensor]) -> Weights:
    """Weights of a network that was saved without its head are called as if they were its own."""
    return {
        _BASE + name if name not in expected and _BASE + name in expected else name: weight
        for name, weight in found.items()
    }


def _without_head(path: Path, weights: Weights) -> Weights:
    """Without a head that is the embedding: one that was saved as well has to be equal."""
    if _HEAD not in weights:
        return weights
    weights = dict(weights)
    head = weights.pop(_HEAD)
    if not _equal(weights.setdefault(_EMBEDDING, head), head):
        raise UnusableCheckpointError(
            f"{path}: {CONFIG_FILE} ties {_HEAD} to {_EMBEDDING}, and the checkpoint holds both "
            "with different values (transformers would use both and warn). Set "
            f"tie_word_embeddings to false where the head is its own, or remove {_HEAD}."
        )
    return weights


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))


def _finite(weight: torch.Tensor) -> bool:
    return not weight.numel() or bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def _check_names(
    path: Path, weights: Weights, expected: Mapping[str, torch.Tensor], described: str
) -> None:
    missing = sorted(expected.keys() - weights.keys())
    foreign = sorted(weights.keys() - expected.keys())
    if not (missing or foreign):
        return
    what = f"lacks the weight {missing[0]}" if missing else f"holds a weight {foreign[0]}"
    wrapped = next((n for n in foreign if any(n.endswith(f".{m}") for m in missing)), None)
    found = "" if wrapped is None else f" It was saved from inside a wrapper: it has {wrapped}."
    raise UnusableCheckpointError(
        f"{path}: the checkpoint {what}, which does not fit its {CONFIG_FILE} ({described}).{found}"
    )


def _method(quantised: Any) -> str:
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    return f" ({method})" if isinstance(method, str) else ""


def _quantised(what: str) -> UnusableCheckpointError:
    return UnusableCheckpointError(
        f"{what}; weights are expected in float32, float16 or bfloat16, not quantised. Take the "
        "checkpoint it was made of, or save its weights dequantised."
    )
