"""API key, metrics, chat templates, and the engine embedded in somebody else's service."""

from __future__ import annotations

import asyncio
import contextlib
import json
from functools import partial

import aiohttp
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from msi import ConfigError, Engine, InvalidRequest, SamplingParams
from msi.control.client_messages import Stats
from msi.errors import Unavailable
from msi.server.calls import observed
from msi.server.chat import parse_chat
from msi.server.chat_template import ChatTemplate
from msi.server.completions import parse_completion
from msi.server.metrics import Metrics
from msi.types import Output
from tests.conftest import TEXT
from tests.edge import TEMPLATE, gateway, with_template
from tests.installed import transformers
from tests.test_engine import collect, idle

KEY = "a-key-ü"
ENGINE = web.AppKey("engine", Engine)


async def get(session, url, **headers):
    async with session.get(url, headers=headers) as response:
        return response.status, await response.text()


async def test_without_the_key_nothing_but_probes_answers(tiny_model):
    async with gateway(tiny_model, api_keys=("another", KEY)) as (_, url), aiohttp.ClientSession() as session:
        for probe in ("/health", "/ready", "/version"):
            assert (await get(session, f"{url}{probe}"))[0] == 200
        for path in ("/v1/models", "/metrics", "/v1/stream", "/nothing", "/ready/", "/Health", "/version/x", "//ready"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer"}):
                status, body = await get(session, url + path, **headers)
                assert (status, json.loads(body)["error"]["code"]) == (401, 401)
                assert "needs an API key" in body
        async with session.post(f"{url}/v1/completions", data=b"{}") as response:
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
        for given in (f"Bearer {KEY}", f"bearer {KEY}", "Bearer another"):
            assert (await get(session, f"{url}/v1/models", Authorization=given))[0] == 200


async def scrape(session, url):
    """Values by name and labels."""
    status, text = await get(session, f"{url}/metrics")
    assert status == 200
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.values()))
            assert key not in samples
            samples[key] = sample.value
    return samples


async def test_metrics_tell_requests_and_workers(tiny_model):
    async with gateway(tiny_model) as (engine, url), aiohttp.ClientSession() as session:
        asked = {"prompt": TEXT, "max_tokens": 5, "ignore_eos": True}
        for body in (asked, {**asked, "n": 2}, {"prompt": [1] * 600}):
            async with session.post(f"{url}/v1/completions", json=body) as response:
                await response.read()
        endless = {**asked, "max_tokens": 400, "stream": True}
        async with session.post(f"{url}/v1/completions", json=endless) as response:
            await response.content.readline()
        await idle(engine)
        async with asyncio.timeout(30):
            wanted, rows = (
                {
                    ("msi_kv_cache_blocks", "attention", "attention-0"),
                    ("msi_peer_delay_seconds", "0.99", "attention-0", "expert-0"),
                },
                ("msi_expert_rows_total", "6", "expert-0"),
            )
            while not wanted <= (samples := await scrape(session, url)).keys() or not samples.get(rows):  # noqa: ASYNC110
                await asyncio.sleep(0.1)  # the next heartbeat brings it
    assert samples["msi_requests_total", "length"] == 2
    assert samples["msi_requests_total", "error"] == 1
    assert samples["msi_requests_total", "cancelled"] == 1
    assert samples["msi_generation_tokens_total",] >= 15
    assert samples["msi_time_to_first_token_seconds_count",] == 3
    assert samples["msi_inter_token_seconds_count",] >= 3 * 4
    assert samples["msi_micro_batches",] == 1
    assert samples["msi_kv_cache_used_ratio", "attention", "attention-0"] <= 1
    assert samples["msi_kv_cache_blocks", "attention", "attention-0"] > 0
    for name in ("msi_attention_seconds", "msi_comm_seconds", "msi_busy_ratio", "msi_bubble_ratio", "msi_running"):
        assert samples[name, "attention", "attention-0"] >= 0
    for quantile in ("0.5", "0.99"):
        assert samples["msi_peer_delay_seconds", quantile, "attention-0", "expert-0"] >= 0
        assert samples["msi_peer_residence_seconds", quantile, "attention-0", "expert-0"] > 0
    for name in ("msi_expert_seconds", "msi_busy_ratio", "msi_worker_evictions_total"):
        assert samples[name, "expert", "expert-0"] >= 0
    assert all(samples["msi_expert_rows_total", str(expert), "expert-0"] > 0 for expert in range(7))


@pytest.mark.parametrize(
    ("num_choices", "reasons", "leaves_after", "outcome"),
    [
        (1, [None, "stop"], None, "stop"),
        (1, [None, "length"], None, "length"),
        (1, [None, "stop"], 1, "cancelled"),
        (2, ["stop", None, "length"], None, "length"),
        (2, ["stop", None, "length"], 2, "cancelled"),
        (2, ["stop", "stop"], 1, "cancelled"),
        (2, ["stop"], None, "error"),
    ],
)
async def test_a_client_that_leaves_counts_as_cancelled_whatever_some_of_its_choices_ended_with(
    num_choices, reasons, leaves_after, outcome
):
    async def outputs():
        for index, reason in enumerate(reasons):
            yield Output("r", "a", (1,), reason, index=index % num_choices)
        if outcome == "error":
            raise Unavailable("lost")
        await asyncio.sleep(0)

    metrics = Metrics()
    seen = observed(outputs(), partial(metrics.request, num_choices))
    with contextlib.suppress(Unavailable):
        async with contextlib.aclosing(seen):
            for _ in range(len(reasons) + 1 if leaves_after is None else leaves_after):
                await anext(seen, None)
    text = metrics.exposition(Stats(0, 1, ()), {}).decode()
    counted = {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "msi_requests_total"
    }
    assert counted == {outcome: 1}


