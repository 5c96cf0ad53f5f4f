"""Numbers that stand in two places are the same in both: on a page and in the code, or on two pages."""

from __future__ import annotations

import re
import tomllib

import pytest

from msi import __version__, structured_outputs
from msi.attention import block_exchange
from msi.control import (
    arrivals,
    calibration,
    due_changes,
    moving,
    overload,
    rebalancing,
    request_routing,
    restarts,
    succession,
    suspects,
)
from msi.net import hedging, secret
from msi.planner import rebalance, replica_state
from msi.server import calls, completions, door, preparers, request_body
from msi.server.parsing import writing
from msi.simulator import workload
from msi_launch.arguments import parse
from tests.test_pages import PAGES, ROOT
from tools.check_clients import CLIENTS

LAUNCH = parse([])
OPTIONS = LAUNCH.options
STANDS = [
    ("launch/README.md", r"sequences that run at an attention worker \((\d+)\)", OPTIONS.limits.max_num_seqs),
    ("launch/README.md", r"and that wait there \((\d+)\)", OPTIONS.limits.max_num_waiting),
    ("launch/README.md", r"the rows of a landing slot \((\d+)\)", OPTIONS.link.slot_rows),
    ("launch/README.md", r"for KV cache; ([\d.]+) \|", OPTIONS.host.gpu_memory_utilization),
    ("launch/README.md", r"workers may take to come \((\d+)\)", OPTIONS.timeouts.start_timeout_s),
    ("launch/README.md", r"counts as lost \((\d+)\)", OPTIONS.timeouts.peer_timeout_s),
    ("launch/README.md", r"when its attention worker is lost \((\d+)\)", OPTIONS.max_resumptions),
    ("launch/README.md", r"on no worker any more \((\d+)\)", OPTIONS.timeouts.hold_timeout_s),
    ("launch/README.md", r"has owed for so long \((\d+)\)", OPTIONS.timeouts.hedge_after_ms),
    ("launch/README.md", r"at most (\d+) % of all turns", 100 * hedging.SHARE),
    ("launch/README.md", r"its rows go to the others for (\d+) s", hedging.FIRST_ASIDE_S),
    ("launch/README.md", r"late again soon after, up to (\d+) s", hedging.MOST_ASIDE_S),
    ("launch/README.md", r"later than (eight tenths) of it", {0.8: "eight tenths"}[overload.HEADROOM]),
    ("launch/README.md", r"looked at every S seconds \((\d+)\)", OPTIONS.rebalance.rebalance_interval_s),
    ("launch/README.md", r"more than F of its time \(([\d.]+)\)", OPTIONS.rebalance.rebalance_threshold),
    ("launch/README.md", r"longer by a share of F \(([\d.]+)\)", OPTIONS.balance.balance_attention_threshold),
    ("msi/control/README.md", r"no more than (\d+) are under way", moving.MOVES_AT_ONCE),
    ("msi/control/README.md", r"came less than (\d+) s", moving.RESTS_S),
    ("msi/control/README.md", r"at most (\d+) KB at a time", block_exchange.CHUNK_BYTES // 1024),
    ("msi/control/README.md", r"or more than (\d+) s, leaves", block_exchange.SENT_WITHIN_S),
    ("msi/control/README.md", r"none for the (third) time", {2: "third"}[moving.MOST_MOVES]),
    ("msi/control/README.md", r"fewer than (\d+) rows for each expert", rebalancing.LEAST_ROWS),
    ("msi/control/README.md", r"none has come for (three) seconds", {3.0: "three"}[arrivals.LULL_S]),
    ("msi/control/README.md", r"three seconds, (eight) at most", {8.0: "eight"}[arrivals.TAKEOVER_S]),
    ("msi/control/README.md", r"gone for (four) times", {4: "four"}[due_changes.REPLICAS_AFTER]),
    ("launch/README.md", r"replicas that were lost, after (\d) S", due_changes.REPLICAS_AFTER),
    ("msi/control/README.md", r"came to nothing, (ten) do", {10: "ten"}[rebalancing.REST_AFTER_FAILURE]),
    ("msi/control/README.md", r"that time, over (ten) windows", {10: "ten"}[rebalance.PAYBACK]),
    ("launch/README.md", r"where another one gains (\d+) %", round(100 * calibration.LEAST_GAIN - 100)),
    ("msi/planner/README.md", r"way counts as (twice) its computing", {2.0: "twice"}[replica_state.WAY]),
    ("launch/README.md", r"plan's by more than F \(([\d.]+)\)", OPTIONS.plan_drift),
    ("launch/README.md", r"127\.0\.0\.1 and (\d+); port 0", LAUNCH.port),
    ("launch/README.md", r"have S seconds \((\d+)\)", LAUNCH.shutdown_timeout_s),
    ("launch/README.md", r"N tokens \((\d+)\) at most", LAUNCH.max_tokens),
    ("launch/README.md", r"mode 600, (\d+)\ncharacters at least", secret.MIN_CHARS),
    ("launch/README.md", r"at the same address within (\d+) s", OPTIONS.timeouts.coordinator_grace_s),
    ("launch/README.md", r"has been silent for (\d+) s;", succession.SILENT_S),
    ("launch/README.md", r"later each time it dies again within \d+ s \(up to (\d+) s\)", restarts.MOST_DELAY_S),
    ("launch/README.md", r"later each time it dies again within (\d+) s", restarts.HEALTHY_AFTER_S),
    ("launch/README.md", r"refused after (\d+) s with a sentence", request_routing.WAIT_FOR_WORKERS_S),
    ("launch/README.md", r"is refused for (ten)\s+minutes", {600.0: "ten"}[suspects.SUSPECTED_FOR_S]),
    ("msi/server/README.md", r"up to (\d+) in a request", completions.MAX_TOTAL_CHOICES),
    ("msi/server/README.md", r"default (\d+); for chat", completions.DEFAULT_MAX_TOKENS),
    ("msi/server/README.md", r"a body above (\d+) MiB", request_body.MAX_BODY_BYTES / 2**20),
    ("msi/server/README.md", r"bodies above (\d+) KiB", calls.SMALL_BYTES / 2**10),
    ("msi/server/README.md", r"At most (\d+) KiB of schema", structured_outputs.MAX_BYTES / 2**10),
    ("msi/server/README.md", r"a call \(up to (\d+);", writing.MOST_CALLS),
    ("msi/server/README.md", r"each request within (\d+) s", preparers.WITHIN_S),
    ("msi/server/README.md", r"Headers have (\d+) s", door.HEADERS_WITHIN_S),
    ("msi/server/README.md", r"bodies (\d+) s", request_body.WHOLE_WITHIN_S),
    ("msi/server/README.md", r"reads\s+nothing for (\d+) s", door.UNREAD_S),
    ("msi/server/README.md", r"Up to (\d+) connections", door.MAX_CONNECTIONS),
    ("msi/simulator/README.md", r"lengths around (\d+) and", workload.MEDIAN_INPUT_LEN),
    ("msi/simulator/README.md", r"lengths around \d+ and (\d+)", workload.MEDIAN_OUTPUT_LEN),
]


@pytest.mark.parametrize(("page", "form", "value"), STANDS)
def test_a_page_says_what_the_code_does(page, form, value):
    found = re.findall(form, PAGES[page])
    assert found, f"{page} has nothing like {form}"
    for said in found:
        assert said == value or float(said) == value, f"{page} says {said}, the code has {value}"


def test_what_is_measured_is_the_same_on_the_first_page():
    """Its figures are those of tools/README.md, word for word."""
    section = PAGES["README.md"].split("## Three numbers")[1].split("\n## ")[0]
    figures = re.findall(r"\d[\d.,]*x|\b\d+ us\b", section)
    assert len(figures) == 9
    measured = PAGES["tools/README.md"].split("## Measured")[1]
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure.removesuffix('x'))}(?!\d)", measured), figure
    (median,) = re.findall(r"within ([\d.]+ %) of what this machine does", PAGES["README.md"])
    assert f"differ by **{median}** in the median" in measured


def test_clients_are_named_at_the_versions_that_are_run():
    table = PAGES["msi/server/README.md"].split("## Clients of vLLM")[1].split("\n## ")[0]
    run = {client.packages[0].partition("==")[::2] for client in CLIENTS.values()}
    for package, version in run:
        assert version in table, f"the page does not say {package} {version}"
    assert table.count("\n| ") == len(CLIENTS) + 1


def test_there_is_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "msi.__version__"}
    assert "version" in project["project"]["dynamic"]
    assert re.findall(r"^## \[([\d.]+)\]", PAGES["CHANGELOG.md"], flags=re.MULTILINE)[0] == __version__


def test_the_oldest_python_is_the_one_that_is_required():
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {least} to" in PAGES[page]
