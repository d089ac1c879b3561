"""What a graph may be: every form of our exporter, and nothing else, whatever its digest says."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import FileSpec
from edge_memllm_runtimes.ort_graph import read_checked_graph
from support.checkpoints import MakeArtifact
from support.graphs import Change, change_graph, manifest_of, refused, seal

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SHAPES: list[dict[str, Any]] = [
    {"beta": 0},
    {"beta": 0, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"beta": 0, "head_dim": 12},
    {"beta": 0, "memory_sharing": "all_layers"},
    {"beta": 1, "num_key_value_heads": 1},
    {"beta": 2},
    {"beta": 3, "attention_bias": True},
    {"beta": 3, "qk_norm": True, "num_key_value_heads": 2},
    {"beta": 3, "head_dim": 20},
    {"beta": 3, "num_hidden_layers": 1, "memory_sharing": "all_layers"},
    {"beta": 8},
]
WEIGHTS = (
    {"graph_weights": "int4"},
    {"graph_weights": "int8", "kv_dtype": "int8"},
    {"graph_weights": "fp16"},
    {"graph_weights": "fp32"},
    {"graph_weights": "int4", "kv_dtype": "int8"},
)
CODECS = ("f32", "f16", "int8-g64", "int4-g32", "lowrank-r4-f16", "nested8-g32", "fp8-g32")
# Every shape twice, with everything else in turn: the numbers have no common divisor.
FORMS = [
    {**shape, **weights} | ({} if shape["beta"] == 8 else {"table_codec": codec})
    for shape, weights, codec in zip(
        SHAPES * 2, itertools.cycle(WEIGHTS), itertools.cycle(CODECS), strict=False
    )
]


def name_of(value: object) -> str:
    return str(value).translate(str.maketrans("", "", "{}' "))


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_every_form_of_the_exporter_is_taken(
    form: dict[str, Any], make_artifact: MakeArtifact
) -> None:
    with Artifact.open(make_artifact(**form)) as artifact:
        read_checked_graph(artifact)


@pytest.fixture
def folder(make_artifact: MakeArtifact, tmp_path: Path) -> Path:
    source = make_artifact(graph_weights="int4", table_codec="int8", beta=2, qk_norm=True)
    return Path(shutil.copytree(source, tmp_path / "artifact"))


def at_the_end(*nodes: Any, weights: dict[str, np.ndarray] | None = None) -> Change:
    """Nodes behind all others, with weights of their own."""

    def change(model: Any) -> None:
        model.graph.node.extend(nodes)
        tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
        model.graph.initializer.extend(tensors)

    return change


def loop(model: Any) -> None:
    """A loop of a billion rounds around the logits."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT16, None),
        ],
    )
    node = helper.make_node("Loop", ["rounds", "", "logits"], ["turned"], body=body)
    at_the_end(node, weights={"rounds": np.array(10**9)})(model)


def node_of(model: Any, op_type: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == op_type)


