#!/usr/bin/env python3
"""Train the small Mixture-of-Experts language model that ships in ``msi/demo_model``.

The script does everything from the raw text to the finished folder:

1. fetch Debian's ``r-cran-janeaustenr`` package and read Jane Austen's six novels out of it;
2. clean the text and train a byte-level BPE tokenizer on five of them;
3. train a small Mixtral-format model from scratch, in float32 on one CPU thread;
4. score the sixth novel, *Persuasion*, which nothing before has seen, with the model and with an
   interpolated trigram model over the same tokens;
5. save the model as a Hugging Face folder in bfloat16 and check it against ``transformers``.

Running it with its default options is what produced the bundled model. It needs ``torch``,
``transformers``, ``tokenizers``, ``safetensors`` and ``numpy``, plus ``apt-get`` and ``dpkg`` (or the
package file itself, given with ``--deb``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import struct
import subprocess
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from msi_launch.command_line import ScriptLine

PACKAGE = "r-cran-janeaustenr"
RDB_PATH = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
HELD_OUT = "PERSUASION"
BOS, EOS = 0, 1  # token ids of <s> and </s>
IGNORE = -100  # target value that the loss skips
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] | trim + '\\n\\n' }}{% endfor %}"
Ids = npt.NDArray[np.int64]


@dataclass
class Settings:
    """Everything that shapes the model; each field is also a command-line option."""

    vocab_size: int = 2048
    layers: int = 4
    hidden: int = 192
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 48
    experts: int = 8
    top_k: int = 2
    expert_hidden: int = 240
    context: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    steps: int = 1500
    batch_tokens: int = 4096
    short_context: int = 256  # sequence length of the first part of the training
    short_share: float = 0.3  # share of the steps that run at short_context
    lr: float = 2e-3
    table_lr: float = 0.01  # for the embeddings, the output head and the norms
    warmup: int = 20
    weight_decay: float = 0.3
    dropout: float = 0.2
    balance: float = 0.01  # weight of the load-balance loss
    ema: float = 0.995
    eval_every: int = 100
    seed: int = 1811


# --------------------------------------------------------------------------- text


def fetch_rdb(deb: Path | None) -> bytes:
    """Return the package's data file, downloading the package with apt-get unless one is given."""
    with tempfile.TemporaryDirectory() as tmp:
        if deb is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=tmp, check=True)
            deb = next(Path(tmp).glob("*.deb"))
        subprocess.run(["dpkg", "-x", str(deb.resolve()), f"{tmp}/root"], check=True)
        return (Path(tmp) / "root" / RDB_PATH).read_bytes()


def read_novels(rdb: bytes) -> dict[str, list[str]]:
    """Split R's lazy-load database into its character vectors: title -> the lines of the book.

    The file is a run of blocks, each a 4-byte length and a zlib stream. A block is a header and a
    vector of strings; a string is a flag word ending in 9, a 4-byte length (-1: NA) and its bytes.
    """
    novels: dict[str, list[str]] = {}
    while rdb:
        inflater = zlib.decompressobj()
        block = inflater.decompress(rdb[4:])
        rdb = inflater.unused_data
        pos = block.index(b"\x00\x00\x00\x10") + 4  # the vector's type word, then its length
        (count,) = struct.unpack_from(">i", block, pos)
        pos += 4
        lines = []
        for _ in range(count):
            flags, size = struct.unpack_from(">Ii", block, pos)
            if flags & 0xFF != 9:
                raise ValueError(f"not an R string at offset {pos}")
            pos += 8
            lines.append(block[pos : pos + max(size, 0)].decode("utf-8" if flags & 0x8000 else "latin-1"))
            pos += max(size, 0)
        novels[lines[0].strip().upper()] = lines
    return novels


def clean(lines: list[str]) -> list[str]:
    """Return a book's chapters as plain text: a paragraph on one line, a blank line between two."""
    text = "\n".join(line.rstrip() for line in lines)
    text = re.sub(r"(?s)\n\s*A NOTE ON THE TEXT.*", "", text)  # an editor's note, not the author's
    text = re.sub(r"(?sm)^ *\[(End volume|At this point).*?\]", "", text)
    text = re.sub(r"(?m)^(VOLUME .*|FINIS|Finis|THE END|[ *]*\*[ *]*|\*Vide .*)$", "", text).replace("_", "")
    chapters = []
    for body in re.split(r"(?mi)^chapter \w+$", text)[1:]:  # what precedes the first one is the title page
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", body):
            # A line break survives only before an indented line (verse, the head of a letter).
            joined = re.sub(r"\n(?! )", " ", paragraph.strip("\n"))
            joined = "\n".join(re.sub(r" +", " ", line).strip() for line in joined.split("\n"))
            if joined.strip():
                paragraphs.append(joined.strip())
        chapters.append("\n\n".join(paragraphs))
    return chapters


