"""What all endpoints share: the model, the engine over it, and what was made of them once."""

from __future__ import annotations

import asyncio
import hashlib
import time
from functools import cached_property

from edge_memllm.chat import ChatTemplate
from edge_memllm.interpretation.token_texts import TokenTexts
from edge_memllm.serving.engine import Engine
from edge_memllm.serving.grammar import Grammars, MakeConstraint
from edge_memllm.serving.http.api_error import ApiError, blaming, explained, is_storage
from edge_memllm.serving.http.body import Body
from edge_memllm.serving.http.fields import BodyFields, shown
from edge_memllm.serving.http.lanes import Lane
from edge_memllm.serving.http.metrics import Metrics
from edge_memllm.serving.http.response_format import WantedSchema
from edge_memllm.serving.http.settings import Settings
from edge_memllm.serving.pieces import ReplyPiece
from edge_memllm.token_bound import TokenBound

# What a model without a limit of its own takes: its context is what ends a text then.
_MOST_TOKENS = (1 << 31) - 1
MOST_MODEL_ID = 1024
# Each of them is done in milliseconds.
_QUICK_THREADS = 4


class Service:
    """Holds no request; safe to share. The engine and its model stay the caller's to close."""

    def __init__(
        self, engine: Engine, settings: Settings, template: ChatTemplate | None = None
    ) -> None:
        """Take an engine; `template` replaces the chat template of its model."""
        self.engine = engine
        self.model = engine.model
        self.settings = settings
        self.template = template or self.model.tokenizer.chat_template
        self.created = self.now()
        self.metrics = Metrics()
        self.trouble: str | None = None  # why the last reply could not be read, if it was that
        self.spec = self.model.manifest.model
        self.grammars = Grammars(self.model.tokenizer, self.spec)
        self.texts = TokenTexts(self.model.tokenizer, self.spec.vocab_size)
        self.token_bound = TokenBound(self.model.tokenizer.definition)
        self.quick = Lane("short requests", _QUICK_THREADS)
        self.thorough = Lane("long requests", 1)
        self.schemas = Lane("schemas", 1, settings.limits.schemas_waiting)
        self.long_bodies = asyncio.Semaphore(settings.limits.long_bodies)

    @property
    def most_tokens(self) -> int:
        """The most tokens a request may ask for."""
        limit = self.settings.limits.max_tokens
        return _MOST_TOKENS if limit is None else limit

    @cached_property
    def fingerprint(self) -> str:
        """What decides, beside seed and request, which text comes: weights, forms, device."""
        graph, table = self.model.manifest.graph, self.model.manifest.table
        parts = (self.spec.identity, graph, table.codec, self.model.runtime.name)
        return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @property
    def busy(self) -> bool:
        """Whether a thread still works on a request, be it that nobody waits for it."""
        return any(lane.busy for lane in (self.quick, self.thorough, self.schemas))

    def lane(self, body: Body) -> Lane:
        """Return where a body is to be read and its prompts are to be tokenized."""
        return self.quick if body.brief else self.thorough

    async def constraint(self, wanted: WantedSchema | None) -> MakeConstraint | None:
        """Return what makes constraints to a schema; a new one waits for those before it.

        Raises `ApiError`.
        """
        if wanted is None:
            return None
        with blaming(wanted.where):
            if wanted.schema is None:
                return await self.quick.run(self.grammars.json_object)
            kept = self.grammars.kept(wanted.schema)
            return kept or await self.schemas.run(self.grammars.json_schema, wanted.schema)

    def note_piece(self, piece: ReplyPiece) -> None:
        """Count a piece of a reply; one that came to its end ends a trouble."""
        self.metrics.note_piece(piece)
        if piece.finish_reason is not None:
            self.trouble = None

    def explained(self, error: Exception) -> ApiError:
        """Return what a client is told about an error; remember it if storage is at fault."""
        if is_storage(error):
            self.trouble = type(error).__name__
        return explained(error)

    @staticmethod
    def now() -> int:
        """Return the time, in seconds since 1970."""
        return int(time.time())

    def check_model(self, fields: BodyFields) -> None:
        """Take the field `model`, which names the one there is or is left out."""
        name = fields.bounded_text("model", MOST_MODEL_ID)
        if name is not None:
            self.check_model_id(name, fields.param("model"))

    def check_model_id(self, name: str, param: str) -> None:
        """Raise `ApiError` for a model that is not served."""
        served = self.settings.model_id
        if name != served:
            message = f"There is no model {shown(name)} here. This server has {shown(served)}."
            raise ApiError(404, message, code="model_not_found", param=param)
