"""What a model directory says about texts: tokenizer, chat templates, special tokens, and how to sample.

As transformers reads these files (version 5), and vLLM generation_config.json. Knows no Jinja and no tokens' ids.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msi.errors import ConfigError, InvalidRequest, shown
from msi.models.files import parse_json, read_bytes, read_json, read_text
from msi.sampling_params import NO_DEFAULTS, SamplingDefaults

log = logging.getLogger(__name__)

STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# what transformers' tokenizer classes say where the files of a model are silent
CLASS_TOKENS: dict[str, Mapping[str, str | None]] = {
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), "pad_token": "<|padding|>",
    },
    "GPT2Tokenizer": {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), "pad_token": None},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}  # fmt: skip
CLASS_OF_MODEL = {
    "qwen2_moe": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer", "olmoe": "GPTNeoXTokenizer", "dbrx": "GPT2Tokenizer",
}  # fmt: skip
GENERATION_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class ModelTexts:
    """All of it.

    Attributes:
        tokenizer: tokenizer.json, b"" when there is none.
        chat_templates: in Jinja, by name; "default" if there are any.
        special_tokens: texts that templates name, such as bos_token.
    """

    tokenizer: bytes = b""
    chat_templates: dict[str, str] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    sampling_defaults: SamplingDefaults = NO_DEFAULTS


def read_texts(model_dir: Path, config: Mapping[str, Any], generation_config: str = "auto") -> ModelTexts:
    """Raises ConfigError: a file that cannot be read, or holds what makes no sense; names it.

    Args:
        config: config.json as parsed.
        generation_config: where generation_config.json is: "auto" for the model's own, "vllm" for none, or a folder.
    """
    tokenizer_path = model_dir / "tokenizer.json"
    tokenizer = _if_there(tokenizer_path, read_bytes) or b""
    if not tokenizer:
        log.warning("%s does not exist: prompts must be given as token ids", tokenizer_path)
    tokenizer_config = _if_there(model_dir / "tokenizer_config.json", read_json) or {}
    return ModelTexts(
        tokenizer=tokenizer,
        chat_templates=_chat_templates(model_dir, tokenizer_config),
        special_tokens=_special_tokens(model_dir, config, tokenizer_config, tokenizer),
        sampling_defaults=read_sampling_defaults(model_dir, generation_config),
    )


# -- chat templates --------------------------------------------------------------------------------------------------


def _chat_templates(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Files of their own go before what tokenizer_config.json says, and that before chat_template.json."""
    old_path = model_dir / "chat_template.json"
    old = _if_there(old_path, read_json) or {}
    found = _named(old.get("chat_template"), old_path)
    found |= _named(tokenizer_config.get("chat_template"), model_dir / "tokenizer_config.json")
    folder = model_dir / "additional_chat_templates"
    if folder.is_dir():
        found |= {path.name.removesuffix(".jinja"): read_text(path) for path in sorted(folder.glob("*.jinja"))}
    if (template := _if_there(model_dir / "chat_template.jinja", read_text)) is not None:
        found["default"] = template
    if found and "default" not in found:
        log.warning("the chat templates of %s are named %s, and none default: it has no chat without `chat_template`",
                    model_dir, ", ".join(sorted(found)))  # fmt: skip
        return {}
    return found


def _named(template: object, path: Path) -> dict[str, str]:
    """A template, or several by name."""
    if template is None or template == "":
        return {}
    if isinstance(template, str):
        return {"default": template}
    pairs: list[tuple[Any, Any]] = [(None, None)]
    if isinstance(template, dict):
        pairs = list(template.items())
    elif isinstance(template, list) and all(isinstance(one, dict) for one in template):
        pairs = [(one.get("name"), one.get("template")) for one in template]
    if not all(isinstance(name, str) and isinstance(source, str) for name, source in pairs):
        raise ConfigError(
            f"{path}: chat_template is {shown(template)}; it must be a text, or a list of objects with name and "
            "template"
        )
    return {str(name): str(source) for name, source in pairs}


# -- special tokens --------------------------------------------------------------------------------------------------