def train_tokenizer(chapters: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts <s> in front of every text."""
    words = r"'(?:s|d|m|t|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(chapters, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, chapters: list[str]) -> Ids:
    """Return the chapters as one run of ids, each chapter between <s> and </s>."""
    encoded = tokenizer.encode_batch(chapters)
    return np.concatenate([np.array([*e.ids, EOS], dtype=np.int64) for e in encoded])


# --------------------------------------------------------------------------- model


class Permute(torch.autograd.Function):
    """Reorder rows; the backward pass is a gather too, much faster on a CPU than index_add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return Permute.apply(rows, order, inverse)  # type: ignore[no-any-return, no-untyped-call]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings in the rotate-half convention."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.s.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        groups = self.s.heads // self.s.kv_heads
        k, v = rotate(k, cos, sin).repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


class MoE(nn.Module):
    """Mixtral's sparse block: softmax over all experts, keep the top k, renormalise."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.s = s
        self.gate = nn.Linear(s.hidden, s.experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(s.experts, s.expert_hidden, s.hidden))
        self.w2 = nn.Parameter(torch.empty(s.experts, s.hidden, s.expert_hidden))
        self.w3 = nn.Parameter(torch.empty(s.experts, s.expert_hidden, s.hidden))
        self.load = torch.zeros(s.experts)  # tokens each expert has seen, for the report

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output and its load-balance loss (1.0 is perfect balance)."""
        s = self.s
        tokens = x.reshape(-1, s.hidden)
        probs = self.gate(tokens).softmax(-1)
        weights, chosen = probs.topk(s.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()
        inverse = order.argsort()
        counts = torch.bincount(chosen.flatten(), minlength=s.experts)
        self.load += counts
        rows = tokens[:, None].expand(-1, s.top_k, -1).reshape(-1, s.hidden)
        parts = torch.split(permute(rows, order, inverse), counts.tolist())
        done = [
            F.linear(F.silu(F.linear(part, w1)) * F.linear(part, w3), w2)
            for part, w1, w2, w3 in zip(parts, self.w1, self.w2, self.w3, strict=True)
        ]
        out = permute(torch.cat(done), inverse, order).view(-1, s.top_k, s.hidden)
        balance = s.experts * (counts / counts.sum() * probs.mean(0)).sum()
        return (out * weights[..., None]).sum(1).view_as(x), balance


class Layer(nn.Module):
    """One decoder layer; its parameter names are Mixtral's, up to the stacked experts."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.block_sparse_moe = MoE(s)
        self.input_layernorm = nn.RMSNorm(s.hidden, s.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden, s.norm_eps)
        self.dropout = nn.Dropout(s.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        out, balance = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + self.dropout(out), balance


class Mixtral(nn.Module):
    """A Mixtral-architecture language model; zero initial outputs make it start as the uniform guess."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, s.norm_eps)
        self.lm_head = nn.Linear(s.hidden, s.vocab_size, bias=False)
        self.dropout = nn.Dropout(s.dropout)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "w2", "lm_head.weight")):
                nn.init.zeros_(p)
            elif p.ndim > 1:
                nn.init.normal_(p, std=0.5 if name == "embed_tokens.weight" else p.shape[-1] ** -0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the layers' mean load-balance loss."""
        s = self.s
        freqs = s.rope_theta ** (-torch.arange(0, s.head_dim, 2) / s.head_dim)
        angles = torch.outer(torch.arange(ids.shape[1]), freqs)
        x = self.dropout(self.embed_tokens(ids))
        balances = []
        for layer in self.layers:
            x, balance = layer(x, angles.cos(), angles.sin())
            balances.append(balance)
        return self.lm_head(self.norm(x)), torch.stack(balances).mean()

    def moe_blocks(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]


# --------------------------------------------------------------------------- training


def batches(
    stream: Ids, starts: Ids, length: int, rows: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets) for ever; each epoch cuts the stream at another offset.

    A sequence is <s> and then a piece of the stream, moved back to where its paragraph starts when
    that is near.
    """
    while True:
        cuts = np.arange(rng.integers(length), len(stream) - length, length)
        snapped = starts[np.searchsorted(starts, cuts, "right") - 1]
        cuts = rng.permutation(np.where(cuts - snapped < length // 4, snapped, cuts))
        for i in range(0, len(cuts) - rows + 1, rows):
            targets = torch.from_numpy(np.stack([stream[c : c + length] for c in cuts[i : i + rows]]))
            inputs = F.pad(targets[:, :-1], (1, 0), value=BOS)
            yield inputs, targets.masked_fill(targets == BOS, IGNORE)


def paragraph_starts(stream: Ids, tokenizer: Tokenizer) -> Ids:
    """Return the positions in the stream at which a paragraph begins."""
    opens = np.isin(stream, tokenizer.encode("\n\n").ids)  # <s> and the blank line
    return np.concatenate([[1], np.flatnonzero(opens[:-1]) + 1])


@torch.no_grad()
def token_losses(model: Mixtral, stream: Ids, stride: int) -> Tensor:
    """Return the loss in nats of every token but <s>, from windows of the full context.

    Each window scores what the one before it has not; a window that starts inside the text is given
    <s> in front, as in training.
    """
    model.eval()
    context = model.s.context
    losses = []
    for begin in range(0, max(1, len(stream) - 1 - context + stride), stride):
        window = torch.from_numpy(stream[begin : begin + context + 1])
        inputs, targets = window[:-1].clone(), window[1:]
        inputs[0] = BOS
        logits, _ = model(inputs[None])
        fresh = 0 if begin == 0 else context - stride
        loss = F.cross_entropy(logits[0, fresh:], targets[fresh:], reduction="none")
        losses.append(loss[targets[fresh:] != BOS])
    model.train()
    return torch.cat(losses)


def train(s: Settings, stream: Ids, starts: Ids, valid: Ids) -> tuple[Mixtral, int]:
    """Train a model; return its averaged weights at the best validation loss, and that step."""
    torch.manual_seed(s.seed)
    rng = np.random.default_rng(s.seed)
    model = Mixtral(s)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} training tokens", flush=True)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and name.startswith("layers.")]
    tables = [p for name, p in model.named_parameters() if p.ndim == 1 or not name.startswith("layers.")]
    groups = [
        {"params": matrices, "peak": s.lr, "weight_decay": s.weight_decay},
        {"params": tables, "peak": s.table_lr, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    short, full = (
        batches(stream, starts, length, s.batch_tokens // length, rng) for length in (s.short_context, s.context)
    )
    average, best, best_loss, best_step = copy.deepcopy(model), copy.deepcopy(model), math.inf, 0
    started, running = time.time(), 0.0
    for step in range(s.steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / s.steps))
            group["lr"] = group["peak"] * min(1.0, (step + 1) / s.warmup) * cosine
        inputs, targets = next(short if step < s.steps * s.short_share else full)
        logits, balance = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        (loss + s.balance * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay = min(s.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, p in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(p, 1 - decay)
        running += loss.item() / s.eval_every
        if (step + 1) % s.eval_every == 0:
            valid_loss = token_losses(average, valid, s.context).mean().item()
            if valid_loss < best_loss:
                best_loss, best_step, best = valid_loss, step + 1, copy.deepcopy(average)
            print(
                f"step {step + 1:5d}  train {running:.4f}  valid {valid_loss:.4f}  balance {balance.item():.3f}"
                f"  {time.time() - started:6.0f} s",
                flush=True,
            )
            running = 0.0
    return best, best_step


# --------------------------------------------------------------------------- trigram baseline


class Trigram:
    """A trigram model with Jelinek-Mercer interpolation of trigram, bigram, unigram and uniform.

    The four weights depend on how often the trigram's context was seen (in powers of two), and are
    fitted by expectation-maximisation on the validation text.
    """

    def __init__(self, stream: Ids, valid: Ids, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        rows = [r for r in self._rows(stream) if r[2] != BOS]
        self.ngrams = Counter(r[i:] for r in rows for i in range(3))
        self.contexts = Counter(r[i:2] for r in rows for i in range(3))
        self.weights = np.full((32, 4), 0.25)
        parts, bucket = self._parts(valid)
        for _ in range(100):
            joint = parts * self.weights[bucket]
            joint /= joint.sum(1, keepdims=True)
            for b in np.unique(bucket):
                self.weights[b] = joint[bucket == b].mean(0)

    @staticmethod
    def _rows(stream: Ids) -> list[tuple[int, ...]]:
        padded = [EOS, EOS, *stream.tolist()]
        return list(zip(padded, padded[1:], padded[2:], strict=False))

    def _parts(self, stream: Ids) -> tuple[npt.NDArray[np.float64], Ids]:
        """Return each token's four estimates, and the bucket that its context falls into."""
        rows = [r for r in self._rows(stream) if r[2] != BOS]
        estimates = [[self.ngrams[r[i:]] / max(1, self.contexts[r[i:2]]) for i in range(3)] for r in rows]
        parts = np.pad(np.array(estimates), ((0, 0), (0, 1)), constant_values=1 / self.vocab_size)
        return parts, np.array([self.contexts[r[:2]].bit_length() for r in rows])

    def token_losses(self, stream: Ids) -> Tensor:
        """Return the loss in nats of every token but <s>."""
        parts, bucket = self._parts(stream)
        return torch.from_numpy(-np.log((parts * self.weights[bucket]).sum(1)))


# --------------------------------------------------------------------------- the finished folder


def hf_config(s: Settings) -> dict[str, object]:
    """Return config.json's content."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": s.vocab_size,
        "hidden_size": s.hidden,
        "intermediate_size": s.expert_hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": s.context,
        "rms_norm_eps": s.norm_eps,
        "rope_theta": s.rope_theta,
        "num_local_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "router_aux_loss_coef": s.balance,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def hf_tensors(model: Mixtral) -> dict[str, Tensor]:
    """Return the weights in bfloat16 under Mixtral's tensor names."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.state_dict().items():
        value = p.to(torch.bfloat16).contiguous()
        prefix, _, last = name.rpartition(".")
        if last in ("w1", "w2", "w3"):
            tensors |= {f"model.{prefix}.experts.{e}.{last}.weight": w.clone() for e, w in enumerate(value)}
        else:
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = value
    return tensors


def save(model: Mixtral, tokenizer: Tokenizer, out: Path) -> None:
    """Write the Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(hf_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    documents = {
        "config.json": hf_config(model.s),
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.8},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": model.s.context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in documents.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def check(model: Mixtral, tokenizer: Tokenizer, out: Path, ids: Ids) -> float:
    """Load the folder with transformers; return the largest difference between the logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    if type(loaded).__name__ != "MixtralForCausalLM":
        raise TypeError(f"loaded as {type(loaded).__name__}")
    inputs = torch.from_numpy(ids[: model.s.context])[None]
    difference: float = (loaded(inputs).logits - model.eval()(inputs)[0]).abs().max().item()
    if difference > 1e-3:
        raise ValueError(f"transformers' logits differ by {difference}")
    text = "It is a truth universally acknowledged,\n\nthat £5 is \u201cenough\u201d."
    fast = AutoTokenizer.from_pretrained(out)
    chat = fast.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True)
    if fast(text)["input_ids"] != tokenizer.encode(text).ids or chat != "<s>Hello\n\n":
        raise ValueError("transformers' tokenizer differs")
    if fast.decode(fast(text)["input_ids"], skip_special_tokens=True) != text:
        raise ValueError("the tokenizer does not give its text back")
    return difference


