"""Other ways of asking: `/v1/responses` of OpenAI, `/v1/messages` of Anthropic, llama.cpp's own.

Each has a file that reads requests and one that writes replies. What they ask for, and all that is
done, is a chat's. `tokens` has what is asked about prompts, under the names of several servers;
`biases` and `timings` have what is given and told in llama.cpp's forms.
"""
