"""Options of `vllm serve` that msi-launch knows by name and does not have: what to use instead.

Values with which an option changes nothing here are accepted, so that a command line written for vLLM works where it
asks for nothing that is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from msi.errors import ConfigError

from .command_line import quoted

ANY = ("*",)
DTYPES = {"half": "float16", "float": "float32"}  # other names that vLLM has for them


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
_CONFIG = "is not built: change config.json"
_LORA = "is not built yet: adapters are refused; merge them into the checkpoint"
_TLS = "is not built: put a proxy that ends TLS in front"
_SPECULATION = "is not built yet: leave it out, the text is the same without"
_HOSTS = "is not needed: start each process by --role and --coordinator, or all by torchrun or --slurm"
_EPLB = "is called --rebalance-interval and --rebalance-threshold here; --redundant-experts adds replicas"
_MEDIA = "is not built: images and sound are not taken"
_TRACING = "is not built: --trace FILE records every stage, and /metrics counts"
_KV = "is not built yet: the KV cache stays with its attention worker"
_GRAMMAR = "is not needed: leave it out"
_EACH = "is a field of each request here:"
_PROXY = "is not built: a proxy in front can do it"


def _switches(*names: str, instead: str = "") -> Iterator[ForeignFlag]:
    """Each alone; accepted where there is nothing to do instead."""
    return (ForeignFlag((name,), () if instead else ANY, instead, takes_value=False) for name in names)


def _values(*names: str, neutral: tuple[str, ...] = (), instead: str = "") -> Iterator[ForeignFlag]:
    return (ForeignFlag((name,), neutral if instead else ANY, instead) for name in names)


FOREIGN = (
    # -- parallelism and hosts
    ForeignFlag(("--tensor-parallel-size", "-tp"), ("1",), _PARALLEL),
    ForeignFlag(("--pipeline-parallel-size", "-pp"), ("1",), _PARALLEL),
    ForeignFlag(("--decode-context-parallel-size", "-dcp"), ("1",), _PARALLEL),
    ForeignFlag(("--prefill-context-parallel-size", "-pcp"), ("1",), _PARALLEL),
    ForeignFlag(("--data-parallel-size", "-dp"), ("1",), "is called --attention-workers here"),
    ForeignFlag(("--data-parallel-size-local", "-dpl"), (), _HOSTS),
    ForeignFlag(("--data-parallel-rank", "-dpn"), (), _HOSTS),
    ForeignFlag(("--data-parallel-start-rank", "-dpr"), (), _HOSTS),
    ForeignFlag(("--data-parallel-address", "-dpa"), (), _HOSTS),
    ForeignFlag(("--data-parallel-rpc-port", "-dpp"), (), _HOSTS),
    *_values("--data-parallel-backend", neutral=("mp",), instead=_HOSTS),
    *_switches("--data-parallel-hybrid-lb", "--data-parallel-external-lb", instead=_HOSTS),
    *_values("--master-addr", "--master-port", "--nnodes", "--node-rank", instead=_HOSTS),
    *_switches("--headless", instead="is not built: use --role coordinator, attention or expert"),
    ForeignFlag(("--enable-expert-parallel", "-ep"), ANY, "", takes_value=False),
    *_switches("--no-enable-expert-parallel", instead="is not built: experts are always workers of their own, "
               "or with --colocated in the one process"),
    *_switches("--enable-dbo", instead="is called --micro-batches here, and measured by default"),
    *_values("--all2all-backend", instead="is called --transport here"),
    *_switches("--enable-eplb", instead="is called --rebalance auto here"),
    *_values("--num-redundant-experts", neutral=("0",), instead="is called --redundant-experts here"),
    *_values("--eplb-config", neutral=("{}",), instead=_EPLB),
    *_values("--expert-placement-strategy", neutral=("linear",), instead="is not built: experts are placed in order"),
    *_values("--distributed-executor-backend", neutral=("mp", "uni"), instead="is not built: workers are processes"),
    *_values("--worker-cls", neutral=("auto",), instead="is not built: workers are msi's own"),
    *_values("--worker-extension-cls", neutral=("",), instead="is not built: workers are msi's own"),
    *_values("--distributed-timeout-seconds", instead="is called --start-timeout here"),
    *_values("--max-parallel-loading-workers"),
    *_switches("--disable-custom-all-reduce", "--ray-workers-use-nsight"),
    # -- which model, and its files
    *_values("--model", instead="is not a flag here: give the directory itself, as MODEL"),
    *_values("--tokenizer", instead="is not built: MODEL's own tokenizer.json is used"),
    *_values("--tokenizer-mode", neutral=("auto", "hf"), instead="is not built: MODEL's own tokenizer.json is used"),
    *_switches("--skip-tokenizer-init", instead="is not needed: prompts may be token ids, with or without a tokenizer"),
    *_values("--revision", "--code-revision", "--tokenizer-revision", "--download-dir", "--hf-token",
             instead=_DIRECTORY),
    *_values("--hf-overrides", neutral=("{}",), instead=_CONFIG),
    *_values("--hf-config-path", "--rope-scaling", "--rope-theta", instead=_CONFIG),
    *_switches("--disable-sliding-window", instead="is not built: the window is the model's own; change config.json"),
    *_values("--config-format", neutral=("auto", "hf"), instead="is not built: config.json is read"),
    *_values("--model-impl", neutral=("auto",), instead="is not built: families are msi's own"),
    *_switches("--trust-remote-code"),
    ForeignFlag(("-q",), ("none",), "is not built: write --quantization"),
    *_values("--model-loader-extra-config", neutral=("{}",), instead="is not built: safetensors are read as they are"),
    *_values("--ignore-patterns", "--safetensors-load-strategy", "--pt-load-map-location"),
    *_switches("--use-tqdm-on-load", "--no-use-tqdm-on-load"),
    *_values("--task", "--runner", neutral=("auto", "generate"), instead="is not built: models here generate"),
    *_values("--convert", neutral=("auto", "none"), instead="is not built: models here generate"),
    *_values("--override-pooler-config", "--pooler-config", instead="is not built: models here generate"),
    *_switches("--enable-lora", "--fully-sharded-loras", "--enable-prompt-adapter", instead=_LORA),
    *_values("--lora-modules", "--max-loras", "--max-lora-rank", "--max-cpu-loras", "--lora-dtype",
             "--lora-extra-vocab-size", "--qlora-adapter-name-or-path", instead=_LORA),
    *_values("--limit-mm-per-prompt", "--mm-processor-kwargs", "--media-io-kwargs", "--mm-encoder-tp-mode",
             instead=_MEDIA),
    *_switches("--enable-mm-embeds", instead=_MEDIA),
    *_values("--allowed-local-media-path", "--allowed-media-domains", "--mm-processor-cache-gb"),
    *_switches("--disable-mm-preprocessor-cache", "--disable-chunked-mm-input"),
    # -- memory and scheduling
    *_switches("--calculate-kv-scales", instead="is not built: a cache in fp8 has no scales"),
    *_values("--kv-cache-memory-bytes", instead="is not built: give --num-gpu-blocks-override, in blocks of 16 tokens"),
    *_values("--block-size", neutral=("16",), instead="is not built: blocks have 16 tokens"),
    *_values("--prefix-caching-hash-algo", "--swap-space"),
    *_switches("--no-enable-chunked-prefill", instead="is not built: long prompts always come in chunks"),
    *_switches("--enable-chunked-prefill", "--async-scheduling", "--no-async-scheduling", "--disable-cascade-attn",
               "--disable-hybrid-kv-cache-manager", "--no-disable-hybrid-kv-cache-manager",
               "--disable-async-output-proc"),
    *_values("--cpu-offload-gb", neutral=("0", "0.0"), instead="is not built; --device cpu keeps all in main memory"),
    *_values("--kv-offloading-size", "--kv-offloading-backend", "--kv-transfer-config", "--kv-events-config",
             "--ec-transfer-config", instead=_KV),
    *_switches("--kv-sharing-fast-prefill", instead=_KV),
    *_values("--seed", neutral=("0",), instead=f'{_EACH} "seed"'),
    *_values("--scheduling-policy", neutral=("fcfs",), instead="is not built: requests are served as they come"),
    *_values("--scheduler-cls", neutral=("auto",), instead="is not built: requests are served as they come"),
    *_values("--scheduler-delay-factor", neutral=("0", "0.0"), instead="is not built: nothing waits for company"),
    *_values("--num-scheduler-steps", "--stream-interval", neutral=("1",), instead="is not built: leave it out"),
    *_values("--max-num-partial-prefills", "--max-long-partial-prefills", neutral=("1",),
             instead="is not built: --max-num-batched-tokens bounds what a pass takes"),
    *_values("--long-prefill-token-threshold", neutral=("0",),
             instead="is not built: --max-num-batched-tokens bounds what a pass takes"),
    *_values("--preemption-mode", neutral=("recompute",), instead="is not built: what is preempted is computed again"),
    *_switches("--enable-sleep-mode", instead="is not built: end the server, and start it again"),
    # -- kernels and compilation: the same tokens, however they are computed
    ForeignFlag(("--compilation-config", "-cc"), ANY, ""),
    ForeignFlag(("--optimization-level", "-O"), ANY, ""),
    *_values("--max-seq-len-to-capture", "--cuda-graph-sizes", "--cudagraph-capture-sizes",
             "--max-cudagraph-capture-size"),
    *_values("--attention-backend", "--attention-config", "--kernel-config", neutral=("auto", "{}"),
             instead="is not built: kernels are chosen by the device"),
    *_values("--additional-config", neutral=("{}",), instead="is not built: leave it out"),
    # -- requests
    *_values("--max-logprobs", neutral=("20",), instead="is not built: 20 at most"),
    *_values("--logprobs-mode", neutral=("raw_logprobs",), instead="is not built: they are of the model's own choice"),
    *_values("--logits-processors", instead=f"{_EACH} logit_bias, allowed_token_ids, bad_words"),
    *_values("--override-generation-config", neutral=("{}",),
             instead="is not built: name a folder with such a file by --generation-config"),
    ForeignFlag(("--speculative-config", "-sc"), (), _SPECULATION),
    *_values("--num-speculative-tokens", "--speculative-model", instead=_SPECULATION),
    *_values("--guided-decoding-backend", "--structured-outputs-config", neutral=("auto", "{}"), instead=_GRAMMAR),
    *_switches("--enable-prompt-embeds", instead="is not built: prompts are texts or token ids"),
    *_switches("--enable-auto-tool-choice"),
    *_values("--tool-parser-plugin", "--reasoning-parser-plugin", neutral=("",),
             instead="is not built: name one of --tool-call-parser's or --reasoning-parser's"),
    *_values("--tool-server", instead="is not built: clients call the tools"),
    *_switches("--exclude-tools-when-tool-choice-none", instead="is not built: leave the tools out of the request"),
    *_values("--default-chat-template-kwargs", neutral=("{}",), instead=f'{_EACH} "chat_template_kwargs"'),
    *_values("--chat-template-content-format", neutral=("auto",), instead="is not needed: both forms are tried"),
    *_switches("--trust-request-chat-template", instead="is not built: give --chat-template"),
    *_values("--response-role", neutral=("assistant",), instead="is not built: it is assistant"),
    *_switches("--return-tokens-as-token-ids", instead="is not built: ask /tokenize"),
    *_switches("--enable-force-include-usage", instead=f'{_EACH} "stream_options": {{"include_usage": true}}'),
    # -- HTTP
    ForeignFlag(("--api-server-count", "-asc"), ("1",), "is not built; leave it out"),
    *_values("--uds", instead="is not built: give --host and --port"),
    *_values("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers", instead=_TLS),
    *_switches("--enable-ssl-refresh", instead=_TLS),
    *_values("--root-path", instead="is not built: let the proxy in front take it off"),
    *_values("--middleware", neutral=("[]",), instead=_PROXY),
    *_values("--allowed-methods", "--allowed-headers", neutral=('["*"]',),
             instead="is not needed: a page of --allowed-origins may send what endpoints take"),
    *_switches("--allow-credentials", instead="is not needed: keys travel in a header of their own"),
    *_values("--h11-max-incomplete-event-size", "--h11-max-header-count"),
    *_switches("--disable-frontend-multiprocessing", "--enable-request-id-headers", "--enable-prompt-tokens-details",
               "--disable-fastapi-docs"),
    *_switches("--enable-server-load-tracking", instead="is not needed: /metrics has it always"),
    *_switches("--enable-tokenizer-info-endpoint", instead="is not built: see tokenizer_config.json in MODEL"),
    # -- logs and metrics
    *_values("--uvicorn-log-level", instead="is called --log-level here"),
    *_values("--log-config-file", instead="is not built: give --log-level and --log-json"),
    *_values("--max-log-len", "--show-hidden-metrics-for-version", "--disable-access-log-for-endpoints"),
    *_switches("--disable-uvicorn-access-log", "--log-error-stack", "--aggregate-engine-logging",
               "--no-enable-log-outputs"),
    *_switches("--enable-log-outputs", instead="is not built: what models write is not logged"),
    *_values("--collect-detailed-traces", "--profiler-config", instead=_TRACING),
    *_switches("--enable-layerwise-nvtx-tracing", "--kv-cache-metrics", "--cudagraph-metrics", instead=_TRACING),
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
