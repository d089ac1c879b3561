"""Which layers are tables: on networks whose layers are tables by construction, and are not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_memllm.errors import ExportError
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.layer_tables import (
    REPLACEMENTS,
    _Measured,
    boundary_of,
    led_windows,
    measure_layers,
)
from support.checkpoints import BOS, EOS, MakeCheckpoint, change_config, write_dense

WINDOW = 24


def network_of(folder: Path) -> Any:
    return Checkpoint.open(folder).architecture.reference().network


def windows(count: int, seed: int) -> torch.Tensor:
    """Windows of few distinct tokens, so that all of them are known."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(97, 109, (count, WINDOW), generator=generator)
    found[:, 0] = BOS
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "edge_memllm"])
def test_a_layer_that_reads_the_token_alone_is_a_table(kind: str, tmp_path: Path) -> None:
    network = network_of(write_dense(tmp_path, kind))
    # Without attention before it, the first feed-forward network reads nothing but the token.
    network.model.layers[0].self_attn.o_proj.weight.zero_()
    found = measure_layers(network, windows(60, 1), windows(6, 2))
    first, second = found.layers[:2]
    assert first.seen_share > 0.999
    assert abs(first.damage["table"].nats) < 0.02
    assert first.damage["alone"].nats == pytest.approx(0, abs=1e-5)
    assert second.seen_share < 0.95
    assert abs(second.damage["table"].nats) > 3 * abs(first.damage["table"].nats)


def test_what_is_dropped_is_gone_but_for_the_first_position(tmp_path: Path) -> None:
    network = network_of(write_dense(tmp_path, "llama"))
    judged = windows(4, 2)
    found = measure_layers(network, windows(20, 1), judged)

    def loss() -> float:
        logits = network(input_ids=judged, use_cache=False).logits[:, :-1]
        return float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), judged[:, 1:].flatten())
        )

    before = loss()
    assert found.loss == pytest.approx(before, abs=1e-5)

    def silent(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(output)
        kept[:, 0] = output[:, 0]
        return kept

    handle = network.model.layers[1].mlp.register_forward_hook(silent)
    dropped = loss() - before
    handle.remove()
    damage = found.layers[1].damage["dropped"]
    assert damage.nats == pytest.approx(dropped, abs=1e-5)
    assert damage.error is not None
    assert damage.error > 0
    one = measure_layers(network, windows(20, 1), judged[:1])
    assert one.layers[1].damage["dropped"].error is None
    assert loss() == pytest.approx(before)  # nothing is left listening


def test_tokens_without_a_row_get_the_mean_and_are_counted(tmp_path: Path) -> None:
    network = network_of(write_dense(tmp_path, "llama"))
    network.model.layers[0].self_attn.o_proj.weight.zero_()
    judged = windows(4, 2)
    judged[:, 1::2] = 65  # never learned from
    found = measure_layers(network, windows(30, 1), judged)
    assert found.seen == pytest.approx(11 / 23)
    judged[:, 1:] = 65
    nothing = measure_layers(network, windows(30, 1), judged)
    assert nothing.seen == 0
    assert [each.nats for each in nothing.layers[0].damage.values()] == [0, 0, 0]
    assert found.layers[0].token_share < 0.9 < found.layers[0].seen_share
    assert found.distinct == 12


def test_layers_that_are_skipped_would_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(write_dense(tmp_path, "gemma3_text"))
    found = measure_layers(network, windows(20, 1), windows(4, 2))
    monkeypatch.setattr(_Measured, "_skipped", lambda *_: nullcontext())
    whole = measure_layers(network, windows(20, 1), windows(4, 2))
    for one, other in zip(found.layers, whole.layers, strict=True):
        for name in REPLACEMENTS:
            assert one.damage[name].nats == pytest.approx(other.damage[name].nats, abs=1e-6)


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text"])
def test_layers_that_read_the_keys_of_others_are_measured(kind: str, tmp_path: Path) -> None:
    network = network_of(write_dense(tmp_path, kind))
    found = measure_layers(network, windows(20, 1), windows(4, 2))
    assert len(found.layers) == 7
    assert all(each.damage["dropped"].nats != 0 for each in found.layers)


def test_progress_is_told_to_its_end(tmp_path: Path) -> None:
    network = network_of(write_dense(tmp_path, "llama"))
    told: dict[str, tuple[int, int]] = {}
    measure_layers(
        network,
        windows(50, 1),
        windows(4, 2),
        lambda name, done, all_: told.update({name: (done, all_)}),
    )
    assert set(told) == {"rows", "alone", "judge"}
    assert all(done == whole for done, whole in told.values())


def test_what_has_no_such_layer_is_sent_elsewhere(make_checkpoint: MakeCheckpoint) -> None:
    network = network_of(make_checkpoint(beta=0))
    with pytest.raises(ExportError, match=r"layer 0 has no feed-forward network.*explain"):
        measure_layers(network, windows(4, 1), windows(4, 2))


def test_windows_are_spread_and_behind_the_boundary() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    text = "".join(chr(200 + number) for number in range(100))
    found = led_windows(encode, text, 7, 11, 30)
    assert found.shape == (3, 11)
    assert found[:, 0].tolist() == [7, 7, 7]
    assert found[:, 1].tolist() == [200, 230, 260]
    with pytest.raises(ExportError, match=r"of 5 characters has no window of 11 .* Give more"):
        led_windows(encode, "short", 7, 11, 30)


def test_of_a_large_text_only_the_pieces_that_windows_are_cut_from_are_read() -> None:
    read = []

    def encode(text: str) -> list[int]:
        read.append(len(text))
        return [ord(letter) for letter in text]

    text = "".join(f" {number:05}" for number in range(10_000))
    found = led_windows(encode, text, 7, 13, 36)
    assert found.shape == (3, 13)
    assert sum(read) < 600
    begins = ["".join(map(chr, row[2:7].tolist())) for row in found]
    assert begins == ["00000", "03325", "06650"]


def test_the_boundary_is_what_begins_a_text_or_ends_it(tmp_path: Path) -> None:
    folder = write_dense(tmp_path, "llama")
    assert boundary_of(Checkpoint.open(folder)) == BOS
    change_config(folder, bos_token_id=None)
    assert boundary_of(Checkpoint.open(folder)) == EOS
    change_config(folder, eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ExportError, match="names neither bos_token_id nor eos_token_id"):
        boundary_of(Checkpoint.open(folder))
