"""generate() of transformers over HTTP, in static batches.

PYTHON tools/clients/transformers_server.py MODEL DTYPE PORT THREADS

POST /v1/completions with {"prompt": token ids, "max_tokens": n} is answered with a line "data: {...}" for each token.
Whoever has come when a batch ends is the next batch.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

WAITING: queue.Queue[tuple[list[int], int, queue.Queue[int | None]]] = queue.Queue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens: queue.Queue[int | None] = queue.Queue()
        WAITING.put((asked["prompt"], asked["max_tokens"], tokens))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        while (token := tokens.get()) is not None:
            choice = {"index": 0, "text": f"<{token}>", "finish_reason": None}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


def generate(model: torch.nn.Module, batch: list[tuple[list[int], int, queue.Queue[int | None]]]) -> None:
    longest = max(len(prompt) for prompt, _, _ in batch)
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt, _, _ in batch]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _, _ in batch]
    step = 0

    def note(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        nonlocal step
        step += 1
        for token, (_, most, tokens) in zip(input_ids[:, -1].tolist(), batch, strict=True):
            if step <= most:
                tokens.put(token)
            if step == most:
                tokens.put(None)
        return torch.zeros(len(batch), dtype=torch.bool)

    most = max(wanted for _, wanted, _ in batch)
    with torch.inference_mode():
        model.generate(
            torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=most, min_new_tokens=most,
            do_sample=False, pad_token_id=0, stopping_criteria=[note],
        )  # fmt: skip


def main() -> None:
    path, dtype, port, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        batch = [WAITING.get()]
        threading.Event().wait(0.01)  # those that were sent together come one after the other
        while not WAITING.empty():
            batch.append(WAITING.get())
        generate(model, batch)


if __name__ == "__main__":
    main()
