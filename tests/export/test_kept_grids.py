"""Grids of quantised files in a graph: what is kept of each type, and whole files to logits."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ExportError
from edge_memllm.evaluation.perplexity import divergences
from edge_memllm.mixed_precision import Target
from edge_memllm.options.export import ExportOptions
from edge_memllm.table.table import Table
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.exporter import graph_form
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from edge_memllm_export.sources.gguf_grids import Grid, read_grid
from edge_memllm_export.weights.kept_grids import kept
from edge_memllm_runtimes.options import RuntimeOptions
from edge_memllm_runtimes.runtime import open_runtime
from support.gguf_files import (
    VOCABULARY,
    metadata_of,
    random_model,
    stored_tensors,
    write_gguf,
)

KINDS = GGMLQuantizationType
# Where the float16 numbers of a block begin, the bits of the codes in the graph, the block.
TYPES = {
    "Q4_0": ((0,), 4, 32),
    "Q4_1": ((0, 2), 4, 32),
    "Q5_0": ((0,), 8, 32),
    "Q5_1": ((0, 2), 8, 32),
    "Q8_0": ((0,), 8, 32),
    "Q4_K": ((0, 2), 4, 32),
    "Q5_K": ((0, 2), 8, 32),
    "Q6_K": ((208,), 8, 16),
}
EXACT = ("Q4_0", "Q5_0", "Q8_0")
TOKENS = [(7 * place) % VOCABULARY for place in range(40)]


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of stored blocks, uint8: every code, scales and minima of ordinary weights."""
    weights, size = GGML_QUANT_SIZES[KINDS[name]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    places = TYPES[name][0]
    sizes = rng.uniform(0.3, 1.0, (len(blocks), len(places))) * 0.2 / 2 ** int(name[1])
    if name.endswith("_1"):  # a minimum is that of the smallest code
        sizes[:, 1] *= -rng.uniform(0.2, 0.8, len(blocks)) * 2 ** int(name[1])
    elif name.endswith("K"):  # each is multiplied by numbers of 6 or 8 bits
        sizes /= 64
        sizes[:, 1:] *= 2 ** int(name[1]) / 2
    for at, numbers in zip(places, sizes.T, strict=True):
        blocks[:, at : at + 2] = numbers.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("columns", [256, 768, 2304])
@pytest.mark.parametrize("name", TYPES)
def test_a_graph_has_the_weights_of_the_file(name: str, columns: int) -> None:
    stored = random_blocks(name, 24, columns)
    grid = read_grid(stored, KINDS[name])
    matrix = kept([grid], "m")
    missed = np.abs(matrix.weights() - dequantize(stored, KINDS[name]))
    _, bits, block = TYPES[name]
    assert [(part.bits, part.block) for part in matrix.parts] == [(bits, block)]
    assert (matrix.rows, matrix.columns) == (24, columns)
    if name in EXACT:
        assert missed.max() == 0
    else:
        _check_missed(grid, missed)
    halves = matrix.at_level_0().weights()
    np.testing.assert_allclose(halves, matrix.weights(), rtol=0, atol=1e-6)


def _check_missed(grid: Grid, missed: np.ndarray) -> None:
    """Within the rounding of products of scales, and what may be left of minima."""
    steps = np.abs(grid.scales)
    codes = np.abs(grid.codes.astype(np.float32)).reshape(*steps.shape, -1)
    rounding = np.zeros_like(steps)
    if grid.kind.endswith("K"):
        rounding = codes.max(axis=-1) * (steps * 2.0**-11 + 2.0**-25)
    rest = np.maximum(missed.reshape(*steps.shape, -1) - rounding[..., None], 0).max(axis=-1)
    assert np.square(rest).mean() <= 2.0**-17 * np.square(steps).mean() * 1.01


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q4_K", "Q5_K"])
def test_minima_beyond_all_zero_points_are_kept_too(name: str) -> None:
    stored = random_blocks(name, 8, 256, seed=3)
    at, size = TYPES[name][0][1], 0.005 if name.endswith("K") else 0.3
    blocks = stored.reshape(-1, GGML_QUANT_SIZES[KINDS[name]][1])
    minima = np.random.default_rng(4).normal(0, size, len(blocks)).astype(np.float16)
    blocks[:, at : at + 2] = minima[:, None].view(np.uint8)
    grid = read_grid(stored, KINDS[name])
    _check_missed(grid, np.abs(kept([grid], "m").weights() - grid.weights()))


def test_rows_of_one_type_follow_each_other() -> None:
    grids = [read_grid(random_blocks("Q4_1", n, 96, n), KINDS.Q4_1) for n in (5, 8)]
    both = np.concatenate([kept([grid], "m").weights() for grid in grids])
    np.testing.assert_allclose(kept(grids, "m").weights(), both, atol=2e-4)


def test_blocks_of_zeros_are_zero() -> None:
    for name in TYPES:
        stored = np.zeros((4, GGML_QUANT_SIZES[KINDS[name]][1] * 8), np.uint8)
        grid = read_grid(stored, KINDS[name])
        assert not kept([grid], "m").weights().any()


@pytest.mark.parametrize("at", [0, 2])
def test_scales_beyond_float16_are_refused(at: int) -> None:
    stored = np.full((2, 144), 255, np.uint8)
    stored[:, :4] = 0
    stored[:, at : at + 2] = np.array([60_000], np.float16).view(np.uint8)
    with pytest.raises(ExportError, match=r"^lm_head: a scale of the file is too large for float"):
        kept([read_grid(stored, KINDS.Q4_K)], "lm_head")


# Sizes that hold whole blocks of K-quants.
WIDE = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
}
WIDE_METADATA = {
    "embedding_length": 256,
    "attention.key_length": 64,
    "attention.value_length": 64,
    "feed_forward_length": 512,
    "block_count": 2,
}


