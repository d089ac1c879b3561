"""Other ways of asking for a chat: `/v1/responses` of OpenAI, `/v1/messages` of Anthropic.

Each has a file that reads requests and one that writes replies. What they ask for, and all that is
done, is a chat's. `tokens` has what is asked about prompts, under the names of several servers.
"""