def attribute(op_type: str, name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        node = node_of(model, op_type)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def weight(part: str, make: Any) -> Change:
    """Another array in the place of the first weight whose name has `part` in it."""

    def change(model: Any) -> None:
        tensor = next(each for each in model.graph.initializer if part in each.name)
        tensor.CopyFrom(numpy_helper.from_array(make(numpy_helper.to_array(tensor)), tensor.name))

    return change


def rename(op_type: str, *, domain: str = "") -> Change:
    def change(model: Any) -> None:
        model.graph.node[0].op_type = op_type
        model.graph.node[0].domain = domain

    return change


def use_input(op_type: str, place: int, name: str) -> Change:
    def change(model: Any) -> None:
        node_of(model, op_type).input[place] = name

    return change


def outer(model: Any) -> None:
    """A value of 64 x 64 numbers for each of 64 x 64, out of two that are small."""
    column = np.array([0, 0, 64, 1])
    at_the_end(
        helper.make_node("Reshape", ["/model/layers.0/memory/Add/output_0", "column"], ["c"]),
        helper.make_node("Mul", ["c", "row"], ["product"]),
        weights={"column": column, "row": np.ones((1, 4096), np.float16)},
    )(model)


FOREIGN = "which no graph of ours has"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (loop, rf"a graph in an attribute \(a branch or the body of a loop\), {FOREIGN}"),
        (rename("Scan"), f"it has the operator 'Scan', {FOREIGN}"),
        (rename("ConstantOfShape"), f"it has the operator 'ConstantOfShape', {FOREIGN}"),
        (rename("Expand"), f"it has the operator 'Expand', {FOREIGN}"),
        (rename("Gather", domain="evil"), rf"it has the operator 'evil\.Gather', {FOREIGN}"),
        (rename("PyOp", domain="com.microsoft"), r"operator 'com\.microsoft\.PyOp'"),
        (at_the_end(helper.make_node("Tile", ["logits", "n"], ["m"])), "operator 'Tile'"),
        (at_the_end(helper.make_node("Sigmoid", ["nowhere"], ["m"])), "'nowhere' is used before"),
        (at_the_end(helper.make_node("Sigmoid", ["logits"], ["logits"])), "'logits' is made twice"),
        (
            at_the_end(helper.make_node("Add", ["lm_head.weight_scales"] * 2, ["m"])),
            "Add at 'm' computes with weights alone",
        ),
        (outer, r"makes a value of \['B', 'T', 64, 4096\], expected at most"),
        (
            at_the_end(
                helper.make_node("Reshape", ["logits", "s"], ["m"]),
                weights={"s": np.array([0, 0, -1, -1])},
            ),
            "has sizes left open 2, expected 1",
        ),
        (
            at_the_end(
                helper.make_node("Reshape", ["logits", "s"], ["m"]),
                weights={"s": np.array([0, 0, 301])},
            ),
            "has numbers 301, expected 300",
        ),
        (
            at_the_end(
                helper.make_node("Reshape", ["logits", "s"], ["m"]),
                weights={"s": np.array([0, 0, -7, 300])},
            ),
            "has numbers -2100, expected 300",
        ),
        (attribute("MatMulNBits", "N", 1 << 30), r"has codes of .*, expected "),
        (attribute("MatMulNBits", "K", 32), "has a width of 64, expected 32"),
        (attribute("MatMulNBits", "block_size", 0), "has block_size 0, expected an integer"),
        (attribute("MatMulNBits", "block_size", 48), "has blocks of a power of two"),
        (attribute("MatMulNBits", "bits", 5), "has 2, 4 or 8 bits False"),
        (attribute("MatMulNBits", "accuracy_level", 1), "has accuracy_level 0 or 4 False"),
        (attribute("MatMulNBits", "weight_prepacked", 1), "has the attribute 'weight_prepacked'"),
        (attribute("GroupQueryAttention", "num_heads", 0), "has num_heads 0, expected"),
        (attribute("GroupQueryAttention", "kv_num_heads", 2), r"keys of .*, expected"),
        (attribute("GroupQueryAttention", "scale", -1.0), "has scale -1.0, expected a number"),
        (attribute("GroupQueryAttention", "local_window_size", 1), r"has a window of \[1, 1\]"),
        (attribute("GroupQueryAttention", "sliding_window_cache", 1), r"keys of .*'B', 4, 'R', 16"),
        (attribute("GroupQueryAttention", "sliding_window_cache", 2), "has sliding_window_cache 2"),
        (attribute("GroupQueryAttention", "k_quant_type", "PER_TENSOR"), "has k_quant_type"),
        (attribute("GatherBlockQuantized", "block_size", 1 << 14), "has scales of"),
        (attribute("GatherBlockQuantized", "gather_axis", 1), "has gather_axis 1"),
        (attribute("RMSNormalization", "epsilon", 0.0), "has epsilon 0.0, expected a number above"),
        (attribute("RMSNormalization", "axis", 0), "has axis 0"),
        (attribute("GatherND", "batch_dims", 0), "has batch_dims 0"),
        (attribute("Split", "axis", 0), "has axis 0"),
        (
            at_the_end(helper.make_node("Cast", ["logits"], ["m"], to=TensorProto.INT64)),
            "Cast at 'm' has a result of floats False, expected True",
        ),
        (weight("cos_cache", lambda a: a[:9]), r"angles of \[9, 8\], expected \[512, 8\]"),
        (weight("weight_codes", lambda a: a[:-1]), "has codes of"),
        (weight("weight_scales", lambda a: a[:, :0]), "has scales of"),
        (weight("input_layernorm", lambda a: a[:1]), r"a weight of \[1\], expected \[64\]"),
        (weight("memory.layer", lambda a: np.array(9)), "takes number 9 of 2"),
        (weight("memory.layer", lambda a: np.array(-1)), "takes number -1 of 2"),
        (weight("parts", lambda a: -a), "makes parts of"),
        (weight("parts", lambda a: a + 1), "has parts of"),
        (weight("positions.axis", lambda a: np.array([3])), r"has axes \[3\]"),
        (weight("input_layernorm", lambda a: a.astype(np.float32)), "inputs of float16, float32"),
        (use_input("GroupQueryAttention", 3, "embedding"), "has keys of"),
        (use_input("GroupQueryAttention", 5, "total_sequence_length"), "has lengths of"),
        (use_input("Gather", 1, "logits_index"), "has an index of"),
        (use_input("GatherND", 1, "token_index"), "has an index of"),
        (lambda model: node_of(model, "Split").output.append("more"), "has 4 outputs, expected 3"),
        (lambda model: node_of(model, "Split").input.pop(), "has 1 inputs, expected 2"),
        (lambda model: node_of(model, "Mul").input.pop(), "has 1 inputs, expected 2"),
        (lambda model: node_of(model, "Add").input.append("embedding"), "has 3 inputs, expected 2"),
        (use_input("Mul", 0, ""), "has nothing where a value is expected"),
        (use_input("Add", 1, ""), "has nothing where a value is expected"),
        (
            lambda model: node_of(model, "SkipSimplifiedLayerNormalization").output.__setitem__(
                1, "mean"
            ),
            "has the output 'mean', which ours leaves out",
        ),
        (
            lambda model: setattr(model.opset_import[0], "version", 7),
            "its operator sets are .*, expected",
        ),
        (
            lambda model: model.opset_import.append(helper.make_opsetid("evil", 1)),
            "its operator sets are .*, expected",
        ),
        (
            lambda model: model.graph.input.append(model.graph.input[0]),
            "'token_index' is made twice|inputs of the same name",
        ),
        (
            lambda model: model.graph.output.append(model.graph.output[0]),
            "it has outputs of the same name",
        ),
        (
            lambda model: model.graph.node.extend(
                helper.make_node("Sigmoid", ["logits"], [f"m{n}"]) for n in range(400)
            ),
            "nodes and .* weights, expected at most 384 of each for 2 layers",
        ),
    ],
)
def test_a_graph_of_another_kind_is_refused_before_the_library_sees_it(
    folder: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_graph(folder, change)
    monkeypatch.setattr("edge_memllm_runtimes.ort.open_session", None)
    refused(folder, rf"graph\.onnx: .*{message}")


def one(op_type: str, *inputs: str, **attributes: Any) -> Change:
    """A node behind all others; 'logits' are [B, K, 300] of float16, 'each' [B, K, 1, 300]."""
    weights = {
        "ones": np.ones(300, np.float16),
        "wide": np.ones(300, np.float32),
        "seven": np.ones(7, np.float16),
        "last": np.array([-1]),
        "before": np.array([-2]),
        "twice": np.array([-2, -1]),
    }
    return at_the_end(
        helper.make_node("Unsqueeze", ["logits", "before"], ["each"]),
        helper.make_node("Cast", ["each"], ["exact"], to=TensorProto.FLOAT),
        helper.make_node(op_type, inputs, ["m"], **attributes),
        weights={name: weights[name] for name in {*inputs, "before"} & weights.keys()},
    )


SHAPED = r"\['B', 'K', 300\]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            case
            for name in ("Sub", "Div", "Max")
            for case in (
                (one(name, "logits", "wide"), f"{name} at 'm' has inputs of float16, float32"),
                (one(name, "logits", "seven"), rf"{name} at 'm' has values of {SHAPED} and \[7\]"),
                (one(name, "ones", "logits"), f"{name} at 'm' has a weight where a value is"),
                (one(name, "logits"), f"{name} at 'm' has 1 inputs, expected 2"),
                (one(name, "logits", "ones", axis=1), f"{name} at 'm' has the attribute 'axis'"),
            )
        ),
        *(
            case
            for name in ("Relu", "Tanh")
            for case in (
                (one(name, "token_index"), f"{name} at 'm' has inputs of int64"),
                (one(name, "ones"), f"{name} at 'm' computes with weights alone"),
                (one(name, "logits", "logits"), f"{name} at 'm' has 2 inputs, expected 1"),
                (one(name, "logits", alpha=1.0), f"{name} at 'm' has the attribute 'alpha'"),
            )
        ),
        (one("Concat", "logits", axis=-1), "several parts False, expected True"),
        (one("Concat", "logits", "logits", axis=0), "has axis 0, expected an integer"),
        (one("Concat", "logits", "logits"), "has axis None, expected an integer"),
        (one("Concat", "logits", "logits", axis=-2), "has values of False, expected True"),
        (one("Concat", "logits", "each", axis=-1), "has parts of .* 1, 300"),
        (one("Concat", "each", "exact", axis=-1), "has inputs of float16, float32"),
        (one("Concat", "logits", "ones", axis=-1), "has a weight where a value is expected"),
        (one("ReduceSum", "each", "last"), "has keepdims None, expected an integer from 0 to 0"),
        (one("ReduceSum", "each", "last", keepdims=1), "has keepdims 1"),
        (one("ReduceSum", "each", "twice", keepdims=0), r"has axes \[-2, -1\], expected \[-1\]"),
        (one("ReduceSum", "each", keepdims=0), "has 1 inputs, expected 2"),
        (one("ReduceSum", "logits", "last", keepdims=0), "has values of 3, expected 4"),
        (one("ReduceSum", "each", "ones", keepdims=0), "has a weight where a few integers"),
        (one("ReduceL2", "logits", "last"), "has keepdims None, expected an integer from 1 to 1"),
        (one("ReduceL2", "logits", "last", keepdims=0), "has keepdims 0"),
        (one("ReduceL2", "logits", "before", keepdims=1), r"has axes \[-2\], expected \[-1\]"),
        (one("ReduceL2", "token_index", "last", keepdims=1), "has inputs of int64"),
        (one("LayerNormalization", "logits", "ones", epsilon=1e-6, axis=-1), "has 2 inputs"),
        (
            one("LayerNormalization", "logits", "ones", "ones", epsilon=1e-6, axis=1),
            "has axis 1, expected an integer",
        ),
        (
            one("LayerNormalization", "logits", "ones", "ones", epsilon=-1.0, axis=-1),
            "has epsilon -1.0, expected a number above 0",
        ),
        (
            one("LayerNormalization", "logits", "ones", "seven", epsilon=1e-6, axis=-1),
            r"has a weight of \[7\], expected \[300\]",
        ),
        (
            one("LayerNormalization", "logits", "wide", "ones", epsilon=1e-6, axis=-1),
            "has inputs of float16, float32",
        ),
        (
            one("LayerNormalization", "logits", "ones", "ones", epsilon=1.0, axis=-1, stash_type=1),
            "has the attribute 'stash_type'",
        ),
        (one("MatMul", "logits", "logits"), "has streams of 3, expected 4"),
        (one("MatMul", "each", "each"), r"has a mixture of .*300\], expected .*1, 1\]"),
        (one("MatMul", "logits", "each"), r"has a mixture of .*300\], expected .*1, 1\]"),
        (one("MatMul", "each", "exact"), "has inputs of float16, float32"),
        (one("MatMul", "ones", "logits"), "has a weight where a value is expected"),
        (one("Unsqueeze", "each", "before"), "has values of 4, expected 3"),
    ],
)
def test_operators_of_streams_are_used_as_the_exporter_does(
    folder: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_graph(folder, change)
    monkeypatch.setattr("edge_memllm_runtimes.ort.open_session", None)
    refused(folder, rf"graph\.onnx: .*{message}")


def test_an_output_of_another_shape_is_refused(folder: Path) -> None:
    def change(model: Any) -> None:
        keys = [each for each in node_of(model, "GroupQueryAttention").output if "present" in each]
        node_of(model, "MatMulNBits").output[0] = "free"
        for node in model.graph.node:
            for place, name in enumerate(node.output):
                if name == "logits":
                    node.output[place] = "aside"
        model.graph.node.append(helper.make_node("Sigmoid", [keys[0]], ["logits"]))

    change_graph(folder, change)
    refused(folder, r"graph\.onnx: not a graph of this format: ")


# --- weights in a file beside the graph ----------------------------------------------------------


def beside(folder: Path, place: Any = None, more: bytes = b"") -> None:
    """Move long weights into a file; `place(number, offset)` may put them elsewhere."""
    manifest = manifest_of(folder)
    path = folder / manifest.graph.file
    model = onnx.load(path)
    data = bytearray()
    for number, tensor in enumerate(model.graph.initializer):
        if len(tensor.raw_data) > 64:
            data += bytes(-len(data) % 64)
            offset = len(data) if place is None else place(number, len(data))
            entries = {"location": "w", "offset": offset, "length": len(tensor.raw_data)}
            data += tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
    (folder / "w").write_bytes(bytes(data) + more)
    path.write_bytes(model.SerializeToString())
    graph = dataclasses.replace(manifest.graph, external_data="w")
    seal(folder, manifest, "w", graph=graph)


def text_of(folder: Path) -> str:
    with edge_memllm.load(folder, device="cpu", threads=1) as model:
        return model.generate("weights", max_new_tokens=8, ignore_eos=True)


def test_weights_beside_the_graph_are_the_same_weights(folder: Path) -> None:
    expected = text_of(folder)
    beside(folder)
    assert text_of(folder) == expected


@pytest.mark.parametrize(
    ("place", "more", "message"),
    [
        (lambda number, offset: 0, b"", r"begins at 0 of its file, the weights before it end at"),
        (lambda number, offset: offset + (1 << 20), b"", "begins at 1048576 of its file"),
        (lambda number, offset: offset + 1, b"?", "begins at 1 of its file"),
        (None, bytes(1 << 17), "its weights end at .* of a file of"),
        (lambda number, offset: offset + 64, b"", "its weights end at .* of a file of"),
    ],
)
def test_weights_lie_one_behind_the_other(
    folder: Path, place: Any, more: bytes, message: str
) -> None:
    beside(folder, place, more)
    refused(folder, message)


def test_a_graph_file_beyond_all_measure_is_not_read(folder: Path) -> None:
    manifest = manifest_of(folder)
    with (folder / "graph.onnx").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: no disk is used
    files = manifest.files | {"graph.onnx": FileSpec(1 << 40, "0" * 64)}
    changed = dataclasses.replace(manifest, files=files)
    (folder / "manifest.json").write_bytes(changed.to_json())
    refused(folder, "1,099,511,627,776 bytes, a graph has at most 2,147,483,647")


@pytest.mark.parametrize("name", ["graph.onnx", "w"])
def test_bytes_that_changed_since_the_check_are_refused(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library is given was read once, and these bytes are the ones that were checked."""
    beside(folder)
    whole = (folder / name).read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    with Artifact.open(folder) as artifact:  # checks every digest
        (folder / name).write_bytes(changed)
        with pytest.raises(edge_memllm.ArtifactError, match=f"{name}: sha256 is"):
            read_checked_graph(artifact)


def test_a_loaded_model_needs_its_graph_files_no_more(folder: Path) -> None:
    """A file that is cut short under a mapping ends the process; there is none."""
    beside(folder)
    expected = text_of(folder)
    with edge_memllm.load(folder, device="cpu", threads=1, reader="pread") as model:
        for name in ("graph.onnx", "w"):
            (folder / name).write_bytes(b"")
        assert model.generate("weights", max_new_tokens=8, ignore_eos=True) == expected
        maps = Path("/proc/self/maps")
        if maps.exists():
            assert str(folder) not in maps.read_text()