def write_wide(
    path: Path, architecture: str, kind: str, kinds: dict[str, str] | None = None, **fields: Any
) -> Path:
    """A file with blocks of `kind`, and of `kinds` in the matrices that end with their names."""
    model = random_model(architecture, **WIDE, **fields)
    metadata = {f"{architecture}.{name}": value for name, value in WIDE_METADATA.items()}
    tensors, types = stored_tensors(architecture, model), {}
    for seed, (name, weight) in enumerate(tensors.items()):
        if weight.ndim == 1:
            continue
        found = [own for end, own in (kinds or {}).items() if name.endswith(end)]
        types[name] = KINDS[found[0] if found else kind]
        tensors[name] = weight * np.float32(0.2)
        if types[name].name in TYPES:
            tensors[name] = random_blocks(types[name].name, *weight.shape, seed)
    return write_gguf(
        path, architecture, metadata_of(architecture, **metadata), tensors, kinds=types
    )


def graph_divergence(file: Path, out: Path) -> float:
    """Nats between the artifact and the dequantised network that was in the file."""
    reference = Checkpoint.open(file).architecture.reference()
    truth = next(reference.logits(TOKENS, len(TOKENS)))
    with JudgedArtifact(out, reference) as judged:
        found = next(judged.graph_logits(TOKENS, len(TOKENS)))
    return float(divergences(truth, found).mean())


@pytest.mark.parametrize(
    ("architecture", "kind", "tied"),
    [
        *(("llama", kind, False) for kind in TYPES),
        ("llama", "Q4_1", True),
        ("qwen2", "Q4_K", True),
        ("qwen3", "Q5_0", False),
    ],
)
def test_whole_files_compute_what_their_weights_say(
    tmp_path: Path,
    architecture: str,
    kind: str,
    tied: bool,
) -> None:
    file = write_wide(tmp_path / "m.gguf", architecture, kind, tie_word_embeddings=tied)
    report = export_model(file, tmp_path / "out", accept_quality_loss=True)
    assert f"matrices of the file: kept as they are: {kind} x 15." in report.notes
    assert report.manifest.graph.weights == "mixed"
    assert graph_divergence(file, tmp_path / "out") < 2e-5


