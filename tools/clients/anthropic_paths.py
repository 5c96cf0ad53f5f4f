"""Run by tools/check_clients.py where there is `anthropic`: URL, the model's name, URL of what calls tools."""

import asyncio
import sys

import anthropic

url, model, calling_url = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none")
asked = {"model": model, "messages": [{"role": "user", "content": "How do you do?"}], "system": "Be brief."}
greedy = {"extra_body": {"temperature": 0}}
tool = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}

whole = client.messages.create(**asked, max_tokens=12, **greedy)
assert whole.stop_reason == "max_tokens"
assert whole.usage.output_tokens == 12
with client.messages.stream(**asked, max_tokens=12, **greedy) as stream:
    assert "".join(stream.text_stream) == whole.content[0].text
counted = client.messages.count_tokens(**asked).input_tokens
usage = whole.usage
assert counted == usage.input_tokens + usage.cache_read_input_tokens

sentence = ""
try:
    client.messages.create(**asked, max_tokens=-1)
except anthropic.BadRequestError as error:
    sentence = error.body["error"]["message"]
assert "max_tokens is -1" in sentence, sentence


async def with_tools() -> None:
    async with anthropic.AsyncAnthropic(base_url=calling_url, api_key="none") as calling:
        question = {"role": "user", "content": "How is the weather?"}
        fixed = {"model": model, "tools": [tool], "max_tokens": 100}
        async with calling.messages.stream(**fixed, messages=[question]) as stream:
            first = await stream.get_final_message()
        thought, text, call = first.content
        assert (thought.type, text.text, call.name, first.stop_reason) == ("thinking", "I look.", "weather", "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        history = [question, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        last = await calling.messages.create(**fixed, messages=history)
        assert (last.content[0].text, last.stop_reason) == ("It is sunny in Paris.", "end_turn")


asyncio.run(with_tools())
print("messages (plain, stream), count_tokens, an error; async: a call and its result: right")
