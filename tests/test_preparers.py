"""Large requests in processes of their own: time limits that end them, turns for everybody, and what is too long."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from msi.control.client_messages import Welcome
from msi.errors import InvalidRequest, Unavailable
from msi.server import preparers
from msi.server.moment import Interrupted, for_a_moment
from msi.server.prepare import (
    ANSWERS,
    CHAT,
    COMPLETION,
    ENDPOINTS,
    MESSAGE,
    SETUP,
    NotUnderstood,
    Preparation,
    Setup,
    tokens_of,
)
from msi.server.preparers import Preparers
from msi.text.prompts import Prompts, most_bytes_per_token
from tests.conftest import TEXT
from tests.edge import gateway
from tests.everyday import mostly_slow

LOOPS = ("a", "b", "c")
ENDLESS = "".join(f"{{% for {name} in range(9999) %}}" for name in LOOPS) + "{% endfor %}" * 3


def setup_of(tiny_model, template="{% for m in messages %}{{ m.content }}{% endfor %}"):
    tokenizer = (tiny_model / "tokenizer.json").read_bytes()
    return Setup(Welcome("tiny", 300, 512, tokenizer, {"default": template}))


def task(endpoint, **body):
    return bytes([ENDPOINTS.index(endpoint)]) + json.dumps(body).encode()


@pytest.mark.slow
async def test_a_process_understands_what_this_one_does(tiny_model):
    setup = setup_of(tiny_model)
    here, pool = Preparation(setup), Preparers(SETUP.encode(setup))
    user = {"role": "user", "content": TEXT}
    bodies = [
        (COMPLETION, {"prompt": TEXT, "echo": True, "n": 3, "stop": "a", "logit_bias": {"5": -1}, "stream": True}),
        (COMPLETION, {"prompt": [[1, 2], "ab"], "seed": 2**63}),
        (COMPLETION, {"prompt": TEXT * 100}),
        (COMPLETION, {"prompt": "a", "model": "other"}),
        (COMPLETION, {}),
        (CHAT, {"messages": [user], "logprobs": True, "top_logprobs": 3}),
        (MESSAGE, {"type": "generate", "id": "x", "messages": [user]}),
        (MESSAGE, {"type": "cancel", "id": "x"}),
        (MESSAGE, {"type": "jump", "id": "x"}),
        (MESSAGE, {"id": 7}),
    ]
    try:
        for endpoint, body in bodies:
            there = ANSWERS.decode(await pool.prepare("me", task(endpoint, **body)))
            assert there == here.understand(endpoint, json.dumps(body))
    finally:
        await pool.close()
    assert tokens_of(here.completion({"prompt": [5, 6]}).prompts[0]) == (5, 6)


@pytest.mark.slow
async def test_a_request_that_takes_for_ever_is_ended_with_its_process_and_others_go_on(tiny_model):
    pool = Preparers(SETUP.encode(setup_of(tiny_model, ENDLESS)), within_s=6.0)
    evil, good = task(CHAT, messages=[{"role": "user", "content": "a"}]), task(COMPLETION, prompt="It is")
    try:
        await asyncio.gather(*(pool.prepare(str(number), good) for number in range(4)))  # its processes are there
        evils = [asyncio.ensure_future(pool.prepare("evil", evil + b" " * preparers.LARGE_BYTES)) for _ in range(2)]
        for _ in range(5):
            assert not isinstance(ANSWERS.decode(await pool.prepare("good", good)), NotUnderstood)
        assert not any(one.done() for one in evils), "one process is kept from large ones"
        for one in evils:
            with pytest.raises(InvalidRequest, match="was not understood within 6 s"):
                await one
        assert pool.num_given_up == 2
        assert not isinstance(ANSWERS.decode(await pool.prepare("good", good)), NotUnderstood)
    finally:
        await pool.close()


@pytest.mark.parametrize("is_known", [True, False])
async def test_processes_that_were_killed_are_started_anew(tiny_model, is_known):
    """Also where nobody has noticed yet: the request after that had an error that told it to be smaller."""
    pool = Preparers(SETUP.encode(setup_of(tiny_model)))
    try:
        await pool.start()
        for victim in pool._idle:
            os.kill(victim._process.pid, 9)
        if is_known:
            await asyncio.gather(*(victim._process.wait() for victim in pool._idle))
        assert await pool.prepare("me", task(COMPLETION, prompt="a"))
        assert pool.num_given_up == 0
    finally:
        await pool.close()


async def test_a_process_that_is_killed_while_it_works_costs_no_request(tiny_model):
    pool = Preparers(SETUP.encode(setup_of(tiny_model)))
    try:
        await pool.start()
        victim = pool._idle[-1]
        os.kill(victim._process.pid, signal.SIGSTOP)
        asked = asyncio.ensure_future(pool.prepare("me", task(COMPLETION, prompt=TEXT)))
        await asyncio.sleep(0.05)
        os.kill(victim._process.pid, signal.SIGKILL)
        assert not isinstance(ANSWERS.decode(await asked), NotUnderstood)
    finally:
        await pool.close()


async def test_processes_that_are_stopped_are_no_fault_of_the_request(tiny_model):
    """It was told to be smaller."""
    pool = Preparers(SETUP.encode(setup_of(tiny_model)), within_s=0.5)
    try:
        await pool.start()
        for victim in pool._idle:
            os.kill(victim._process.pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match="stand still; try again"):
            await pool.prepare("me", task(COMPLETION, prompt=TEXT))
    finally:
        for victim in pool._idle:
            victim._process.kill()
        await pool.close()


async def test_no_process_to_be_had_is_no_fault_of_the_request(tiny_model, monkeypatch):
    pool = Preparers(SETUP.encode(setup_of(tiny_model)))
    monkeypatch.setattr(preparers.sys, "executable", "/nowhere/python")
    try:
        with pytest.raises(Unavailable, match="try again"):
            await pool.prepare("me", task(COMPLETION, prompt="a"))
    finally:
        await pool.close()


@pytest.mark.slow
async def test_requests_whose_clients_left_take_no_place_in_the_queue(tiny_model, monkeypatch):
    """They kept their places, and their bodies, until those before them were through."""
    monkeypatch.setattr(preparers, "MAX_QUEUED", 8)
    pool = Preparers(SETUP.encode(setup_of(tiny_model, ENDLESS)), within_s=3.0)
    endless = task(CHAT, messages=[{"role": "user", "content": "a"}])
    try:
        running = [asyncio.ensure_future(pool.prepare(f"evil {at}", endless)) for at in range(2)]
        for client in ("leaver", *map(str, range(7))):
            left = [asyncio.ensure_future(pool.prepare(client, endless)) for _ in range(8)]
            await asyncio.sleep(0)
            for one in left:
                one.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        assert not pool._waiting
        assert not isinstance(ANSWERS.decode(await pool.prepare("good", task(COMPLETION, prompt="a"))), NotUnderstood)
        await asyncio.gather(*running, return_exceptions=True)
    finally:
        await pool.close()


# -- small ones ------------------------------------------------------------------------------------------------------


def test_what_takes_longer_than_a_moment_is_interrupted_though_it_catches_everything():
    def evil():
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    with pytest.raises(Interrupted), for_a_moment(0.01):
        evil()
    with for_a_moment(10.0):
        assert sum(range(1000)) == 499500
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


ENDLESS_SMALL = {
    "loops": ENDLESS,
    "text that doubles": (
        "{% set n = namespace(x='abcdefgh') %}{% for i in range(99999) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    ),
    "calls of itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("template", mostly_slow(ENDLESS_SMALL.values()), ids=ENDLESS_SMALL)
@pytest.mark.slow
async def test_a_template_that_never_ends_holds_nobody_up(tiny_model, template, monkeypatch):
    """A small chat was rendered where all are answered: nobody had an answer any more."""
    monkeypatch.setattr(preparers, "WITHIN_S", 1.0)
    async with gateway(tiny_model, chat_template=template) as (_, url), aiohttp.ClientSession(url) as session:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        endless = [asyncio.ensure_future(session.post("/v1/chat/completions", json=body)) for _ in range(2)]
        for _ in range(10):
            async with session.post("/v1/completions", json={"prompt": "It is", "max_tokens": 2}) as response:
                assert response.status == 200
        for one in endless:
            response = await one
            assert response.status in (400, 503), "503 where the machine is too busy to blame the request"
            sentence = (await response.json())["error"]["message"]
            assert sentence.endswith(("send a smaller one", "try again", "MemoryError")), sentence


@pytest.mark.slow
async def test_clients_take_turns_and_the_queue_has_an_end(tiny_model, monkeypatch):
    monkeypatch.setattr(preparers, "MAX_QUEUED", 20)
    pool = Preparers(SETUP.encode(setup_of(tiny_model)))
    order = []

    async def ask(client):
        await pool.prepare(client, task(COMPLETION, prompt=TEXT))
        order.append(client)

    try:
        greedy = [asyncio.ensure_future(ask("greedy")) for _ in range(20)]
        await asyncio.sleep(0)
        modest = asyncio.ensure_future(ask("modest"))
        await asyncio.sleep(0)
        more = [asyncio.ensure_future(ask("greedy")) for _ in range(20)]
        refused = [one for one in await asyncio.gather(*more, return_exceptions=True) if one is not None]
        assert refused
        assert all(isinstance(one, Unavailable) for one in refused)
        await asyncio.gather(*greedy, modest)
        assert "modest" in order[:5]
        left = asyncio.ensure_future(ask("gone"))
        await asyncio.sleep(0)
        left.cancel()
        await ask("modest")
    finally:
        await pool.close()


# -- length ----------------------------------------------------------------------------------------------------------


def trained(model, trainer, pre_tokenizer=None, normalizer=None, decoder=None):
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
TOKENIZERS = {
    "byte level": trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=320, initial_alphabet=ALPHABET),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "byte level, composed": trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=320, initial_alphabet=ALPHABET),
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(),
    ),
    "metaspace with bytes": trained(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *BYTES]), pre_tokenizers.Metaspace(),
    ),
    "unknown characters become one": trained(
        models.BPE(unk_token="<unk>", fuse_unk=True), trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>"]),
    ),
    "words": trained(
        models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(special_tokens=["<unk>"]),
        pre_tokenizers.Whitespace(),
    ),
    "lower case": trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=320, initial_alphabet=ALPHABET),
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Sequence([normalizers.StripAccents()]),
    ),
}  # fmt: skip


PIECES = [TEXT, "e\u0301\u0302", "\u1112\u1161\u11ab", "  "]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES)).map("".join)),
    times=st.integers(1, 50),
)  # fmt: skip
def test_no_text_is_refused_unread_that_would_have_fitted(name, text, times):
    tokenizer, text = TOKENIZERS[name], text * times
    longest = most_bytes_per_token(json.loads(tokenizer.to_str()))
    num_tokens = len(tokenizer.encode(text).ids)
    if longest:
        assert len(text.encode()) <= longest * max(num_tokens, 1)
    prompts = Prompts.of(tokenizer.to_str().encode(), 1000, max_model_len=num_tokens + 1)
    assert len(prompts.encode(text)) == num_tokens


def test_bounds_are_known_where_nothing_is_dropped():
    known = {name for name, one in TOKENIZERS.items() if most_bytes_per_token(json.loads(one.to_str()))}
    assert known == {"byte level", "byte level, composed", "metaspace with bytes"}


@pytest.mark.parametrize("prompt", ["a" * 8_000_000, "\U0001f600" * 1_000_000, [5] * 200_000, "word " * 10_000])
def test_a_prompt_of_any_size_is_refused_with_the_contexts_sentence(prompt):
    prompts = Prompts.of(TOKENIZERS["byte level"].to_str().encode(), 1000, 512)
    with pytest.raises(InvalidRequest, match="maximum context length is 512 tokens") as caught:
        prompts.encode(prompt, max_tokens=7)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_a_text_too_long_is_refused_before_it_is_tokenised(monkeypatch):
    monkeypatch.setattr("msi.text.prompts.encode", None)
    with pytest.raises(InvalidRequest, match="at least"):
        Prompts.of(TOKENIZERS["byte level"].to_str().encode(), 1000, 512).encode("a" * 100_000)
