"""Products that read weights at the speed of memory on a CPU: compiled where they run, and used if that works."""