async def test_metrics_without_an_instance_are_a_503(tiny_model, monkeypatch):
    async with gateway(tiny_model) as (engine, url), aiohttp.ClientSession() as session:

        async def nobody():
            raise Unavailable("the coordinator did not answer")

        monkeypatch.setattr(engine, "stats", nobody)
        status, body = await get(session, f"{url}/metrics")
    assert (status, json.loads(body)["error"]["type"]) == (503, "server_error")


# -- chat templates --------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "Why?\nSay it."},
    {"role": "assistant", "content": "Because."},
]
TEMPLATES = [
    TEMPLATE,
    "{%- for message in messages %}\n    {%- if loop.first %}{{ bos_token }}{% endif %}\n"
    "    {{ '[' + message.role + '] ' + message.content }}\n{%- endfor %}\n{{ eos_token }}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ mood }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(tiny_model, template, add_generation_prompt):
    tokenizer = transformers().PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_model / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    expected = tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt, mood="good"
    )
    ours = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    given = {"add_generation_prompt": add_generation_prompt, "values": {"mood": "good"}}
    assert ours.render(MESSAGES, **given) == expected


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "cannot render these messages: roles must alternate"),
        ("{{ messages[7].content }}", "cannot render these messages"),
        ("{{ ''.__class__.__mro__ }}", "cannot render these messages: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "cannot render these messages"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(template, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        ChatTemplate(template, {}).render(MESSAGES, add_generation_prompt=True, values={})


def test_template_values_cannot_replace_the_messages():
    with pytest.raises(InvalidRequest, match="chat_template_kwargs has 'messages'"):
        ChatTemplate("", {}).render(MESSAGES, add_generation_prompt=True, values={"messages": []})


def test_a_template_that_is_no_jinja_is_said_at_start():
    with pytest.raises(ConfigError, match="the chat template is not valid Jinja"):
        ChatTemplate("{% for %}", {})


async def test_a_template_of_ones_own_and_a_model_without(tiny_model, tmp_path):
    body = {"messages": [{"role": "user", "content": "It is"}], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    async with (
        gateway(tiny_model) as (_, url),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        assert response.status == 400
        assert "has no chat template" in (await response.json())["error"]["message"]
    model = with_template(tiny_model, tmp_path)
    async with (
        gateway(model, chat_template="{{ messages[0].content }}") as (engine, url),
        aiohttp.ClientSession() as session,
    ):
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            text = (await response.json())["choices"][0]["message"]["content"]
        assert text == (await collect(engine, "It is", max_tokens=4, temperature=0, ignore_eos=True))[0]


# -- bodies ----------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "messages is missing or empty"),
        ({"messages": "hello"}, "messages is a string; it must be an array"),
        ({"messages": ["hello"]}, r"messages\[0\] is a string; it must be an object"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]\.role is None; it must be one of system"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content is null; it must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\] is not text"),
        ({"messages": [USER], "top_logprobs": 2}, 'top_logprobs needs "logprobs": true'),
        ({"messages": [USER], "logprobs": 2}, "logprobs is a number; it must be a boolean"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"messages": [USER], "tools": [{}]}, "tools.0. is an object; it must be an object like"),
        ({"messages": [USER], "prompt": "a"}, "prompt is 'a', which is not supported: prompts go to"),
        ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ({"messages": [USER], "chat_template_kwargs": 1}, "chat_template_kwargs is a number; it must be an object"),
    ],
)
def test_chats_that_make_no_sense_are_named(body, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        parse_chat(body, max_tokens=10)


def test_a_body_says_what_the_sampler_gets():
    body = {
        "prompt": "a", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 4, "n": 2,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"7": 2},
        "min_tokens": 3, "stop": "x", "stop_token_ids": [8], "logprobs": 0, "ignore_eos": True,
    }  # fmt: skip
    expected = {name: value for name, value in body.items() if name != "prompt"}
    expected |= {"logit_bias": {7: 2}, "stop": ("x",), "stop_token_ids": (8,)}
    assert parse_completion(body).params == SamplingParams(**expected)
    assert parse_completion({"prompt": "a", **dict.fromkeys(expected)}).params == SamplingParams(), "null is absent"


# -- embedding -------------------------------------------------------------------------------------------------------


def test_an_engine_lives_in_somebody_elses_service_on_the_stock_loop(tiny_model):
    """A user's own aiohttp application: no gateway, no uvloop, no pytest loop."""
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    async def engine_of(app):
        async with Engine.local(model=tiny_model, transport="inproc", micro_batches=1) as engine:
            app[ENGINE] = engine
            yield

    async def answer(request):
        prompt = (await request.json())["prompt"]
        return web.json_response([output.text async for output in request.app[ENGINE].generate(prompt, params)])

    async def main():
        assert type(asyncio.get_running_loop()).__module__.startswith("asyncio.")
        app = web.Application()
        app.cleanup_ctx.append(engine_of)
        app.router.add_post("/ask", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/ask"
            async with aiohttp.ClientSession() as session:

                async def ask(prompt):
                    async with session.post(url, json={"prompt": prompt}) as response:
                        return "".join(await response.json())

                texts = await asyncio.gather(*(ask(prompt) for prompt in (TEXT, "It is", TEXT)))
            expected = [(await collect(app[ENGINE], one, max_tokens=8, temperature=0, ignore_eos=True))[0]
                        for one in (TEXT, "It is", TEXT)]  # fmt: skip
            assert texts == expected
        finally:
            await runner.cleanup()

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(main())
