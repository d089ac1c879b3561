"""The artifact that is changed: small, with every kind of file, and as a manifest that vouches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_memllm.artifact.layout import checksum_seed, record_checksum
from edge_memllm.artifact.manifest import MANIFEST_NAME, FileSpec, Manifest, sealed

Files = dict[str, bytes]

_TEXT = "The old mill turns while the river runs near the bank and the child sleeps in the house. "
_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
    "model_max_length": 128,
    "added_tokens_decoder": {"256": {"content": "<s>", "special": True}},
}
_GENERATION = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95}


def make_artifact(folder: Path) -> None:
    """Export a tiny random network to `folder`, its weights beside the graph. Needs torch."""
    import onnx_ir
    import torch

    from edge_memllm.modeling import MemoryLLMConfig, MemoryLLMForCausalLM
    from edge_memllm_export import export_model
    from edge_memllm_export.graph.model import EXTERNAL_FILE, save_graph

    torch.manual_seed(0)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MemoryLLMConfig(
        beta=2, vocab_size=320, max_position_embeddings=128, bos_token_id=256, **shape
    )
    MemoryLLMForCausalLM(config).save_pretrained(checkpoint)
    _tokenizer().save(str(checkpoint / "tokenizer.json"))
    for name, content in (("tokenizer", _TOKENIZER_CONFIG), ("generation", _GENERATION)):
        (checkpoint / f"{name}_config.json").write_text(json.dumps(content, indent=1))
    (checkpoint / "chat_template.jinja").write_text(_TEMPLATE)
    export_model(checkpoint, folder, graph_weights="int4", table_codec="int8", verify=False)
    files = read_files(folder)
    manifest = Manifest.from_json(files[MANIFEST_NAME], MANIFEST_NAME)
    save_graph(onnx_ir.load(folder / manifest.graph.file), folder, self_contained_bytes=0)
    data = (folder / EXTERNAL_FILE).read_bytes()
    specs = manifest.files | {EXTERNAL_FILE: FileSpec(len(data), "0" * 64)}
    changed = replace(
        manifest, graph=replace(manifest.graph, external_data=EXTERNAL_FILE), files=specs
    )
    (folder / MANIFEST_NAME).write_bytes(changed.to_json())
    (folder / MANIFEST_NAME).write_bytes(vouched(read_files(folder))[MANIFEST_NAME])


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def read_files(folder: Path) -> Files:
    """Return manifest and every file it names, by name."""
    names = [MANIFEST_NAME, *json.loads((folder / MANIFEST_NAME).read_bytes())["files"]]
    return {name: (folder / name).read_bytes() for name in names}


def vouched(files: Files) -> Files:
    """Return the files with every digest written again, as far as the manifest can be read.

    Files' sizes and sha256, the table's checksums and their digest, and the manifest's own.
    """
    try:
        content = json.loads(files[MANIFEST_NAME])
        specs, table = content["files"], content["table"]
        files = dict(files)
        if isinstance(table, dict) and table.get("classes") is None and table["file"] in files:
            data = _checksummed(files[table["file"]], content)
            files[table["file"]] = data
        for name in specs:
            if name in files:
                digest = hashlib.sha256(files[name]).hexdigest()
                specs[name] = {"bytes": len(files[name]), "sha256": digest}
        return files | {MANIFEST_NAME: sealed(content)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return files


def _checksummed(data: bytes, content: dict[str, Any]) -> bytes:
    """Write the checksums of all records again, and their digest into the manifest."""
    table, vocabulary = content["table"], content["model"]["vocab_size"]
    start, stride, size = (table[name] for name in ("records_offset", "stride", "record_bytes"))
    end = start + vocabulary * stride
    if len(data) < end + 8 * vocabulary:
        return data
    seed = checksum_seed(content["model"]["identity"])
    view = memoryview(data)
    sums = b"".join(
        record_checksum([view[place : place + size]], token, seed).to_bytes(8, "little")
        for token, place in enumerate(range(start, end, stride))
    )
    table["checksums_sha256"] = hashlib.sha256(sums).hexdigest()
    return data[:end] + sums + data[end + len(sums) :]
