"""The parity ladder and the measure of quality: green on good exports, red on each fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_memllm.errors import ArtifactError, ExportError
from edge_memllm.evaluation.perplexity import divergences
from edge_memllm_export import Quality, export_model, verify_against
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.judging import ladder
from edge_memllm_export.judging import quality as quality_module
from edge_memllm_export.judging.judged_artifact import JudgedArtifact, text_tokens
from edge_memllm_export.judging.ladder import ParityCheck, parity_checks
from edge_memllm_export.judging.quality import measure_quality, token_budget
from edge_memllm_export.judging.remedies import graph_remedy
from edge_memllm_export.texts import judging_text
from support.checkpoints import MakeArtifact, MakeCheckpoint

FORMS = [
    ("fp32", "f32", {"beta": 0}),
    ("fp32", "int4", {"beta": 3, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("fp16", "f16", {"beta": 1}),
    ("int8", "int8", {"beta": 2, "dtype": "bfloat16"}),
    ("int4", "int8", {"beta": 0, "dtype": "float16"}),
    ("int4", "int4-g64", {"beta": 3, "head_dim": 12}),
    ("int4", "int8", {"beta": 8}),
    ("int4", "int8", {"beta": 2, "memory_source": "both", "memory_norm": "shared"}),
    ("fp32", "int4", {"beta": 0, "memory_source": "table", "memory_sharing": "all_layers"}),
    ("fp32", "f32", {"beta": 0, "max_position_embeddings": 16}),
]


@pytest.fixture
def judged(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> Iterator[JudgedArtifact]:
    """An int8 table under an fp32 graph, beta 3."""
    artifact = make_artifact(graph_weights="fp32", table_codec="int8", beta=3)
    with JudgedArtifact(
        artifact, Checkpoint.open(make_checkpoint(beta=3)).architecture.reference()
    ) as judged:
        yield judged


@pytest.mark.parametrize(("graph_weights", "table_codec", "shape"), FORMS)
def test_every_form_of_the_family_climbs_the_ladder(
    graph_weights: str,
    table_codec: str,
    shape: dict[str, Any],
    make_artifact: MakeArtifact,
    make_checkpoint: MakeCheckpoint,
) -> None:
    artifact = make_artifact(graph_weights=graph_weights, table_codec=table_codec, **shape)
    rungs = verify_against(artifact, make_checkpoint(**shape))
    assert [rung.number for rung in rungs] == [1, 2, 3, 4, 5, 6]
    assert all(rung.ok for rung in rungs), rungs
    if graph_weights == "fp32":
        assert all(rung.bound == 1e-4 for rung in rungs[2:])


def red_rungs(judged: JudgedArtifact) -> list[str]:
    return [rung.name for rung in parity_checks(judged, "float32") if not rung.ok]


def test_rung_1_sees_a_codec_beyond_its_bound(
    judged: JudgedArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = type(judged.table.layout.codec)
    bound = codec.bound
    monkeypatch.setattr(codec, "bound", lambda self, rows: bound(self, rows) / 4)
    assert red_rungs(judged)[0] == "codec"


def test_rung_2_sees_one_wrong_row(judged: JudgedArtifact) -> None:
    with torch.no_grad():
        judged.reference.network.model.layers[1].memory.down_proj.weight[3] += 0.1
    assert red_rungs(judged)[0] == "table"


def test_rung_2_sees_one_wrong_embedding(judged: JudgedArtifact) -> None:
    wide = judged.table.embeddings
    judged.table.embeddings = lambda ids: wide(ids) + (ids[:, None] == 299) * np.float32(0.01)
    assert red_rungs(judged) == ["table"]


def test_rung_3_sees_a_network_that_ignores_what_it_is_fed(
    judged: JudgedArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        judged.reference,
        "fed_logits",
        lambda ids, *_: next(judged.reference.logits([*ids[1:], 0], len(ids))),
    )
    assert red_rungs(judged)[0] == "feeding"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: layer.self_attn.o_proj.weight.mul_(1.01),
        lambda layer: layer.mlp.up_proj.weight[:, 0].add_(0.01),
        lambda layer: layer.post_attention_layernorm.weight.mul_(0.99),
    ],
)
def test_rung_4_sees_a_graph_of_other_weights(
    judged: JudgedArtifact, spoil: Callable[[Any], Any]
) -> None:
    with torch.no_grad():
        spoil(judged.reference.network.model.layers[0])
    assert red_rungs(judged) == ["graph"]


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_rung_4_sees_a_wrong_wire_in_narrow_graphs(
    weights: str, make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    """The memory of the two layers swapped: quantisation never costs that much."""
    reference = Checkpoint.open(make_checkpoint()).architecture.reference()
    with JudgedArtifact(make_artifact(graph_weights=weights), reference) as judged:
        rows = judged.table.rows
        judged.table.rows = lambda ids: rows(ids)[:, ::-1].copy()
        assert red_rungs(judged) == ["table", "graph"]


@pytest.mark.parametrize(("name", "chunk"), [("cache", 1), ("chunks", 7)])
def test_rungs_5_and_6_see_a_graph_that_forgets(
    name: str, chunk: int, judged: JudgedArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = judged.graph_logits

    def forgetful(ids: list[int], size: int) -> Iterator[np.ndarray]:
        if size != chunk:
            return whole(ids, size)
        parts = (ids[start : start + size] for start in range(0, len(ids), size))
        return itertools.chain.from_iterable(whole(part, size) for part in parts)

    monkeypatch.setattr(judged, "graph_logits", forgetful)
    assert red_rungs(judged) == [name]


def forgetting(whole: Any, ids: list[int], size: int) -> Iterator[np.ndarray]:
    """Every chunk begins anew: nothing is in the cache."""
    parts = (ids[start : start + size] for start in range(0, len(ids), size))
    return itertools.chain.from_iterable(whole(part, size) for part in parts)


def repeating(whole: Any, ids: list[int], size: int) -> Iterator[np.ndarray]:
    """The cache holds the last token of each chunk twice: all places behind it are off by one."""
    fed, kept = list[int](), list[int]()
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        kept += range(len(fed), len(fed) + len(part))
        fed += [*part, part[-1]]
    yield np.concatenate(list(whole(fed, size)))[kept]


def blind_at_the_edge(whole: Any, ids: list[int], size: int) -> Iterator[np.ndarray]:
    """The mask hides from each chunk the one before the last."""
    for start in range(0, len(ids), size):
        seen = ids[: max(0, start - size)] + ids[start : start + size]
        yield np.concatenate(list(whole(seen, size)))[max(0, start - size) :]


@pytest.mark.parametrize(("name", "chunk"), [("cache", 1), ("chunks", 7)])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4", "int2"])
@pytest.mark.parametrize("fault", [forgetting, repeating, blind_at_the_edge])
def test_rungs_5_and_6_see_faults_in_narrow_graphs(
    fault: Callable[..., Iterator[np.ndarray]],
    weights: str,
    name: str,
    chunk: int,
    make_artifact: MakeArtifact,
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What rounding alone costs is told from what is wrong in the cache, the mask or positions."""
    reference = Checkpoint.open(make_checkpoint()).architecture.reference()
    with JudgedArtifact(make_artifact(graph_weights=weights), reference) as judged:
        assert red_rungs(judged) == []
        right = judged.graph_logits
        monkeypatch.setattr(
            judged,
            "graph_logits",
            lambda ids, size: fault(right, ids, size) if size == chunk else right(ids, size),
        )
        assert red_rungs(judged) == [name]


