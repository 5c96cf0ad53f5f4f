"""Run by tools/check_clients.py where there is `litellm`: URL, the model's name, URL of what calls tools."""

import sys

import litellm

NUM_TOKENS = 16  # litellm makes 16 of any smaller max_output_tokens, which is the least that OpenAI takes
url, model, calling_url = sys.argv[1:]
given = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": NUM_TOKENS, "temperature": 0}
chat = {"model": f"openai/{model}", "messages": [{"role": "user", "content": "How do you do?"}], **given}
whole = litellm.completion(**chat).choices[0].message.content
streamed = litellm.completion(**chat, stream=True)
assert "".join(part.choices[0].delta.content or "" for part in streamed) == whole
text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="It is", **given).choices[0].text
assert text

message = {"model": f"anthropic/{model}", "messages": chat["messages"], "api_base": url, "api_key": "none"}
assert litellm.completion(**message, max_tokens=NUM_TOKENS, temperature=0).choices[0].message.content == whole
response = {"model": f"openai/{model}", "input": "How do you do?", "max_output_tokens": NUM_TOKENS, "temperature": 0}
answer = litellm.responses(**response, api_base=f"{url}/v1", api_key="none")
assert answer.output[0].content[0].text == whole
assert answer.usage.output_tokens == NUM_TOKENS
tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
for prefix, base in (("openai", f"{calling_url}/v1"), ("anthropic", calling_url)):
    asked = {"model": f"{prefix}/{model}", "messages": chat["messages"], "tools": tools, "max_tokens": 50}
    (call,) = litellm.completion(**asked, api_base=base, api_key="none").choices[0].message.tool_calls
    assert call.function.name == "weather"
print("completion (plain, stream, tools) by chat and by messages, text_completion, responses: right")
