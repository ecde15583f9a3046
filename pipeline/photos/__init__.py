"""Photos: from a storage_path to bytes, from bytes to pixels."""
