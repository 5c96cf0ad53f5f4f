"""`msi.LLM`: arrays in, arrays out, in order, from a script, a thread or under a running loop; nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import msi
from msi import LLM, CompletionOutput, InvalidRequest, RequestOutput, SamplingParams
from msi.offline.loop_thread import LoopThread
from msi.offline.outputs import Choice
from msi.types import Output, TokenLogprobs, TokenText

pytestmark = pytest.mark.timeout(180)
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
HERE = {"transport": "inproc", "threads_per_worker": 1, "micro_batches": 1}
TEMPLATE = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM(tiny_model, chat_template=TEMPLATE, **HERE) as one:
        yield one


def test_many_prompts_are_answered_in_their_order(llm):
    prompts = [f"It is {at}" for at in range(40)]
    answers = llm.generate(prompts, GREEDY)
    assert [answer.prompt for answer in answers] == prompts
    assert all(
        isinstance(one, RequestOutput) and one.finished and len(one.outputs[0].token_ids) == 4 for one in answers
    )
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in prompts[:3]]
    assert alone == [answer.outputs[0].text for answer in answers[:3]]


@pytest.mark.parametrize(
    "prompts",
    ["It is", ["It is"], {"prompt": "It is"}, [{"prompt": "It is"}]],
    ids=["text", "list", "object", "objects"],
)
def test_one_prompt_comes_in_many_forms(llm, prompts):
    (answer,) = llm.generate(prompts, GREEDY)
    tokens = llm.engine.encode("It is")
    for same in (list(tokens), [list(tokens)], {"prompt_token_ids": tokens}):
        (other,) = llm.generate(same, GREEDY)
        assert other.outputs[0].token_ids == answer.outputs[0].token_ids
        assert other.prompt is None
        assert other.prompt_token_ids == answer.prompt_token_ids == tokens


def test_each_prompt_may_have_parameters_of_its_own(llm):
    each = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, n=1 + count % 2) for count in (1, 2, 3)]
    answers = llm.generate(["It is"] * 3, each)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [1, 2, 3]
    assert [len(answer.outputs) for answer in answers] == [2, 1, 2]
    assert llm.generate([], GREEDY) == []


def test_logprobs_of_the_prompt_come_by_token(llm):
    (answer,) = llm.generate([[5, 6, 7, 8]], SamplingParams(max_tokens=0, prompt_logprobs=2))
    first, *others = answer.prompt_logprobs
    assert first is None
    assert [next(iter(at)) for at in others] == [6, 7, 8]
    for at in others:
        assert 2 <= len(at) <= 3
        ranked = sorted(at.values(), key=lambda one: one.rank)
        assert [one.rank for one in ranked[:2]] == [1, 2]
        assert ranked == sorted(at.values(), key=lambda one: -one.logprob)
    assert answer.outputs[0].token_ids == ()


def test_logprobs_come_by_token(llm):
    (answer,) = llm.generate("It is", SamplingParams(max_tokens=3, temperature=0, logprobs=2))
    (choice,) = answer.outputs
    assert choice.logprobs is not None
    for token, at in zip(choice.token_ids, choice.logprobs, strict=True):
        assert at[token].rank == 1
        assert len(at) == 2
    assert choice.cumulative_logprob == pytest.approx(
        sum(at[token].logprob for token, at in zip(choice.token_ids, choice.logprobs, strict=True))
    )
    assert "".join(at[token].decoded_token for token, at in zip(choice.token_ids, choice.logprobs, strict=True)) == (
        choice.text
    )


def test_chats_are_rendered_and_answered(llm):
    conversation = [{"role": "user", "content": "It is"}]
    (answer,) = llm.chat(conversation, GREEDY)
    assert answer.prompt == "user: It is\n"
    answers = llm.chat([conversation, [*conversation, {"role": "assistant", "content": "so"}]], GREEDY)
    assert answers[0].outputs[0].token_ids == answer.outputs[0].token_ids
    assert answers[1].prompt == "user: It is\nassistant: so\n"


@pytest.mark.parametrize(
    ("prompts", "params", "complaint"),
    [
        (["a", 3.5], GREEDY, "prompt 1 is a float; give a text, token ids"),
        ([["a"]], GREEDY, "prompt 0 is a list"),
        ([True], GREEDY, "prompt 0 is a bool"),
        (b"It is", GREEDY, "prompt 0 is a bytes"),
        (["a", b"b"], GREEDY, "prompt 1 is a bytes"),
        (["a", ""], GREEDY, "prompt 1: "),
        (["a", [10**6]], GREEDY, "prompt 1: "),
        (["a"] * 2, [GREEDY], "1 sampling_params for 2 prompts"),
        (["a"], {"max_tokens": 3}, "give SamplingParams"),
        (["a " * 5000], GREEDY, "prompt 0: This model's maximum context length"),
    ],
)
def test_what_cannot_be_served_says_which_and_the_engine_goes_on(llm, prompts, params, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        llm.generate(prompts, params)
    assert llm.generate("It is", GREEDY)[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "give a list"),
        ("hello", "give a list"),
        ([[]], "conversation 0: messages is missing or empty"),
        (["hello"], "conversation 0: give a list"),
        ([["hello"]], r"conversation 0: messages\[0\] is a string; it must be an object"),
        ([{"content": "x"}], r"conversation 0: messages\[0\].role is None"),
        ([[{"role": "user", "content": "x"}], [{"role": 3}]], r"conversation 1: messages\[0\].role is 3"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only .* is supported"),
    ],
)
def test_conversations_that_are_none_are_refused(llm, messages, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        llm.chat(messages, GREEDY)


def test_parts_of_text_are_understood_as_over_http(llm):
    parts = [{"type": "text", "text": "It"}, {"type": "text", "text": " is"}]
    (answer,) = llm.chat([{"role": "user", "content": parts}], GREEDY)
    assert "It" in answer.prompt
    assert "is" in answer.prompt
    assert "type" not in answer.prompt


async def test_it_works_where_a_loop_runs_already(llm):
    """As in a notebook."""
    assert asyncio.get_running_loop().is_running()
    (answer,) = llm.generate("It is", GREEDY)
    assert len(answer.outputs[0].token_ids) == 4


def test_several_threads_may_ask(llm):
    found = {}
    threads = [
        threading.Thread(target=lambda at=at: found.update({at: llm.generate(f"It is {at}", GREEDY)[0].prompt}))
        for at in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {at: f"It is {at}" for at in range(4)}


def test_an_interrupted_call_cancels_its_requests_and_the_engine_goes_on(llm, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever other tests have left there
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    forever = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["It is"] * 4000, forever)
    assert llm._thread.run(llm.engine.stats()).num_requests == 0
    assert llm.generate("It is", GREEDY)[0].outputs[0].finish_reason == "length"


def test_a_model_without_a_template_has_no_chats(tiny_model):
    with LLM(tiny_model, **HERE) as one, pytest.raises(InvalidRequest, match="no chat template"):
        one.chat([{"role": "user", "content": "x"}])


def test_a_closed_one_says_so_and_options_are_checked(tiny_model):
    before = set(threading.enumerate())
    one = LLM(tiny_model, **HERE)
    one.close()
    one.close()
    with pytest.raises(RuntimeError, match="closed"):
        one.generate("It is", GREEDY)
    with pytest.raises(TypeError, match="attention_workers"):
        LLM(tiny_model, attention_worker=2)
    with pytest.raises(TypeError, match="leave them out"):
        LLM(tiny_model, address="tcp://h:1")
    with pytest.raises(msi.ConfigError):
        LLM("/nowhere")
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "msi-llm"]


UNCLOSED = """
from msi import LLM, SamplingParams
llm = LLM({model!r}, threads_per_worker=1, micro_batches=1)
print(llm.engine.pids["coordinator"], llm.generate("It is", SamplingParams(max_tokens=2))[0].outputs[0].finish_reason)
"""


@pytest.mark.slow
def test_a_program_that_closes_nothing_leaves_nothing_behind(tiny_model):
    """With processes of its own."""
    command = [sys.executable, "-W", "error", "-c", UNCLOSED.format(model=str(tiny_model))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    pid, reason = done.stdout.split()
    assert reason in ("length", "stop")
    assert "Traceback" not in done.stderr
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            break
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


INTERRUPTED = """
from msi import LLM, SamplingParams
with LLM({model!r}, threads_per_worker=1, micro_batches=1) as llm:
    print("up", flush=True)
    try:
        llm.generate(["It is"] * 5000, SamplingParams(max_tokens=400, ignore_eos=True))
    except KeyboardInterrupt:
        print(len(llm.generate("It is", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
"""


@pytest.mark.slow
def test_ctrl_c_reaches_the_program_alone_and_its_workers_go_on(tiny_model):
    """A terminal sends it to all of the group."""
    command = [sys.executable, "-W", "error", "-c", INTERRUPTED.format(model=str(tiny_model))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "up\n"
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "3\n"
            assert process.returncode == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_loops_thread_hands_on_results_and_errors_and_ends():
    one = LoopThread("a-loop")

    async def fails():
        raise ValueError("so it is")

    async def works():
        return threading.current_thread().name

    assert one.run(works()) == "a-loop"
    with pytest.raises(ValueError, match="so it is"):
        one.run(fails())
    one.close()
    one.close()
    assert not one._thread.is_alive()
    with pytest.raises(RuntimeError):
        one.run(works())


def test_outputs_are_put_together():
    choice = Choice()
    choice.add(Output("r", "It", (1,), logprobs=(TokenLogprobs(1, -0.5, (2, 1), (-0.1, -0.5)),),
                      token_texts=(TokenText("It", b"It"),)))  # fmt: skip
    choice.add(Output("r", " is", (2,), "stop"))
    whole = choice.whole(0, has_logprobs=True, token_text=lambda token: TokenText(f"<{token}>", b""))
    assert isinstance(whole, CompletionOutput)
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("It is", (1, 2), "stop")
    assert whole.logprobs is not None
    assert whole.logprobs[0][1].rank == 2
    assert whole.logprobs[0][2].decoded_token == "<2>"
