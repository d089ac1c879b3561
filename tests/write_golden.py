"""Write tests/golden/vN, an artifact that every later version must read. Run once per format.

    python -m tests.write_golden tests/golden/v1

An existing golden artifact is never written again: a change of format gets a new folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from edge_memllm import load
from edge_memllm_export import export_model
from tests.conftest import write_checkpoint
from tests.test_golden import PROMPT, continuation, logits_after

FORMS = (("int8", "int4"), ("fp32", "f16"))  # graph weights, table codec


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder}: exists. A new format gets a new folder.")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch)
        write_checkpoint(
            checkpoint,
            dtype="float32",
            seed=7,
            vocab_size=259,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
        for weights, codec in FORMS:
            out = folder / f"{weights}-{codec}"
            export_model(
                checkpoint, out, graph_weights=weights, table_codec=codec, accept_quality_loss=True
            )
            with load(out) as model:
                expected = {"prompt": PROMPT, "tokens": continuation(model)}
                logits = logits_after(model)
            (folder / f"{weights}-{codec}.json").write_text(json.dumps(expected, indent=1) + "\n")
            np.save(folder / f"{weights}-{codec}.npy", logits, allow_pickle=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
