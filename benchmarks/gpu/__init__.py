"""make gpu-check: is the GPU right, how fast is it, and what limits it."""
