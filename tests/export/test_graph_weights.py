"""Methods and forms of the graph's matrices, as an export has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_memllm.cli.export import EXPORT
from edge_memllm.cli.main import build_parser, main
from edge_memllm.cli.options import options_of
from edge_memllm.errors import ExportError, RequestError
from edge_memllm.evaluation.perplexity import divergences
from edge_memllm.options.export import GRAPH_METHODS
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.graph.attention import AttentionShape, widen_heads
from edge_memllm_export.judging.judged_artifact import JudgedArtifact
from support.checkpoints import MakeCheckpoint, files_of
from support.matrices import matrices_of

TEXT = "It was the best of times, it was the worst of times. " * 4
QUICK = {
    "verify": False,
    "calibration_text": TEXT,
    "graph_method": "gptq",
    "graph_weights": "int4",
}


@pytest.mark.parametrize(
    ("weights", "method", "like"),
    [("int2", None, "gptq"), ("int4", None, "gptq"), ("int8", None, "gptq")],
)
def test_the_default_method_is_that_of_the_form(
    weights: str, method: str | None, like: str, checkpoint: Path, tmp_path: Path
) -> None:
    for name, chosen in (("default", method), ("named", like)):
        export_model(
            checkpoint, tmp_path / name, graph_weights=weights, graph_method=chosen, verify=False
        )
    assert files_of(tmp_path / "default") == files_of(tmp_path / "named")
    other = next(name for name in GRAPH_METHODS if name != like)
    export_model(
        checkpoint, tmp_path / "other", graph_weights=weights, graph_method=other, verify=False
    )
    found, expected = (files_of(tmp_path / name)["graph.onnx"] for name in ("other", "named"))
    assert found != expected


def test_calibrated_twice_the_bytes_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_model(checkpoint, tmp_path / name, **QUICK)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_another_text_gives_other_codes(checkpoint: Path, tmp_path: Path) -> None:
    export_model(checkpoint, tmp_path / "one", **QUICK)
    export_model(checkpoint, tmp_path / "two", **QUICK | {"calibration_text": "0123456789" * 30})
    one, two = matrices_of(tmp_path / "one"), matrices_of(tmp_path / "two")
    assert all((one[name][1] != two[name][1]).any() for name in one)


@pytest.mark.parametrize(
    "shape",
    [
        {"beta": 0, "head_dim": 12, "tie_word_embeddings": True},
        {"beta": 2},
        {"beta": 3, "num_key_value_heads": 2},
        {"beta": 8},
    ],
    ids=str,
)
def test_graph_is_the_network_with_the_matrices_it_holds(
    shape: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Rung 4 from near by: what is left is float16 and MatMulNBits rounding its input."""
    checkpoint = make_checkpoint(**shape)
    export_model(
        checkpoint,
        tmp_path / "out",
        graph_weights="int4",
        graph_method="rtn",  # folds no columns, so the matrices are the network's
        table_codec="f16",
        matrix_weights={"o_proj": "int8"},
        verify=False,
    )
    source = Checkpoint.open(checkpoint)
    reference = source.architecture.reference()
    for path, (_, values) in matrices_of(tmp_path / "out").items():
        put(reference.network, path[1:].replace("/", "."), torch.from_numpy(values.copy()))
    ids = list(b"It was the best of times")
    with JudgedArtifact(tmp_path / "out", reference) as judged:
        distinct = np.unique(ids)
        table = judged.table
        truth = reference.fed_logits(ids, table.embeddings(distinct), table.rows(distinct))
        found = np.concatenate(list(judged.graph_logits(ids, 24)))
        assert divergences(truth, found).mean() <= 4e-3


def put(network: Any, name: str, values: torch.Tensor) -> None:
    """Put a matrix of the graph in its place in the network; widened heads are narrowed."""
    config = network.config
    shape = AttentionShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    if name.endswith("qkv_proj"):
        names = ["q_proj", "k_proj", "v_proj"]
        values = values[real_places(shape, len(values))]
    elif name.endswith("gate_up_proj"):
        names = ["gate_proj", "up_proj"]
    else:
        names = [name.rsplit(".", 1)[-1]]
        if name.endswith("o_proj"):
            values = values[:, real_places(shape, values.shape[1])]
    parent = network.get_submodule(name.rpartition(".")[0])
    for each in names:
        module = getattr(parent, each)
        part, values = values[: len(module.weight)], values[len(module.weight) :]
        module.weight = torch.nn.Parameter(part.contiguous(), requires_grad=False)
    assert len(values) == 0


