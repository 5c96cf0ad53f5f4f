"""Run by tools/check_clients.py where there is `openai-agents`: URL, the model's name, URL of what calls tools."""

import asyncio
import sys

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

url, model, calling_url = sys.argv[1:]
set_tracing_disabled(True)
asked_for = []


@function_tool
def weather(city: str) -> str:
    """How the weather is.

    Args:
        city: where.
    """
    asked_for.append(city)
    return "sunny"


async def main() -> None:
    calling = AsyncOpenAI(base_url=f"{calling_url}/v1", api_key="none")
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(name="a", instructions="Be brief.", tools=[weather], model=kind(model, calling))
        result = await Runner.run(agent, "How is the weather?")
        assert result.final_output == "It is sunny in Paris."
        streamed = Runner.run_streamed(agent, "How is the weather?")
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == "It is sunny in Paris."
    assert asked_for == ["Paris"] * 4


asyncio.run(main())
print("an agent that runs a tool, by responses and by chat, plain and streamed: right")
