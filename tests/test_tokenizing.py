"""/tokenize and /detokenize, with transformers as the judge."""

from __future__ import annotations

import aiohttp
import pytest

from msi.server import tokenizing
from tests.conftest import TEXT
from tests.edge import TEMPLATE, gateway, with_template
from tests.installed import transformers

CHAT = [{"role": "user", "content": "It is"}, {"role": "assistant", "content": " a truth </s>"}]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return with_template(tiny_model, tmp_path_factory.mktemp("with-template"))


async def post(session, url, body):
    async with session.post(url, json=body) as response:
        return response.status, await response.json()


async def test_texts_and_chats_are_tokenized_as_transformers_does_and_decoded_again(model, monkeypatch):
    theirs = transformers().PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    async with gateway(model) as (engine, url), aiohttp.ClientSession() as session:
        cases = [
            ({"prompt": TEXT}, theirs.encode(TEXT)),
            ({"prompt": ""}, []),
            ({"prompt": TEXT * 50, "model": "tiny"}, theirs.encode(TEXT * 50)),  # longer than the context
            ({"prompt": "<s>ü", "add_special_tokens": False}, theirs.encode("<s>ü", add_special_tokens=False)),
            ({"messages": CHAT}, theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)),
            (
                {"messages": CHAT, "add_generation_prompt": False},
                theirs.apply_chat_template(CHAT, return_dict=False),
            ),
        ]
        for body, expected in cases:
            status, answer = await post(session, f"{url}/tokenize", body)
            assert (status, answer["tokens"]) == (200, expected), body
            assert (answer["count"], answer["max_model_len"]) == (len(expected), engine.max_model_len)
            assert answer["token_strs"] is None
            _, again = await post(session, f"{url}/detokenize", {"tokens": expected})
            assert again == {"prompt": theirs.decode(expected)}
        _, named = await post(session, f"{url}/tokenize", {"messages": CHAT, "return_token_strs": True})
        assert named["token_strs"] == theirs.convert_ids_to_tokens(named["tokens"])
        refused = [
            ("tokenize", {}, "prompt"), ("tokenize", {"prompt": [1]}, "prompt"),
            ("tokenize", {"messages": []}, "messages"),
            ("tokenize", {"prompt": "a", "messages": CHAT}, "prompt"), ("detokenize", {}, "tokens"),
            ("detokenize", {"tokens": [1, -1]}, "tokens"), ("detokenize", {"tokens": [1, "a"]}, "tokens"),
            ("detokenize", {"tokens": [10**6]}, "tokens"), ("tokenize", {"prompt": "a", "model": "other"}, "model"),
            ("tokenize", {"prompt": "a", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ]  # fmt: skip
        for path, body, param in refused:
            status, answer = await post(session, f"{url}/{path}", body)
            assert (status, answer["error"]["param"]) == (404 if param == "model" else 400, param), body
        monkeypatch.setattr(tokenizing, "MAX_TOKENS", 3)
        for path, body in (("tokenize", {"prompt": "zqzqzq"}), ("detokenize", {"tokens": [1, 2, 3, 4]})):
            status, answer = await post(session, f"{url}/{path}", body)
            assert (status, "at most 3 are allowed" in answer["error"]["message"]) == (400, True)


async def test_a_models_card_has_what_clients_read(model):
    async with gateway(model) as (_, url), aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as got:
        (card,) = (await got.json())["data"]
    assert card["created"] > 1_700_000_000
    assert {name: card[name] for name in ("id", "object", "root", "parent", "max_model_len")} == {
        "id": "tiny", "object": "model", "root": "tiny", "parent": None, "max_model_len": 512,
    }  # fmt: skip
    assert card["permission"][0]["allow_sampling"] is True