def real_places(shape: AttentionShape, wide: int) -> np.ndarray:
    """Which of the graph's rows of heads the network has."""
    real = np.ones((wide // shape.graph_head_dim * shape.head_dim, 1), bool)
    return widen_heads(real, shape)[:, 0]


def test_kinds_of_matrices_have_forms_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    report = export_model(
        checkpoint,
        tmp_path / "out",
        **QUICK,
        matrix_weights={"lm_head": "int8", "gate_up_proj": "int8"},
    )
    bits = {name: bits for name, (bits, _) in matrices_of(tmp_path / "out").items()}
    assert bits.pop("/lm_head") == 8
    assert {name for name, each in bits.items() if each == 8} == {
        f"/model/layers.{layer}/mlp/gate_up_proj" for layer in range(2)
    }
    assert report.manifest.graph.weights == "int4"


def test_the_manifest_names_the_form_of_fewest_bits(checkpoint: Path, tmp_path: Path) -> None:
    """By it the artifact is judged: what loses most."""
    report = export_model(
        checkpoint,
        tmp_path / "out",
        **QUICK,
        matrix_weights={"lm_head": "int8", "gate_up_proj": "int2"},
    )
    assert {bits for bits, _ in matrices_of(tmp_path / "out").values()} == {2, 4, 8}
    assert report.manifest.graph.weights == "int2"


def test_without_a_tokenizer_random_tokens_do(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    for method in ("gptq", "rtn"):
        export_model(
            checkpoint,
            tmp_path / method,
            verify=False,
            graph_weights="int4",
            graph_method=method,
        )
    one, two = matrices_of(tmp_path / "gptq"), matrices_of(tmp_path / "rtn")
    assert all((one[name][1] != two[name][1]).any() for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph_method": "awq"}, r"graph method 'awq', expected one of rtn, gptq"),
        (
            {"graph_method": "gptq", "graph_weights": "fp16"},
            r"graph method gptq is for graphs in int2, int4, int8; the graph weights are fp16",
        ),
        ({"graph_method": "rtn"}, r"for graphs in int2, int4, int8; the graph weights are auto"),
        (
            {"calibration_text": TEXT, "graph_method": "rtn", "graph_weights": "int4"},
            r"calibration text: graph weights int4 by the method rtn are not calibrated",
        ),
        (
            {"calibration_text": TEXT, "graph_weights": "fp32"},
            r"graph weights fp32 by the method none are not calibrated",
        ),
        ({"calibration_text": ""}, r"tokenizer\.json: gives 0 tokens of the calibration text"),
        (
            {"matrix_weights": {"lm_head": "int8"}, "graph_weights": "fp32"},
            r"matrix weights are for graphs in int2, int4, int8; the graph weights are fp32",
        ),
        (
            {"matrix_weights": {"lm_head": "int8"}},
            r"matrix weights are for graphs in int2, int4, int8; the graph weights are auto",
        ),
        (
            {"matrix_weights": {"projections": "int8"}, "graph_weights": "int4"},
            r"'projections', this network's graph has qkv_proj, o_proj, gate_up_proj, down_proj",
        ),
        (
            {"matrix_weights": {"lm_head": "fp16"}, "graph_weights": "int8"},
            r"matrix weights 'fp16' for lm_head, expected one of int2, int4, int8",
        ),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", verify=False, **options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("tokenizer", [None, "another model's"])
def test_a_text_needs_the_model_s_tokenizer(
    tokenizer: str | None, make_checkpoint: MakeCheckpoint, checkpoint: Path, tmp_path: Path
) -> None:
    if tokenizer is None:
        (checkpoint / "tokenizer.json").unlink()
    else:
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        checkpoint = make_checkpoint(vocab_size=64, **special)
    with pytest.raises(ExportError, match=r"expected some of the model's (300|64)\. Give a text"):
        export_model(checkpoint, tmp_path / "out", **QUICK)


def test_command_line_names_method_text_and_matrices(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words", encoding="utf-8")
    words = ["export", "in", "out", "--graph-method", "gptq", "--calibration-text"]
    words += [str(tmp_path / "text.txt"), "--matrix-weights", "lm_head=int8,o_proj=int4"]
    asked = options_of(EXPORT.options, build_parser("export").parse_args(words)).export
    assert asked.matrix_weights == {"lm_head": "int8", "o_proj": "int4"}
    assert (asked.graph_method, asked.calibration_text) == ("gptq", "words")


def test_a_matrix_that_two_options_name_is_refused() -> None:
    words = ["export", "in", "out", *2 * ("--matrix-weights", "lm_head=int8")]
    with pytest.raises(RequestError, match=r"--matrix-weights: lm_head is there twice"):
        options_of(EXPORT.options, build_parser("export").parse_args(words))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_head", "'lm_head' is not of the form lm_head=int8"),
        ("lm_head=", r"'lm_head=' is not of the form"),
        ("lm_head=int8,", r"'' is not of the form"),
        ("lm_head=int8,lm_head=int4", r"lm_head is there twice"),
    ],
)
def test_what_names_no_matrices_is_refused(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "in", "out", "--matrix-weights", text]) == 2
    assert message in capsys.readouterr().err
