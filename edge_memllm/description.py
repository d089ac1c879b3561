"""What is loaded and what was chosen, as plain values for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_memllm.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from edge_memllm.model import Model


def describe(model: Model, memory: MemoryPlan | None) -> dict[str, Any]:
    """Return what `Model.describe` does; `memory` is what was planned when it was loaded."""
    spec, graph, table = model.manifest.model, model.manifest.graph, model.table
    return {
        "identity": spec.identity,
        "beta": spec.beta,
        "layers": spec.num_hidden_layers,
        "width": spec.hidden_size,
        "vocabulary": spec.vocab_size,
        "context": spec.max_position_embeddings,
        "codec": model.manifest.table.codec,
        "record_bytes": table.layout.record_bytes,
        "graph_weights": graph.weights,
        "compute_dtype": graph.compute_dtype,
        "runtime": model.runtime.name,
        "device": model.device,
        "reader": model.reader,
        "reader_reason": table.reader_reason,
        "overlays": list(model.overlays),
        "prefill_chunk": model.prefill_chunk,
        "memory": None if memory is None else memory.as_dict(),
    }
