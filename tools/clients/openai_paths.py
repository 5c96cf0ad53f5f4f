"""Run by tools/check_clients.py where there is `openai`: URL, the model's name, URL of what calls tools."""

import asyncio
import sys
from typing import Literal

import openai
import pydantic

url, model, calling_url = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
question = [{"role": "user", "content": "How do you do?"}]

assert [one.id for one in client.models.list()] == [model]
whole = client.completions.create(model=model, prompt="It is", max_tokens=12, temperature=0, logprobs=2)
assert whole.choices[0].finish_reason == "length"
assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
parts = client.completions.create(model=model, prompt="It is", max_tokens=12, temperature=0, stream=True)
assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text

chat = client.chat.completions.create(model=model, messages=question, max_tokens=12, temperature=0, n=2)
assert len(chat.choices) == 2
assert chat.usage.completion_tokens == 24
streamed = client.chat.completions.create(
    model=model, messages=question, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(streamed)
assert chunks[-1].usage.completion_tokens == 12
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == chat.choices[0].message.content


class Answer(pydantic.BaseModel):
    polite: bool
    tone: Literal["warm", "cool"]


parsed = client.chat.completions.parse(model=model, messages=question, max_tokens=60, response_format=Answer)
assert isinstance(parsed.choices[0].message.parsed, Answer)
called = client.chat.completions.parse(
    model=model, messages=question, max_tokens=90, tool_choice="required", parallel_tool_calls=False,
    tools=[openai.pydantic_function_tool(Answer, name="answer")],
)  # fmt: skip
assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Answer)

code = None
try:
    client.completions.create(model=model, prompt="It is " * 5000, max_tokens=4)
except openai.BadRequestError as error:
    code = error.code
assert code == "context_length_exceeded", code


async def several() -> None:
    many = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    answers = await asyncio.gather(
        *(many.completions.create(model=model, prompt=["It is", "She was"], max_tokens=4) for _ in range(4))
    )
    assert [[choice.index for choice in one.choices] for one in answers] == [[0, 1]] * 4


asyncio.run(several())

response = client.responses.create(model=model, input="How do you do?", max_output_tokens=12, temperature=0)
assert (response.status, response.output_text) == ("incomplete", chat.choices[0].message.content)
with client.responses.stream(model=model, input="How do you do?", max_output_tokens=12, temperature=0) as events:
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == response.output_text

calling = openai.OpenAI(base_url=f"{calling_url}/v1", api_key="none")
tool = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
asked = [{"role": "user", "content": "How is the weather?"}]
first = calling.responses.create(model=model, input=asked, tools=[tool])
assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
result = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "sunny"}
last = calling.responses.create(model=model, input=[*asked, *first.output, result], tools=[tool])
assert last.output_text == "It is sunny in Paris."
parsed = client.responses.parse(model=model, input="How do you do?", text_format=Answer, temperature=0)
assert isinstance(parsed.output_parsed, Answer)
print(
    "models, completions (plain, stream, logprobs, arrays, async), chat (n, stream, usage, schema, call), context "
    "error, responses (plain, stream, schema, a call and its result): right"
)
