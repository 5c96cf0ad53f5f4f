"""msi-launch --check: each thing that would stand in the way is a line that says what to do, and status 2."""

from __future__ import annotations

import http.server
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.errors import ConfigError
from msi.net.rdma.options import RdmaOptions
from msi.options import InstanceOptions
from msi_launch.arguments import Peer, parse
from msi_launch.doctor import doctor, host, model, network
from msi_launch.doctor.findings import Finding, refused
from msi_launch.doctor.host import Limits
from msi_launch.main import run
from tests.hosts import Hosts, why_not
from tests.loopback_verbs import Fabric, LoopbackDriver
from tests.test_launch import free_port

ENOUGH = Limits(descriptors=-1, memlock_bytes=-1, shm_bytes=1 << 30, free_bytes=1 << 36, num_cores=8)


def found(*words, limits=ENOUGH):
    return {one.check: one for one in doctor.findings(parse(list(map(str, words))), limits)}


def says_what_to_do(finding):
    assert finding.state == "failed", finding
    assert len(finding.advice) > 10, finding
    assert "\n" not in finding.line()
    return finding.line()


# -- as a whole ------------------------------------------------------------------------------------------------------


def test_a_machine_that_can_start_says_so(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr(host, "measured_limits", lambda: ENOUGH)
    assert run([str(tiny_model), "--check", "--port", "0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "warning ")) for line in out[:-1])
    assert out[-1] == f"{len(out) - 1} checks: it can start"


def test_what_fails_is_status_2_and_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(host, "measured_limits", lambda: ENOUGH)
    assert run(["/nowhere", "--check", "--port", "0"]) == 2
    out = capsys.readouterr().out
    assert "failed  model: /nowhere" in out
    assert "1 of " in out.splitlines()[-1]


def test_programs_get_an_object(capsys, monkeypatch):
    monkeypatch.setattr(host, "measured_limits", lambda: ENOUGH)
    assert run(["/nowhere", "--check", "--json", "--port", "0"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    (bad,) = [one for one in said["findings"] if one["state"] == "failed"]
    assert bad["check"] == "model"
    assert bad["advice"]


def test_json_and_hosts_are_for_the_check():
    for words in (["--json"], ["--hosts", "a"]):
        with pytest.raises(ConfigError, match="is for --check"):
            parse(words)


@pytest.mark.parametrize(
    ("words", "present", "absent"),
    [
        ([], {"device", "HTTP port", "weights", "tokenizer", "memory"}, {"coordinator", "secret"}),
        (["--role", "coordinator"], {"HTTP port", "coordinator's port", "tokenizer"}, {"device", "weights", "memory"}),
        (["--role", "gateway"], {"HTTP port", "coordinator"}, {"model", "device"}),
        (["--role", "attention"], {"device", "coordinator", "secret", "weights", "RDMA", "memory"}, {"HTTP port"}),
        (["--role", "expert"], {"memory of expert workers"}, {"memory of attention workers", "tokenizer"}),
    ],
)
def test_each_process_is_asked_what_it_needs(tiny_model, words, present, absent):
    address = [] if words[1:] in ([], ["coordinator"]) else ["--coordinator", f"tcp://127.0.0.1:{free_port()}"]
    checks = found(tiny_model, "--port", 0, *words, *address)
    assert present <= checks.keys()
    assert not absent & checks.keys()
    assert not [one for one in checks.values() if one.state == "failed"]


@pytest.mark.parametrize(
    ("error", "sentence", "advice"),
    [
        ("it is gone; look again; or do not", "it is gone; look again", "or do not"),
        ("it has no secret: give one, or none", "it has no secret", "give one, or none"),
        ("it is gone", "it is gone", "do what one does"),
    ],
)
def test_what_an_error_advises_is_told_once(error, sentence, advice):
    said = refused("x", ConfigError(error), "do what one does")
    assert (said.sentence, said.advice) == (sentence, advice)


def test_a_failure_without_advice_is_a_bug():
    with pytest.raises(AssertionError):
        Finding("x", "failed", "it is broken")


# -- this host -------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr("msi.device.choice.why_unavailable", lambda: "there is no GPU")
    assert "device: --device cuda cannot work: there is no GPU" in says_what_to_do(
        host.check_device("cuda", 1, 1, ENOUGH)
    )


def test_more_threads_than_cores_is_a_warning():
    assert host.check_device("cpu", 4, 4, ENOUGH).state == "warning"
    assert host.check_device("cpu", 2, 4, ENOUGH).state == "ok"


def test_shared_memory_that_a_host_has_not():
    assert "--transport tcp" in says_what_to_do(host.check_sharing("shm", 1, reason="no memfd"))
    assert host.check_sharing("auto", 1, reason="no memfd").state == "warning"

    def fails(size):
        raise OSError(28, "No space left on device")

    assert "--slot-rows" in says_what_to_do(host.check_sharing("auto", 1 << 20, create=fails))
    assert host.check_sharing("auto", 1 << 20).state == "ok"


def test_a_small_dev_shm_is_a_warning():
    assert host.check_shm_folder(replace(ENOUGH, shm_bytes=1 << 20)).state == "warning"
    assert host.check_shm_folder(replace(ENOUGH, shm_bytes=-1)).state == "ok"


def test_too_few_descriptors():
    assert "ulimit -n" in says_what_to_do(host.check_descriptors(replace(ENOUGH, descriptors=64)))
    assert host.check_descriptors(replace(ENOUGH, descriptors=1024)).state == "warning"
    assert host.check_descriptors(replace(ENOUGH, descriptors=65_536)).state == "ok"


def test_too_little_locked_memory_for_rdma():
    little = replace(ENOUGH, memlock_bytes=65_536)
    assert "ulimit -l unlimited" in says_what_to_do(host.check_memlock(little, 1 << 20, uses_rdma=True))
    assert host.check_memlock(little, 1 << 20, uses_rdma=False).state == "ok"
    assert host.check_memlock(ENOUGH, 1 << 20, uses_rdma=True).state == "ok"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, -1),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n"}, 2048 * 1024),
        ({"proc/meminfo": "MemAvailable: 2048 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 2048 * 1024),
        (
            {"proc/meminfo": "MemAvailable: 2048 kB\n", "sys/fs/cgroup/memory.max": "1000",
             "sys/fs/cgroup/memory.current": "400"}, 600,
        ),
        ({"proc/meminfo": "MemAvailable: none\n"}, -1),
    ],
)  # fmt: skip
def test_free_memory_is_what_a_containers_limit_leaves(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host.free_memory_bytes(tmp_path) == expected


# -- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def listener():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield one.getsockname()[1]


def test_a_port_that_is_in_use(listener):
    assert "choose another --port" in says_what_to_do(network.check_http_port("127.0.0.1", listener))
    assert "address" in says_what_to_do(network.check_http_port("203.0.113.9", 0))
    assert network.check_http_port("127.0.0.1", free_port()).state == "ok"
    checks = found("--role", "coordinator", "--coordinator", f"tcp://127.0.0.1:{listener}", "--port", 0)
    assert "another port" in says_what_to_do(checks["coordinator's port"])


def test_a_coordinator_on_a_network_needs_a_secret():
    checks = found("--role", "coordinator", "--coordinator", "tcp://0.0.0.0:0", "--port", 0)
    assert "--secret-file" in says_what_to_do(checks["coordinator's port"])
    checks = found("--role", "gateway", "--coordinator", "tcp://203.0.113.9:1", "--port", 0)
    assert "--secret-file" in says_what_to_do(checks["secret"])


UNREACHED = [TimeoutError("timed out"), OSError(113, "No route to host"), socket.gaierror(-2, "Name not known")]


@pytest.mark.parametrize("error", UNREACHED)
def test_hosts_that_are_not_reached(error, monkeypatch):
    def connect(address, timeout):
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    line = says_what_to_do(network.check_coordinator("tcp://h:5555"))
    assert "firewalls" in line
    assert any(reason in line for reason in ("no answer in time", "No route to host", "Name not known"))
    (only,) = network.check_host(Peer("h", 0), 8000)
    assert "firewalls" in says_what_to_do(only)


def test_a_coordinator_that_is_no_address_or_not_there_yet(listener):
    for address in ("tcp://h", "tcp://:1", "tcp://h:0", "tcp://h:99999", "udp://h:1", "h:1"):
        assert "tcp://HOST:PORT" in says_what_to_do(network.check_coordinator(address))
    assert network.check_coordinator(f"tcp://127.0.0.1:{free_port()}").state == "warning"
    assert network.check_coordinator(f"tcp://127.0.0.1:{listener}").state == "ok"


def test_a_host_where_nothing_listens_is_reached():
    (only,) = network.check_host(Peer("127.0.0.1", free_port()), 8000)
    assert only.state == "ok"


class Clock(http.server.BaseHTTPRequestHandler):
    off_s = 0.0

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.off_s)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("off_s", "state"), [(0, "ok"), (-3600, "failed"), (3600, "failed"), (1.5, "failed")])
def test_a_clock_that_is_off(off_s, state):
    with http.server.HTTPServer(("127.0.0.1", 0), type("Off", (Clock,), {"off_s": off_s})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            reached, clock = network.check_host(Peer("127.0.0.1", server.server_port), 8000)
        finally:
            server.shutdown()
            thread.join()
    assert reached.state == "ok"
    assert clock.state == state
    if state == "failed":
        assert "NTP" in says_what_to_do(clock)
        assert ("behind" if off_s < 0 else "ahead of") in clock.sentence


def test_a_clock_that_nobody_tells_is_no_failure(listener):
    assert network.check_clock("127.0.0.1", listener, within_s=0.1).state == "ok"


@given(st.floats(-5, 5), st.floats(0, 0.05), st.floats(0, 1))
def test_clocks_are_judged_by_what_their_answers_leave_open(off_s, takes_s, begin_s):
    """Whole seconds, asked for a dozen times: they tell a clock to a fraction of one."""
    times = [1e9 + begin_s + 0.1 * at for at in range(network.NUM_DATES)]
    found = network.judge_clock("clock", [(at, math.floor(at + takes_s / 2 + off_s), at + takes_s) for at in times])
    unsure_s = network.BETWEEN_DATES_S + takes_s + 1e-6
    if abs(off_s) <= network.MAX_SKEW_S - 1e-6:
        assert found.state == "ok"
    if abs(off_s) > network.MAX_SKEW_S + unsure_s:
        assert found.state == "failed"
        (told,) = re.findall(r"is ([0-9.]+) s", found.sentence)
        assert abs(off_s) - unsure_s - 0.1 <= float(told) <= abs(off_s) + 0.1


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_hosts_with_their_cable_in_and_out():
    with Hosts("a", "b") as hosts:
        address = hosts.addresses["b"]
        words = ("--check", "--json", "--role", "gateway", "--port", "0", "--coordinator", f"tcp://{address}:5555")
        command = hosts.on("a", sys.executable, "-m", "msi_launch", *words, "--hosts", address, "--insecure-network")
        states = {}
        for state in ("up", "down"):
            hosts.set_link("b", state)
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            found = {one["check"]: one["state"] for one in json.loads(done.stdout)["findings"]}
            states[state] = (done.returncode, found["coordinator"], found[f"host {address}"])
    assert states == {"up": (0, "warning", "ok"), "down": (2, "failed", "failed")}


# -- RDMA ------------------------------------------------------------------------------------------------------------


def test_rdma_that_cannot_work_fails_where_it_was_asked_for(monkeypatch):
    driver = LoopbackDriver(Fabric())
    assert network.check_rdma(RdmaOptions(), "rdma", driver).state == "ok"
    assert network.check_rdma(RdmaOptions(), "tcp").state == "ok"
    assert "there are:" in says_what_to_do(network.check_rdma(RdmaOptions(rdma_device="none"), "rdma", driver))
    wrong_gid = RdmaOptions(rdma_gid="203.0.113.9")
    assert "GID" in says_what_to_do(network.check_rdma(wrong_gid, "rdma", driver))
    monkeypatch.setattr(LoopbackDriver, "devices", lambda self: [])
    assert "no RDMA device" in says_what_to_do(network.check_rdma(RdmaOptions(), "rdma", driver))
    fallback = network.check_rdma(RdmaOptions(), "auto", driver)
    assert fallback.state == "ok"
    assert "TCP" in fallback.sentence


# -- the model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_a_model_directory_that_is_none(tmp_path):
    assert "give a Hugging Face model directory" in says_what_to_do(found(tmp_path, "--port", 0)["model"])


def test_a_family_that_is_not_known(copied):
    config = copied / "config.json"
    config.write_text(config.read_text().replace("MixtralForCausalLM", "LlamaForCausalLM"))
    checks = found(copied, "--port", 0)
    assert "LlamaForCausalLM" in says_what_to_do(checks["model"])
    assert "weights" not in checks


def test_weights_that_are_cut_or_gone(copied):
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    says_what_to_do(found(copied, "--port", 0)["weights"])
    weights.unlink()
    says_what_to_do(found(copied, "--port", 0)["weights"])
    assert found(copied, "--port", 0, "--load-format", "dummy")["weights"].state == "ok"


def test_texts_that_cannot_be_read(copied):
    assert found(copied, "--port", 0)["tokenizer"].state == "warning"  # it has no chat template
    (copied / "chat_template.json").write_text("{")
    says_what_to_do(found(copied, "--port", 0)["tokenizer"])
    (copied / "chat_template.json").unlink()
    (copied / "tokenizer.json").unlink()
    assert "token ids" in found(copied, "--port", 0)["tokenizer"].advice


def test_memory_that_is_too_little(tiny_model):
    little = replace(ENOUGH, free_bytes=1 << 20)
    checks = found(tiny_model, "--port", 0, "--attention-workers", 2, limits=little)
    assert "are free" in says_what_to_do(checks["memory"])
    assert "each of 2 takes" in checks["memory of attention workers"].sentence
    assert found(tiny_model, "--port", 0)["memory"].state == "ok"
    assert found(tiny_model, "--port", 0, limits=replace(ENOUGH, free_bytes=-1))["memory"].state == "warning"


def test_memory_for_one_sequence_but_not_for_all_is_a_warning(tiny_model):
    options = InstanceOptions.of(model=tiny_model)
    (_, config) = model.check_config(options)
    shape = model.shape_here(options, config)
    need = model.need_of_attention(options, shape, 512)
    assert need.weights < need.least < need.full
    assert need.full - need.least == pytest.approx(63 * 512 * shape.kv_bytes_per_token)
    experts = model.need_of_experts(options, shape)
    free = need.least + experts.least + 1000
    *_, last = model.check_memory(options, shape, 512, (1, 1), free)
    assert last.state == "warning"


def test_the_weights_of_all_workers_are_those_of_the_checkpoint(tiny_model):
    options = InstanceOptions.of(model=tiny_model, expert_workers=1, dtype="float32")
    (_, config) = model.check_config(options)
    shape = model.shape_here(options, config)
    both = model.need_of_attention(options, shape, 512).weights + model.need_of_experts(options, shape).weights
    assert both == pytest.approx((tiny_model / "model.safetensors").stat().st_size, rel=0.1)


@pytest.mark.parametrize("word", ["", "a:b", "a:0", "a:99999", "http://a", "a,,b", "[::1"])
def test_hosts_are_names_with_or_without_ports(word):
    with pytest.raises(ConfigError, match="--hosts"):
        parse(["--check", "--hosts", word])


def test_hosts_may_be_several():
    told = parse(["--check", "--hosts", "a,b:80,[::1]:81,::1"])
    assert told.hosts == (Peer("a", 0), Peer("b", 80), Peer("::1", 81), Peer("::1", 0))
