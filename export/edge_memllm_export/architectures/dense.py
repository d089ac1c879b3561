"""What dense families of transformers share: layers named as Llama's, no memory, some windows.

A family adds which configurations it takes, and the drawing of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from edge_memllm.artifact.model_spec import CacheSpec, MemorySpec, ModelSpec
from edge_memllm.modeling.stored_weights import describing
from edge_memllm_export.architectures.architecture import Source, Weights
from edge_memllm_export.architectures.dense_reference import DenseReference
from edge_memllm_export.architectures.mapped_weights import LayerWeights, converting
from edge_memllm_export.graph.attention import Attention, AttentionShape, Rotary
from edge_memllm_export.graph.builder import GraphBuilder
from edge_memllm_export.graph.step import StepInputs

# What the rotary embedding is asked for besides positions: the layers of a kind have one of theirs.
RotaryKind = tuple[str, ...]

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# Those whose angles depend on nothing but the position.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_FACTS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)


class Dense(LayerWeights):
    """A network of a dense family; see `Architecture`. Biases and norms show in weights' names."""

    own_facts: ClassVar[tuple[str, ...]] = ()  # fields that change a logit in this family alone
    heads_first: ClassVar[bool] = False  # keys are normed with heads before positions

    def __init__(self, source: Source) -> None:
        """Read the source.

        Raises:
            UnusableCheckpointError: No network of the family is like that, or not exactly.
        """
        with describing(source.where, "describes no network that can be exported"):
            fields = self.text_fields(source.fields)
            kind = fields.pop("model_type")
            if kind not in CONFIG_MAPPING:
                raise ValueError(
                    f"transformers {transformers.__version__} has no {kind}. Upgrade transformers."
                )
            self.config: Any = AutoConfig.for_model(kind, **fields)
            self.refuse(self.config)
            expected = self.expected(_empty_network(self.config))
        self.weights: Weights = source.weights(
            expected,
            tied=self.config.tie_word_embeddings,
            described=f"{self.config.model_type}, {self.config.num_hidden_layers} layers",
            named=self.text_name,
            apart=self.row_table,
        )
        self.read_rows = source.rows
        self.shapes = self.attention_shapes()
        self.epsilon: float = self.config.rms_norm_eps
        self.context: int = self.config.max_position_embeddings

    def text_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of the network that makes text, out of a source's."""
        return dict(fields)

    def text_name(self, stored: str) -> str | None:
        """Return what that network calls a stored weight; None for another network's."""
        return stored

    def refuse(self, config: Any) -> None:
        """Name, in a ValueError, what the network computes and the graph would not."""
        raise NotImplementedError

    def expected(self, network: Any) -> Weights:
        """Return the weights that a network has, without values."""
        return dict(network.named_parameters())

    def attention_shapes(self) -> tuple[AttentionShape, ...]:
        """Return the heads of each layer; a window that holds the whole context is none."""
        config = self.config
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads, config.num_key_value_heads, head_dim
        every = ["sliding_attention"] * config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or every
        squared = getattr(config, "query_pre_attn_scalar", None) or head_dim
        return tuple(AttentionShape(*heads, self.window(kind), squared) for kind in kinds)

    def window(self, kind: str) -> int | None:
        """Return how many positions layers of a kind look at; None for all there are."""
        window: int | None = getattr(self.config, "sliding_window", None)
        if kind != "sliding_attention" or window is None:
            return None
        return window if window < self.config.max_position_embeddings else None

    def source(self, layer: int) -> int | None:
        """Return the layer whose keys and values a layer reads; None for its own."""
        return None

    def readers(self, layer: int) -> tuple[int, ...]:
        """Return the layers that read the keys and values of a layer besides itself."""
        return tuple(each for each in range(len(self.shapes)) if self.source(each) == layer)

    def keeps_window(self, layer: int) -> bool:
        """Return whether a layer keeps a window only, which no other layer may read."""
        window = self.shapes[layer].window
        return window is not None and window < self.context and not self.readers(layer)

    def rotary_kinds(self) -> tuple[RotaryKind, ...]:
        """Return which angles each layer turns by."""
        return ((),) * len(self.shapes)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The configuration, complete."""
        fields: dict[str, Any] = self.config.to_dict()
        return fields

    @property
    def facts(self) -> Mapping[str, Any]:
        """What changes a logit besides the weights."""
        windows = [shape.window for shape in self.shapes]
        facts = {name: getattr(self.config, name) for name in (*_FACTS, *self.own_facts)}
        first = self.shapes[0]
        heads = {"head_dim": first.head_dim, "num_key_value_heads": first.kv_heads}
        return facts | heads | {"windows": windows}

    @property
    def spec(self) -> ModelSpec:
        """What a manifest says of it."""
        config = self.config
        return ModelSpec(
            identity="",
            architecture=config.model_type,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=self.context,
            bos_token_id=config.bos_token_id,
            eos_token_ids=(),
            memory=self.memory(),
            caches=tuple(
                CacheSpec(
                    layer,
                    shape.kv_heads,
                    shape.graph_head_dim,
                    shape.window,
                    rolling=self.keeps_window(layer),
                    readers=self.readers(layer),
                )
                for layer, shape in enumerate(self.shapes)
                if self.source(layer) is None
            ),
            details={"feed_forward_parameters": self.feed_forward_parameters()},
        )

    def memory(self) -> MemorySpec:
        """Return the rows of a token, of which a dense model has none."""
        return MemorySpec()

    def feed_forward_parameters(self) -> int:
        """Return how many weights all feed-forward networks have."""
        config = self.config
        each: int = 3 * config.hidden_size * config.intermediate_size
        return each * int(config.num_hidden_layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names that the graph gives its matrices, as they lie in it."""
        return ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")

    @property
    def notes(self) -> Sequence[str]:
        """What is left out of the model, and the like, in sentences."""
        return ()

    def makes_rows(self, weight: str) -> bool:
        """There are no memory rows."""
        return False

    def reference(
        self, device: str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> DenseReference:
        """The network of transformers over the weights where they are."""
        network = _empty_network(self.config)
        network.load_state_dict(dict(self.weights), strict=False, assign=True)
        network.tie_weights()
        self.complete(network)
        network = network.requires_grad_(False).eval().to(device)
        return self.judge(converting(network, compute_dtype))

    def judge(self, network: Any) -> DenseReference:
        """Return the frozen network as a judge."""
        return DenseReference(network, self.shapes, self.parts, heads_first=self.heads_first)

    @property
    def rotary_values(self) -> int:
        """Numbers that the tables of angles hold for each position."""
        kinds = {
            (k, s.graph_head_dim) for k, s in zip(self.rotary_kinds(), self.shapes, strict=True)
        }
        return sum(width for _, width in kinds)

    def heads(self, layer: int) -> AttentionShape:
        """Return the heads of a layer."""
        return self.shapes[layer]

    def complete(self, network: Any) -> None:
        """Make again, outside of the meta device, what is no weight and so was not assigned."""
        network.model.rotary_emb = self._rotary_embedding()

    def attentions(self, graph: GraphBuilder, step: StepInputs) -> Iterator[Attention]:
        """Yield the attention of each layer; those that are alike have one."""
        made: dict[tuple[AttentionShape, RotaryKind], Attention] = {}
        for shape, kind in zip(self.shapes, self.rotary_kinds(), strict=True):
            if (shape, kind) not in made:
                prefix = "".join(kind) or ("" if shape.window is None else "window")
                rotary = self._rotary(*kind)
                made[shape, kind] = Attention(graph, step, shape, rotary, prefix and f"{prefix}.")
            yield made[shape, kind]

    def attended(
        self,
        graph: GraphBuilder,
        attention: Attention,
        layer: int,
        normed: ir.Value,
        *,
        wanted: bool = False,
    ) -> ir.Value:
        """Return the output of a layer's attention, biases included, at all or wanted positions."""
        path, name = f"/model/layers.{layer}/self_attn", f"model.layers.{layer}.self_attn"
        weights = self.attention_weights(name)
        output = attention(layer, path, normed, weights, self.source(layer), wanted=wanted)
        return self.biased(graph, f"{path}/o_proj", output)

    def biased(self, graph: GraphBuilder, path: str, x: ir.Value) -> ir.Value:
        """Return the output of a projection plus its bias, where it has one."""
        name = f"{path[1:].replace('/', '.')}.bias"
        if name not in self.weights:
            return x
        return graph.op(f"{path}/Add", "Add", [x, graph.vector(name, self.array(name))])

    def head(self, graph: GraphBuilder, x: ir.Value, pending: ir.Value) -> ir.Value:
        """Return the logits [B,K,V] out of the last layer's sum, which is still to be made."""
        normed, _ = self.add_norm(graph, "/model/norm", x, pending)
        return self.logits(graph, normed)

    def logits(self, graph: GraphBuilder, normed: ir.Value) -> ir.Value:
        """Return the product with the head, which may be the embedding."""
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return graph.linear("/lm_head", normed, self.array(f"{head}.weight"))

    def _rotary(self, *kind: str) -> Rotary:
        """The network's own rotary embedding at every position: half of it, for it repeats."""
        positions = torch.arange(self.context).unsqueeze(0)
        cosine, sine = self._rotary_embedding()(torch.zeros(1), positions, *kind)
        half = cosine.shape[-1] // 2  # of [1, P, head_dim]
        return Rotary(cosine[0, :, :half].numpy(), sine[0, :, :half].numpy())

    def _rotary_embedding(self) -> Any:
        return type(_empty_network(self.config).model.rotary_emb)(self.config)


def refuse_rotary(rope: Mapping[str, Any]) -> None:
    """Name, in a ValueError, a rotary embedding that is no table of angles by position."""
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(_ROPE_TYPES)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("its rotary embedding turns a part of each head only.")


def _empty_network(config: Any) -> Any:
    """The network of transformers without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
