"""llama.cpp's server, of the package xllamacpp.

PYTHON tools/clients/llama_server.py FILE PORT THREADS SEQUENCES CONTEXT, which is tokens of all sequences together.
"""

from __future__ import annotations

import signal
import sys

from xllamacpp import CommonParams, Server


def main() -> None:
    params = CommonParams()
    params.model.path = sys.argv[1]
    params.port, params.cpuparams.n_threads, params.n_parallel, params.n_ctx = map(int, sys.argv[2:6])
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.n_gpu_layers = 0
    params.cache_ram_mib = 0
    params.ui = False
    server = Server(params)
    print(f"listening at {server.listening_address}", file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
