"""What is found about a memory, as plain data: the only thing that analyses and reports share.

Knows nothing of how a figure is made or shown; docs/explain.md defines every one. Layers are
counted from 0, and a memory that all layers share is layer 0. Shape letters: T tokens of a text,
L layers, M memories of a token (`memory_layers`), K keys of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from edge_memllm.arrays import Doubles

_DIGITS = 7  # what a float32 holds


class Finding:
    """Base of all findings; `as_dict` gives them as JSON has them."""

    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as dicts, lists, texts and numbers, to seven significant digits."""
        found: dict[str, Any] = _plain(self)
        return found


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return value


@dataclass(frozen=True, slots=True)
class Token(Finding):
    """A token of the vocabulary: its id, and its text as it stands in a line.

    A leading space is part of the text. A token without text of its own shows its spelling
    (`<|endoftext|>`), one that is part of a character its bytes (`<E2 80>`).
    """

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Scored(Finding):
    """A token and a number: a coefficient, a logit, a similarity."""

    token: Token
    value: float


@dataclass(frozen=True, slots=True)
class KeyCard(Finding):
    """What one key is about.

    `fires`: tokens whose coefficient is the highest, the highest first; `inverts`: those whose
    coefficient is the lowest below zero, the lowest first: they subtract the value. `promotes` and
    `suppresses`: output tokens whose logits the value raises and lowers most, per unit of
    coefficient (less the mean over the vocabulary).
    """

    layer: int
    key: int
    fires: tuple[Scored, ...]
    inverts: tuple[Scored, ...]
    promotes: tuple[Scored, ...]
    suppresses: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class KeyUse(Finding):
    """A key as one token uses it.

    `coefficient` is c_i = (q.k_i) * SiLU(q.g_i); `share` is c_i (v_i.o) / (o.o) of the output
    o = sum_i c_i v_i, so that the shares of all keys sum to one.
    """

    card: KeyCard
    coefficient: float
    share: float


@dataclass(frozen=True, slots=True)
class LayerUse(Finding):
    """What one layer's memory does for a token.

    `norm` is the row's length; `promotes` and `suppresses` as in `KeyCard`, of the whole row, both
    without gain, None of a row that is a gate. `keys`: those with the largest shares in size, the
    largest first; empty where the weights are not at hand or rows are no FFN-M's. `keys_for_half`
    is how few of them, the largest shares first, make up half of the output.
    """

    layer: int
    norm: float
    promotes: tuple[Scored, ...] | None
    suppresses: tuple[Scored, ...] | None
    keys: tuple[KeyUse, ...] = ()
    keys_for_half: int | None = None


@dataclass(frozen=True, slots=True)
class TokenCard(Finding):
    """A token's memory, layer by layer."""

    token: Token
    layers: tuple[LayerUse, ...]


@dataclass(frozen=True, slots=True, eq=False)
class DirectParts(Finding):
    """The logit of each target as a sum of what each part of the network adds to the stream.

    The final norm's factor is taken as it was, and the mean over the vocabulary, which changes no
    probability, is left out: `embedding` [T] + the sums of `attention`, `compute` and `memory`
    [T, L] over layers are `logit` [T], and `logit` + `mean_logit` [T] is what the network puts
    out. `compute` is FFN-C, zeros where there is none.
    """

    logit: Doubles
    mean_logit: Doubles
    embedding: Doubles
    attention: Doubles
    compute: Doubles
    memory: Doubles


@dataclass(frozen=True, slots=True, eq=False)
class Sentence(Finding):
    """Where in a text memory matters.

    `tokens` are what the network was fed; `targets[i]` is what position i predicts: the token
    after it, for the last position the one the network holds for the likeliest. With natural
    logarithms: `log_probability` [T] of the targets, the same `without_layer` [T, L] with one
    layer's memory off, and `without_memory` [T] with all of it off. Gates are off when they are
    blank. The effect of a memory is the
    first less the second: above zero where it helps. `direct` needs a checkpoint.
    """

    text: str
    tokens: tuple[Token, ...]
    targets: tuple[Token, ...]
    log_probability: Doubles
    without_layer: Doubles
    without_memory: Doubles
    direct: DirectParts | None = None

    @property
    def layer_effect(self) -> Doubles:
        """What each layer's memory adds to the log-probability of each target, [T, L]."""
        return self.log_probability[:, None] - self.without_layer

    @property
    def memory_effect(self) -> Doubles:
        """What all of the memory adds to the log-probability of each target, [T]."""
        return self.log_probability - self.without_memory


