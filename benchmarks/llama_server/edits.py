"""Where a check expects the very words, counts or names of llama.cpp's test model.

Only where the check is of something else. The model of the checks, stories260K, could not be had;
the one in `examples/tiny-english` stands in for it. Whatever is edited is listed with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """A line of a check, how often it stands there, and what it becomes."""

    file: str
    old: str
    new: str
    why: str
    times: int = 1


_COUNT = "counts of its tokenizer"
_BUILD = "the name of its build"
_ZERO = "token 0 of its vocabulary never comes; here it ends a text"

_PATH = "/completions without /v1 is OpenAI's here; the check is of the key"
_ORIGIN = "an origin as browsers send it"

_CACHED = """
        assert res.body["usage"]["prompt_tokens"] == n_prompt
        assert res.body["usage"]["prompt_tokens_details"]["cached_tokens"] == n_cache
"""
_CACHED_HERE = """
        usage = res.body["usage"]
        counts = (*counts, usage["prompt_tokens_details"]["cached_tokens"])
    assert counts[0] == 0 and counts[1] == usage["prompt_tokens"] - 1
    assert counts[1] > counts[2] > counts[3] > 0
"""

EDITS = (
    Edit(
        "test_basic.py",
        'assert ".gguf" in res.body["model_path"]',
        'assert res.body["model_path"]',
        "its file",
    ),
    Edit(
        "test_chat_completion.py",
        'system_fingerprint"].startswith("b")',
        'system_fingerprint"]',
        _BUILD,
        2,
    ),
    Edit(
        "test_chat_completion.py",
        'system_fingerprint.startswith("b")',
        "system_fingerprint",
        _BUILD,
    ),
    Edit("test_completion.py", 'system_fingerprint.startswith("b")', "system_fingerprint", _BUILD),
    Edit(
        "test_chat_completion.py",
        "    for user_prompt, n_prompt, n_cache in seq:",
        "    counts = ()\n    for user_prompt, n_prompt, n_cache in seq:",
        "counts of its tokenizer: none, all but one, then fewer and fewer",
    ),
    Edit("test_chat_completion.py", _CACHED, _CACHED_HERE, "the same"),
    Edit(
        "test_chat_completion.py", '["prompt_tokens"] == n_prompt', '["prompt_tokens"]', _COUNT, 2
    ),
    Edit(
        "test_chat_completion.py",
        '"<s> <|start_header_id|>system',
        '"<|start_header_id|>system',
        "the template given does not write the first token, its tokenizer does",
    ),
    Edit(
        "test_chat_completion.py",
        "assert total_batch_count == batch_count",
        'assert total_batch_count == 1 + -(-(last_progress["total"] - last_progress["cache"]) '
        "// n_batch)",
        "counts of its tokenizer: as many chunks as the prompt has here, and one report before",
    ),
    Edit("test_completion.py", '["prompt_n"] == n_prompt', '["prompt_n"]', _COUNT, 2),
    Edit("test_completion.py", '["cache_n"] == n_prompt', '["cache_n"]', _COUNT),
    Edit(
        "test_completion.py",
        '"I believe the meaning of life is"*32',
        '"I believe the meaning of life is"*64',
        "too long for the context in tokens of this vocabulary, too",
    ),
    Edit(
        "test_completion.py",
        '["prompt"] == "<s> " + prompt',
        '["prompt"].endswith(prompt)',
        "the first token, as its tokenizer spells it",
    ),
    Edit("test_completion.py", 'tok["id"] > 0', 'tok["id"] >= 0', _ZERO, 3),
    Edit("test_completion.py", 'prob["id"] > 0', 'prob["id"] >= 0', _ZERO, 3),
    Edit("test_tokenize.py", 'token["id"] > 0', 'token["id"] >= 0', _ZERO),
    Edit("test_tokenize.py", "bosId = 1", "bosId = 0", "the number of its first token"),
    Edit(
        "test_ctx_shift.py",
        '["predicted_n"] == n_token_output',
        '["predicted_n"] in (64, 257 - res.body["timings"]["prompt_n"])',
        "counts of its tokenizer; and one more fits, for the last token is never fed",
    ),
    Edit(
        "test_ctx_shift.py",
        '"prompt": LONG_TEXT,',
        '"prompt": LONG_TEXT * 3,',
        "too long for the context in tokens of this vocabulary, too",
    ),
    Edit(
        "test_security.py",
        "assert cors_header in res.headers\n    assert res.headers[cors_header]",
        "assert res.headers[cors_header.lower()]",
        "names of headers are the same in capitals",
    ),
    Edit(
        "test_security.py",
        '["/", "/sw.js", "/manifest.webmanifest", "/_app/version.json"]',
        '["/", "/page/index.html"]',
        "the files of its page",
    ),
    Edit(
        "test_security.py",
        'res = server.make_request("POST", "/completions", data={\n'
        '        "prompt": "I believe the meaning of life is",\n'
        "    }, headers={\n"
        '        "Authorization": f"Bearer {TEST_API_KEY}"',
        'res = server.make_request("POST", "/completion", data={\n'
        '        "prompt": "I believe the meaning of life is",\n'
        "    }, headers={\n"
        '        "Authorization": f"Bearer {TEST_API_KEY}"',
        _PATH,
    ),
    Edit(
        "test_security.py",
        'res = server.make_request("POST", "/completions", data={\n'
        '        "prompt": "I believe the meaning of life is",\n'
        "    }, headers={\n"
        '        "X-Api-Key"',
        'res = server.make_request("POST", "/completion", data={\n'
        '        "prompt": "I believe the meaning of life is",\n'
        "    }, headers={\n"
        '        "X-Api-Key"',
        _PATH,
    ),
    Edit(
        "test_security.py",
        '("localhost", "Access-Control-Allow-Origin", "localhost")',
        '("http://localhost", "Access-Control-Allow-Origin", "http://localhost")',
        _ORIGIN,
    ),
    Edit(
        "test_security.py",
        '("web.mydomain.fr", "Access-Control-Allow-Origin", "web.mydomain.fr")',
        '("http://web.mydomain.fr", "Access-Control-Allow-Origin", "http://web.mydomain.fr")',
        _ORIGIN,
    ),
    Edit("test_security.py", '("origin", "Access', '("http://web.mydomain.fr", "Access', _ORIGIN),
    Edit(
        "test_security.py",
        '("web.mydomain.fr", "Access-Control-Allow-Methods", "GET, POST, DELETE, OPTIONS")',
        '("http://web.mydomain.fr", "Access-Control-Allow-Methods", "GET, POST")',
        "the methods that there are",
    ),
    Edit(
        "test_security.py",
        '("web.mydomain.fr", "Access-Control-Allow-Headers", "*")',
        '("http://web.mydomain.fr", "Access-Control-Allow-Headers", "Authorization")',
        "the headers that were asked for, in place of all",
    ),
    Edit(
        "test_speculative.py",
        '"prompt": "Hello " * 248,\n        "temperature": 0.0,\n        "top_k": 1,\n'
        '        "speculative.p_min": 0.0,\n    })\n    assert res.status_code == 200\n'
        '    assert len(res.body["content"]) > 0\n\n\ndef test_with_ctx_shift',
        '"prompt": "Hello " * 80,\n        "temperature": 0.0,\n        "top_k": 1,\n'
        '        "speculative.p_min": 0.0,\n    })\n    assert res.status_code == 200\n'
        '    assert len(res.body["content"]) > 0\n\n\ndef test_with_ctx_shift',
        "as long a prompt in tokens of this vocabulary",
    ),
    Edit(
        "test_speculative.py",
        "server.model_draft = download_file(MODEL_DRAFT_FILE_URL)",
        "pass",
        "no file of a draft model: drafts are looked up in the text (--speculate)",
    ),
)

# What its story model writes, as `match_regex` is asked: here any text that is not empty will do.
STORIES = (
    "But she couldn't",
    '(Suddenly)+|\\{ " Sarax.',
    "^ blue",
    "(Aside|she|felter|alonger)+",
    "Whillicter",
    "(Suddenly)+",
    "(going|bed)+",
    "(princesses|everyone|kids|Anna|forest)+",
    "(wise|kind|owl|answer)+",
)

# Names of models that its clients ask for: there any name is the only model's.
NAMES = (
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-instruct",
    "gpt-4.1",
    "davinci-002",
    "codellama70b",
    "test",
)

# Whose pages may ask, in the checks of that: there all may, here none unless it is said.
ORIGINS = ("http://localhost", "http://web.mydomain.fr")


def apply(folder: Path) -> None:
    """Change the checks in `folder`. Raises `SystemExit` for another version of them."""
    for edit in EDITS:
        path = folder / edit.file
        text = path.read_text("utf-8")
        if (found := text.count(edit.old)) != edit.times:
            raise SystemExit(
                f"{edit.file}: {edit.old!r:.80} is there {found} times, expected {edit.times}. "
                "These are checks of another version of llama.cpp: look at what they expect."
            )
        path.write_text(text.replace(edit.old, edit.new), "utf-8")
