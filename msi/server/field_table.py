"""Fields of request bodies that are not done: what each would do, and which of its values ask for nothing.

A field that would change the answer is refused unless its value is neutral: a client that spells out a default gets its
answer, and one that wants more learns which field it was. A field that changes nothing (who asks, what it is billed
to) is ignored; so is one that nobody knows, and the log names it once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NotDone:
    """Why a field is refused.

    Attributes:
        what: what it would do, as in "it is not built yet: {what}", or what to do instead.
        neutral: values that ask for nothing, besides those that are always neutral (`ALWAYS_NEUTRAL`).
    """

    what: str
    neutral: tuple[object, ...] = ()


ALWAYS_NEUTRAL: tuple[object, ...] = (None, False, "", [], {})

_GRAMMAR = "the name here is structured_outputs, with json, regex, choice, grammar or json_object"
_BEAMS = "beam search is not built yet"
_MEDIA = "only text goes in and comes out"
_TRANSFER = "a KV cache cannot be handed over yet"
_OTHER_SAMPLER = "this way of sampling is not built"

IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "session_id", "request_id",
    "prompt_cache_key", "prompt_cache_retention", "prediction", "stream_interval",
    "spaces_between_special_tokens", "truncation_side", "media_io_kwargs",
    "mm_processor_kwargs", "return_mm_kwargs", "early_stopping", "disable_log_stats", "guided_decoding_backend",
    "api_key", "timeout", "extra_headers", "extra_query",
})  # fmt: skip

NOT_DONE = {
    # -- OpenAI's
    "suffix": NotDone("text is only written after the prompt, not into it"),
    "functions": NotDone("functions are the older form of tools, which are not built yet"),
    "function_call": NotDone("functions are the older form of tools, which are not built yet", ("none", "auto")),
    "modalities": NotDone(_MEDIA, (["text"],)),
    "audio": NotDone(_MEDIA),
    "web_search_options": NotDone("nothing is looked up on the web"),
    "verbosity": NotDone("say in the messages how long the answer should be", ("medium",)),
    "moderation": NotDone("nothing is moderated here"),
    # -- vLLM's
    "use_beam_search": NotDone(_BEAMS),
    "length_penalty": NotDone(_BEAMS, (1, 0)),
    "logprob_token_ids": NotDone("log-probabilities are given for the most probable tokens only"),
    "return_token_offsets": NotDone("offsets come with logprobs"),
    "return_prompt_text": NotDone("the rendered prompt is not given back; completions have echo"),
    "logits_processors": NotDone("a server runs no code of its clients"),
    "prompt_embeds": NotDone("prompts are text or token ids"),
    "detokenize": NotDone("answers are text; token ids come with return_token_ids", (True,)),
    "chat_template": NotDone("the template is the model's, or the server's own `chat_template`"),
    "thinking_token_budget": NotDone("there is no limit for a part of the answer; max_tokens is for all of it", (-1,)),
    "repetition_detection": NotDone("repetition is not looked for; penalties work against it"),
    "kv_transfer_params": NotDone(_TRANSFER),
    "ec_transfer_params": NotDone(_TRANSFER),
    "vllm_xargs": NotDone("there are no extensions"),
    "watermarking": NotDone("texts are not marked"),
    # -- other servers'
    "json_schema": NotDone(_GRAMMAR),
    "regex": NotDone(_GRAMMAR),
    "ebnf": NotDone(_GRAMMAR),
    "grammar": NotDone(_GRAMMAR),
    "json_object": NotDone(_GRAMMAR),
    "max_new_tokens": NotDone("the name here is max_tokens"),
    "num_predict": NotDone("the name here is max_tokens"),
    "n_predict": NotDone("the name here is max_tokens"),
    "max_length": NotDone("the name here is max_tokens, which does not count the prompt"),
    "min_new_tokens": NotDone("the name here is min_tokens", (0,)),
    "repeat_penalty": NotDone("the name here is repetition_penalty", (1,)),
    "stop_sequences": NotDone("the name here is stop"),
    "num_return_sequences": NotDone("the name here is n", (1,)),
    "do_sample": NotDone("send temperature 0 for the most probable tokens", (True,)),
    "num_beams": NotDone(_BEAMS, (1, 0)),
    "num_beam_groups": NotDone(_BEAMS, (1, 0)),
    "diversity_penalty": NotDone(_BEAMS, (0,)),
    "typical_p": NotDone(_OTHER_SAMPLER, (1, 0)),
    "top_a": NotDone(_OTHER_SAMPLER, (0,)),
    "tfs": NotDone(_OTHER_SAMPLER, (1,)),
    "mirostat": NotDone(_OTHER_SAMPLER, (0,)),
    "mirostat_mode": NotDone(_OTHER_SAMPLER, (0,)),
    "epsilon_cutoff": NotDone(_OTHER_SAMPLER, (0,)),
    "eta_cutoff": NotDone(_OTHER_SAMPLER, (0,)),
    "penalty_alpha": NotDone(_OTHER_SAMPLER, (0,)),
    "guidance_scale": NotDone(_OTHER_SAMPLER, (1, 0)),
    "negative_prompt": NotDone(_OTHER_SAMPLER),
    "no_repeat_ngram_size": NotDone(_OTHER_SAMPLER, (0,)),
    "encoder_repetition_penalty": NotDone(_OTHER_SAMPLER, (1,)),
    "smoothing_factor": NotDone(_OTHER_SAMPLER, (0,)),
    "dynatemp_range": NotDone(_OTHER_SAMPLER, (0,)),
    "dry_multiplier": NotDone(_OTHER_SAMPLER, (0,)),
    "xtc_probability": NotDone(_OTHER_SAMPLER, (0,)),
    "lora_path": NotDone("one model is served, without adapters"),
    "lora_request": NotDone("one model is served, without adapters"),
    "adapter_id": NotDone("one model is served, without adapters"),
}

NOT_IN_COMPLETIONS = {
    "messages": NotDone("chats go to /v1/chat/completions"),
    "tools": NotDone("tools belong to /v1/chat/completions"),
    "tool_choice": NotDone("tools belong to /v1/chat/completions", ("none", "auto")),
    "top_logprobs": NotDone("logprobs is a number on this endpoint", (0,)),
    "max_completion_tokens": NotDone("the name on this endpoint is max_tokens"),
    "reasoning_effort": NotDone("there is no template on this endpoint that could read it"),
    "chat_template_kwargs": NotDone("there is no template on this endpoint"),
    "documents": NotDone("there is no template on this endpoint"),
}

NOT_IN_CHATS = {
    "prompt": NotDone("prompts go to /v1/completions"),
    "echo": NotDone("echo belongs to /v1/completions"),
    "best_of": NotDone("all choices are given; ask for n", (1,)),
}

NOT_IN_TOKENIZE = {
    "truncate_prompt_tokens": NotDone("all tokens are told; cut them where they are used"),
    "continue_final_message": NotDone("it goes with messages"),
    "tools": NotDone("they go with messages"),
}

NOT_IN_DETOKENIZE = {
    "prompt": NotDone("texts go to /tokenize"),
    "messages": NotDone("chats go to /tokenize"),
}
