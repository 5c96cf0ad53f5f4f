"""Attention workers that are killed or freeze under load: answers go on elsewhere, as if nothing had happened.

Real processes, real signals; what each client gets is compared with what it gets undisturbed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass, field

import pytest

from msi import Engine, RequestFailed, SamplingParams, StructuredOutputs, Unavailable
from tests import crashing
from tests.everyday import thorough
from tests.test_faults import until

ENDS_WITHIN_S = 60
SCHEMA = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 40, "maxItems": 60})
LENGTH = {"max_tokens": 150, "ignore_eos": True}
ASKED = {
    "greedy": SamplingParams(temperature=0, **LENGTH),
    "sampled": SamplingParams(seed=5, temperature=0.8, top_p=0.9, min_p=0.01, **LENGTH),
    "penalties": SamplingParams(
        seed=6, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2, min_tokens=100, max_tokens=150
    ),
    "logprobs": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, **LENGTH),
    "choices": SamplingParams(seed=7, n=3, **LENGTH),
    "grammar": SamplingParams(
        seed=8, max_tokens=150, structured_outputs=StructuredOutputs(json=SCHEMA), repetition_penalty=1.1
    ),
    "bad words": SamplingParams(seed=9, bad_words=("e", " a"), logit_bias={7: -5.0}, **LENGTH),
    "stop string": SamplingParams(temperature=0, stop=("\x00never\x00",), include_stop_str_in_output=True, **LENGTH),
}

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@dataclass
class Answer:
    """What a client got, by choice."""

    token_ids: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[object] = field(default_factory=list)
    num_outputs: int = 0

    def take(self, output):
        self.num_outputs += bool(output.token_ids)
        index = output.index
        self.token_ids.setdefault(index, []).extend(output.token_ids)
        self.texts[index] = self.texts.get(index, "") + output.text
        self.logprobs += [one.logprob for one in output.logprobs]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.append(len(output.prompt_logprobs))
        if output.finish_reason is not None:
            assert index not in self.reasons, "it ended twice"
            self.reasons[index] = output.finish_reason


def told(answers):
    """What has to be the same to the token; log-probabilities hang on what is computed together."""
    return {name: (one.token_ids, one.texts, one.reasons, one.prompt_logprobs) for name, one in answers.items()}


async def ask_all(engine, answers, asked=ASKED):
    """Fills `answers` as they come."""

    async def ask(name, number, params):
        answers[name] = Answer()
        async for output in engine.generate([number + 3, 7, 11, *range(20, 40)], params):
            answers[name].take(output)

    async with asyncio.TaskGroup() as tasks:
        for number, (name, params) in enumerate(asked.items()):
            tasks.create_task(ask(name, number, params))


def local(model, attention=2, **options):
    return Engine.local(
        model=model, attention_workers=attention, expert_workers=2, micro_batches=2, threads_per_worker=1, **options
    )


async def resumptions(engine):
    return (await engine.stats()).counters["resumptions"]


async def signalled_amid(engine, worker_id, number, asked=ASKED, after=3, beside=()):
    """All answers, where a worker, and those beside it, get a signal once each has some tokens."""
    answers: dict[str, Answer] = {}
    asking = asyncio.create_task(ask_all(engine, answers, asked))

    async def all_have_begun():
        return len(answers) == len(asked) and all(one.num_outputs >= after for one in answers.values())

    await until(all_have_begun)
    for pid in [engine.pids[name] for name in (worker_id, *beside)]:
        os.kill(pid, number)
    await asyncio.wait_for(asking, ENDS_WITHIN_S)
    return answers


@pytest.mark.parametrize(
    ("number", "transport"),
    [
        (signal.SIGKILL, "tcp"),
        (signal.SIGSTOP, "shm"),
        thorough(signal.SIGKILL, "shm"),
        thorough(signal.SIGSTOP, "tcp"),
    ],
)
async def test_when_an_attention_worker_dies_or_freezes_every_answer_is_what_it_would_have_been(
    tiny_model, number, transport
):
    async with local(tiny_model, transport=transport) as engine:
        expected: dict[str, Answer] = {}
        await ask_all(engine, expected)
        pid = engine.pids["attention-0"]
        answers = await signalled_amid(engine, "attention-0", number)
        assert await resumptions(engine) > 0
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    assert told(answers) == told(expected)
    assert answers["logprobs"].logprobs == pytest.approx(expected["logprobs"].logprobs, abs=1e-3)
    assert len(answers["logprobs"].logprobs) == 150


async def test_with_one_attention_worker_requests_are_held_until_it_is_back(tiny_model):
    async with local(tiny_model, attention=1) as engine:
        expected: dict[str, Answer] = {}
        await ask_all(engine, expected)
        for _ in range(2):
            assert told(await signalled_amid(engine, "attention-0", signal.SIGKILL)) == told(expected)


async def test_one_that_does_not_come_back_in_time_ends_what_it_ran_with_what_is_missing(tiny_model):
    async with local(tiny_model, attention=1, hold_timeout_s=1.0) as engine:
        asked = {"greedy": ASKED["greedy"]}
        with pytest.raises(ExceptionGroup) as raised:
            await signalled_amid(engine, "attention-0", signal.SIGSTOP, asked)
        os.kill(engine.pids["attention-0"], signal.SIGCONT)
    (error,) = raised.value.exceptions
    assert isinstance(error, Unavailable)
    assert "attention worker attention-0 was lost: no sign of life" in str(error)
    assert "no other could go on with it for 1 s: waiting for attention worker 1 of 1" in str(error)


@pytest.mark.parametrize("attention", [1, 2])
async def test_a_request_that_workers_crash_by_ends_alone_and_takes_no_third_one(
    tiny_model, tmp_path, monkeypatch, attention
):
    for name, value in crashing.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    asked = {name: ASKED[name] for name in ("greedy", "sampled", "logprobs")}
    async with local(tiny_model, attention=attention) as engine:
        expected: dict[str, Answer] = {}
        await ask_all(engine, expected, asked)
        answers: dict[str, Answer] = {}
        asking = asyncio.create_task(ask_all(engine, answers, asked))

        async def all_have_begun():
            return len(answers) == len(asked) and all(one.num_outputs >= 3 for one in answers.values())

        await until(all_have_begun)
        poison = list(crashing.POISON)
        with pytest.raises(RequestFailed, match="crashed 2 times while they ran this very request"):
            async for _ in engine.generate(poison, ASKED["greedy"]):
                pass
        await asyncio.wait_for(asking, ENDS_WITHIN_S)
        with pytest.raises(RequestFailed, match="crashed 2 times"):
            await anext(engine.generate(poison, ASKED["greedy"]))
        lives = [one.incarnation for one in (await engine.stats()).workers if one.role == "attention"]
        assert sum(lives) <= 2
    assert told(answers) == told(expected)
