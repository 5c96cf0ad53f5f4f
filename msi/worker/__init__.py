"""A worker process: what it is told, loads, and hosts."""
