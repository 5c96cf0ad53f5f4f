"""Kernels compiled for GPUs that are not here, and what the assembler and the disassembler say of them.

Run as a program, for Triton's interpreter may be on in the tests' own process: requests as JSON on its standard input.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that a program can have
ARCHITECTURES = tuple(SHARED_BYTES)
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # their own way with tiles of 64 rows


@dataclass(frozen=True)
class Request:
    """A kernel with its arguments.

    Attributes:
        kernel: "module:name".
        types: of its arguments that are not constants, in Triton's words: "*bf16", "i32", "tensordesc<bf16[64, 64]>".
        constants: the others; "tl.bfloat16" is that type.
        unaligned: pointers and numbers that are not known to be multiples of 16.
        is_read: whether its instructions are asked for; the disassembler takes as long as the compiler.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    architecture: int = 90
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()
    is_read: bool = True


@dataclass(frozen=True)
class Compiled:
    """Attributes: bytes of shared memory and of stack, registers, and how often an instruction stands in the code."""

    shared: int
    stack: int
    registers: int
    instructions: dict[str, int] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.instructions.items() if re.match(pattern, name))


def compile_all(requests: list[Request]) -> list[Compiled]:
    """In a process of its own, which compiles as on a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"], input=json.dumps([asdict(one) for one in requests]),
        capture_output=True, text=True, timeout=90 + 15 * len(requests), cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [Compiled(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def assert_fits(request: Request, compiled: Compiled) -> None:
    """No register is spilt into memory, and the device has the shared memory. Where nobody read the instructions,
    there is no stack at all.
    """
    assert request.is_read or not compiled.stack, (request, compiled.stack)
    assert not compiled.count(r"LDL|STL"), (request, compiled.count(r"LDL|STL"))
    limit = SHARED_BYTES[request.architecture]
    assert compiled.shared <= limit, f"{request} wants {compiled.shared} bytes of shared memory of {limit}"


def assert_uses_tensor_cores(request: Request, compiled: Compiled) -> None:
    assert compiled.count(TENSOR_CORES[request.architecture]), (request, compiled.instructions)


def _compile(request: dict[str, Any]) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = request["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    types, unaligned = request["types"], request["unaligned"]
    constants = {
        key: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for key, value in request["constants"].items()
    }
    missing = [arg for arg in kernel.arg_names if arg not in types and arg not in constants]
    assert not missing, f"{name} wants {missing}"
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, arg in enumerate(kernel.arg_names)
        if types.get(arg, "tensordesc")[:6] != "tensor" and arg not in unaligned
    }
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    options = {"num_warps": request["num_warps"], "num_stages": request["num_stages"]}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", request["architecture"], 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(built.asm["cubin"])
        binary.flush()
        usage = _dump("--dump-resource-usage", binary.name)
        code = _dump("--dump-sass", binary.name) if request["is_read"] else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    found: dict[str, int] = {}
    for line in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, re.MULTILINE):
        found[line] = found.get(line, 0) + 1
    return Compiled(built.metadata.shared, int(stack), int(registers), found)


def _dump(what: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), what, path], capture_output=True, text=True, timeout=60, check=True).stdout


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(one)) for one in json.load(sys.stdin)]))
