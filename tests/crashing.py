"""Workers that crash by a prompt: `environment` makes every Python process abort that computes it."""

from __future__ import annotations

from pathlib import Path

POISON = (5, 9, 66, 66)  # a prompt, or its beginning

SCRIPT = f"""
import os, sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Poisoned(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "msi.attention.requests":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def and_poison(module):
            execute(module)
            finish = module.Requests.finish

            def or_abort(self, lane, micro_batch, sampled):
                tokens = micro_batch.token_ids
                if any(tokens[at : at + {len(POISON)}] == {POISON} for at in range(len(tokens))):
                    os.abort()
                finish(self, lane, micro_batch, sampled)

            module.Requests.finish = or_abort

        spec.loader.exec_module = and_poison
        return spec

sys.meta_path.insert(0, Poisoned())
"""


def environment(folder: Path) -> dict[str, str]:
    """Variables for processes that are to crash."""
    (folder / "sitecustomize.py").write_text(SCRIPT)
    return {"PYTHONPATH": str(folder)}
