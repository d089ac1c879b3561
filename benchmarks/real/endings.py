"""Whether JSON of a small model ends by itself: twenty seeds of each schema, as a user would ask.

A reply counts as ended when its grammar ended it, not its limit of tokens, and as valid when
jsonschema-rs, which knows nothing of grammars, accepts it under the schema as it was given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

SEEDS = 20
LIMIT = 1024  # tokens
TEMPERATURES = (0.8, 1.0)
_SLOTS = 10  # texts at a time
QUESTION = (
    "Describe a person: name, age, height in metres, mood, address, hobbies and pets. Answer in "
    "JSON."
)
_ADDRESS = {"street": {"type": "string"}, "number": {"type": "integer"}, "city": {"type": "string"}}
_PET = {"name": {"type": "string"}, "kind": {"enum": ["cat", "dog", "bird"]}}
_PERSON = {
    "name": {"type": "string"},
    "age": {"type": "integer"},
    "height": {"type": "number"},
    "mood": {"enum": ["happy", "sad", "angry"]},
    "married": {"type": "boolean"},
}


def _object(properties: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": dict(properties)}
    if strict:
        found |= {"required": list(properties), "additionalProperties": False}
    return found


def schema(*, strict: bool) -> dict[str, Any]:
    """Return a schema of every kind of value; open says only which properties there may be."""
    pets = {"type": "array", "items": _object(_PET, strict=strict)}
    return _object(
        {
            **_PERSON,
            "address": _object(_ADDRESS, strict=strict),
            "hobbies": {"type": "array", "items": {"type": "string"}},
            "pets": pets,
        },
        strict=strict,
    )


def forms() -> dict[str, dict[str, Any]]:
    """Return OpenAI's objects by what the page calls them."""
    return {
        "open schema": {"type": "json_schema", "json_schema": {"schema": schema(strict=False)}},
        "strict schema": {
            "type": "json_schema",
            "json_schema": {"schema": schema(strict=True), "strict": True},
        },
        "any object": {"type": "json_object"},
    }


def measure_endings(gguf: Path, folder: Path, threads: int, artifact: Path | None) -> Iterator[str]:
    """Yield a line for each form and temperature, and store the figures."""
    from benchmarks.real.comparison import store

    if artifact is None:
        from edge_memllm_export import export_model

        artifact = folder / "artifact"
        if not artifact.exists():
            export_model(gguf, artifact)
    rows = []
    for name, temperature, found in endings(artifact, threads):
        row = {"form": name, "temperature": temperature, **found}
        rows.append(row)
        yield f"{name} at {temperature}: {found['ended']} of {SEEDS} ended, {found['valid']} valid"
        for each in found["cut"]:
            yield f"  {each}"
    store("json", {"name": gguf.name, "seeds": SEEDS, "limit": LIMIT, "rows": rows})


def endings(artifact: Path, threads: int) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield for each form and temperature how many replies ended, and how many are valid."""
    import edge_memllm
    from edge_memllm.engine import Engine

    with (
        edge_memllm.load(artifact, device="cpu", threads=threads) as model,
        Engine(model, slots=_SLOTS) as engine,
    ):
        template = model.tokenizer.chat_template
        assert template is not None
        text = template.render([{"role": "user", "content": QUESTION}])
        prompt = model.tokenizer.encode(text, special=False)
        for temperature in TEMPERATURES:
            for name, form in forms().items():
                yield name, temperature, _counted(engine, prompt, form, temperature)


def _counted(engine: Any, prompt: list[int], form: Any, temperature: float) -> dict[str, Any]:
    import jsonschema_rs

    from edge_memllm.engine import Request
    from edge_memllm.sampling import Sampling

    asked = Request(
        prompt=prompt,
        max_new_tokens=LIMIT,
        sampling=Sampling(temperature=temperature),
        response_format=form,
    )
    judge = form.get("json_schema", {}).get("schema", {"type": "object"})
    ended, valid, tokens, cut = 0, 0, [], []
    for seed, reply in [(s, engine.submit(replace(asked, seed=s))) for s in range(SEEDS)]:
        pieces = list(reply)
        text = "".join(each.text for each in pieces)
        tokens.append(len(pieces))
        if pieces[-1].finish_reason == "stop":
            ended += 1
            valid += jsonschema_rs.is_valid(judge, json.loads(text))
        else:
            cut.append(f"seed {seed}: ...{text[-60:]!r}")
    return {"ended": ended, "valid": valid, "tokens": sorted(tokens), "cut": cut}
