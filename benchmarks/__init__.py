"""What the pipeline does in a second, beside the plain way: commands, one JSON line each."""
