"""Run by tools/check_clients.py where there is `langchain-openai`: URL, the model's name, URL of what calls tools."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url, model, calling_url = sys.argv[1:]


@tool
def weather(city: str) -> str:
    """How the weather is."""
    return "sunny"


for is_responses in (False, True):
    fixed = {"model": model, "api_key": "none", "use_responses_api": is_responses, "temperature": 0}
    plain = ChatOpenAI(base_url=f"{url}/v1", **fixed, max_tokens=12)
    whole = plain.invoke("How do you do?")
    assert whole.text
    assert "".join(part.text for part in plain.stream("How do you do?")) == whole.text
    calling = ChatOpenAI(base_url=f"{calling_url}/v1", **fixed).bind_tools([weather])
    question = HumanMessage("How is the weather?")
    first = calling.invoke([question])
    (call,) = first.tool_calls
    assert call["args"] == {"city": "Paris"}
    last = calling.invoke([question, first, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])])
    assert last.text == "It is sunny in Paris."
print("chat and responses: plain, stream, a tool's call and result: right")
