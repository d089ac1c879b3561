"""An engine behind HTTP, speaking OpenAI's protocol. Needs the extra `serve`.

Requests are read strictly (what is not understood is refused, never ignored), handed to an
`Engine`, and its pieces are written as JSON or as a stream of events. Knows nothing of slots,
runtimes or tables.
"""
