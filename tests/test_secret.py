"""The secret of a cluster: where it may lie, what it may be, and where nobody listens without one."""

from __future__ import annotations

import os

import pytest

from msi.errors import ConfigError
from msi.net.secret import MAX_BYTES, Secret, Trust, find_secret, is_loopback, public_name

TEXT = "0123456789abcdef"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_text(f"  {TEXT}\n\n")
    return path


def test_a_file_and_the_environment_say_the_same_whatever_space_is_around_it(file):
    assert find_secret(file, {}).key("x") == find_secret(None, {"MSI_SECRET": TEXT}).key("x") == Secret(TEXT).key("x")
    assert find_secret(file, {"MSI_SECRET": "another, which does not count"}).text == TEXT
    assert find_secret(None, {}) is None


def test_each_purpose_has_a_key_of_its_own_and_none_is_shown():
    one, other = Secret(TEXT), Secret(TEXT + "0")
    keys = {one.key("a"), one.key("b"), other.key("a"), other.key("b")}
    keys |= {Trust(trusted).link_key(token) for trusted in (None, one, other) for token in ("token", "other")}
    assert len(keys) == 10
    assert all(len(key) == 32 for key in keys)
    assert TEXT not in repr(Trust(one)) + str(one)
    assert "token" not in public_name("token")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620, 0o601])
def test_a_file_that_others_can_read_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(ConfigError, match=r"is open to others than its owner .*chmod 600"):
        find_secret(file, {})


def test_what_keeps_no_secret_is_refused_by_a_sentence_at_once(tmp_path, file):
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "short").touch(mode=0o600)
    (tmp_path / "short").write_text("   0123456789      \n")
    (tmp_path / "long").touch(mode=0o600)
    (tmp_path / "long").write_bytes(b"x" * (MAX_BYTES + 1))
    (tmp_path / "binary").touch(mode=0o600)
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, complaint in {
        "fifo": "is not a regular file", ".": "is not a regular file", "nowhere": "cannot be read: No such file",
        "short": "has 10 characters, and at least 16 are needed; write one with: openssl rand",
        "long": "is longer than 4096 bytes", "binary": "is not text", "loop": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=complaint):
            find_secret(tmp_path / name, {})
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
        with pytest.raises(ConfigError, match="belongs to user 12345"):
            find_secret(file, {})


@pytest.mark.parametrize("text", ["", " ", "short", "x" * 15, "\n" * 40, "x" * 5000])
def test_a_secret_from_the_environment_is_held_to_the_same(text):
    with pytest.raises(ConfigError, match="the secret in MSI_SECRET has"):
        find_secret(None, {"MSI_SECRET": text})


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("::1", True), ("[::1]", True),
        ("0.0.0.0", False), ("*", False), ("", False), ("::", False), ("10.0.0.1", False), ("no.such.host.", False),
        ("eth0", False), ("x" * 300, False),
    ],
)  # fmt: skip
def test_only_what_this_machine_alone_reaches_needs_no_secret(host, is_here):
    assert is_loopback(host) == is_here
    Trust(Secret(TEXT)).check_listening(host, "a worker")
    Trust(None, is_insecure_allowed=True).check_listening(host, "a worker")
    if is_here:
        Trust(None).check_listening(host, "a worker")
    else:
        with pytest.raises(ConfigError, match=r"a worker would listen on .*`secret_file` FILE .*`insecure_network`"):
            Trust(None).check_listening(host, "a worker")


def test_an_api_key_from_a_file_or_the_environment_is_on_no_command_line(file, monkeypatch):
    from msi_launch.arguments import parse

    monkeypatch.setenv("MSI_API_KEY", "from-the-environment")
    assert parse(["--api-key", "given", "--api-key", "other"]).api_keys == ("given", "other")
    assert parse(["--api-key-file", str(file)]).api_keys == (TEXT,)
    assert parse([]).api_keys == ("from-the-environment",)
    for arguments in (["--api-key", "given"], ["--api-key-file", str(file)], []):
        assert not [word for word in parse(arguments).serving_flags if "key" in word]
    for wrong in ("two words", "", "\n", "good\nb\u00e4d"):
        monkeypatch.setenv("MSI_API_KEY", wrong)
        with pytest.raises(ConfigError, match="MSI_API_KEY has to hold keys"):
            parse([])
    monkeypatch.delenv("MSI_API_KEY")
    monkeypatch.setenv("VLLM_API_KEY", "as-for-vllm")
    assert parse([]).api_keys == ("as-for-vllm",)
    monkeypatch.delenv("VLLM_API_KEY")
    assert parse([]).api_keys == ()
    file.write_text(f"{TEXT}\n\n other \n")
    assert parse(["--api-key-file", str(file)]).api_keys == (TEXT, "other")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"--api-key-file .* is open to others"):
        parse(["--api-key-file", str(file)])


@pytest.mark.parametrize("flags", [["--secret-file", "x"], ["--insecure-network"]])
def test_an_instance_on_this_machine_alone_has_no_use_for_a_secret(flags, monkeypatch):
    from msi_launch.arguments import parse

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match=f"{flags[0]} is for --role, --slurm and torchrun"):
        parse(flags)
    monkeypatch.setenv("MSI_SECRET", "bad")
    assert parse([]).trust.secret is None
    with pytest.raises(ConfigError, match="the secret in MSI_SECRET has 3 characters"):
        parse(["--role", "coordinator"])
