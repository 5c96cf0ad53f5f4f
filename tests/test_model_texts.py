"""What a model directory says about texts, read as transformers reads it; odd files are a sentence."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from msi import ConfigError, SamplingParams
from msi.models.texts import read_sampling_defaults, read_texts, tokenizers_end
from msi.sampling_params import NO_DEFAULTS, SamplingDefaults
from tests.installed import transformers

ADDED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """tokenizer.json files by kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = {}
    for kind, splitter, joiner in (
        ("bytes", pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        ("spaces", pre_tokenizers.Metaspace(), decoders.Metaspace()),
    ):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = splitter, joiner
        special = ["<unk>", "<s>", "</s>", "<pad>", "<|endoftext|>"]
        tokenizer.train_from_iterator(["hello world"], trainers.BpeTrainer(vocab_size=300, special_tokens=special))
        paths[kind] = folder / f"{kind}.json"
        tokenizer.save(str(paths[kind]))
    tokenizer.enable_padding(pad_token="<pad>", pad_id=3)
    paths["padded"] = folder / "padded.json"
    tokenizer.save(str(paths["padded"]))
    return paths


def directory(folder, tokenizer, model_type="mixtral", **files):
    """A model directory; `files` by stem, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    files["config"] = {"model_type": model_type, "bos_token_id": 1, "eos_token_id": 2}
    for stem, values in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(values))
    return folder


def texts_of(folder, **options):
    return read_texts(folder, json.loads((folder / "config.json").read_text()), **options)


FILES = {
    "nothing": {},
    "texts": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}},
    "objects": {"tokenizer_config": {"bos_token": {"__type": "AddedToken", "content": "<s>", **ADDED}}},
    "only the map": {"special_tokens_map": {"bos_token": "<s>", "unk_token": {"content": "<unk>", **ADDED}}},
    "the map goes before the config": {
        "tokenizer_config": {"bos_token": "<s>", "cls_token": "<pad>"},
        "special_tokens_map": {"bos_token": "</s>", "sep_token": "<pad>"},
    },
    "the map is older than added_tokens_decoder": {
        "tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {"2": {"content": "</s>", **ADDED}}},
        "special_tokens_map": {"bos_token": "<s>", "eos_token": "<pad>"},
    },
    "names of its own": {
        "tokenizer_config": {
            "bos_token": "<s>", "image_token": "<img>", "add_bos_token": True, "odd": "x",
            "extra_special_tokens": {
                "audio_token": "<audio>", "eoc_token": {"__type": "AddedToken", "content": "<c>", **ADDED},
            },
        },
    },
    "a list of more": {
        "tokenizer_config": {"additional_special_tokens": ["<pad>"], "mask_token": "<pad>"},
        "special_tokens_map": {"additional_special_tokens": ["<a>"], "eos_token": "</s>"},
    },
    "a class": {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}},
    "Llama's class": {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}},
    "Qwen's class": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bytes", "spaces", "padded"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "dbrx"])
@pytest.mark.parametrize("files", FILES)
def test_templates_name_the_special_tokens_that_transformers_knows(tmp_path, tokenizers, files, model_type, kind):
    folder = directory(tmp_path / "model", tokenizers[kind], model_type, **json.loads(json.dumps(FILES[files])))
    expected = transformers().AutoTokenizer.from_pretrained(folder).special_tokens_map
    assert texts_of(folder).special_tokens == expected


@pytest.mark.parametrize(
    ("says", "end"),
    [
        ({}, None),
        ({"eos_token": "</s>"}, None),
        ({"eos_token": "<end>", "added_tokens_decoder": {"2": {"content": "</s>"}, "7": {"content": "<end>"}}}, 7),
        ({"eos_token": {"content": "<end>"}, "added_tokens_decoder": {"7": {"content": "<end>"}}}, 7),
        ({"eos_token": "<end>", "added_tokens_decoder": {"9" * 5000: {"content": "<end>"}, "x": 1}}, None),
        ({"eos_token": 5, "added_tokens_decoder": [1]}, None),
    ],
)
def test_the_tokenizers_end_of_sequence_ends_answers_too(tmp_path, says, end):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    assert tokenizers_end(tmp_path) == end


# -- chat templates --------------------------------------------------------------------------------------------------


def test_templates_come_from_every_place_that_models_have_them(tmp_path, tokenizers):
    folder = directory(tmp_path / "model", tokenizers["bytes"])
    assert texts_of(folder).chat_templates == {}
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    assert texts_of(folder).chat_templates == {"default": "old"}
    listed = [{"name": "default", "template": "listed"}, {"name": "rag", "template": "rag"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert texts_of(folder).chat_templates == {"default": "listed", "rag": "rag"}
    (folder / "chat_template.jinja").write_text("\ufefffile \u00e9")
    assert texts_of(folder).chat_templates == {"default": "file \u00e9", "rag": "rag"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert texts_of(folder).chat_templates == {"default": "file \u00e9", "rag": "rag", "tool_use": "tools"}


def test_templates_without_a_default_are_no_chat(tmp_path, tokenizers, caplog):
    folder = directory(tmp_path / "model", tokenizers["bytes"])
    (folder / "tokenizer_config.json").write_text('{"chat_template": [{"name": "rag", "template": "x"}]}')
    assert texts_of(folder).chat_templates == {}
    assert "are named rag, and none default" in caplog.text


ODD_TEMPLATES = [
    "[1]",
    '["a"]',
    "5",
    "true",
    '[{"name": "default"}]',
    '[{"template": "x"}]',
    '[{"name": 1, "template": 2}]',
]


@pytest.mark.parametrize("template", ODD_TEMPLATES)
def test_odd_templates_are_a_sentence(tmp_path, tokenizers, template):
    folder = directory(tmp_path / "model", tokenizers["bytes"])
    (folder / "tokenizer_config.json").write_text('{"chat_template": ' + template + "}")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template is .*; it must be a text, or a list"):
        texts_of(folder)


NAMES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "additional_chat_templates/x.jinja",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["fifo", "directory", "binary", "deep", "list", "digits"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_no_such_file_is_a_sentence_at_once_or_taken_as_it_is(tmp_path, tokenizers, name, kind):
    folder = directory(tmp_path / "model", tokenizers["bytes"])
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    contents = {
        "binary": b"\xff\xfe\x00\x01" * 99, "deep": b"[" * 100_000, "list": b"[1, 2]",
        "digits": b'{"temperature": ' + b"9" * 9000 + b"}",
    }  # fmt: skip
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(contents[kind])
    if name == "tokenizer.json" and kind not in ("fifo", "directory"):
        return  # whose bytes the tokenizer judges
    if name.endswith(".jinja") and kind in ("deep", "list", "digits"):
        assert texts_of(folder)  # any text may be a template
        return
    with pytest.raises(ConfigError) as caught:
        texts_of(folder)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


# -- sampling --------------------------------------------------------------------------------------------------------


def test_generation_config_says_what_requests_leave_out(tmp_path, tokenizers, caplog):
    caplog.set_level("INFO")
    says = {
        "temperature": 0.6, "top_k": 20.0, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.05, "max_new_tokens": 99,
        "do_sample": True, "eos_token_id": [2, 7], "pad_token_id": None, "typical_p": 1.0,
    }  # fmt: skip
    folder = directory(tmp_path / "model", tokenizers["bytes"], generation_config=says)
    expected = SamplingDefaults(0.6, 0.95, 20, 0, 1.05, 99)
    assert texts_of(folder).sampling_defaults == expected
    assert "temperature 0.6, top_k 20, top_p 0.95, min_p 0, repetition_penalty 1.05, max_tokens 99" in caplog.text
    assert "`generation_config=vllm` turns this off" in caplog.text
    assert expected.params() == SamplingParams(
        temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05, max_tokens=99
    )
    assert texts_of(folder, generation_config="vllm").sampling_defaults == NO_DEFAULTS
    other = directory(tmp_path / "other", tokenizers["bytes"], generation_config={"max_new_tokens": 5})
    assert texts_of(folder, generation_config=str(other)).sampling_defaults == SamplingDefaults(
        max_tokens=5, is_limit=True
    )


def test_no_generation_config_is_no_default_and_a_named_one_must_be_there(tmp_path, tokenizers):
    folder = directory(tmp_path / "model", tokenizers["bytes"])
    assert read_sampling_defaults(folder, "auto") == NO_DEFAULTS
    for named in (folder, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"`generation_config` .*generation_config\.json does not exist"):
            read_sampling_defaults(folder, str(named))


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": [50]}, "top_k is "),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
        ({"max_new_tokens": True}, "max_tokens is True"),
        ({"temperature": 1e400}, "temperature is inf"),
    ],
)
def test_values_that_no_request_could_have_are_said_at_start(tmp_path, says, complaint):
    (tmp_path / "generation_config.json").write_text(json.dumps(says))
    with pytest.raises(
        ConfigError, match=f"generation_config.json: {complaint}.*`generation_config=vllm` leaves the file"
    ):
        read_sampling_defaults(tmp_path, "auto")
