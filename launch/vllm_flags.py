"""Options of `vllm serve` that msi-launch knows by name and does not have: what to use instead.

Values with which an option changes nothing here are accepted, so that a command line written for vLLM works where it
asks for nothing that is missing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from msi.errors import ConfigError

from .command_line import quoted

ANY = ("*",)
SWITCH: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """Attributes:
    names: as vLLM writes them.
    neutral: values that change nothing here, `ANY` for all of them.
    instead: what to do for other values; for a switch, for giving it at all.
    takes_value: False for a switch; a switch with `neutral` ANY is accepted.
    """

    names: tuple[str, ...]
    neutral: tuple[str, ...]
    instead: str
    takes_value: bool = True


_PARALLEL = "is not built yet; --attention-workers and --expert-workers spread a model over processes"
_DIRECTORY = "is not needed: MODEL is a directory with the files of the very revision that is to be served"
_LORA = "is not built yet: adapters are refused; merge them into the checkpoint"
_TLS = "is not built: put a proxy that ends TLS in front"
_SPECULATION = "is not built yet: leave it out, the text is the same without"

FOREIGN = (
    ForeignFlag(("--tensor-parallel-size", "-tp"), ("1",), _PARALLEL),
    ForeignFlag(("--pipeline-parallel-size", "-pp"), ("1",), _PARALLEL),
    ForeignFlag(("--data-parallel-size", "-dp"), ("1",), "is called --attention-workers here"),
    ForeignFlag(("--enable-expert-parallel", "-ep"), ANY, "", takes_value=False),
    ForeignFlag(("--distributed-executor-backend",), ("mp", "uni"), "is not built: workers are processes"),
    ForeignFlag(("--api-server-count",), ("1",), "is not built; leave it out"),
    ForeignFlag(("--model",), (), "is not a flag here: give the directory itself, as MODEL"),
    ForeignFlag(("--tokenizer",), (), "is not built: MODEL's own tokenizer.json is used"),
    ForeignFlag(("--tokenizer-mode",), ("auto",), "is not built: MODEL's own tokenizer.json is used"),
    ForeignFlag(("--revision",), (), _DIRECTORY),
    ForeignFlag(("--tokenizer-revision",), (), _DIRECTORY),
    ForeignFlag(("--download-dir",), (), _DIRECTORY),
    ForeignFlag(("--hf-token",), (), _DIRECTORY),
    ForeignFlag(("--hf-overrides",), ("{}",), "is not built: change config.json"),
    ForeignFlag(("--rope-scaling",), (), "is not built: change config.json"),
    ForeignFlag(("--trust-remote-code",), ANY, "", takes_value=False),
    ForeignFlag(("--quantization", "-q"), ("none",), "is not built yet: use a float32, bfloat16 or float16 checkpoint"),
    ForeignFlag(("--kv-cache-dtype",), ("auto",), "is not built yet: the cache has the dtype of --dtype"),
    ForeignFlag(("--block-size",), ("16",), "is not built: blocks have 16 tokens"),
    ForeignFlag(("--swap-space",), ANY, ""),
    ForeignFlag(("--cpu-offload-gb",), ("0", "0.0"), "is not built; --device cpu keeps all in main memory"),
    ForeignFlag(("--seed",), ("0",), 'is a field of each request here: "seed"'),
    ForeignFlag(("--enforce-eager",), ANY, "", takes_value=False),
    ForeignFlag(("--enable-chunked-prefill",), ANY, "", takes_value=False),
    ForeignFlag(("--no-enable-chunked-prefill",), (), "is not built: long prompts always come in chunks",
                takes_value=False),
    ForeignFlag(("--async-scheduling",), ANY, "", takes_value=False),
    ForeignFlag(("--scheduling-policy",), ("fcfs",), "is not built: requests are served as they come"),
    ForeignFlag(("--max-logprobs",), ("20",), "is not built: 20 at most"),
    ForeignFlag(("--task",), ("auto", "generate"), "is not built: models here generate"),
    ForeignFlag(("--runner",), ("auto", "generate"), "is not built: models here generate"),
    ForeignFlag(("--speculative-config",), (), _SPECULATION),
    ForeignFlag(("--num-speculative-tokens",), (), _SPECULATION),
    ForeignFlag(("--speculative-model",), (), _SPECULATION),
    ForeignFlag(("--enable-auto-tool-choice",), ANY, "", takes_value=False),
    ForeignFlag(("--guided-decoding-backend",), ("auto",), "is not built yet: leave it out"),
    ForeignFlag(("--limit-mm-per-prompt",), (), "is not built: images and sound are not taken"),
    ForeignFlag(("--enable-lora",), (), _LORA, takes_value=False),
    ForeignFlag(("--lora-modules",), (), _LORA),
    ForeignFlag(("--max-loras",), (), _LORA),
    ForeignFlag(("--max-lora-rank",), (), _LORA),
    ForeignFlag(("--ssl-keyfile",), (), _TLS),
    ForeignFlag(("--ssl-certfile",), (), _TLS),
    ForeignFlag(("--ssl-ca-certs",), (), _TLS),
    ForeignFlag(("--root-path",), (), "is not built: let the proxy in front take it off"),
    ForeignFlag(("--uvicorn-log-level",), (), "is called --log-level here"),
    ForeignFlag(("--config",), (), "is not built: give the flags themselves"),
    ForeignFlag(("--headless",), (), "is not built: use --role coordinator, attention or expert", takes_value=False),
    ForeignFlag(("--disable-frontend-multiprocessing",), ANY, "", takes_value=False),
)  # fmt: skip


def add_foreign(parser: argparse.ArgumentParser) -> None:
    """Makes the parser know them; its help does not list them. Those accepted are in `ignored` of the namespace."""
    for flag in FOREIGN:
        parser.add_argument(
            *flag.names,
            action=_Foreign,
            nargs=1 if flag.takes_value else 0,
            dest="ignored",
            default=(),
            help=argparse.SUPPRESS,
            metavar="VALUE",
            const=flag,
        )


class _Foreign(argparse.Action):
    """Adds to the flags that are `ignored`, or raises ConfigError."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        flag: ForeignFlag = self.const
        given = " ".join([str(option_string), *(quoted(value) for value in values)])
        if flag.neutral != ANY and not (values and values[0] in flag.neutral):
            raise ConfigError(f"{given} {flag.instead}")
        namespace.ignored = (*namespace.ignored, given)
