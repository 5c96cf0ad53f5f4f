"""Imports point downwards only, and each library has one owner."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# lower layers first; a module may import its own layer and those below
LAYERS = [
    {
        "msi.errors", "msi.sampling_params", "msi.structured_outputs", "msi.prompt_logprobs", "msi.types",
        "msi.meter", "msi.tracing", "msi.request_spans", "msi.watchdog", "msi.complaints", "msi.control.lateness",
        "msi.parameters", "msi.precision", "msi.json_log",
    },
    {
        "msi.experts.waves", "msi.experts.wave", "msi.experts.pace", "msi.experts.batches", "msi.placement",
        "msi.placement_change",
        "msi.attention.scheduler", "msi.attention.admission",
        "msi.attention.sequence", "msi.attention.journal", "msi.attention.block_pool", "msi.attention.exchanged_blocks",
        "msi.attention.prompt_share",
        "msi.sampling", "msi.kernels", "msi.net", "msi.planner",
        "msi.settings",
    },
    {  # decisions about an instance, and its messages
        "msi.control.messages", "msi.control.client_messages", "msi.control.worker_status",
        "msi.control.members", "msi.control.roster", "msi.control.formation", "msi.control.membership",
        "msi.control.inheritance", "msi.control.leaving", "msi.control.waiting_for",
        "msi.control.calibration", "msi.control.clients", "msi.control.counters", "msi.control.lane_choice",
        "msi.control.suspects", "msi.control.routed", "msi.control.loads",
        "msi.control.moving", "msi.control.move_messages",
        "msi.control.request_routing", "msi.control.resuming", "msi.control.restarts",
        "msi.control.fair_queue", "msi.control.overload", "msi.control.prediction",
        "msi.control.watched", "msi.control.takeover", "msi.control.adoption", "msi.control.arrivals",
        "msi.control.placing", "msi.control.due_changes", "msi.control.expert_places", "msi.control.changes",
        "msi.control.orders", "msi.control.size_watch", "msi.control.rhythm",
        "msi.control.slowness", "msi.control.slow_workers", "msi.control.replacements",
        "msi.control.succession", "msi.options",
    },
    {"msi.device", "msi.models", "msi.text"},
    {"msi.attention", "msi.experts", "msi.worker"},
    {"msi.control", "msi.instance", "msi.engine", "msi.scored_prompts"},
    {"msi.server", "msi.simulator", "msi.profiler", "msi.offline"},
    {"msi"},  # what everybody imports from, and which imports nothing before it is asked for
    {"launch", "tools"},
]  # fmt: skip
OWNERS = {
    "zmq": {"msi/net/control.py", "msi/net/control_server.py", "msi/net/control_socket.py", "msi/net/pulse.py"},
    "msgpack": {"msi/net/codec.py"},
    "aiohttp": {
        "msi/server/gateway.py",
        "msi/server/endpoints.py",
        "msi/server/json_answers.py",
        "msi/server/websocket.py",
        "msi/server/door.py",
        "msi/server/request_body.py",
        "msi/server/events.py",
        "msi/server/page.py",
        "msi/server/event_stream.py",
    },
    "prometheus_client": {"msi/server/exposition.py"},
    "jinja2": {"msi/server/chat_template.py"},
    "triton": {"msi/kernels/"},
    "llguidance": {"msi/text/grammars.py"},
    "opentelemetry": {"msi/request_spans.py"},
    "ibverbs": {"msi/net/rdma/ibverbs_driver.py"},
    "pyverbs": {"msi/net/rdma/pyverbs_driver.py"},
    "uvloop": {"launch/main.py", "msi/profiler/process.py"},
    "pickle": set(),
}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, however deep inside it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer_of(module: str) -> int:
    while module:
        for index, names in enumerate(LAYERS):
            if module in names:
                return index
        module = module.rpartition(".")[0]
    raise AssertionError("not ours")


def test_every_module_has_a_layer():
    for path in python_files("msi", "launch", "tools"):
        layer_of(module_of(path).removesuffix("_launch"))


@pytest.mark.parametrize("path", python_files("msi", "launch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    ours = module_of(path)
    for imported in imports_of(path):
        if imported.partition(".")[0] in ("msi", "launch", "tools") and imported != "msi.errors":
            package = imported if (ROOT / imported.replace(".", "/")).with_suffix(".py").exists() else None
            package = package or (imported if (ROOT / imported.replace(".", "/")).is_dir() else None)
            if package is not None and package != "msi":
                assert layer_of(package) <= layer_of(ours), f"{ours} imports {package} from above"


@pytest.mark.parametrize("path", python_files("msi", "launch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_library_has_one_owner(path):
    name = str(path.relative_to(ROOT))
    for library, owners in OWNERS.items():
        if any(imported.split(".")[0] == library for imported in imports_of(path)):
            assert any(name.startswith(owner) for owner in owners), f"{name} imports {library}"


def test_kernels_know_nothing_of_msi():
    for path in python_files("msi/kernels"):
        assert not [name for name in imports_of(path) if name.startswith("msi") and not name.startswith("msi.kernels")]


def test_net_knows_no_layers_experts_or_requests():
    allowed = ("msi.net", "msi.errors", "msi.meter", "msi.parameters")
    for path in python_files("msi/net"):
        assert not [name for name in imports_of(path) if name.startswith("msi") and not name.startswith(allowed)]


def test_there_are_no_import_circles():
    files = {module_of(path): path for path in python_files("msi")}
    graph = {
        module: {name for name in imports_of(path) if name in files and name not in (module, "msi")}
        for module, path in files.items()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"import circle: {' -> '.join([*above, module])}"
        if module not in done:
            for name in graph[module]:
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_package_list_is_complete():
    listed = (ROOT / "pyproject.toml").read_text()
    for folder in {path.parent for path in python_files("msi")}:
        package = ".".join(folder.relative_to(ROOT).parts)
        assert f'"{package}"' in listed, f"{package} is missing in pyproject.toml"


@pytest.mark.parametrize(
    "module",
    [
        "msi",
        "msi_launch.main",
        "msi_launch.plan",
        "msi_launch.profile",
        "msi_launch.simulate",
        "msi_launch.ctl",
        "msi_launch.local",
        "msi.control.coordinator",
    ],
)
def test_torch_is_not_loaded_above_the_workers(module):
    """It takes a second and 200 MB: command lines answer at once, and coordinators stay small."""
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_who_asks_for_help_waits_for_little():
    """Each of these costs a command line a tenth of a second or more, and an instance one for each of its processes."""
    code = (
        "import sys, msi_launch.main; heavy = {'numpy', 'asyncio', 'aiohttp', 'rich', 'zmq'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_coordinator_and_a_worker_load_nothing_that_others_need():
    code = "import sys, msi_launch.processes; assert not {'aiohttp', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
