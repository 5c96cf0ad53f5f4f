"""truncate_prompt_tokens: the prompt's end, as transformers cuts it from the left."""

from __future__ import annotations

import pytest
from tokenizers import processors

from msi import InvalidRequest, SamplingParams
from msi.text.prompts import Prompts
from tests.conftest import TEXT
from tests.installed import transformers
from tests.vocabularies import tokenizer_of

AROUND = [None, "<s> $A", "<s> $A </s>"]


def framed(template):
    """A tokenizer that puts special tokens around a text."""
    tokenizer = type(tokenizer_of("llama")).from_str(tokenizer_of("llama").to_str())
    if template is not None:
        names = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=names)
    return tokenizer


@pytest.mark.parametrize("template", AROUND)
@pytest.mark.parametrize("adds", [True, False])
def test_the_end_of_a_text_is_what_transformers_leaves_of_it(template, adds):
    tokenizer = framed(template)
    theirs = transformers().PreTrainedTokenizerFast(tokenizer_object=framed(template), truncation_side="left")
    prompts = Prompts(tokenizer, vocab_size=10**6, max_model_len=10**4)
    for count in (3, 4, 7, 10**3):
        expected = theirs(TEXT, truncation=True, max_length=count, add_special_tokens=adds)["input_ids"]
        assert list(prompts.encode(TEXT, add_special_tokens=adds, truncate=count)) == expected


def test_ids_are_cut_from_the_left_and_minus_one_leaves_room_for_the_answer():
    prompts = Prompts(None, vocab_size=100, max_model_len=20)
    ids = tuple(range(50))
    assert prompts.encode(ids, truncate=3) == (47, 48, 49)
    assert prompts.encode(ids, truncate=-1, max_tokens=15) == ids[-5:]
    assert prompts.encode(ids, truncate=-1, max_tokens=500) == ids[-19:]
    assert prompts.encode(ids[:2], truncate=10) == (0, 1)
    with pytest.raises(InvalidRequest, match="truncate_prompt_tokens is 21; the context is 20 tokens"):
        prompts.checked(SamplingParams(truncate_prompt_tokens=21))


def test_a_text_of_any_length_is_cut_to_the_context():
    prompts = Prompts(framed("<s> $A"), vocab_size=10**6, max_model_len=20, bytes_per_token=10)
    with pytest.raises(InvalidRequest, match="context"):
        prompts.encode(TEXT * 50)
    assert len(prompts.encode(TEXT * 50, truncate=-1, max_tokens=8)) == 12
