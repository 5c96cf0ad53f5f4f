"""Checkpoints damaged at random: they load as transformers loads them, or end in one sentence, within seconds."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import time

import pytest
import torch

from msi.errors import ConfigError
from msi.instance.instance import check_files
from msi.options import InstanceOptions
from msi.placement import place_evenly
from msi.worker.loading import ModelFiles
from tests.everyday import IS_THOROUGH
from tests.reference import load_reference, save_tiny
from tests.test_models import PlainDevice, assignment, logits_of

PROMPT = (5, 17, 101, 33, 2, 64, 9)
JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
ODD_VALUES = [
    None, True, False, -1, 0, 1, 3, 7, 10**400, -(10**30), 2**31, 2**63, 1.5, -0.0, 1e-320, 1e308, float("inf"),
    float("nan"), "", "x", "silu", "\ud800", "../x", [], [1], [[]], {}, {"a": {"b": []}},
]  # fmt: skip


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Directories to damage, and the logits of each."""
    found = []
    for family, shard in (("mixtral", "1GB"), ("mixtral", "40KB"), ("qwen3", "1GB"), ("dbrx", "40KB")):
        path = tmp_path_factory.mktemp(family)
        save_tiny(path, family=family, max_shard_size=shard)
        found.append((path, logits_of(path, PROMPT, torch.float32)))
    return found


def places_in(value, above=()):
    """Keys of all values inside a JSON value, from the top."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*above, key)
        yield from places_in(inner, (*above, key))


def change_json(path, chance):
    name = chance.choice([name for name in JSON_FILES if (path / name).exists()])
    values = json.loads((path / name).read_text())
    for _ in range(chance.choice([1, 1, 2])):
        places = list(places_in(values))
        if not places:
            return
        *above, key = chance.choice(places)
        inner = values
        for step in above:
            inner = inner[step]
        if chance.random() < 0.2 and isinstance(inner, dict):
            del inner[key]
        else:
            inner[key] = chance.choice(ODD_VALUES)
    (path / name).write_text(json.dumps(values))


def any_file(path, chance):
    return chance.choice(sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors")))


def flip_header_bits(path, chance):
    file = any_file(path, chance)
    content = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 3, 30])):
        content[chance.randrange(min(len(content), 4000))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut_off(path, chance):
    file = any_file(path, chance)
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def put_bytes_in(path, chance):
    file = any_file(path, chance)
    content, at = file.read_bytes(), chance.randrange(200)
    file.write_bytes(content[:at] + chance.randbytes(chance.choice([1, 8, 500])) + content[at:])


def replace_a_file(path, chance):
    file = any_file(path, chance)
    file.unlink()
    odd = [b"", b"{}", b"null", pickle.dumps({"a": 1}), b"\x00" * 4096, b"[" * 50_000, chance.randbytes(999)]
    kind = chance.randrange(len(odd) + 3)
    if kind < len(odd):
        file.write_bytes(odd[kind])
    elif kind == len(odd):
        file.mkdir()
    elif kind == len(odd) + 1:
        file.symlink_to(chance.choice(["gone", file.name, "/dev/zero", "/proc/self/mem"]))


DAMAGES = [change_json, change_json, change_json, flip_header_bits, cut_off, put_bytes_in, replace_a_file]


def assert_holds(original, logits, path, seed):
    """Damages a copy of a checkpoint; it is refused in a sentence, or computes what transformers does."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)
    chance = random.Random(seed)
    chance.choice(DAMAGES)(path, chance)
    started = time.thread_time()
    try:
        check_files(InstanceOptions.of(model=path))
        files = ModelFiles(path)
        files.fingerprint()
        placement = place_evenly(files.config.num_experts, 1)
        for role in ("expert", "attention"):
            files.load(assignment(role, 0, 1, placement=placement), PlainDevice())
    except ConfigError as error:
        sentence = str(error)
        assert sentence
        assert "\n" not in sentence
        assert len(sentence) < 500 + 2 * len(str(path))
        return "refused"
    finally:
        assert time.thread_time() - started < 5, "seconds of this thread's own time"
    ours = logits_of(path, PROMPT, torch.float32)
    if torch.equal(ours, logits):
        return "unchanged"
    try:
        with torch.inference_mode():
            expected = load_reference(path)(torch.tensor([PROMPT])).logits[0, -1]
    except Exception:
        return "only here"  # transformers checks types of fields that change nothing
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    return "changed"


def try_seeds(intact, path, monkeypatch, seeds):
    def refuse(*_, **__):
        raise AssertionError("something was unpickled, or run")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    ends = []
    for seed in seeds:
        original, logits = intact[seed % len(intact)]
        try:
            ends.append(assert_holds(original, logits, path, seed))
        except BaseException as error:
            error.add_note(f"seed {seed}, {original}")
            raise
    return ends


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_in_a_sentence_or_computes_what_transformers_does(
    intact, tmp_path, monkeypatch
):
    ends = try_seeds(intact, tmp_path / "model", monkeypatch, range(120))
    import collections

    print(collections.Counter(ends))
    assert ends.count("refused") > 40
    assert ends.count("unchanged") > 5
    assert ends.count("changed") > 2


@pytest.mark.slow
def test_many_damaged_checkpoints(intact, tmp_path, monkeypatch):
    ends = try_seeds(intact, tmp_path / "model", monkeypatch, range(1000, 1800 if IS_THOROUGH else 1200))
    assert ends.count("refused") > 3 / 8 * len(ends)
