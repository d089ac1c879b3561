"""Clusters: planted ones are found again, their number is chosen, and their meaning measured."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import edge_memllm
from edge_memllm import RequestError, RuntimeUnavailableError
from edge_memllm.interpretation import memory as features_module
from edge_memllm.interpretation.clusters import (
    SHUFFLES,
    assign,
    cluster_layers,
    contingency,
    distance,
    mutual_information,
    partition,
    plane,
    purity,
    shuffled_tables,
)
from edge_memllm.interpretation.explaining import open_subject
from edge_memllm.interpretation.memory import EMBEDDING, ComputedFeatures, TableMemory
from edge_memllm.interpretation.tokens import character_class, token_of
from edge_memllm.text.token_texts import TokenTexts
from support import ROOT
from support.checkpoints import VOCABULARY, MakeArtifact, MakeCheckpoint
from support.interpretation import network_memory
from support.small_model import byte_tokenizer

TEXTS = TokenTexts(byte_tokenizer(), VOCABULARY)
EVERY = np.arange(VOCABULARY)
SHIPPED = ROOT / "examples" / "tiny-english"
QUIET = lambda done, total: None  # noqa: E731


class Planted:
    """A memory whose coefficients are one of several centres, and noise."""

    layers, keys, width, vocabulary = 2, 24, 8, VOCABULARY

    def __init__(self, groups: np.ndarray, noise: float = 0.05) -> None:
        random = np.random.default_rng(0)
        centres = random.standard_normal((2, int(groups.max()) + 1, self.keys))
        spread = noise * random.standard_normal((2, VOCABULARY, self.keys))
        self.groups = groups
        self._coefficients = (centres[:, groups] + spread).astype(np.float32)
        self._embeddings = random.standard_normal((VOCABULARY, self.width)).astype(np.float32)

    def coefficients(self, layer: int, ids: np.ndarray, keys: None = None) -> np.ndarray:
        return self._coefficients[layer, ids]

    def values(self, layer: int, keys: None = None) -> np.ndarray:
        raise NotImplementedError

    def rows(self, layer: int, ids: np.ndarray) -> np.ndarray:
        return self._coefficients[layer, ids, : self.width]

    def embeddings(self, ids: np.ndarray) -> np.ndarray:
        return self._embeddings[ids]


def by_characters() -> np.ndarray:
    names = [character_class(TEXTS.text(i), TEXTS.has_text(i)) for i in range(VOCABULARY)]
    return np.unique(names, return_inverse=True)[1]


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = len(set(zip(first.tolist(), second.tolist(), strict=True)))
    return pairs == len(set(first.tolist())) == len(set(second.tolist()))


def test_planted_clusters_are_found_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_CHUNK_BYTES", 1 << 13)
    memory = Planted(EVERY % 16)
    features = ComputedFeatures(memory, "coefficients")
    found = partition(features, 1, None, 0)
    assert len(found.centres) == 16
    assert [choice.clusters for choice in found.choices] == [8, 16, 32, 64]
    assert max(found.choices, key=lambda choice: choice.value).clusters == 16
    (own,) = assign(features, [found], QUIET)
    assert own.count == 16
    assert same_partition(own.clusters, memory.groups)
    points = found.points(memory.coefficients(1, EVERY))
    right = ((points - found.centres[:, None]) ** 2).sum(axis=2).min(axis=0)
    np.testing.assert_allclose(own.distances, right, atol=1e-5)


def test_centres_of_a_sample_serve_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_memllm.interpretation.clusters.SAMPLE", 120)
    memory = Planted(EVERY % 8)
    features = ComputedFeatures(memory, "coefficients")
    both = [partition(features, layer, 8, 0) for layer in (0, EMBEDDING)]
    assert both[0].choices == ()
    own, embedded = assign(features, both, QUIET)
    assert same_partition(own.clusters, memory.groups)
    assert embedded.clusters.shape == own.clusters.shape
    assert (np.diff(np.bincount(own.clusters)) <= 0).all()


def test_clusters_of_a_checkpoint_are_a_finding() -> None:
    memory = Planted(by_characters())
    seen: list[str] = []
    (found,) = cluster_layers(
        memory,
        texts=TEXTS,
        layers=[1],
        corpus="The cat sat on the mat. " * 40,
        progress=lambda stage, done, total: seen.append(stage),
    )
    assert (found.layer, found.features, found.tokens) == (1, "coefficients", VOCABULARY)
    assert "highest mean silhouette" in found.rule
    assert sum(cluster.size for cluster in found.clusters) == VOCABULARY
    assert any("digits 100%" in cluster.label for cluster in found.clusters)
    characters, frequency = found.agreements
    assert characters.labelling == "characters"
    assert characters.tokens == VOCABULARY
    assert characters.purity == 1
    assert characters.purity > characters.embedding_purity
    assert characters.purity_z > 10
    assert abs(characters.shuffled_mutual_information) < 0.05
    assert abs(characters.embedding_mutual_information) < 0.2
    assert characters.mutual_information > 0.5
    assert frequency.labelling == "frequency"
    assert len(found.points) == VOCABULARY
    assert {point.cluster for point in found.points} == set(range(len(found.clusters)))
    assert all(abs(each.x) <= 1 and abs(each.y) <= 1 for each in found.points)
    assert found.map_method.startswith("t-SNE")
    assert list(dict.fromkeys(seen)) == ["cluster", "assign", "describe"]
    cluster = found.clusters[found.points[65].cluster]
    assert found.points[65].token == token_of(TEXTS, 65)
    assert len(cluster.tokens) <= 12


def test_clusters_of_the_shipped_model_mean_something() -> None:
    with open_subject(SHIPPED, threads=1) as subject:
        (found,) = cluster_layers(subject.memory, texts=subject.texts, layers=[0], clusters=32)
    agreements = {each.labelling: each for each in found.agreements}
    characters, words = agreements["characters"], agreements["word class"]
    assert characters.purity > 0.75 > 0.5 > characters.shuffled_purity
    assert words.purity > 0.65 > 0.4 > words.shuffled_purity
    assert min(characters.mutual_information, words.mutual_information) > 0.3
    for each in (characters, words):
        assert abs(each.shuffled_mutual_information) < 0.01
        assert each.purity_z > 50
    assert any(cluster.label.startswith("digits") for cluster in found.clusters)


def test_the_same_seed_gives_the_same_clusters(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_memllm.interpretation.clusters._MAP_POINTS", 50)
    with edge_memllm.load(make_artifact(beta=1), device="cpu") as model:
        memory = TableMemory(model)
        first, again = (
            cluster_layers(memory, texts=TEXTS, layers=[0, 1], clusters=5) for _ in range(2)
        )
    assert first == again
    assert [each.layer for each in first] == [0, 1]
    assert {each.features for each in first} == {"rows"}
    assert first[0].rule == "the number that was asked for"
    assert first[0].choices == ()
    assert len(first[0].clusters) == 5


def test_a_network_without_keys_is_clustered_by_its_rows(make_checkpoint: MakeCheckpoint) -> None:
    memory = network_memory(make_checkpoint(memory_source="table"))
    (found,) = cluster_layers(memory, texts=TEXTS, layers=[0], clusters=3)
    assert found.features == "rows"


def test_too_many_clusters_are_refused() -> None:
    memory = Planted(EVERY % 3, noise=0)
    for wrong in (3, 200):
        with pytest.raises(RequestError, match=f"layer 0.* 3 distinct .* few for {wrong} clusters"):
            cluster_layers(memory, texts=TEXTS, layers=[0], clusters=wrong)
    with pytest.raises(RequestError, match="clusters is 1, expected at least 2"):
        cluster_layers(memory, texts=TEXTS, layers=[0], clusters=1)
    with pytest.raises(RequestError, match="layer 5 has no memory"):
        cluster_layers(memory, texts=TEXTS, layers=[5])


def test_few_distinct_vectors_get_few_clusters() -> None:
    features = ComputedFeatures(Planted(EVERY % 9, noise=0), "coefficients")
    found = partition(features, 0, None, 0)
    assert [choice.clusters for choice in found.choices] == [2]


def test_the_extra_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(RuntimeUnavailableError, match=r"scikit-learn.*pip install .\.\[explain\]"):
        cluster_layers(Planted(EVERY % 9), texts=TEXTS, layers=[0])


def test_purity_by_hand() -> None:
    clusters, classes = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 0, 0, 1])
    table = contingency(clusters, classes)
    assert table.tolist() == [[1, 2], [2, 0], [0, 1]]
    assert purity(table) == pytest.approx(5 / 6)


def test_mutual_information_is_that_of_the_library(random: np.random.Generator) -> None:
    from sklearn.metrics import adjusted_mutual_info_score

    clusters = random.integers(0, 6, 400)
    classes = np.where(random.random(400) < 0.5, clusters % 3, random.integers(0, 4, 400))
    found = mutual_information(contingency(clusters, classes))
    assert found == pytest.approx(adjusted_mutual_info_score(classes, clusters), abs=1e-9)
    equal = contingency(clusters, clusters)
    assert mutual_information(equal) == pytest.approx(1)
    assert mutual_information(contingency(clusters * 0, classes)) == 0
    assert mutual_information(contingency(clusters * 0, clusters * 0)) == 1


def test_shuffling_keeps_what_there_is(random: np.random.Generator) -> None:
    clusters, classes = random.integers(0, 6, 400), random.integers(0, 4, 400)
    tables = shuffled_tables(clusters, classes, 0)
    assert len(tables) == SHUFFLES
    for table in tables:
        assert table.sum(axis=0).tolist() == np.bincount(classes).tolist()
        assert table.sum(axis=1).tolist() == np.bincount(clusters).tolist()
    assert not np.array_equal(tables[0], tables[1])


def test_a_distance_is_in_deviations_of_the_control() -> None:
    assert distance(5, [1, 2, 3], 0.1) == pytest.approx(3)
    assert distance(5, [2, 2, 2], 0.5) == pytest.approx(6)


@pytest.mark.parametrize(("count", "how"), [(3, "principal"), (99, "principal"), (100, "t-SNE")])
def test_a_map_keeps_neighbours_together(count: int, how: str) -> None:
    points = np.repeat(np.eye(3, dtype=np.float32), -(-count // 3), axis=0)[:count]
    points += 0.01 * np.random.default_rng(0).standard_normal(points.shape).astype(np.float32)
    places, method = plane(points, 0)
    assert how in method
    assert np.abs(places).max() == pytest.approx(1)
    if count > 3:
        group = np.repeat(np.arange(3), -(-count // 3))[:count]
        far = np.linalg.norm(places[:, None] - places, axis=2)
        assert far[group[:, None] == group].max() < far[group[:, None] != group].min()


@pytest.mark.parametrize("shape", [(5, 1), (1, 7), (120, 3)])
def test_a_map_of_points_that_are_all_alike(shape: tuple[int, int]) -> None:
    places, _ = plane(np.zeros(shape, np.float32), 0)
    assert places.shape == (shape[0], 2)
    assert np.isfinite(places).all()
