"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the hundreds of processes that tests start load what one compiled
if not Path("/dev/nvidiactl").exists():  # no GPU: before anything imports Triton, which decides by it how kernels run
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

settings.register_profile("msi", parent=settings(), deadline=None)  # of an example: others use this machine, too
settings.load_profile("msi")
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want."


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random checkpoint with a byte-pair tokenizer of its own size."""
    from tests.tiny import VOCAB_SIZE, save_tiny  # loads torch, which many tests do without

    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 40, special_tokens=["<u>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    assert tokenizer.get_vocab_size() > VOCAB_SIZE
    save_tiny(path, vocab_size=tokenizer.get_vocab_size())
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class ToldAtOnce:
    """Names a test that failed as soon as it has: the whole check takes a while, and tells why at its end."""

    def __init__(self, reporter):
        self._reporter = reporter

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._reporter.write_line(f"\nfailed: {report.nodeid}, {report.when}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):  # not in each of the processes that run tests
        config.pluginmanager.register(ToldAtOnce(reporter))
