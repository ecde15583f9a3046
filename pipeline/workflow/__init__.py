"""What a run is: what the Snakefile and the commands ask. Nothing below knows it."""
