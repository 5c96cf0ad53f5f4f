"""What tools/gpu_check looks at on a machine with a GPU, a file per section."""
