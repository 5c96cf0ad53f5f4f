// A box to talk to the model: what is typed goes to the chat or completions endpoint, and what comes is shown as it comes.
import { at, digits, duration, element } from "./draw.js";
import { headers, sentenceOf } from "./stream.js";

export class Ask {
  constructor() {
    this.running = null;
    this.model = "";
    at("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.running.abort();
      else this.ask();
    });
    at("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !this.running) {
        event.preventDefault();
        at("ask").requestSubmit();
      }
    });
  }

  greet(hello) {
    if (this.model === hello.model) return;
    this.model = hello.model;
    at("chat").checked = hello.has_chat;
    at("chat-label").hidden = !hello.has_chat;
  }

  async ask() {
    const prompt = at("prompt").value, isChat = at("chat").checked;
    this.running = new AbortController();
    at("send").textContent = "Stop";
    const text = document.createTextNode("");
    at("answer").replaceChildren(element("span", "said", isChat ? `${prompt}\n\n` : prompt), text);
    at("answer-note").textContent = "waiting for the first token";
    const asked = Array.from({ length: Math.max(1, Math.min(32, Number(at("times").value) || 1)) }, (_, index) =>
      this.stream(prompt, isChat, index ? () => {} : (piece) => this.said(text, piece)),
    );
    try {
      const [first] = await Promise.all(asked);
      at("answer-note").textContent = `${first.tokens} tokens, first after ${duration(first.first)}, then ${digits(first.rate)} tokens/s; ended by ${first.reason || "the server"}`;
    } catch (error) {
      const stopped = this.running.signal.aborted;
      at("answer-note").textContent = stopped ? "stopped" : "";
      if (!stopped) at("answer").append(element("div", "bad", error.message));
      this.running.abort();
    }
    this.running = null;
    at("send").textContent = "Ask";
  }

  said(text, piece) {
    const box = at("answer"), isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
    text.data += piece;
    if (isAtEnd) box.scrollTop = box.scrollHeight;
    at("answer-note").textContent = "";
  }

  async stream(prompt, isChat, said) {
    const began = performance.now();
    const response = await fetch(isChat ? "/v1/chat/completions" : "/v1/completions", {
      method: "POST",
      signal: this.running.signal,
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({
        ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
        max_tokens: Number(at("max-tokens").value) || 16,
        temperature: Number(at("temperature").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) throw new Error(await sentenceOf(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const found = { tokens: 0, first: 0, rate: 0, reason: "" };
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: {")) this.take(JSON.parse(event.slice(6)), found, said, began);
    }
    const elapsed = (performance.now() - began) / 1e3 - found.first;
    found.rate = found.tokens > 1 && elapsed > 0 ? (found.tokens - 1) / elapsed : 0;
    return found;
  }

  take(chunk, found, said, began) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) found.tokens = chunk.usage.completion_tokens;
    for (const choice of chunk.choices) {
      const delta = choice.delta || {}, piece = choice.text ?? ((delta.reasoning || "") + (delta.content || ""));
      if (!found.first && (piece || choice.finish_reason)) found.first = (performance.now() - began) / 1e3;
      found.reason = choice.finish_reason || found.reason;
      if (piece) said(piece);
    }
  }
}
