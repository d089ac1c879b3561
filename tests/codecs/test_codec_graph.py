"""What the graph makes of every codec's wire form is what the codec decodes to, bit for bit."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edge_memllm.artifact.layout import RecordBuffer, RecordLayout
from edge_memllm.artifact.model_spec import MemorySpec
from edge_memllm.codecs import Codec
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.tokens import token_inputs
from support.ready_codecs import WITH_ROWS, ready

LAYERS, WIDTH, TOKENS = 2, 256, 5


def no_matrix(*_: object) -> NoReturn:
    raise AssertionError("this graph has no matrices")


def rows_graph(codec: Codec) -> onnxruntime.InferenceSession:
    """A graph that gives the memory rows [1, T, L, D] of the tokens it is fed, in float32."""
    builder = GraphBuilder("float32", no_matrix)
    memory = MemorySpec(LAYERS, WIDTH, "added", (1.0,) * LAYERS)
    tokens = token_inputs(builder, WIDTH, memory, codec, "float32")
    assert tokens.memory is not None
    tokens.memory.shape = ir.Shape(["B", "T", LAYERS, WIDTH])
    tokens.embedding.shape = ir.Shape(["B", "T", WIDTH])
    graph = builder.graph(tokens.inputs, [tokens.memory, tokens.embedding], 23)
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("codec_id", WITH_ROWS)
def test_graph_and_codec_agree_bit_for_bit(codec_id: str, random: np.random.Generator) -> None:
    codec = ready(codec_id, LAYERS, WIDTH)
    layout = RecordLayout(LAYERS, WIDTH, codec, "float32")
    rows = random.standard_normal((TOKENS, LAYERS, WIDTH)).astype(np.float32)
    buffer = RecordBuffer(layout, TOKENS + 1)
    for slot, parts in enumerate(zip(*codec.encode(rows), strict=True)):
        stored = [part.data for part in parts if part.size]
        for target, part in zip(buffer.parts(slot)[1:], stored, strict=True):
            target[:] = part
    buffer.transcode(TOKENS)
    session = rows_graph(codec)
    feeds = {
        "token_index": np.arange(TOKENS)[::-1].reshape(1, -1).copy(),
        "embedding": buffer.embedding(TOKENS),
        "memory_gain": np.ones(LAYERS, np.float32),
        **buffer.wire(TOKENS),
    }
    found, _ = session.run(None, feeds)
    np.testing.assert_array_equal(found[0, ::-1], buffer.rows(TOKENS))
