"""pyverbs of this environment, or the distribution's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

DISTRIBUTION = Path("/usr/lib/python3/dist-packages")  # where Debian puts python3-pyverbs, for its own Python


def import_pyverbs() -> ModuleType:
    """Of this environment, else the distribution's own where it fits this Python, without all that lies beside it.

    Raises ImportError.
    """
    if "pyverbs" in sys.modules:
        return sys.modules["pyverbs"]
    if importlib.util.find_spec("pyverbs") is None:
        _offer(DISTRIBUTION / "pyverbs")
    return importlib.import_module("pyverbs")


def _offer(folder: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not (folder / f"qp{suffix}").exists():
        raise ImportError(f"there is none for this Python ({suffix}), here or in {folder}")
    spec = importlib.util.spec_from_file_location(
        "pyverbs", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyverbs"] = module
    spec.loader.exec_module(module)
