"""The vector cache, by what it does."""
