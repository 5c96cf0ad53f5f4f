"""Products with bfloat16 weights on CPUs that compute in float32: compiled where they run, and used if that works."""
