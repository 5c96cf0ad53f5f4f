"""OpenAI's Responses API: what a request asks of a chat, and how a chat's answer is told. Pure; knows no HTTP."""
