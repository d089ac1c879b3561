"""Which weights of a checkpoint folder are taken, beside what transformers takes, and which are
refused, by export and convert alike."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import edge_memllm
from edge_memllm.cli.main import main
from edge_memllm.errors import ArtifactError, EdgeMemLLMError, ExportError, RecipeError
from edge_memllm.modeling.conversion import dense_network
from edge_memllm_export.checkpoint import Checkpoint
from support.checkpoints import change_config, write_checkpoint, write_dense

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q_BIAS = "model.layers.0.self_attn.q_proj.bias"
DOWN = "model.layers.1.mlp.down_proj.weight"
Weights = dict[str, torch.Tensor]
Change = Callable[[Path], Any]


@pytest.fixture(scope="session", params=["tied", "own head"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama, which convert reads, and one of the family, which export reads."""
    folder, tied = tmp_path_factory.mktemp("made"), request.param == "tied"
    write_dense(folder / "llama", "llama", tie_word_embeddings=tied)
    (folder / "own").mkdir()
    write_checkpoint(folder / "own", dtype="float32", seed=0, beta=3, tie_word_embeddings=tied)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_dense(tmp_path / "llama", "llama", tie_word_embeddings=True)


def read(folder: Path) -> Weights:
    return {name: weight.clone() for name, weight in load_file(folder / SINGLE).items()}


def rewritten(edit: Callable[[Weights], Weights | None]) -> Change:
    def change(folder: Path) -> None:
        weights = read(folder)
        save_file(edit(weights) or weights, folder / SINGLE, {"format": "pt"})

    return change


def sharded(folder: Path, **index: Any) -> Weights:
    """Spread the weights over two files; `index` replaces what names their files."""
    weights = read(folder)
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    files = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files | index}))
    (folder / SINGLE).unlink()
    return weights


def stale_index(folder: Path) -> None:
    """Saved in shards first, and once more as a whole, with other values."""
    weights = sharded(folder)
    save_file({n: w * 1.5 for n, w in weights.items()}, folder / SINGLE, {"format": "pt"})


def index_without_shards(folder: Path) -> None:
    stale_index(folder)
    for file in ("a.safetensors", "b.safetensors"):
        (folder / file).unlink()


def foreign_shard(folder: Path) -> None:
    sharded(folder)
    save_file({NORM: torch.zeros(3)}, folder / "c.safetensors")


def twice_in_shards(folder: Path) -> None:
    save_file({NORM: sharded(folder, extra="c.safetensors")[NORM]}, folder / "c.safetensors")


def head_as_well(weights: Weights) -> None:
    weights[HEAD] = weights.get(HEAD, weights[EMBEDDING]).clone()


def head_only(weights: Weights) -> None:
    if HEAD not in weights:
        weights[HEAD] = weights.pop(EMBEDDING)


def old_constants(weights: Weights) -> None:
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