@dataclass(frozen=True, slots=True)
class SimilarTokens(Finding):
    """Tokens whose memory is the most like one token's, by cosine.

    `layer` None is all layers together. `features` is what was compared: "coefficients" or "rows".
    """

    token: Token
    layer: int | None
    features: str
    similar: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class Cluster(Finding):
    """Tokens of one cluster: how many, an automatic label, and those nearest to its centre."""

    label: str
    size: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Agreement(Finding):
    """How far clusters agree with a labelling that knows nothing of the memory.

    `shuffled_*` are means over shuffles of the labels, `*_z` the distance from them in their
    standard deviations; `embedding_*` are those of as many clusters of the tokens' embeddings.
    `mutual_information` is adjusted: 0 by chance, 1 for equal partitions. `tokens` have a label.
    """

    labelling: str
    classes: int
    purity: float
    shuffled_purity: float
    purity_z: float
    mutual_information: float
    shuffled_mutual_information: float
    embedding_purity: float = 0.0
    embedding_mutual_information: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class MapPoint(Finding):
    """A token of the cluster map: its place in the plane and the number of its cluster."""

    token: Token
    x: float
    y: float
    cluster: int


@dataclass(frozen=True, slots=True)
class Choice(Finding):
    """A number of clusters that was tried, and how well it did by the rule."""

    clusters: int
    value: float


@dataclass(frozen=True, slots=True)
class LayerClusters(Finding):
    """K-means clusters of the vocabulary by one layer's memory.

    `features` is "coefficients" or "rows", of unit length; `tokens` how many were clustered.
    `rule` says in words how the number of clusters was chosen from `choices`.
    """

    layer: int
    features: str
    tokens: int
    rule: str
    choices: tuple[Choice, ...]
    clusters: tuple[Cluster, ...]
    agreements: tuple[Agreement, ...]
    map_method: str
    points: tuple[MapPoint, ...]


@dataclass(frozen=True, slots=True)
class Curve(Finding):
    """One figure per layer, what it is in words, and the same of a control where there is one."""

    name: str
    definition: str
    values: tuple[float, ...]
    control: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class GainGroup(Finding):
    """What one group of texts or tasks scores at each gain of a sweep."""

    name: str
    metric: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GainSweep(Finding):
    """All memory multiplied by one number, and what becomes of the scores.

    `definition` says in words what is multiplied.
    """

    gains: tuple[float, ...]
    groups: tuple[GainGroup, ...]
    definition: str


@dataclass(frozen=True, slots=True)
class LayerCurves(Finding):
    """How the layers differ: a value of each curve per entry of `layers`.

    None is a figure that was not asked for, or that needs what is not at hand.
    """

    layers: tuple[int, ...]
    clustering: Curve | None = None  # mean local clustering coefficient
    outliers: Curve | None = None  # coefficients of a token that stand out
    norms: Curve | None = None  # mean length of rows
    dropped: Curve | None = None  # KL divergence with the layer's memory off
    gains: GainSweep | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts(Finding):
    """Which model was looked at. `source` is "checkpoint" or "artifact".

    `memory_layers` is M, `memory_kind` says how rows enter the network: "added" to the stream or
    as the "gate" of what is computed. `keys` is K, None for an artifact and for rows that no FFN-M
    makes.
    """

    name: str
    source: str
    identity: str
    beta: int | None
    layers: int
    memory_layers: int
    width: int
    vocabulary: int
    keys: int | None
    memory_gain: tuple[float, ...]
    memory_kind: str = "added"


@dataclass(frozen=True, slots=True)
class Explanation(Finding):
    """All that one call found out; what was not asked for is empty or None.

    `notes` are sentences on what this model's memory cannot answer, or answers in another way.
    """

    model: ModelFacts
    command: str
    notes: tuple[str, ...] = ()
    tokens: tuple[TokenCard, ...] = ()
    keys: tuple[KeyCard, ...] = ()
    sentences: tuple[Sentence, ...] = ()
    similar: tuple[SimilarTokens, ...] = ()
    clusters: tuple[LayerClusters, ...] = ()
    curves: LayerCurves | None = None
