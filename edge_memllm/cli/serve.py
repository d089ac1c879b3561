"""``edge-memllm serve``: models behind OpenAI's protocol."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Annotated

import edge_memllm
from edge_memllm.cli.models import Yes, load_model, local_artifact
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import StageBars, read_text, write_json
from edge_memllm.engine.feeding import SERVING_CHUNK
from edge_memllm.engine.request import check_speculate, start_token
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.loading import LoadOptions, plan_loading
from edge_memllm.memory_plan import BASE_BYTES, Item, arithmetic, total
from edge_memllm.model import Model
from edge_memllm.options import Group, Option, byte_size, keywords, positive_int
from edge_memllm.process.interrupts import leave
from edge_memllm.process.memory_account import MemoryAccount, MemoryShare
from edge_memllm.sampling import check_seed
from edge_memllm.server.settings import KEY_VARIABLE, UNIX, Settings
from edge_memllm.statistics import give_back_large_blocks, process_memory
from edge_memllm.store.source import hub_source
from edge_memllm.text.chat import ChatTemplate

if TYPE_CHECKING:
    import socket

    from edge_memllm.server.models import ServedModel, ServedModels
    from edge_memllm.server.service import ServerState, Service


LEAST_KEY = 8

EXIT_STUCK = 1
_PATIENCE = 3.0  # seconds
_PACKAGES = ("starlette", "uvicorn")

_DESCRIPTION = """\
Serve models over HTTP, in the words of OpenAI's API and Anthropic's: completions, chat where the
model has a template, tools, streaming, likelihoods, JSON by a schema. Many requests run together;
each distinct token of a step is read from storage once. docs/serving.md has the details.

Of several models the first is loaded now and the others when a request names them; within
--memory-limit the one that is longest unused makes room.

It listens to this machine alone unless --host says otherwise. Ctrl-C, or SIGTERM, lets replies
under way finish; a second one ends at once."""

_EXAMPLES = """\
  edge-memllm serve artifact
  edge-memllm serve artifact --port 9000 --slots 4 --chat-template chat.jinja
  edge-memllm serve artifact --host 0.0.0.0 --api-key-file keys.txt --max-tokens 512
  edge-memllm serve artifact --cors https://example.org --json"""


def port_number(text: str) -> int:
    """Parse a TCP port, or 0 for a free one."""
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise ArgumentTypeError(f"{text} is not a port, expected 0 to 65535")
    return value


@dataclass(frozen=True)
class ServeOptions:
    """What may be asked of ``edge-memllm serve``."""

    models: Annotated[
        tuple[Path, ...],
        Option(
            "exported models, or what to export them of first: folders of checkpoints, .gguf "
            "files, org/name of the Hugging Face Hub; or names that 'list' shows",
            metavar="MODEL",
            parse=Path,
            several="words",
        ),
    ]
    _: KW_ONLY
    chat_template: Annotated[
        Path | None,
        Option("a Jinja template that makes a prompt of chat messages", unset="the artifact's"),
    ] = None
    json: Json = False
    yes: Yes = False
    settings: Annotated[Settings, Group(without={"model_id": ""})]
    port: Annotated[
        int,
        Option(
            "0 takes a free one and says which", parse=port_number, metavar="N", group="address"
        ),
    ] = 8080
    name: Annotated[
        str | None,
        Option("the model's name in requests", "NAME", unset="its folder's", group="address"),
    ] = None
    api_key_file: Annotated[
        Path | None, Option("ask for one of these keys, one a line", group="access")
    ] = None
    slots: Annotated[
        int,
        Option(
            "texts under way at once; each has keys and values of its own",
            parse=positive_int,
            group="work",
        ),
    ] = 4
    queue: Annotated[
        int,
        Option(
            "texts that may wait for a slot, beyond that the answer is 429",
            parse=positive_int,
            group="work",
        ),
    ] = 64
    per_client: Annotated[
        int | None,
        Option(
            "texts of one client that may wait",
            parse=positive_int,
            unset="as many as may wait at all",
            group="work",
        ),
    ] = None
    batch_invariant: Annotated[
        bool,
        Option(
            "the same request gets the same reply to the last bit, whatever else goes on; slower",
            group="work",
        ),
    ] = False
    loading: Annotated[
        LoadOptions,
        Group(
            "loading",
            without={"path": Path()},
            unset={"prefill_chunk": str(SERVING_CHUNK)},
        ),
    ]


def settings_of(options: ServeOptions) -> Settings:
    """Return how the server is to behave. Raises `RequestError` for what cannot be."""
    from edge_memllm.server.guard import checked_host, checked_origin

    asked = options.settings
    for option, room in (("--queue", options.queue), ("--per-client", options.per_client)):
        if room is not None and asked.limits.choices > room:
            raise RequestError(
                f"--max-choices is {asked.limits.choices} and {option} {room}: a request of that "
                f"many replies would never find room. Give more {option}, or fewer choices."
            )
    check_speculate(asked.speculate)
    return replace(
        asked,
        seed=None if asked.seed is None else check_seed(asked.seed),
        model_id=model_names(options)[0],
        api_keys=_keys(options),
        origins=tuple(map(checked_origin, asked.origins)),
        hosts=tuple(map(checked_host, asked.hosts)),
    )


