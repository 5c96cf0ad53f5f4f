"""A model with a SentencePiece tokenizer, served: text, stops, log-probabilities, every way in."""

from __future__ import annotations

import itertools
import json

import aiohttp
import pytest
import pytest_asyncio
from tokenizers import Tokenizer, decoders, models

from msi.errors import RequestFailed
from tests.edge import gateway, with_template
from tests.everyday import mostly_slow
from tests.test_engine import collect, idle
from tests.tiny import save_tiny
from tests.vocabularies import tokenizer_of

pytestmark = pytest.mark.asyncio(loop_scope="module")
ENDLESS = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True}
SEEDS = range(4)
seeds = pytest.mark.parametrize("seed", mostly_slow(SEEDS))


def save_model(path, tokenizer):
    save_tiny(path, vocab_size=max(tokenizer.get_vocab().values()) + 1)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=mostly_slow(["llama", "metaspace-first"]))
async def served(request, tmp_path_factory):
    """(tokenizer, engine, url, session)"""
    tokenizer = tokenizer_of(request.param)
    model = save_model(tmp_path_factory.mktemp("model"), tokenizer)
    with_template(model, tmp_path_factory.mktemp("chat"))
    async with gateway(with_template(model, tmp_path_factory.mktemp("served"))) as (engine, url):
        async with aiohttp.ClientSession() as session:
            yield tokenizer, engine, url, session
        await idle(engine)


async def post(served, path, **body):
    async with served[3].post(f"{served[2]}/v1/{path}", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def chunks(served, path, **body):
    async with served[3].post(f"{served[2]}/v1/{path}", json={**body, "stream": True}) as response:
        lines = [line[6:].strip() async for line in response.content if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def names(entries):
    return [(one["token"], one["bytes"]) for one in entries]


def added(tokenizer, prompt, answer):
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *answer])
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.slow
async def test_the_text_is_what_decoding_adds_with_the_first_space(served):
    tokenizer, engine, _, _ = served
    prompt = tokenizer.encode("It is").ids
    space = next(token for token in range(300, 480) if (tokenizer.id_to_token(token) or "").startswith("▁"))
    text, tokens, _ = await collect(engine, "It is", logit_bias={space: 100}, max_tokens=2, temperature=0)
    assert tokens == [space] * 2
    assert text == added(tokenizer, prompt, tokens)
    assert text.startswith(" ")
    for seed in SEEDS:
        text, tokens, _ = await collect(engine, "It is", seed=seed, **ENDLESS)
        assert text == added(tokenizer, prompt, tokens)
        whole = await post(served, "completions", prompt="It is", seed=seed, echo=True, **ENDLESS)
        assert whole["choices"][0]["text"] == f"It is{text}"


@seeds
async def test_log_probabilities_of_completions_add_up_to_the_text_streamed_or_not(served, seed):
    asked = {"prompt": "It is a", "seed": seed, "logprobs": 5, **ENDLESS}
    plain = (await post(served, "completions", **asked))["choices"][0]
    for stop in (None, [plain["text"][7:9]], ["never", plain["text"][20:24]]):
        choice = (await post(served, "completions", **asked, stop=stop))["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
        assert text == plain["text"][: min(plain["text"].find(one) for one in stop if one in plain["text"])
                                     if stop else None]  # fmt: skip
        assert "".join(logprobs["tokens"]) == text
        ends = list(itertools.accumulate(map(len, logprobs["tokens"])))
        assert logprobs["text_offset"] == [0, *ends[:-1]]
        for token, value, tops in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert tops[token] == value
            assert len(tops) in (5, 6), "nothing is lost"
        pieces = await chunks(served, "completions", **asked, stop=stop)
        assert "".join(piece["text"] for piece in pieces) == text
        for name in ("tokens", "text_offset"):
            assert [one for piece in pieces for one in piece["logprobs"][name]] == logprobs[name]
    echoed = (await post(served, "completions", **asked | {"logprobs": None, "echo": True}))["choices"][0]
    assert echoed["text"] == "It is a" + plain["text"]


@seeds
async def test_log_probabilities_of_chats_have_the_bytes_of_their_tokens(served, seed):
    _, _, url, session = served
    asked = {"messages": [{"role": "user", "content": "It is"}], "seed": seed, "logprobs": True, "top_logprobs": 5}
    choice = (await post(served, "chat/completions", **asked, **ENDLESS))["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == ENDLESS["max_tokens"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"]
    for entry in [entry for one in content for entry in [one, *one["top_logprobs"]]]:
        if entry["token"] not in ("", "\ufffd") and len(entry["bytes"]) > 1:
            assert bytes(entry["bytes"]).decode() == entry["token"]
    assert any(len(one["bytes"]) == 1 and one["bytes"][0] >= 0x80 for one in content), "a token inside a character"
    assert all(len(one["top_logprobs"]) == 5 for one in content)
    pieces = await chunks(served, "chat/completions", **asked, **ENDLESS)
    assert names([one for piece in pieces[1:] for one in piece["logprobs"]["content"]]) == names(content)
    async with session.ws_connect(f"{url}/v1/stream") as socket:
        await socket.send_json({"type": "generate", "id": "a", **asked, **ENDLESS})
        entries, text = [], ""
        while (message := await socket.receive_json(timeout=60))["type"] == "output":
            entries += message["logprobs"]["content"]
            text += message["text"]
    assert (names(entries), text) == (names(content), choice["message"]["content"])


@pytest.mark.slow
async def test_bytes_in_any_order_reach_every_client_to_the_end(served):
    """As a model does that writes nonsense: what was "Invalid prefix" once, and a WebSocket id that was never free."""
    tokenizer, _, url, session = served
    high = {str(tokenizer.token_to_id(f"<0x{byte:02X}>")): 100 for byte in (0x20, 0x41, 0x82, 0xE2, 0xAC, 0xFF)}
    async with session.ws_connect(f"{url}/v1/stream") as socket:
        for seed in range(8):
            body = {"prompt": "It is", "logit_bias": high, "seed": seed, **ENDLESS}
            await socket.send_json({"type": "generate", "id": "same", **body})
            tokens, text = [], ""
            while (message := await socket.receive_json(timeout=60))["type"] == "output":
                tokens += message["token_ids"]
                text += message["text"]
            assert message["type"] == "done"
            assert text == added(tokenizer, tokenizer.encode("It is").ids, tokens)


async def test_a_tokenizer_that_panics_ends_one_request_and_no_other(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "bb": 1, "c": 2}, "a"))
    tokenizer.decoder = decoders.Strip("a", 1, 1)  # cuts more than there is
    async with (
        gateway(save_model(tmp_path, tokenizer)) as (engine, url),
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/v1/stream") as socket,
    ):
        with pytest.raises(RequestFailed, match="the tokenizer cannot decode the answer"):
            await collect(engine, [1], logit_bias={0: 100}, max_tokens=3)
        for name, token in (("same", 0), ("same", 1), ("same", 0)):
            asked = {"prompt": [1], "logit_bias": {str(token): 100}, "max_tokens": 3, "ignore_eos": True}
            await socket.send_json({"type": "generate", "id": name, **asked})
            while (message := await socket.receive_json(timeout=60))["type"] == "output":
                pass
            assert message["type"] == ("error" if token == 0 else "done")
        assert (await collect(engine, [1], logit_bias={1: 100}, max_tokens=2))[0]
        await idle(engine)
