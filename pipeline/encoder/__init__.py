"""The encoder: which one is asked for, and its tower that turns pixels into vectors."""