def model_names(options: ServeOptions) -> list[str]:
    """Return what requests call the models by. Raises `RequestError` for what cannot be."""
    several = len(options.models) > 1
    if several:
        _refuse_for_several(options)
    found = [_name_of(path) for path in options.models]
    if options.name is not None:
        found = [options.name]
    for name, option in (
        *((each, "another folder, or --name" if several else "--name") for each in found),
        *((each, "--alias") for each in options.settings.aliases),
    ):
        if not name.isprintable() or not name.strip():
            raise RequestError(
                f"the model's name is {name!r}, which nobody can type. Give {option}."
            )
    for name in found:
        if found.count(name) > 1:
            raise RequestError(
                f"two models are called {name!r}, and requests name one. Give one of the folders "
                "another name, or serve them apart."
            )
    return found


def _refuse_for_several(options: ServeOptions) -> None:
    loading = options.loading
    given = {
        "--name": options.name,
        "--alias": options.settings.aliases,
        "--chat-template": options.chat_template,
        "--overlay": loading.overlays,
        "--vram-limit": loading.vram_limit,
        "--hot-text": loading.hot_text,
    }
    for option, value in given.items():
        if value:
            raise RequestError(
                f"{option} is for one model, and {len(options.models)} are served. Leave it out, "
                "or serve one model."
            )


def _name_of(path: Path) -> str:
    hub = hub_source(path)
    local = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    return local if hub is None else hub.model.repository


def _keys(options: ServeOptions) -> tuple[str, ...]:
    """Return the keys from the options, the file and the environment."""
    keys = [*options.settings.api_keys]
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    if options.api_key_file is not None:
        lines = (line.strip() for line in read_text(options.api_key_file).splitlines())
        found = [line for line in lines if line]
        if not found:
            raise RequestError(f"{options.api_key_file}: no key in it. Write one a line.")
        keys += found
    for key in keys:
        if len(key) < LEAST_KEY or not key.isprintable() or " " in key:
            raise RequestError(
                f"an API key has {len(key)} characters, expected {LEAST_KEY} or more, without "
                "spaces. Take a long random one."
            )
    return tuple(dict.fromkeys(keys))


def execute(options: ServeOptions) -> int:
    """Run the command."""
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise missing_extra(package, "serve")
    from edge_memllm.server.server import bound_sockets

    settings = settings_of(options)
    with (
        _logging_to_stderr(settings),
        bound_sockets(settings.listens, options.port) as bound,
    ):
        models = _served_models(options, settings)
        try:
            models.load(models.all[0])
            return _serve(models, bound, options)
        finally:
            models.close(_PATIENCE)


def _served_models(options: ServeOptions, settings: Settings) -> ServedModels:
    """Return the models, none of them loaded; what is to be exported first is."""
    from edge_memllm.server.models import ServedModel, ServedModels
    from edge_memllm.server.service import ServerState

    state = ServerState(settings)
    names, limit = model_names(options), options.loading.memory_limit
    if len(names) > 1 or settings.idle_seconds is not None:
        give_back_large_blocks()
    if len(names) == 1:
        opening = Opening(options, options.models[0], settings, state)
        models = [ServedModel(names[0], opening.open, {}, settings.aliases)]
        return ServedModels(state, models, idle_seconds=settings.idle_seconds)
    base = max(BASE_BYTES, process_memory().anon_bytes or 0)
    account = None if limit is None else MemoryAccount(max(0, _as_bytes(limit) - base))
    models = []
    for name, source in zip(names, options.models, strict=True):
        with StageBars() as bars:
            path = local_artifact(source, bars, yes=options.yes)
        own = replace(settings, model_id=name)
        models.append(_planned(Opening(options, path, own, state), account, base))
    return ServedModels(state, models, account=account, idle_seconds=settings.idle_seconds)


def _as_bytes(limit: int | str) -> int:
    return byte_size(limit) if isinstance(limit, str) else limit


@dataclass(frozen=True)
class Opening:
    """How one model is opened, as often as it has to be."""

    options: ServeOptions
    path: Path
    settings: Settings
    state: ServerState

    def open(self, share: MemoryShare | None) -> Service:
        """Load the model and start its engine."""
        from edge_memllm.engine.engine import Engine
        from edge_memllm.server.service import Service

        options, loading = self.options, replace(self.options.loading, path=self.path)
        if share is not None:
            loading = replace(loading, memory_limit=None, memory_share=share)
        with ExitStack() as opened:
            if current_thread() is main_thread():
                model = load_model(loading, yes=options.yes)
            else:  # while the server runs: there is nobody to ask, and no bar to show
                model = edge_memllm.load(**keywords(loading))
            opened.enter_context(model)
            path = options.chat_template
            template = None if path is None else _template(path, model)
            engine = Engine(
                model,
                slots=options.slots,
                queue=options.queue,
                per_client=options.per_client,
                prefill_chunk=options.loading.prefill_chunk,
                batch_invariant=options.batch_invariant,
            )
            opened.callback(engine.close)
            service = Service(engine, self.settings, template, self.state)
            opened.pop_all()
        return service