def test_parts_may_be_rounded_in_their_own_way(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far from the network as the whole is, and as far from the whole: no fault."""
    reference = Checkpoint.open(make_checkpoint()).architecture.reference()
    with JudgedArtifact(make_artifact(graph_weights="fp16"), reference) as judged:
        exact = judged.graph_logits
        noise = np.random.default_rng(0)

        def rounded(ids: list[int], size: int) -> Iterator[np.ndarray]:
            for logits in exact(ids, size):
                yield logits + noise.normal(0, 0.04, logits.shape).astype(np.float32)

        monkeypatch.setattr(judged, "graph_logits", rounded)
        whole, *parts = list(parity_checks(judged, "float32"))[3:]
        apart = divergences(judged.logits(list(range(48)), 48), judged.logits(list(range(48)), 1))
    assert whole.measured > 5e-4
    assert all(rung.ok for rung in parts)
    assert all(rung.measured < whole.measured / 4 for rung in parts)
    assert apart.mean() > 1.5 * whole.measured


def test_a_measurement_that_is_no_number_is_red() -> None:
    assert ParityCheck(4, "graph", 0.1, 0.1, "").ok
    assert not ParityCheck(4, "graph", float("nan"), 0.1, "").ok


def test_red_rung_ends_the_export(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "_LOGIT_BOUND", 1e-9)
    with pytest.raises(ExportError, match=r"Rung 3 of the parity ladder, feeding, does not hold"):
        export_model(make_checkpoint(), tmp_path / "out", graph_weights="fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "helps"),
    [
        (
            {"graph_weights": "int4"},
            "more bits for the head (matrix weights lm_head=int8), or graph weights int8",
        ),
        ({"graph_weights": "int8"}, "graph weights fp16"),
        ({"graph_weights": "int8", "graph_block": 64}, "graph block 32, or graph weights fp16"),
        ({"graph_weights": "auto"}, "graph weights int8"),
        ({"graph_weights": "fp16"}, "graph weights fp32"),
        ({"graph_weights": "fp32"}, None),
    ],
    ids=str,
)
def test_what_is_advised_is_not_there_yet(
    options: dict[str, Any],
    helps: str | None,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint()
    export_model(checkpoint, tmp_path / "out", verify=False, **options)
    reference = Checkpoint.open(checkpoint).architecture.reference()
    with JudgedArtifact(tmp_path / "out", reference) as judged:
        assert graph_remedy(judged) == helps
        refusal = ParityCheck(4, "graph", 1.0, 0.5, "").refusal(judged)
    assert (f"Export with {helps}: where" in refusal) == (helps is not None)
    assert "please report it" in refusal


def test_artifact_of_another_checkpoint_is_refused(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    with pytest.raises(ArtifactError, match=r"exported from the model sha256:\w+, .* is sha256"):
        verify_against(make_artifact(), make_checkpoint(seed=1))


def test_mean_kl_of_known_distributions() -> None:
    truth = np.log(np.array([[0.5, 0.5], [1.0, 1e-30]]))
    found = np.log(np.array([[0.25, 0.75], [0.5, 0.5]])) + 3  # logits may be shifted
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), np.log(2)]
    assert divergences(truth, found).mean() == pytest.approx(np.mean(expected))
    assert divergences(truth, truth).mean() == 0


def test_quality_is_that_of_a_plain_computation(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    reference = Checkpoint.open(make_checkpoint()).architecture.reference()
    with JudgedArtifact(make_artifact(), reference) as judged:
        ids = text_tokens(judged, judging_text(), 300)  # a whole window and a part
        quality = measure_quality(judged, ids)
        logits = {"network": [], "graph": []}
        for part in (ids[:256], ids[256:]):
            logits["network"].append(next(judged.reference.logits(part, 256))[:-1])
            logits["graph"].append(next(judged.graph_logits(part, 256))[:-1])
    targets = torch.tensor(ids[1:256] + ids[257:])
    truth, found = (torch.from_numpy(np.concatenate(x)).double() for x in logits.values())
    logs, other = torch.log_softmax(truth, -1), torch.log_softmax(found, -1)
    divergence = (logs.exp() * (logs - other)).sum(-1)
    cross_entropy = torch.nn.functional.cross_entropy
    assert quality.tokens == 298
    assert quality.mean_kl == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert quality.max_kl == pytest.approx(float(divergence.max()), rel=1e-3)
    assert quality.checkpoint_perplexity == pytest.approx(
        float(cross_entropy(truth, targets).exp()), rel=1e-4
    )
    assert quality.artifact_perplexity == pytest.approx(
        float(cross_entropy(found, targets).exp()), rel=1e-4
    )


def test_quality_of_the_exact_form_is_lossless(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    reference = Checkpoint.open(make_checkpoint()).architecture.reference()
    artifact = make_artifact(graph_weights="fp32", table_codec="f32")
    with JudgedArtifact(artifact, reference) as judged:
        quality = measure_quality(judged, text_tokens(judged, judging_text(), 64))
    assert quality.mean_kl < 1e-9
    assert abs(quality.perplexity_increase) < 1e-5


@pytest.mark.parametrize(
    ("mean", "after", "acceptable"),
    [(0.05, 104.9, True), (0.051, 100, False), (0.01, 106, False), (0.01, 90, True)],
)
def test_bounds_of_quality(mean: float, after: float, acceptable: bool) -> None:
    assert Quality(10, mean, 1.0, 100.0, after).acceptable is acceptable


def test_quality_that_is_no_number_is_not_acceptable() -> None:
    nan, inf = float("nan"), float("inf")
    assert not Quality(10, nan, nan, 100.0, 100.0).acceptable
    assert not Quality(10, 0.0, 0.0, inf, inf).acceptable


def figures(tokens: int, mean_kl: float, seed: int = 0) -> np.ndarray:
    """Divergences and losses [3, tokens] as they scatter where so much is lost."""
    noise = np.random.default_rng(seed)
    divergence = noise.exponential(mean_kl, tokens)
    truth = noise.exponential(3.0, tokens)
    return np.stack([divergence, truth, truth + noise.normal(0, (2 * mean_kl) ** 0.5, tokens)])


@pytest.mark.parametrize(
    ("tokens", "mean_kl", "sure"),
    [(512, 0.001, False), (1024, 0.001, True), (256, 0.5, True), (2048, 0.05, False)],
)
def test_a_text_is_read_until_the_verdict_is_sure(tokens: int, mean_kl: float, sure: bool) -> None:
    assert quality_module._sure(figures(tokens, mean_kl), tokens) is sure


def test_what_is_no_number_is_never_sure() -> None:
    assert not quality_module._sure(np.full((3, 2000), np.nan), 2000)


def test_a_clear_case_is_read_no_further(
    make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> None:
    reference = Checkpoint.open(make_checkpoint()).architecture.reference()
    with JudgedArtifact(make_artifact(graph_weights="fp16"), reference) as judged:
        ids = text_tokens(judged, judging_text(), 2000)
        told: list[tuple[int, int]] = []
        quality = measure_quality(judged, ids, lambda *count: told.append(count))
    assert quality.tokens == 4 * 255
    assert told[-1] == (2000, 2000)


def test_larger_models_are_compared_on_fewer_tokens() -> None:
    assert token_budget(10**6) == 4096
    assert token_budget(10**9) == 1099
    assert token_budget(10**11) == 512


def test_text_of_the_package_is_prose() -> None:
    text = judging_text()
    assert 16_000 < len(text.encode()) < 24_000
    assert len(set(text.split())) > 1000
