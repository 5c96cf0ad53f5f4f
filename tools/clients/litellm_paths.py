"""Run by tools/check_clients.py inside an environment that has `litellm`: URL, then the model's name."""

import sys

import litellm

url, model = sys.argv[1:]
given = {"api_base": f"{url}/v1", "api_key": "none", "max_tokens": 8, "temperature": 0}
chat = {"model": f"openai/{model}", "messages": [{"role": "user", "content": "How do you do?"}], **given}
whole = litellm.completion(**chat).choices[0].message.content
streamed = litellm.completion(**chat, stream=True)
assert "".join(part.choices[0].delta.content or "" for part in streamed) == whole
text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="It is", **given).choices[0].text
assert text
print("completion (plain, stream), text_completion: right")
