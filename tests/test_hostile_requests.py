"""One request does to the others nothing: live streams beside absurd ones keep their tokens, and no worker ends."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest
from tokenizers import Tokenizer

from msi import Engine, InvalidRequest, SamplingParams
from tests.conftest import TEXT
from tests.everyday import mostly_slow, thorough
from tests.test_engine import collect, idle
from tests.tiny import save_tiny

LIVE = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
ABSURD = [
    {"temperature": 1e-50}, {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1e-5},
    {"temperature": 100},
    {"top_p": 1e-50}, {"top_p": 5e-324}, {"top_k": 2**63 - 1}, {"min_p": 1.0}, {"min_p": 5e-324},
    {"seed": 2**64 - 1}, {"seed": -(2**63)}, {"max_tokens": 2**63 - 1, "stop": ("e",)},
    {"max_tokens": 2**31, "min_tokens": 2**31, "stop_token_ids": (5,)},
    {"repetition_penalty": 0.01}, {"repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": 2},
    {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": -2, "temperature": 1e-5},
    {"logit_bias": dict.fromkeys(range(180), -100), "logprobs": 20}, {"logit_bias": dict.fromkeys(range(180), 100)},
    {"logit_bias": {0: 5e-324}, "top_p": 1e-300, "temperature": 1e-300, "logprobs": 0},
    {"min_tokens": 8, "max_tokens": 8, "stop_token_ids": tuple(range(3, 190))},
]  # fmt: skip


@pytest.mark.parametrize("eos", [*mostly_slow([[2, -1, 10_000], None, []]), *map(thorough, [-1, 10_000])], ids=str)
@pytest.mark.slow
async def test_live_streams_keep_their_tokens_beside_absurd_requests(tiny_model, tmp_path, eos):
    if eos is not None:
        path = tmp_path / "model"
        shutil.copytree(tiny_model, path)
        for name in ("config.json", "generation_config.json"):
            values = json.loads((path / name).read_text())
            (path / name).write_text(json.dumps({**values, "eos_token_id": eos}))
    else:
        path = tiny_model
    options = {"expert_workers": 2, "transport": "inproc", "micro_batches": 2, "threads_per_worker": 1}
    async with Engine.local(model=path, **options) as engine:
        alone = await collect(engine, TEXT, **LIVE)
        live = [asyncio.ensure_future(collect(engine, TEXT, **LIVE)) for _ in range(2)]
        ends = await asyncio.gather(
            *(collect(engine, TEXT[: 5 + n], **{"max_tokens": 6, **params}) for n, params in enumerate(ABSURD))
        )
        assert all(tokens and reason in ("length", "stop") for _, tokens, reason in ends)
        assert await asyncio.gather(*live) == [alone] * 2
        await idle(engine)
        workers = engine._instance.workers
        assert [one.life.assignment.incarnation for one in workers] == [0] * 3
        for worker in workers:
            if worker.life.attention is not None:
                worker.life.attention.requests.check_integrity()


@pytest.fixture(scope="module")
def larger_tokenizer(tiny_model, tmp_path_factory):
    """A model whose tokenizer has tokens that its embedding lacks."""
    path = tmp_path_factory.mktemp("larger-tokenizer")
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    save_tiny(path, vocab_size=tokenizer.get_vocab_size())
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path, tokenizer


@pytest.mark.parametrize("text", ["<|im_start|>", "a zyzzyva", "It is<|im_start|> a truth"])
async def test_a_text_with_a_token_that_the_model_lacks_is_refused_and_named(larger_tokenizer, text):
    path, tokenizer = larger_tokenizer
    word = "zyzzyva" if "zyzzyva" in text else "<|im_start|>"
    async with Engine.local(model=path, transport="inproc", threads_per_worker=1) as engine:
        for ask in (engine.encode, lambda text: engine.generate(text, SamplingParams(max_tokens=1)).__anext__()):
            with pytest.raises(InvalidRequest) as caught:
                await asyncio.to_thread(ask, text) if ask == engine.encode else await ask(text)
            assert f"token id {tokenizer.token_to_id(word)} ('{word}') in the prompt" in str(caught.value)
            assert caught.value.param == "prompt"
        with pytest.raises(InvalidRequest, match="in the prompt"):
            await collect(engine, [5, tokenizer.token_to_id(word)])
        assert (await collect(engine, "It is", max_tokens=2, ignore_eos=True))[2] == "length"
