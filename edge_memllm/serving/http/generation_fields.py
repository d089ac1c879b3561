"""The fields that completions and chat share, as OpenAI defines them, and our extensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edge_memllm.model import Model
from edge_memllm.request import check_tokens
from edge_memllm.sampling import SEED_LIMIT, Sampling
from edge_memllm.serving.http.api_error import blaming, refused
from edge_memllm.serving.http.call import Wishes
from edge_memllm.serving.http.fields import BodyFields, checked_text, shown
from edge_memllm.serving.http.parameters import nothing_of
from edge_memllm.serving.http.response_format import take_schema
from edge_memllm.serving.http.settings import Limits
from edge_memllm.steering import MOST_BIAS, MOST_PENALTY, Steering
from edge_memllm.stopping import MAX_STOP_CHARACTERS

MOST_TEMPERATURE = 2.0
MOST_REPETITION = 10.0
MOST_USER = 256
MOST_NAME = 256
_MOST_METADATA, _MOST_METADATA_TEXT = 16, 512
_STREAM_UNSUPPORTED = nothing_of("events are not padded", include_obfuscation=(False,))
# OpenAI's top_p may be 0, which keeps the likeliest token alone.
_LEAST_TOP_P = 1e-9
_SEED_LOW, _SEED_HIGH = -(1 << 63), SEED_LIMIT - 1


def take_wishes(fields: BodyFields, model: Model, limits: Limits) -> Wishes:
    """Take the shared fields. Raises `ApiError` for the first that cannot be granted."""
    stream = fields.flag("stream")
    seed = fields.optional_integer("seed", _SEED_LOW, _SEED_HIGH)
    usage, running = _take_usage(fields, stream)
    _take_hints(fields)
    return Wishes(
        sampling=_take_sampling(fields, model.sampling),
        steering=_take_steering(fields, model.manifest.model.vocab_size, limits.biases),
        schema=take_schema(fields, limits.schema_bytes),
        choices=_or(fields.optional_integer("n", 1, limits.choices), 1),
        seed=None if seed is None else seed % SEED_LIMIT,
        stops=_take_stops(fields, limits.stops),
        stop_tokens=_take_stop_tokens(fields, limits.stops, model),
        ignore_eos=fields.flag("ignore_eos"),
        overlays=_take_overlays(fields, model.overlays, limits.overlays),
        without_memory=fields.flag("without_memory"),
        trace=fields.flag("trace"),
        stream=stream,
        usage=usage,
        running_usage=running,
        statistics=fields.flag("statistics"),
        user=_take_user(fields),
    )


def _take_sampling(fields: BodyFields, default: Sampling) -> Sampling:
    """Take how tokens are chosen; what is left out comes from the artifact."""
    top_p = fields.optional_number("top_p", 0, 1)
    top_k = fields.optional_integer("top_k", -1, 1 << 31)  # -1 is vLLM's word for all
    given: dict[str, Any] = {
        "temperature": fields.optional_number("temperature", 0, MOST_TEMPERATURE),
        "top_p": None if top_p is None else max(top_p, _LEAST_TOP_P),
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": fields.optional_number("min_p", 0, 1),
        "repetition_penalty": fields.optional_number("repetition_penalty", 0.01, MOST_REPETITION),
    }
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def _take_steering(fields: BodyFields, vocab_size: int, most: int) -> Steering:
    frequency, presence = (
        fields.optional_number(name, -MOST_PENALTY, MOST_PENALTY) or 0.0
        for name in ("frequency_penalty", "presence_penalty")
    )
    biases = fields.pairs("logit_bias", most)
    where = fields.param("logit_bias")
    return Steering(frequency, presence, _biases(biases, where, vocab_size))


def _biases(given: Mapping[str, object], where: str, vocab_size: int) -> dict[int, float]:
    """Return biases by token; they come under the token's number, written as text."""
    found: dict[int, float] = {}
    for name in given:
        token = int(name) if name.isascii() and name.isdecimal() and len(name) < 20 else -1
        if not 0 <= token < vocab_size or str(token) != name:
            expected = f"token numbers from 0 to {vocab_size - 1}"
            raise refused(where, f"{where} has the entry {shown(name)}, expected {expected}.")
    entries = BodyFields(given, f"{where}.")
    for name in given:
        found[int(name)] = entries.optional_number(name, -MOST_BIAS, MOST_BIAS) or 0.0
    return found


def _take_stops(fields: BodyFields, most: int) -> tuple[str, ...]:
    value = fields.value("stop")
    where = fields.param("stop")
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > most:
        raise refused(where, f"{where} is {shown(value)}, expected a text or at most {most}.")
    stops = tuple(
        checked_text(each, f"{where}[{number}]", MAX_STOP_CHARACTERS)
        for number, each in enumerate(texts)
    )
    if "" in stops:
        raise refused(where, f"{where} has an empty text, which would stop every reply.")
    return stops


def _take_overlays(
    fields: BodyFields, loaded: tuple[str, ...], most: int
) -> tuple[str, ...] | None:
    names = fields.optional_items("overlays", most)
    if names is None:
        return None
    where = fields.param("overlays")
    chosen = tuple(checked_text(each, where, MOST_NAME) for each in names)
    unknown = [name for name in chosen if name not in loaded]
    if unknown:
        there = ", ".join(loaded) or "none"
        raise refused(where, f"There is no overlay {shown(unknown[0])}. Loaded: {there}.")
    if len(set(chosen)) < len(chosen):
        raise refused(where, f"{where} names an overlay twice.")
    return chosen


def _take_stop_tokens(fields: BodyFields, most: int, model: Model) -> tuple[int, ...]:
    tokens = fields.optional_items("stop_token_ids", most) or []
    with blaming(fields.param("stop_token_ids")):
        return tuple(check_tokens(tokens, model.manifest.model.vocab_size))


def _take_usage(fields: BodyFields, stream: bool) -> tuple[bool, bool]:
    """Take whether a stream tells its usage at its end, and whether with each part as well."""
    options = fields.group("stream_options")
    if options is None:
        return False, False
    usage, running = options.flag("include_usage"), options.flag("continuous_usage_stats")
    options.finish(_STREAM_UNSUPPORTED)
    where = fields.param("stream_options")
    if usage and not stream:
        raise refused(where, f"{where} is for streams. Ask with stream true, or leave it out.")
    if running and not usage:
        message = f"{where}.continuous_usage_stats needs include_usage true. Add it."
        raise refused(f"{where}.continuous_usage_stats", message)
    return usage, running


def _take_user(fields: BodyFields) -> str:
    """Take who asks, under either of OpenAI's names: users of one client take turns."""
    names = (fields.bounded_text(name, MOST_USER) for name in ("user", "safety_identifier"))
    return "/".join(name for name in names if name)


def _take_hints(fields: BodyFields) -> None:
    """Take what may be said of a request and changes nothing about its reply."""
    fields.bounded_text("prompt_cache_key", MOST_USER)
    pairs = fields.pairs("metadata", _MOST_METADATA)
    where = fields.param("metadata")
    for name, value in pairs.items():
        checked_text(value, f"{where}.{name}", _MOST_METADATA_TEXT)


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
