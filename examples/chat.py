"""Write a text in turns with a model, in a terminal.

    python examples/chat.py artifact

With a chat template a line of yours is a message, without one it is added to the text as it stands.
The session keeps what is computed, so only what is new is. An empty line ends it.
"""

from __future__ import annotations

import sys

import edge_memllm


def main(artifact: str) -> None:
    with edge_memllm.load(artifact) as model, model.session() as session:
        template = model.tokenizer.chat_template
        messages: list[dict[str, str]] = []
        while line := input("> "):
            messages.append({"role": "user", "content": line})
            if template is None:
                session.append(line)
            else:
                tokens = model.tokenizer.encode(template.render(messages), special=False)
                session.rewind(tokens)  # to what it has in common with the text
                session.append(tokens[len(session) :])
            answer = ""
            for piece in session.stream(max_new_tokens=60):
                print(piece.text, end="", flush=True)
                answer += piece.text
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1])
