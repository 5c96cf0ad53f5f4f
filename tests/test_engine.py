"""The engine as an embedding service sees it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import Tokenizer

from msi import ConfigError, Engine, InvalidRequest, RequestFailed, SamplingParams, Unavailable
from msi.control.client import CoordinatorClient
from tests.conftest import TEXT


@pytest.fixture
async def engine(tiny_model):
    async with Engine.local(model=tiny_model, expert_workers=2, transport="inproc", micro_batches=2) as engine:
        yield engine
        await idle(engine)
        for worker in engine._instance.workers:
            if worker.life.attention is not None:
                worker.life.attention.requests.check_integrity()


async def idle(engine, within_s=10):
    for _ in range(int(within_s * 20)):
        if (await engine.stats()).num_requests == 0 and all(
            worker.life.attention is None or worker.life.attention.requests.is_idle
            for worker in engine._instance.workers
        ):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("requests are left")


async def collect(engine, prompt, **params):
    outputs = [output async for output in engine.generate(prompt, SamplingParams(**params))]
    return "".join(o.text for o in outputs), [t for o in outputs for t in o.token_ids], outputs[-1].finish_reason


async def test_text_in_text_out(engine, tiny_model):
    text, tokens, reason = await collect(engine, TEXT, max_tokens=20, temperature=0, ignore_eos=True)
    assert (len(tokens), reason) == (20, "length")
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert text == tokenizer.decode(tokens)
    assert await collect(engine, tokenizer.encode(TEXT).ids, max_tokens=20, temperature=0, ignore_eos=True) == (
        text, tokens, reason,
    )  # fmt: skip


async def test_a_seeded_request_gives_the_same_tokens_whatever_runs_beside_it(engine):
    params = {"max_tokens": 24, "temperature": 1.2, "top_p": 0.95, "top_k": 50, "seed": 11, "ignore_eos": True}
    alone = await collect(engine, TEXT, **params)
    crowd = [
        asyncio.create_task(collect(engine, [3 + n] * (1 + 9 * n), max_tokens=30, seed=n, ignore_eos=True))
        for n in range(6)
    ]
    beside = [await collect(engine, TEXT, **params) for _ in range(2)]
    await asyncio.gather(*crowd)
    assert beside == [alone, alone]
    assert await collect(engine, TEXT, **{**params, "seed": 12}) != alone


async def test_unseeded_requests_differ(engine):
    results = {(await collect(engine, TEXT, max_tokens=16, ignore_eos=True))[0] for _ in range(3)}
    assert len(results) > 1


@pytest.mark.slow
async def test_a_stop_string_ends_the_text_before_itself_and_cancels(engine):
    whole, tokens, _ = await collect(engine, TEXT, max_tokens=200, temperature=0, ignore_eos=True)
    stop = whole[11:15]
    text, fewer, reason = await collect(
        engine, TEXT, max_tokens=200, temperature=0, ignore_eos=True, stop=("zzz", stop)
    )
    assert (text, reason) == (whole[: whole.index(stop)], "stop")
    assert len(fewer) < len(tokens)
    await idle(engine)


@pytest.mark.slow
async def test_an_end_of_sequence_token_stops(engine):
    outputs = [await collect(engine, TEXT, max_tokens=400, temperature=3.0, seed=seed) for seed in range(4)]
    assert "stop" in {reason for _, _, reason in outputs}
    for _, tokens, reason in outputs:
        assert (tokens[-1] == 2) == (reason == "stop")


async def test_leaving_early_cancels(engine):
    outputs = engine.generate(TEXT, SamplingParams(max_tokens=400, ignore_eos=True))
    async with contextlib.aclosing(outputs):
        async for _ in outputs:
            break
    await idle(engine)
    task = asyncio.create_task(collect(engine, TEXT, max_tokens=400, ignore_eos=True))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(engine)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, 5000], "token id 5000 in the prompt"),
        ([1, -1], "token id -1"),
        ([1, "a"], "token id 'a'"),
        ([True], "token id True"),
        ([1] * 512, "maximum context length is 512 tokens"),
        ("a\ud800b", "not valid"),
        (b"It is", "of the type bytes; give a text, or a sequence of token ids"),
        (bytearray(b"a"), "of the type bytearray"),
        ({"prompt": "a"}, "of the type dict"),
        ({1, 2}, "of the type set"),
        (None, "of the type NoneType"),
        (5, "of the type int"),
        ([1.0], r"token id 1\.0"),
        ([[1]], r"token id \[1\]"),
    ],
)
async def test_prompts_that_cannot_be_served_are_refused_with_a_sentence(engine, prompt, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        await collect(engine, prompt)
    assert (await collect(engine, TEXT, max_tokens=1))[2] == "length", "nothing is lost"


@pytest.mark.parametrize(
    "prompt", [(5, 6), range(5, 7), numpy.array([5, 6]), [numpy.int64(5), 6], torch.tensor([5, 6])]
)
async def test_token_ids_come_in_whatever_holds_integers_in_an_order(engine, prompt):
    params = {"max_tokens": 2, "temperature": 0}
    assert await collect(engine, prompt, **params) == await collect(engine, [5, 6], **params)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"priority": 1.5}, r"priority is 1\.5; it must be an integer"),
        ({"priority": "1"}, "priority is '1'"),
        ({"priority": None}, "priority is None"),
        ({"priority": True}, "priority is True"),
        ({"priority": 2**40}, "priority is 1099511627776"),
        ({"timeout_s": "1"}, "timeout_s is '1'; it must be a number of seconds"),
        ({"timeout_s": -1}, "timeout_s is -1"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": None}, "timeout_s is None"),
        ({"timeout_s": True}, "timeout_s is True"),
        ({"timeout_s": 10**400}, "timeout_s is 1000"),
        ({"cache_salt": 5}, "cache_salt is 5; it must be a text"),
        ({"cache_salt": "a\ud800"}, "cache_salt is"),
        ({"cache_salt": "a" * 10**6}, "cache_salt is 'aaa"),
        ({"flow": None}, "flow is None"),
        ({"trace": b"00-"}, "trace is b'00-'"),
        ({"request_id": 7}, "request_id is 7"),
        ({"request_id": "\udfff"}, "request_id is"),
        ({"params": {"max_tokens": 3}}, "params is of the type dict; give SamplingParams"),
        ({"params": 0}, "params is of the type int"),
    ],
)
async def test_a_value_that_no_coordinator_could_read_leaves_neither_its_request_nor_others_waiting(
    engine, words, complaint
):
    other = asyncio.create_task(collect(engine, TEXT, max_tokens=8, ignore_eos=True))
    with pytest.raises(InvalidRequest, match=complaint):
        await anext(engine.generate(TEXT, **words))
    assert (await other)[2] == "length"


@pytest.mark.parametrize(("first", "second"), [(("x", 1), ("x", 1)), (("x", 3), ("x-1", 1)), (("x-1", 1), ("x", 3))])
async def test_an_id_that_is_in_use_is_refused_and_its_request_goes_on(engine, first, second):
    def ask(name, n):
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, n=n)
        return engine.generate(TEXT, params, request_id=name)

    running = ask(*first)
    tokens = [*(await anext(running)).token_ids]
    with pytest.raises(InvalidRequest, match=r"request_id 'x.*' is that of a request that runs") as caught:
        await anext(ask(*second))
    assert caught.value.param == "request_id"
    tokens += [token async for output in running for token in output.token_ids]
    assert len(tokens) == 8 * first[1]
    again = [token async for output in ask(*second) for token in output.token_ids]
    assert len(again) == 8 * second[1], "its id is free again"


async def test_a_bug_where_answers_are_read_ends_requests_with_a_sentence(tiny_model, monkeypatch, caplog):
    async with Engine.local(model=tiny_model, transport="inproc", micro_batches=1) as engine:

        def fail(self, outputs):
            raise TypeError("not even a number")

        monkeypatch.setattr(CoordinatorClient, "_take", fail)
        for _ in range(2):
            with pytest.raises(RequestFailed, match=r"failed by a bug: TypeError\('not even a number'\)"):
                await collect(engine, TEXT, max_tokens=2)
        assert not engine.status[0]
    assert "cannot go on" in caplog.text


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"max_tokens": -1}, "max_tokens is -1; it must be an integer >= 0"),
        ({"max_tokens": 2.5}, r"max_tokens is 2\.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": -0.1}, r"temperature is -0\.1; it must be a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, r"top_p is 0; it must be a number in \(0, 1\]"),
        ({"top_p": float("inf")}, "top_p is inf"),
        ({"top_k": -2}, "top_k is -2"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"seed": 2**64}, "64 bits"),
        ({"stop": ("",)}, "stop is"),
        ({"stop": 5}, "stop is 5"),
        ({"stop": {"a"}}, "stop is {'a'}"),
        ({"stop": [["a"]]}, "stop is"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5"),
        ({"allowed_token_ids": "5"}, "allowed_token_ids is '5'"),
        ({"bad_words": "a"}, "bad_words is 'a'"),
        ({"bad_words": 0}, "bad_words is 0"),
        ({"bad_words": {}}, "bad_words is {}"),
        ({"bad_words_token_ids": False}, "bad_words_token_ids is False"),
        ({"bad_words_token_ids": [5]}, r"bad_words_token_ids is \(5,\)"),
        ({"logit_bias": []}, r"logit_bias is \[\]"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be true or false"),
    ],
)
def test_parameters_that_make_no_sense_are_named(params, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "b"], "bad_words": ["c"]}, {"stop": ("a", "b"), "bad_words": ("c",)}),
        ({"stop_token_ids": [1], "allowed_token_ids": [1, 2]}, {"stop_token_ids": (1,), "allowed_token_ids": (1, 2)}),
        ({"bad_words_token_ids": [[1, 2], (3,)]}, {"bad_words_token_ids": ((1, 2), (3,))}),
        ({"stop": [], "logit_bias": {}}, {}),
        (dict.fromkeys(("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logit_bias", "seed")), {}),
    ],
)
def test_parameters_may_be_written_as_for_vllm(written, meant):
    assert SamplingParams(**written) == SamplingParams(**meant)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"attention_workers": 0}, "`attention_workers` 0: give an integer from 1 to 1024"),
        ({"expert_workers": "two"}, "`expert_workers` 'two'"),
        ({"micro_batches": 5}, "`micro_batches` 5: give auto or 1 to 4"),
        ({"gpu_memory_utilization": 0.0}, r"`gpu_memory_utilization` 0\.0"),
        ({"max_num_batched_tokens": 600}, "more than a slot's 512 rows"),
        ({"colocated": True, "expert_workers": 2}, "one process with both roles"),
        ({"device": "tpu"}, "`device` 'tpu' is not one"),
        ({"transport": "rdma", "rdma_gid": "here"}, "`rdma_gid` 'here' is neither an index nor an address"),
        ({"transport": "pigeon"}, "`transport` 'pigeon' is not one"),
        ({"transport": "rdma", "encrypt_rows": True}, "`encrypt_rows` is for TCP"),
        ({"load_format": "gguf"}, "`load_format` 'gguf' is not one; supported: auto, dummy"),
        ({"dtype": "float8"}, "`dtype` 'float8' is not one"),
        ({"model": 5}, "`model` 5: give a path"),
        ({"model": ["a"]}, r"`model` .*: give a path"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Engine.local(**options)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="no option 'experts'; did you mean 'expert_workers'"):
        Engine.local(experts=2)


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"expert_workers": 8}, "8 expert workers for 7 experts; give between 1 and 7"),
        ({"max_model_len": 4096}, "`max_model_len` 4096 is more than the 512 positions"),
        ({"model": "/nowhere"}, "/nowhere is not a directory"),
    ],
)
async def test_instances_that_cannot_start_say_why(tiny_model, transport, options, complaint):
    engine = Engine.local(**{"model": tiny_model, "transport": transport, **options})
    with pytest.raises((ConfigError, Unavailable), match=complaint):
        await asyncio.wait_for(engine.__aenter__(), 60)
    assert engine.pids == {}


@pytest.mark.slow
@pytest.mark.skipif(Path("/sys/class/infiniband").exists(), reason="this machine has RDMA devices")
async def test_an_instance_without_an_rdma_device_says_what_is_missing(tiny_model):
    engine = Engine.local(model=tiny_model, transport="rdma")
    with pytest.raises((ConfigError, Unavailable), match=r"`transport` rdma(: no| needs a| device|: this)"):
        await asyncio.wait_for(engine.__aenter__(), 60)


@pytest.mark.parametrize("transport", ["inproc", "shm"])
async def test_an_answer_that_nobody_reads_to_its_end_may_be_closed_after_its_engine(tiny_model, transport):
    async with Engine.local(model=tiny_model, transport=transport, micro_batches=1) as engine:
        left = [engine.generate(TEXT, SamplingParams(max_tokens=100, ignore_eos=True, n=n)) for n in (1, 3)]
        for one in left:
            await anext(one)
    for one in left:
        await one.aclose()
        assert [output async for output in one] == []


async def test_an_engine_that_is_closed_says_so(tiny_model):
    engine = Engine.local(model=tiny_model, transport="inproc")
    with pytest.raises(Unavailable, match="closed"):
        await collect(engine, TEXT)
    async with engine:
        pass
    with pytest.raises(Unavailable, match="closed"):
        await collect(engine, TEXT)
    assert engine.status == (False, "the engine is closed")


@pytest.mark.slow
async def test_requests_cross_processes_and_the_layer_loop_does_no_control_traffic(tiny_model):
    async with Engine.local(
        model=tiny_model, attention_workers=2, expert_workers=2, micro_batches=2, threads_per_worker=1
    ) as engine:
        await asyncio.gather(
            *(collect(engine, [5 + n, 6, 7], max_tokens=200, temperature=0, ignore_eos=True) for n in range(4))
        )
        await asyncio.sleep(1.2)  # the next heartbeat
        workers = (await engine.stats()).workers
    experts = [worker for worker in workers if worker.role == "expert"]
    assert len({worker.pid for worker in workers}) == 4
    for worker in experts:
        assert worker.status.counters["rows_landed"] > 500
        assert worker.status.counters["control_messages_sent"] < 40, "heartbeats and the like, nothing per layer"
    for worker in workers:
        if worker.role == "attention":
            passes = worker.status.counters["passes"]
            assert passes > 200
            assert worker.status.counters["control_messages_sent"] < passes + 40, "one per pass"
            assert worker.status.counters["posts"] >= passes * 3 * 2, "one per layer and expert worker"
            assert not [name for name in worker.status.counters if name.startswith("dropped")]


async def test_a_full_queue_refuses_the_next_and_serves_the_rest(tiny_model):
    async with Engine.local(
        model=tiny_model, transport="inproc", micro_batches=1, max_num_seqs=1, max_num_waiting=1
    ) as engine:
        results = await asyncio.gather(
            *(collect(engine, [5, 6, 7], max_tokens=40, ignore_eos=True) for _ in range(4)), return_exceptions=True
        )
        refused = [one for one in results if isinstance(one, Unavailable)]
        assert len(refused) == 2
        assert "1 requests wait here already; try again later" in str(refused[0])
        assert not [one for one in results if isinstance(one, BaseException) and one not in refused]
        await idle(engine)