@torch.no_grad()
def generate(model: Mixtral, tokenizer: Tokenizer, prompt: str, temperature: float, count: int = 120) -> str:
    """Continue a prompt, greedily when the temperature is 0."""
    model.eval()
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0][0, -1]
        choice = logits.argmax() if temperature == 0 else torch.multinomial((logits / temperature).softmax(-1), 1)
        ids.append(int(choice))
        if ids[-1] == EOS:
            break
    return tokenizer.decode(ids)


README = """\
# Demo model

A very small Mixtral-format Mixture-of-Experts language model that writes in the manner of Jane Austen.
It is here so that the server can be tried and tested with no download; it knows nothing but five novels.

- **Format**: `MixtralForCausalLM`, {parameters:,} parameters in bfloat16; {layers} layers, hidden size {hidden},
  {heads} heads of {head_dim} over {kv_heads} key/value heads, {experts} experts of width {expert_hidden}, {top_k} per
  token, {context} positions.
- **Tokenizer**: byte-level BPE, {vocab_size} tokens, trained on the same five novels.
- **Chat**: the template only puts the messages one after the other as paragraphs; the model continues the text.

## Origin

The text is Jane Austen's *Emma*, *Mansfield Park*, *Northanger Abbey*, *Pride and Prejudice* and *Sense and
Sensibility*, all in the public domain, as packaged in the R package `janeaustenr` (MIT licence, Julia Silge) and
fetched as Debian's `r-cran-janeaustenr`. *Persuasion* was held out: neither the tokenizer, nor the training, nor
early stopping has seen it. `tools/train_demo_model.py` made this folder, from random weights, with its default options.

## Figures

| on *Persuasion* ({heldout_tokens:,} tokens, {heldout_chars:,} characters) | perplexity per token | bits per char |
|---|---|---|
| this model ({context}-token windows, stride {stride}) | **{model_ppl:.2f}** | **{model_bpc:.3f}** |
| trigram, Jelinek-Mercer interpolation, same tokens | {trigram_ppl:.2f} | {trigram_bpc:.3f} |

Every token is scored, with one `</s>` per chapter. The bfloat16 weights were scored, computing in float32. On the
validation chapters (the middle one of each training novel; used for early stopping and for the trigram's weights) the
perplexities are {model_valid:.2f} and {trigram_valid:.2f}.

- Training: {tokens:,} tokens of text, {steps} steps of {batch_tokens} tokens ({epochs:.1f} passes), {minutes:.0f}
  minutes on {threads} thread of {cpu} (shared with other work); the best step was {best_step}.
- Largest difference from transformers' logits, both in float32: {difference:.1e}.
- Share of *Persuasion*'s tokens that each expert takes, by layer (even would be {even:.1f} %):

{loads}

## Samples

{samples}
"""