def _special_tokens(
    model_dir: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], tokenizer: bytes
) -> dict[str, str]:
    values = dict(tokenizer_config)
    if "added_tokens_decoder" not in values:  # newer files say all of it in one place
        values |= _if_there(model_dir / "special_tokens_map.json", read_json) or {}
    values = {**_class_tokens(config, tokenizer_config, tokenizer), **values}
    if "pad_token" not in values:
        values["pad_token"] = _padding_token(tokenizer)
    named = {name: value for name, value in values.items() if name in STANDARD_TOKENS or name.endswith("_token")}
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        more = values.get(group)
        named |= more if isinstance(more, dict) else {}
    return {name: text for name, value in named.items() if (text := _text_of(value)) is not None}


def tokenizers_end(model_dir: Path) -> int | None:
    """The id of the tokenizer's eos_token, which ends answers too, as in vLLM; None where the files do not tell it.

    Raises:
        ConfigError: tokenizer_config.json cannot be read.
    """
    values = _if_there(model_dir / "tokenizer_config.json", read_json) or {}
    end, added = _text_of(values.get("eos_token")), values.get("added_tokens_decoder")
    if end is None or not isinstance(added, dict):
        return None
    ids = (number for number, token in added.items() if _text_of(token) == end and re.fullmatch("[0-9]{1,9}", number))
    return next(map(int, ids), None)


def _text_of(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _class_tokens(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], tokenizer: bytes
) -> Mapping[str, str | None]:
    """What the class says that transformers would choose."""
    models_class = CLASS_OF_MODEL.get(str(config.get("model_type")), "")
    if not models_class:
        return {}  # a class that takes all from the files
    name = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or models_class
    name = str(name).removesuffix("Fast")
    if name == "LlamaTokenizer" and b'"ByteLevel"' in tokenizer:
        return {}
    return CLASS_TOKENS.get(name, {})


def _padding_token(tokenizer: bytes) -> object:
    """Of tokenizer.json's section on padding, which stands at the beginning; None where there is none."""
    if not re.search(rb'"padding"\s*:\s*\{', tokenizer[:4096]):
        return None
    padding = parse_json(tokenizer, "tokenizer.json").get("padding")
    return padding.get("pad_token") if isinstance(padding, dict) else None


# -- sampling --------------------------------------------------------------------------------------------------------


def read_sampling_defaults(model_dir: Path, generation_config: str) -> SamplingDefaults:
    """What generation_config.json says. A folder that is named for it limits max_tokens, too, as in vLLM.

    Raises:
        ConfigError: a value that no request could have either, or a named folder without the file.
    """
    if generation_config == "vllm":
        return SamplingDefaults()
    is_own = generation_config == "auto"
    path = (model_dir if is_own else Path(generation_config)) / "generation_config.json"
    if not is_own and not path.exists():
        raise ConfigError(
            f"`generation_config` {generation_config}: {path} does not exist; give a folder that holds it, or auto, or "
            "vllm"
        )
    values = _if_there(path, read_json) or {}
    found: dict[str, Any] = {}
    for name, parameter in GENERATION_NAMES.items():
        if (value := values.get(name)) is not None:
            whole = parameter in ("top_k", "max_tokens") and isinstance(value, float) and value.is_integer()
            found[parameter] = int(value) if whole else value
    defaults = SamplingDefaults(**found, is_limit=not is_own and "max_tokens" in found)
    try:
        defaults.params()
        if defaults.max_tokens == 0:
            raise InvalidRequest("max_tokens is 0, with which requests that leave it out would get no token")
    except InvalidRequest as error:
        raise ConfigError(f"{path}: {error}. `generation_config=vllm` leaves the file out of account") from error
    if found:
        log.info(
            "requests that leave them out get %s from %s; `generation_config=vllm` turns this off",
            ", ".join(f"{name} {value:g}" for name, value in found.items()), path,
        )  # fmt: skip
    return defaults


def _if_there(path: Path, read: Callable[[Path], Any]) -> Any:
    return read(path) if os.path.lexists(path) else None