def test_a_prompt_may_be_longer_than_a_chunk(tmp_path: Path) -> None:
    """No position of the first chunks reaches the head."""
    file = write_wide(tmp_path / "m.gguf", "llama", "Q4_1")
    export_model(file, tmp_path / "out", accept_quality_loss=True)
    with JudgedArtifact(tmp_path / "out", Checkpoint.open(file).architecture.reference()) as judged:
        found = []
        for chunk in (64, 16):
            with Feeder(judged.runtime, judged.table, 1, chunk) as feeder:
                found.append(np.array(feeder.prefill(0, TOKENS), np.float32))
    assert np.allclose(*found, atol=1e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_processor_computes_them_in_float32(tmp_path: Path, kind: str) -> None:
    file = write_wide(tmp_path / "m.gguf", "llama", kind)
    export_model(file, tmp_path / "out", kv_dtype="float32", verify=False)
    truth = next(Checkpoint.open(file).architecture.reference().logits(TOKENS, len(TOKENS)))
    found = []
    for own in (True, False):
        with Artifact.open(tmp_path / "out") as artifact:
            runtime = open_runtime(artifact, "cpu", RuntimeOptions(own_dtype=own))
            with (
                closing(Table.open(artifact, "ram")) as table,
                Feeder(runtime, table, 1, 64) as feeder,
            ):
                found.append(np.abs(np.array(feeder.score(0, TOKENS), np.float32) - truth).max())
            runtime.close()
    rounded, floats = found
    assert floats < 0.75 * rounded  # the rest is the table's rounding of embeddings


def test_rows_of_several_types_and_types_without_a_grid(tmp_path: Path) -> None:
    kinds = {"attn_v.weight": "Q6_K", "ffn_up.weight": "F16", "token_embd.weight": "Q8_0"}
    file = write_wide(tmp_path / "m.gguf", "llama", "Q4_K", kinds, tie_word_embeddings=True)
    report = export_model(file, tmp_path / "out", accept_quality_loss=True)
    assert report.notes[-1] == (
        "matrices of the file: kept as they are: Q4_K x 10, Q6_K x 2, Q8_0 x 1; rounded to 8 bits: "
        "F16 x 2."
    )
    assert graph_divergence(file, tmp_path / "out") < 1e-3


def test_grids_are_kept_unless_something_else_is_asked_for(tmp_path: Path) -> None:
    path = write_wide(tmp_path / "m.gguf", "llama", "Q4_0")
    source = Checkpoint.open(path)

    def method(**asked: Any) -> str | None:
        return graph_form(source, ExportOptions(path, tmp_path / "out", **asked)).method

    assert method() is None
    assert method(graph_weights="int8") == "gptq"
    assert method(table_target=Target(bits=5.0)) == "gptq"
    with pytest.raises(ExportError, match="calibration text: graph weights mixed by the method no"):
        export_model(path, tmp_path / "out", calibration_text="What it would be rounded by.")


def test_inputs_are_rounded_only_where_that_was_asked_for(tmp_path: Path) -> None:
    path = write_wide(tmp_path / "m.gguf", "llama", "Q4_1")
    counts = []
    for most in (None, 1e-7, 1e-6, 1e-5, 1e-4, 1e3):
        export_model(path, tmp_path / str(most), rounded_inputs=most, verify=False)
        counts.append(sum(level == 4 for level in levels(tmp_path / str(most))))
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert len(set(counts)) > 2, counts
    assert set(levels(tmp_path / "1000.0")) == {4}
    with pytest.raises(ExportError, match=r"rounded inputs 0\.1: for matrices that are kept"):
        export_model(path, tmp_path / "out", rounded_inputs=0.1, graph_weights="int8")


def levels(artifact: Path) -> list[int]:
    """The accuracy level of every product with codes."""
    nodes = ir.load(artifact / "graph.onnx").graph
    return [
        node.attributes["accuracy_level"].as_int()
        for node in nodes
        if node.op_type == "MatMulNBits"
    ]


def test_files_of_floats_are_quantised_as_folders_are(tmp_path: Path) -> None:
    path = write_wide(tmp_path / "m.gguf", "llama", "F16")
    form = graph_form(Checkpoint.open(path), ExportOptions(path, tmp_path / "out"))
    assert form.method == "gptq"
