"""Every field of a request that is known: what is done with it, or which values ask for nothing.

The one table of them. Those of OpenAI, and of the servers whose clients send more: vLLM, llama.cpp.
A field that is not honoured is taken with the values that ask for nothing, or for what is done
anyway; with any other it is refused, for a reason that the client is told. docs/fields.md is made
from this table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Endpoint = Literal["completions", "chat", "responses", "messages", "llama"]

COMPLETIONS: tuple[Endpoint, ...] = ("completions",)
CHAT: tuple[Endpoint, ...] = ("chat",)
RESPONSES: tuple[Endpoint, ...] = ("responses",)
MESSAGES: tuple[Endpoint, ...] = ("messages",)
BOTH: tuple[Endpoint, ...] = ("completions", "chat")
OPENAI: tuple[Endpoint, ...] = (*BOTH, "responses")
LLAMA: tuple[Endpoint, ...] = ("llama",)  # its own /completion
CHUNKED: tuple[Endpoint, ...] = (*BOTH, *LLAMA)
STREAMED: tuple[Endpoint, ...] = (*OPENAI, *LLAMA)
ALL: tuple[Endpoint, ...] = (*OPENAI, "messages", *LLAMA)

# Whatever is to be kept for how long: beginnings of prompts are, as long as there is room.
EPHEMERAL = ({"type": "ephemeral"}, *({"type": "ephemeral", "ttl": ttl} for ttl in ("5m", "1h")))


@dataclass(frozen=True, slots=True)
class Parameter:
    """A field by its name. `meaning` says what is done with it, or why it is refused."""

    name: str
    endpoints: tuple[Endpoint, ...]
    meaning: str
    honoured: bool
    nothing: Sequence[Any] = ()  # values that ask for nothing, where it is not honoured

    def asks_for_nothing(self, value: object) -> bool:
        """Whether a value of a field that is not honoured changes nothing."""
        return any(same(value, each) for each in self.nothing)


def same(first: object, second: object) -> bool:
    """Whether two JSON values are the same; 1.0 is 1, and false is not 0."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, int | float) and isinstance(second, int | float):
        return first == second
    return type(first) is type(second) and first == second


def _done(endpoints: tuple[Endpoint, ...], **meanings: str) -> Iterator[Parameter]:
    for name, meaning in meanings.items():
        yield Parameter(name, endpoints, meaning, honoured=True)


def _not_done(
    why: str, endpoints: tuple[Endpoint, ...] = BOTH, **nothing: Sequence[Any]
) -> Iterator[Parameter]:
    for name, values in nothing.items():
        yield Parameter(name, endpoints, why, honoured=False, nothing=values)