TAKEN: dict[str, Change] = {
    "as saved": lambda folder: None,
    "shards": sharded,
    "a stale index beside the whole": stale_index,
    "an index whose shards are gone beside the whole": index_without_shards,
    "a broken index beside the whole": lambda folder: (folder / INDEX).write_text("{"),
    "a file the index does not name": foreign_shard,
    "one weight twice, equal": twice_in_shards,
    "an index that has a weight in the wrong shard": lambda folder: sharded(
        folder, **{NORM: "a.safetensors", EMBEDDING: "a.safetensors"}
    ),
    "an index that lacks a weight": lambda folder: sharded(folder, **{NORM: "b.safetensors"}),
    "a head saved as well": rewritten(head_as_well),
    "a tied embedding saved as the head": rewritten(head_only),
    "without the prefix of the base": rewritten(
        lambda weights: {name.removeprefix("model."): w for name, w in weights.items()}
    ),
    "constants of an older release": rewritten(old_constants),
    "halves": rewritten(lambda weights: {name: w.half() for name, w in weights.items()}),
    "dtypes mixed": rewritten(lambda w: {**w, NORM: w[NORM].bfloat16(), DOWN: w[DOWN].half()}),
}


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN)
def test_what_is_taken_is_what_transformers_takes(
    change: Change, made: Path, tmp_path: Path
) -> None:
    ids = torch.arange(40).reshape(1, -1)
    for kind in ("llama", "own"):
        folder = Path(shutil.copytree(made / kind, tmp_path / kind))
        change(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = (
            dense_network(folder)
            if kind == "llama"
            else Checkpoint.open(folder).architecture.reference().network
        )
        with torch.no_grad():
            expected, found = theirs(ids).logits, ours(ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_equal_head_saved_as_well_leaves_the_identity(llama: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype="float32", seed=0, beta=3, tie_word_embeddings=True)
    before = Checkpoint.open(tmp_path)
    expected = before.identity(), before.parameters  # now: it reads the file that is written over
    rewritten(head_as_well)(tmp_path)
    after = Checkpoint.open(tmp_path)
    assert (after.identity(), after.parameters) == expected


def lose(name: str) -> Change:
    return rewritten(lambda weights: {n: w for n, w in weights.items() if n != name})


def add(name: str, weight: torch.Tensor) -> Change:
    return rewritten(lambda weights: {**weights, name: weight})


def prefixed(prefix: str) -> Change:
    return rewritten(lambda weights: {prefix + name: w for name, w in weights.items()})


def pointer(name: str) -> Change:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    return lambda folder: (folder / name).write_text(text)


def pointer_shard(folder: Path) -> None:
    sharded(folder)
    pointer("b.safetensors")(folder)


def lose_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "b.safetensors").unlink()


def twice_unequal(folder: Path) -> None:
    save_file({NORM: sharded(folder, extra="c.safetensors")[NORM] + 1}, folder / "c.safetensors")


def as_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def spoilt(value: float) -> Change:
    return rewritten(lambda weights: weights[DOWN][3, 5:6].fill_(value) and None)


def quantised(**said: Any) -> Change:
    return lambda folder: change_config(folder, quantization_config=said)


def packed(folder: Path) -> None:
    """As GPTQ and its like store a matrix, without a word in config.json."""
    weights = read(folder)
    weights["model.layers.1.mlp.down_proj.qweight"] = weights.pop(DOWN).to(torch.int32)
    save_file(weights, folder / SINGLE)


REFUSED: dict[str, tuple[Change, str]] = {
    "a weight is missing": (lose(DOWN), rf"lacks the weight {DOWN}, which does not fit"),
    "the embedding is missing": (lose(EMBEDDING), rf"lacks the weight {EMBEDDING}"),
    "renamed by compile": (
        prefixed("_orig_mod."),
        rf"lacks the weight {EMBEDDING}.* from inside a wrapper: it has _orig_mod\.model\.embed",
    ),
    "renamed by data parallel": (prefixed("module."), r"inside a wrapper: it has module\.model\."),
    "a foreign bias": (add(Q_BIAS, torch.ones(64)), rf"holds a weight {Q_BIAS}, which does not"),
    "an untied head is missing": (
        lambda folder: change_config(folder, tie_word_embeddings=False),
        rf"lacks the weight {HEAD}",
    ),
    "a tied head differs": (
        add(HEAD, torch.ones(300, 48)),
        rf"ties {HEAD} to {EMBEDDING}, and the checkpoint holds both with different values",
    ),
    "another shape": (add(NORM, torch.ones(47)), rf"{NORM} is \[47\], config\.json makes it \[48"),
    "more layers than there are": (
        lambda folder: change_config(folder, num_hidden_layers=4),
        r"lacks the weight model\.layers\.3\.input_layernorm\.weight.*4 layers",
    ),
    "fewer layers": (
        lambda folder: change_config(folder, num_hidden_layers=2),
        r"holds a weight model\.layers\.2\.input_layernorm\.weight",
    ),
    "whole numbers": (add(NORM, torch.ones(48, dtype=torch.int32)), r"is torch\.int32; weights"),
    "doubles": (add(NORM, torch.ones(48, dtype=torch.float64)), r"is torch\.float64; weights are"),
    "float8": (
        add(NORM, torch.ones(48).to(torch.float8_e4m3fn)),
        r"float8_e4m3fn; .* not quantised\. Take the checkpoint it was made of",
    ),
    "packed": (packed, r"down_proj\.qweight is torch\.int32; .* not quantised"),
    "said to be quantised": (
        quantised(quant_method="bitsandbytes", load_in_4bit=True),
        r"config\.json: has a quantization_config \(bitsandbytes\); .* not quantised",
    ),
    "quantised by nobody knows what": (quantised(bits=4), r"has a quantization_config; weights"),
    "NaN": (spoilt(float("nan")), rf"{DOWN} holds NaN or infinity"),
    "infinity": (spoilt(float("-inf")), rf"{DOWN} holds NaN or infinity"),
    "weights are a pointer": (pointer(SINGLE), rf"{SINGLE}: this is a Git LFS pointer.*lfs pull"),
    "a shard is a pointer": (pointer_shard, r"b\.safetensors: this is a Git LFS pointer"),
    "config is a pointer": (pointer("config.json"), r"config\.json: this is a Git LFS pointer"),
    "a shard is missing": (lose_shard, rf"b\.safetensors: no such file, and {INDEX} names it"),
    "one weight twice, unequal": (twice_unequal, rf"holds {NORM}, which another file of the"),
    "pickles alone": (as_pickle, r"found pytorch_model\.bin but no .*Pickled.*save_pretrained"),
    "nothing": (lambda folder: (folder / SINGLE).unlink(), "found no weights, expected"),
    "no JSON": (lambda folder: (folder / "config.json").write_bytes(b"\xff{"), "this is not JSON"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    change: Change, message: str, llama: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    fields = {"hidden_size": 48, "num_hidden_layers": 3, "tie_word_embeddings": True, "beta": 3}
    write_checkpoint(own, dtype="float32", seed=0, **fields)
    readers: list[tuple[Path, Callable[[Path], Any], type[EdgeMemLLMError]]] = [
        (llama, dense_network, RecipeError),
        (own, Checkpoint.open, ExportError),
    ]
    for folder, reader, error in readers:
        change(folder)
        with pytest.raises(error, match=message):
            reader(folder)


def test_every_dtype_that_a_file_can_name_is_taken_or_refused(llama: Path) -> None:
    """Those that torch lacks too: a header of our own names them."""
    for name, bits in (("F4", 4), ("F8_E8M0", 8), ("U16", 16), ("U64", 64), ("C64", 64)):
        header = {
            "model.norm.weight": {"dtype": name, "shape": [48], "data_offsets": [0, 6 * bits]}
        }
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + bytes(6 * bits)
        (llama / SINGLE).write_bytes(content)
        with pytest.raises(RecipeError, match=r"cannot be read as safetensors|not quantised"):
            dense_network(llama)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("dtype", "silu"),
        ("rope_parameters", {"rope_type": "linear"}),
        ("id2label", 1),
        ("pad_token_id", 300),
        ("head_dim", 0),
        ("hidden_size", -1),
        ("hidden_size", 64.0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("max_position_embeddings", None),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 10**12),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", float("nan")),
    ],
)
def test_a_configuration_that_libraries_stumble_over_is_refused_in_words(
    field: str, value: object, llama: Path, tmp_path: Path
) -> None:
    change_config(llama, **{field: value})
    with pytest.raises(RecipeError, match=r"config\.json: cannot be converted: \w+"):
        dense_network(llama)
    write_checkpoint(tmp_path, dtype="float32", seed=0, beta=3)
    change_config(tmp_path, **{field: value})
    with pytest.raises(ExportError, match=r"config\.json: describes no network: \w+"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tie_word_embeddings", "no"),
        ("qk_norm", 1),
        ("memory_gain", [1.0, float("nan")]),
        ("memory_gain", [1.0, "1"]),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(
    field: str, value: object, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, dtype="float32", seed=0, beta=3)
    change_config(tmp_path, **{field: value})
    with pytest.raises(ExportError, match=rf"config\.json: describes no network: {field}"):
        Checkpoint.open(tmp_path)


def test_a_refused_conversion_leaves_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lose(DOWN)(llama)
    text = tmp_path / "text.txt"
    text.write_text("A cat sat. " * 99)
    words = ["--data", str(text), "--set", "data.sequence_length=32"]
    assert main(["convert", str(llama), str(tmp_path / "out"), *words]) == 1
    assert f"error: {llama}: the checkpoint lacks the weight {DOWN}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_loading_a_checkpoint_says_that_it_is_none_of_ours(llama: Path) -> None:
    quantised(quant_method="gptq")(llama)
    with pytest.raises(ArtifactError, match=r"is a checkpoint, .* edge-memllm export .* OUT"):
        edge_memllm.load(llama)
