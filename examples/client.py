"""Ask a server of yours, with the client that OpenAI gives to its users.

edge-memllm serve artifact
python examples/client.py "The river" [http://127.0.0.1:8080/v1]
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main(prompt: str, server: str = "http://127.0.0.1:8080/v1") -> None:
    client = OpenAI(base_url=server, api_key="none")
    model = client.models.list().data[0].id
    stream = client.completions.create(model=model, prompt=prompt, max_tokens=60, stream=True)
    for part in stream:
        print(part.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