def _planned(opening: Opening, account: MemoryAccount | None, base: int) -> ServedModel:
    """Return a model with what its manifest tells, and its share of the memory."""
    from edge_memllm.server.models import ServedModel, manifest_facts

    options, name = opening.options, opening.settings.model_id
    loading = replace(options.loading, path=opening.path, memory_limit=None)
    manifest, plan = plan_loading(**keywords(loading))
    facts = manifest_facts(manifest)
    if account is None:
        return ServedModel(name, opening.open, facts)
    first = plan.first_bytes(manifest, options.slots)
    share = MemoryShare(account, plan.model_bytes, first, plan.score_bytes, plan.loading_bytes)
    facts["memory_bytes"] = share.least_bytes
    refusal = None
    if share.least_bytes > account.limit:
        texts = f"keys and values with which {options.slots} texts begin"
        lines = [Item(plan.items[0].what, base), *plan.items[1:], Item(texts, first)]
        refusal = (
            f"the model '{name}' does not fit: memory_limit is {account.limit + base:,} bytes and "
            f"about {total(lines):,} are needed:\n{arithmetic(lines)}\nRaise the limit, or lower "
            "slots or prefill_chunk."
        )
        print(f"warning: {refusal}", file=sys.stderr)
    return ServedModel(name, opening.open, facts, share=share, refusal=refusal)


def _template(path: Path, model: Model) -> ChatTemplate:
    spec, spell = model.manifest.model, model.tokenizer.spelling
    start, ends = start_token(spec), spec.eos_token_ids
    named = {
        "bos_token": None if start is None else spell(start),
        "eos_token": spell(ends[0]) if ends else None,
        **model.tokenizer.named_tokens,
    }
    template = ChatTemplate(
        read_text(path), {name: text for name, text in named.items() if text}, str(path)
    )
    template.check()
    return template


def _serve(models: ServedModels, bound: Sequence[socket.socket], options: ServeOptions) -> int:
    from edge_memllm.server.server import Server

    server = Server(models)
    _announce(models, bound, options)
    server.run(sockets=[*bound])
    if not models.close(_PATIENCE):
        # Nothing that they use may be closed, and no thread can be stopped.
        print("error: work on a request does not come back. Left it there.", file=sys.stderr)
        leave(EXIT_STUCK)
    return 0


def _announce(models: ServedModels, bound: Sequence[socket.socket], options: ServeOptions) -> None:
    """Say where the server is, before it listens: it does from the next moment on."""
    from edge_memllm.server.guard import missing_protection

    settings, first = models.state.settings, models.all[0]
    urls, chat, slots = [*map(_url, bound)], bool(first.facts["chat"]), first.facts["slots"]
    url = urls[0]
    for warning in missing_protection(settings):
        print(f"warning: {warning}", file=sys.stderr)
    if options.json:
        names = [each.name for each in models.all]
        told = {
            "url": url,
            "urls": urls,
            "model": first.name,
            "models": names,
            "slots": slots,
            "chat": chat,
        }
        write_json(told)
        sys.stdout.flush()
        return
    kinds = "completions and chat" if chat else "completions (no chat template)"
    key = "with a key" if settings.api_keys else "without a key"
    print(f"{first.name} at {url}: {kinds}, {slots} at once, {key}", file=sys.stderr)
    if urls[1:]:
        print(f"at {', '.join(urls[1:])} too", file=sys.stderr)
    if others := [each.name for each in models.all[1:]]:
        print(f"when they are asked for: {', '.join(others)}", file=sys.stderr)
    page = f"a page for people: {url}/   " if settings.page else ""
    print(f"{page}for programs: {url}/v1   Ctrl-C ends", file=sys.stderr)


def _url(bound: socket.socket) -> str:
    address = bound.getsockname()
    if isinstance(address, str):
        return f"{UNIX}{address}"
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _logging_to_stderr(settings: Settings) -> Iterator[None]:
    """Show our warnings, and requests where that is wished; what is below us makes noise."""
    requests = logging.INFO if settings.log_requests else logging.WARNING
    levels = {
        "edge_memllm": logging.WARNING,
        "edge_memllm.server.server": logging.INFO,
        "edge_memllm.server.guard": requests,
        "uvicorn": logging.CRITICAL,
        "asyncio": logging.ERROR,
    }
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = {name: logging.getLogger(name).level for name in levels}
    logging.getLogger("edge_memllm").addHandler(handler)
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        logging.getLogger("edge_memllm").removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


SERVE = Command(ServeOptions, execute, _DESCRIPTION, _EXAMPLES)
