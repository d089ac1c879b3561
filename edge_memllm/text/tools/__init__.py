"""Tools: how a model is told of them, and how what it answers becomes calls.

`formats` says which spelling a chat template implies, `parsing` reads calls out of a reply as it
comes, `prompt` makes the messages, and `spelling` is the grammar of calls that must come.
"""

from edge_memllm.text.tools.formats import Tool, ToolFormat, format_of
from edge_memllm.text.tools.parsing import ToolCall, ToolCallParser, parsed_reply

__all__ = ["Tool", "ToolCall", "ToolCallParser", "ToolFormat", "format_of", "parsed_reply"]
