"""Log-probabilities of prompts: what the engine says of them, beside transformers on the same checkpoint."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msi import Engine, SamplingParams
from msi.attention import prompt_scores
from msi.attention.prompt_scores import score
from msi.errors import ProtocolError, RequestFailed
from msi.prompt_logprobs import PromptLogprobs
from msi.scored_prompts import gathered
from msi.types import Progress, PromptRows
from tests.everyday import mostly_slow
from tests.reference import FAMILIES, save_tiny
from tests.test_scheduler import make_scheduler, request

CLOSE = 1e-4


def prompt_of(length, vocab_size=199, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())


@torch.inference_mode()
def truth(model, tokens):
    """float32 [len(tokens), vocab_size]"""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)


def assert_equal(found, tokens, expected):
    assert found.first == 1
    assert len(found) == len(tokens) - 1
    for position, one in enumerate(found.tokens()):
        row, token = expected[position], tokens[position + 1]
        assert one.logprob == pytest.approx(float(row[token]), abs=CLOSE)
        least, most = (int((row > row[token] + margin).sum()) + 1 for margin in (CLOSE, -CLOSE))
        assert least <= one.rank <= most
        best = row.topk(found.num_top)
        assert one.top_logprobs == pytest.approx(best.values.tolist(), abs=CLOSE)
        assert one.top_logprobs == pytest.approx([float(row[other]) for other in one.top_token_ids], abs=CLOSE)


async def outputs_of(engine, prompt, **params):
    params = {"temperature": 0, "ignore_eos": True, **params}
    return [output async for output in engine.generate(prompt, SamplingParams(**params))]


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, keep=2))
@pytest.mark.parametrize("is_colocated", mostly_slow([False, True]))
async def test_a_scored_prompt_equals_transformers_however_it_is_cut(tmp_path, family, is_colocated):
    model = save_tiny(tmp_path, seed=5, family=family)
    prompts = [prompt_of(length, seed=length) for length in (2, 30, 70)]
    expected = [truth(model, prompt) for prompt in prompts]
    roles = {"expert_workers": 2, "micro_batches": 2}
    if is_colocated:
        roles = {"colocated": True, "expert_workers": 1, "micro_batches": 1}
    async with Engine.local(model=tmp_path, transport="inproc", max_num_batched_tokens=17, **roles) as engine:
        beside = asyncio.create_task(outputs_of(engine, prompt_of(40, seed=9), max_tokens=20))
        for max_tokens in (0, 3):
            found = await asyncio.gather(
                *(outputs_of(engine, prompt, max_tokens=max_tokens, prompt_logprobs=5) for prompt in prompts)
            )
            for outputs, prompt, one in zip(found, prompts, expected, strict=True):
                assert [output.prompt_logprobs is None for output in outputs] == [False] + [True] * (len(outputs) - 1)
                assert_equal(outputs[0].prompt_logprobs, prompt, one)
                assert sum(len(output.token_ids) for output in outputs) == max_tokens
                assert (outputs[-1].finish_reason, outputs[0].num_cached_tokens) == ("length", 0)
        await beside


async def test_a_prompt_is_scored_once_for_all_choices_and_fills_the_prefix_cache(tiny_model):
    prompt = prompt_of(50)
    async with Engine.local(model=tiny_model, transport="inproc", micro_batches=1) as engine:
        outputs = await outputs_of(engine, prompt, max_tokens=2, n=3, prompt_logprobs=0, temperature=1, seed=1)
        assert [output.index for output in outputs if output.prompt_logprobs is not None] == [outputs[0].index] == [0]
        assert len(outputs[0].prompt_logprobs) == 49
        assert {output.index for output in outputs if output.finish_reason == "length"} == {0, 1, 2}
        (later, *_) = await outputs_of(engine, prompt, max_tokens=1)
        assert later.num_cached_tokens == 48
        (again, *_) = await outputs_of(engine, prompt, max_tokens=1, prompt_logprobs=0)
        assert (again.num_cached_tokens, again.prompt_logprobs) == (0, outputs[0].prompt_logprobs)


async def test_a_prompt_of_one_token_has_nothing_to_score_and_one_of_the_whole_context_has(tiny_model):
    async with Engine.local(model=tiny_model, transport="inproc", micro_batches=1) as engine:
        (output,) = await outputs_of(engine, (5,), max_tokens=0, prompt_logprobs=3)
        assert (len(output.prompt_logprobs), output.token_ids, output.finish_reason) == (0, (), "length")
        (output,) = await outputs_of(engine, prompt_of(engine.max_model_len), max_tokens=0, prompt_logprobs=1)
        assert len(output.prompt_logprobs) == engine.max_model_len - 1
        (output,) = await outputs_of(engine, prompt_of(9), max_tokens=0)
        assert (output.prompt_logprobs, output.text, output.finish_reason) == (None, "", "length")


# -- the head, some rows at a time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most_bytes", [1, 4 * 30 * 3, 1 << 20])
def test_slices_of_rows_give_what_all_rows_give(monkeypatch, most_bytes):
    monkeypatch.setattr(prompt_scores, "MAX_LOGITS_BYTES", most_bytes)
    torch.manual_seed(0)
    logits = torch.randn(12, 30)
    most = []

    def head(rows):
        most.append(len(rows) * 4 * 30)
        return logits[rows]

    wanted = [PromptRows(0, 1, 6, (4, 5, 6), 2), PromptRows(2, 5, 0, (7, 8, 9, 10, 11), 20)]
    found, broken = score(head, wanted, 30, torch.device("cpu"))
    assert not broken
    assert max(most) <= max(most_bytes, 4 * 30)
    for one in wanted:
        scored = found[one.sequence]
        assert (scored.first, scored.num_top) == (one.position + 1, one.num_top)
        rows = torch.log_softmax(logits[one.first : one.first + len(one.next_token_ids)], dim=-1)
        for row, token, this in zip(rows, one.next_token_ids, scored.tokens(), strict=True):
            order = row.argsort(descending=True).tolist()
            assert this.logprob == pytest.approx(float(row[token]))
            assert this.rank == order.index(token) + 1
            assert this.top_token_ids == tuple(order[: one.num_top])
            assert this.top_logprobs == pytest.approx(row[order[: one.num_top]].tolist())


def test_rows_that_are_not_finite_fail_alone_and_impossible_tokens_are_finite():
    logits = torch.zeros(4, 30)
    logits[0, 3] = torch.nan
    logits[2, 5] = -torch.inf
    wanted = [PromptRows(0, 0, 0, (4,), 1), PromptRows(1, 1, 0, (4, 5), 1), PromptRows(3, 3, 7, (4,), 1)]
    found, broken = score(lambda rows: logits[rows], wanted, 30, torch.device("cpu"))
    assert broken == {0}
    assert set(found) == {1, 3}
    assert [one.logprob for one in found[1].tokens()] == [pytest.approx(-3.4012, abs=1e-3), -9999.0]
    assert [one.rank for one in found[1].tokens()] == [1, 30]


async def test_a_prompt_whose_values_are_not_finite_fails_alone(tmp_path):
    model = save_tiny(tmp_path, seed=5)
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = torch.nan
    model.save_pretrained(tmp_path)
    sound = tuple(token for token in prompt_of(30) if token != 77)
    async with Engine.local(model=tmp_path, transport="inproc", micro_batches=1) as engine:
        asked = {"max_tokens": 1, "prompt_logprobs": 2}
        broken = outputs_of(engine, (*sound[:9], 77, *sound[9:]), **asked)
        failed, outputs = await asyncio.gather(broken, outputs_of(engine, sound, **asked), return_exceptions=True)
        assert isinstance(failed, RequestFailed)
        assert "not finite" in str(failed)
        assert_equal(outputs[0].prompt_logprobs, sound, truth(model, sound))


# -- the scheduler -----------------------------------------------------------------------------------------------------


def scored(batch):
    """What a pass would say: of each token "its log-probability" is its id, and the rank its position."""
    found = {}
    for one in batch.prompt_rows:
        rows = range(one.first, one.first + len(one.next_token_ids))
        assert [batch.positions[row] for row in rows] == [one.position + at for at in range(len(rows))]
        found[one.sequence] = packed(one.position + 1, one.next_token_ids)
    return found


def packed(first, tokens):
    ranks = range(first, first + len(tokens))
    numbers = torch.tensor(tokens, dtype=torch.float32), torch.tensor(ranks, dtype=torch.int32)
    return PromptLogprobs(first, 0, *(one.numpy().tobytes() for one in numbers), b"", b"")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 17),
    st.integers(12, 40),
    st.integers(0, 2**32),
)
def test_each_token_is_scored_once_and_in_order_whatever_is_lost_or_preempted(asked, budget, num_blocks, seed):
    chance = random.Random(seed)
    scheduler = make_scheduler(num_blocks=num_blocks, max_num_batched_tokens=budget, eos_token_ids=())
    told = {}
    for number, (num_prompt, max_tokens, is_scored) in enumerate(asked):
        params = {"prompt_logprobs": 0} if is_scored else {}
        scheduler.add(request(str(number), num_prompt, max_tokens, **params))
        told[str(number)] = SimpleNamespace(parts=[], tokens=0, reason=None)
    for _ in range(2000):
        batch = scheduler.plan(0)
        if batch is None:
            break
        if chance.random() < 0.1:
            scheduler.give_up(0)
            continue
        for one in scheduler.update(0, [7] * len(batch.logit_rows), prompt_logprobs=scored(batch)):
            entry = told[one.request_id]
            assert entry.reason is None
            entry.tokens += len(one.token_ids)
            entry.reason = one.finish_reason
            if one.prompt_logprobs is not None:
                assert not (entry.tokens > len(one.token_ids)), "scored behind its first token"
                entry.parts.append(one.prompt_logprobs)
        scheduler.check_integrity()
    assert scheduler.is_idle
    for number, (num_prompt, max_tokens, is_scored) in enumerate(asked):
        entry = told[str(number)]
        assert (entry.reason, entry.tokens) == ("length", max_tokens)
        whole = PromptLogprobs.joined(entry.parts)
        expected = list(range(11, 10 + num_prompt)) if is_scored else []
        assert [one.logprob for one in whole.tokens()] == expected
        assert [one.rank for one in whole.tokens()] == list(range(1, 1 + len(expected)))


def test_what_was_scored_before_a_preemption_may_come_from_the_cache_and_the_rest_not():
    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=8)
    scheduler.add(request("a", 30, 1, prompt_logprobs=0))
    first = scheduler.plan(0)
    assert first.prompt_rows == (PromptRows(0, 0, 0, tuple(range(11, 19)), 0),)
    (progress,) = scheduler.update(0, [], prompt_logprobs=scored(first))
    assert progress == Progress("a", prompt_logprobs=packed(1, range(11, 19)))
    (sequence,) = scheduler._sequences.values()
    scheduler._admission._preempt(sequence)
    again = scheduler.plan(0) if scheduler._admission.admit() else None
    assert again is not None
    assert again.positions[0] == 8
    assert again.prompt_rows[0].position == 8


# -- their way back ----------------------------------------------------------------------------------------------------


async def test_outputs_of_other_choices_wait_for_the_whole_prompt():
    async def updates():
        yield Progress("b", (1,))
        yield Progress("a", queued_s=0.5, prompt_logprobs=packed(1, [5, 6]))
        yield Progress("b", (2,), "stop")
        yield Progress("a", (3,), prompt_logprobs=packed(3, [7]))
        yield Progress("a", (4,), "length")

    found = [one async for one in gathered(updates(), "a")]
    assert found == [
        Progress("a", (3,), queued_s=0.5, prompt_logprobs=packed(1, [5, 6, 7])),
        Progress("b", (1,)), Progress("b", (2,), "stop"),
        Progress("a", (4,), "length"),
    ]  # fmt: skip


async def test_parts_that_are_missing_end_the_request():
    async def updates():
        yield Progress("a", prompt_logprobs=packed(3, [7]))
        yield Progress("a", (4,), "length")

    with pytest.raises(RequestFailed, match="go on at 3, and not at 1"):
        await anext(gathered(updates(), "a"))
    with pytest.raises(ProtocolError):
        PromptLogprobs.joined([packed(1, [5]), packed(3, [7])])
    with pytest.raises(ValueError, match="2 tokens with 0 others"):
        PromptLogprobs(1, 0, bytes(8), bytes(4), b"", b"")