def cpu_model() -> str:
    """Return the processor's name."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else "an unknown CPU"


def evaluate(model: Mixtral, trigram: Trigram, valid: Ids, test: Ids, chars: int) -> dict[str, Any]:
    """Score the validation chapters and the held-out novel, of so many characters, with both models."""
    stride = model.s.context // 2
    figures: dict[str, Any] = {
        "model_valid": token_losses(model, valid, stride).mean().exp().item(),
        "trigram_valid": trigram.token_losses(valid).mean().exp().item(),
        "stride": stride,
        "heldout_chars": chars,
        "parameters": sum(p.numel() for p in model.parameters()),
        "even": 100 / model.s.experts,
    }
    for block in model.moe_blocks():
        block.load.zero_()
    for name, losses in (("model", token_losses(model, test, stride)), ("trigram", trigram.token_losses(test))):
        figures["heldout_tokens"] = len(losses)
        figures[f"{name}_ppl"] = losses.mean().exp().item()
        figures[f"{name}_bpc"] = losses.sum().item() / math.log(2) / chars
    rows = [[""] * model.s.experts, ["---"] * model.s.experts]
    rows += [[f"{share:.1f}" for share in 100 * block.load / block.load.sum()] for block in model.moe_blocks()]
    figures["loads"] = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return figures


def samples(model: Mixtral, tokenizer: Tokenizer) -> str:
    """Return texts that the model writes, as Markdown quotations."""
    torch.manual_seed(model.s.seed)
    parts = []
    for temperature in (0.8, 0.0):
        parts.append(f"At temperature {temperature}:" if temperature else "Greedily:")
        for prompt in ("It is a truth universally acknowledged", "The next morning"):
            parts.append(re.sub("(?m)^", "> ", generate(model, tokenizer, prompt, temperature)))
    return "\n\n".join(parts)


def parse_args() -> tuple[argparse.Namespace, Settings]:
    parser = ScriptLine(__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "msi" / "demo_model", help="folder; the bundled one"
    )
    parser.add_argument("--deb", type=Path, help="the package file, if already downloaded")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1")
    for field in fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{field.default}",
        )
    args = parser.parse_args()
    return args, Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


def main() -> None:
    args, s = parse_args()
    torch.set_num_threads(args.threads)
    novels = {title: clean(lines) for title, lines in read_novels(fetch_rdb(args.deb)).items()}
    held_out = novels.pop(HELD_OUT)
    valid_chapters = [chapters.pop(len(chapters) // 2) for chapters in novels.values()]
    chapters = [chapter for novel in novels.values() for chapter in novel]
    tokenizer = train_tokenizer(chapters, s.vocab_size)
    stream, valid, test = (encode(tokenizer, part) for part in (chapters, valid_chapters, held_out))

    started = time.time()
    model, best_step = train(s, stream, paragraph_starts(stream, tokenizer), valid)
    minutes = (time.time() - started) / 60
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(torch.bfloat16))  # from here on, the weights that the file holds
    save(model, tokenizer, args.out)
    difference = check(model, tokenizer, args.out, stream)

    figures = evaluate(model, Trigram(stream, valid, s.vocab_size), valid, test, sum(map(len, held_out)))
    figures |= {"tokens": len(stream), "minutes": minutes, "best_step": best_step, "difference": difference}
    figures |= {"threads": args.threads, "cpu": cpu_model(), "epochs": s.steps * s.batch_tokens / len(stream)}
    readme = README.format(**vars(s), **figures, samples=samples(model, tokenizer))
    (args.out / "README.md").write_text(readme)
    print(readme)


if __name__ == "__main__":
    main()