PARAMETERS: tuple[Parameter, ...] = (
    *_done(
        COMPLETIONS,
        prompt="a text, token ids, or a list of either",
        echo="the reply begins with the prompt; with `logprobs`, its tokens are scored too",
        logprobs="so many likeliest tokens with each; false is none",
        best_of="the same as `n`",
        max_tokens="16 if left out, as OpenAI has it",
    ),
    *_done(
        CHAT,
        messages="of system, developer, user, assistant and tool, in text; an assistant's may have "
        "`tool_calls`",
        tools="functions that the model may call",
        tool_choice="`auto`, `none`, `required`, one function, or `allowed_tools`",
        parallel_tool_calls="false is one call at the most, as it is if left out where the "
        "template does not know of tools",
        chat_template_kwargs="what the template asks for beside messages and tools, as "
        "`enable_thinking`",
        reasoning_format="`none` leaves reasoning in the text; `auto` and `deepseek` give it "
        "apart, in `reasoning_content`",
        continue_final_message="the reply goes on inside the last message, as it does unasked "
        "where that has words of the assistant",
        add_generation_prompt="the other side of `continue_final_message`",
        logprobs="each token's likelihood",
        top_logprobs="so many likeliest tokens with each",
        max_completion_tokens="what the context holds, if left out",
        max_tokens="the older name of `max_completion_tokens`",
    ),
    *_done(
        RESPONSES,
        input="a text, or items: messages in text, `function_call`, `function_call_output`",
        instructions="a system's message before the others",
        max_output_tokens="what the context holds, if left out",
        text="`format`: `text`, `json_object` or `json_schema`",
        tools="functions that the model may call",
        tool_choice="`auto`, `none`, `required`, one function, or `allowed_tools`",
        parallel_tool_calls="false is one call at the most, as it is if left out where the "
        "template does not know of tools",
        stream_options="nothing is chosen by it",
        include="`message.output_text.logprobs`: each token's likelihood",
        top_logprobs="so many likeliest tokens with each, and their likelihoods",
    ),
    *_done(
        MESSAGES,
        messages="of user and assistant, in blocks of text, `tool_use` and `tool_result`; a last "
        "one of the assistant is gone on with",
        max_tokens="has to be there",
        system="a text, or blocks of it",
        stop_sequences="texts that end a reply",
        tools="functions that the model may call",
        tool_choice="`auto`, `any`, `none`, or one tool; `disable_parallel_tool_use`, which is "
        "true if left out where the template does not know of tools",
        metadata="`user_id`: users of one client take turns",
    ),
    *_done(
        LLAMA,
        prompt='a text, tokens and texts in one list, `{"prompt_string": ...}`, or a list of those',
        n_predict="-1, and if left out: what the context holds",
        n_probs="so many likeliest tokens with each",
        post_sampling_probs="the probabilities that a token was drawn with, in their place",
        return_tokens="the tokens of the reply",
        response_fields="tells these fields alone; `a/b` is b of a",
    ),
    *_done(BOTH, n_predict="llama.cpp's word for `max_tokens`"),
    *_done(
        CHUNKED,
        n="so many replies to each prompt",
        stream_options="`include_usage`; with it, `continuous_usage_stats`",
        response_format="`text`, `json_object`, `json_schema`, `regex` or `grammar`",
        structured_outputs="vLLM's: `json`, `regex`, `choice`, `grammar` or `json_object`",
        guided_json="vLLM's older word for a schema",
        guided_regex="an expression for the whole reply",
        guided_choice="the reply is one of these texts",
        guided_grammar="a grammar in Lark or GBNF",
        json_schema="llama.cpp's word for a schema",
        grammar="llama.cpp's word for a grammar, in Lark or GBNF",
        statistics="times, reused tokens and the seed, with the end of a choice",
        trace="where the record of each token came from",
        cache_prompt="false computes the whole prompt, whatever of it is there already",
        id_slot="a hint, which this server does without: a place is chosen by what it holds",
        verbose="chat tells its prompt's text too, and how tokens were chosen, in `__verbose`",
    ),
    *_done(
        STREAMED,
        return_progress="a stream tells how much of the prompt is computed",
        timings_per_token="a stream tells with each part what it took so far",
        stop="texts that end a reply",
        user="users of one client take turns",
        safety_identifier="as `user`",
        metadata="for whoever stores replies, which this server does not",
        prompt_cache_key="a hint, which this server does without",
    ),
    *_done(
        ALL,
        model="the name of the model that is served, or another that it goes by",
        stream="the reply in parts",
        stop_token_ids="tokens that end a reply",
        seed="the same request with the same seed gets the same reply",
        temperature="from 0 to 2; 0 takes the likeliest token",
        top_p="from 0 to 1",
        top_k="0 and -1 are all",
        min_p="from 0 to 1",
        repetition_penalty="1 is none",
        repeat_penalty="llama.cpp's word for `repetition_penalty`",
        frequency_penalty="from -2 to 2",
        presence_penalty="from -2 to 2",
        logit_bias="by token id; as in llama.cpp a list of `[id, bias]` too, where false forbids, "
        "and texts in place of ids for its own `/completion`",
        ignore_eos="the text goes on behind the tokens that end it",
        speculate="so many draft tokens in a step at the most; 0 is none",
        **{"speculative.n_max": "llama.cpp's word for `speculate`"},
        keep_alive="how long the model stays loaded afterwards, as Ollama has it: seconds, `5m`, "
        "0, or -1 for ever; where `serve` frees models, and as the last request to end has it",
        overlays="names of those that act",
        without_memory="computes as if memory added nothing",
    ),
    *_not_done("nothing is filled in between two texts", COMPLETIONS, suffix=("",)),
    *_not_done("nothing is chosen among replies", CHAT, best_of=(1,)),
    *_not_done("a chat's reply does not repeat its messages", CHAT, echo=(False,)),
    *_not_done(
        "the fields are called `tools` and `tool_choice`",
        CHAT,
        functions=([],),
        function_call=("none", "auto"),
    ),
    *_not_done("this server has no tools of its own", CHAT, web_search_options=()),
    *_not_done("this server makes text only", CHAT, audio=(), modalities=(["text"],)),
    *_not_done(
        "this model has one way of answering",
        CHAT,
        reasoning=({},),
        include_reasoning=(False, True),
        thinking=({"type": "disabled"},),
        verbosity=("medium",),
    ),
    *_not_done("replies are not stored", ("chat", "responses"), store=(False,)),
    *_not_done(
        "replies are not stored; give the whole conversation in `input`",
        RESPONSES,
        previous_response_id=(),
        conversation=(),
        prompt=(),
        background=(False,),
        background_options=(),
        context_management=([],),
    ),
    *_not_done("prompts are never cut", RESPONSES, truncation=("disabled",)),
    *_not_done(
        "this model has one way of answering",
        RESPONSES,
        reasoning=({}, {"effort": "none"}, {"effort": None, "summary": None}),
    ),
    *_not_done(
        "nothing more than the text is told",
        RESPONSES,
        moderation=(),
    ),
    *_not_done("this server calls no tools itself", RESPONSES, max_tool_calls=()),
    *_not_done("this server makes text only", RESPONSES, image=()),
    *_not_done(
        "beginnings of prompts are always kept, as long as there is room",
        RESPONSES,
        prompt_cache_retention=("in_memory",),
        prompt_cache_options=({},),
    ),
    *_not_done(
        "all requests are served alike",
        RESPONSES,
        service_tier=("auto", "default"),
        access_programs=(),
    ),
    *_not_done(
        "beginnings of prompts are always kept, as long as there is room",
        MESSAGES,
        cache_control=EPHEMERAL,
    ),
    *_not_done(
        "this model has one way of answering",
        MESSAGES,
        thinking=({"type": "disabled"},),
        output_config=({},),
    ),
    *_not_done(
        "all requests are served alike",
        MESSAGES,
        service_tier=("auto", "standard_only"),
        speed=("standard",),
        inference_geo=(),
        user_profile_id=(),
        workspace_id=(),
        diagnostics=(),
    ),
    *_not_done(
        "this server has no tools of its own",
        MESSAGES,
        container=(),
        mcp_servers=([],),
        context_management=(),
    ),
    *_not_done(
        "this model does not reason; of one that does, the template is told",
        CHAT,
        reasoning_effort=("none",),
    ),
    *_not_done("replies are not looked over", CHAT, moderation=()),
    *_not_done("the reply is not known before", CHAT, prediction=()),
    *_not_done("all requests are served alike", service_tier=("auto", "default"), priority=(0,)),
    *_not_done(
        "beginnings of prompts are always kept, as long as there is room",
        prompt_cache_retention=("in_memory",),
        prompt_cache_options=({},),
        cache_salt=(),
        kv_transfer_params=(),
    ),
    # vLLM
    *_not_done(
        "tokens are drawn one after the other",
        use_beam_search=(False,),
        length_penalty=(1,),
        early_stopping=(False,),
    ),
    *_not_done(
        "tokens are chosen by the fields above",
        min_tokens=(0,),
        bad_words=([],),
        allowed_token_ids=(),
        logits_processors=([],),
        vllm_xargs=({},),
    ),
    *_not_done(
        "a reply is its text, without special tokens and without what ended it",
        skip_special_tokens=(True,),
        spaces_between_special_tokens=(True,),
        include_stop_str_in_output=(False,),
        return_tokens_as_token_ids=(False,),
        return_token_ids=(False,),
    ),
    *_not_done("prompts are never cut", truncate_prompt_tokens=()),
    *_not_done(
        "with `echo` and `logprobs`, /v1/completions scores the prompt", prompt_logprobs=(0,)
    ),
    *_not_done("a text begins as the model was trained", COMPLETIONS, add_special_tokens=(True,)),
    *_not_done(
        "the model's template makes the prompt",
        CHAT,
        add_special_tokens=(False,),
        chat_template=(),
        documents=([],),
        mm_processor_kwargs=({},),
    ),
    *_not_done(
        "a form is kept to in one way, with white space that is fixed",
        guided_decoding_backend=(),
        guided_whitespace_pattern=(),
    ),
    # llama.cpp
    *_not_done("the field is called `logprobs`", n_probs=(0,), post_sampling_probs=(False,)),
    *_not_done(
        "penalties look at the whole text", CHUNKED, repeat_last_n=(-1,), penalize_nl=(True,)
    ),
    *_not_done(
        "tokens are chosen by the fields above",
        CHUNKED,
        typical_p=(1,),
        tfs_z=(1,),
        top_a=(0,),
        top_n_sigma=(-1, 0),
        xtc_probability=(0,),
        dynatemp_range=(0,),
        mirostat=(0,),
        dry_multiplier=(0,),
        min_keep=(0, 1),
        samplers=([],),
    ),
    *_not_done(
        "drafts are copied from the text: none is a guess with a likelihood",
        CHUNKED,
        **{"speculative.n_min": (0,), "speculative.p_min": (0,)},
    ),
    *_not_done("a text ends where the context does", CHUNKED, n_keep=(0, -1), n_discard=(0,)),
    *_not_done("overlays are asked for with `overlays`", CHUNKED, lora=([],)),
    *_not_done("images are not understood", CHUNKED, image_data=([],)),
    *_not_done(
        "time is limited by the server",
        CHUNKED,
        t_max_predict_ms=(0, -1),
        t_max_prompt_ms=(0, -1),
    ),
    *_not_done(
        "a reply tells what its protocol has", return_tokens=(False,), response_fields=([],)
    ),
)


def not_honoured(endpoint: Endpoint) -> Mapping[str, Parameter]:
    """Return the fields of an endpoint that are known and not honoured."""
    return {
        each.name: each for each in PARAMETERS if endpoint in each.endpoints and not each.honoured
    }


def honoured(endpoint: Endpoint) -> Mapping[str, Parameter]:
    """Return the fields of an endpoint that something is done with."""
    return {each.name: each for each in PARAMETERS if endpoint in each.endpoints and each.honoured}


def nothing_of(why: str, **nothing: Sequence[Any]) -> Mapping[str, Parameter]:
    """Return fields inside others that are known and not honoured, for one reason."""
    return {
        name: Parameter(name, BOTH, why, honoured=False, nothing=values)
        for name, values in nothing.items()
    }
