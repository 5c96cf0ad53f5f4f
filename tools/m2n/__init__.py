"""What `tools/bench_m2n.py` compares: one file per family of systems, and what starts, times and draws them."""
