"""Postgres: connections, what is pending, the target table and what waits. Knows no torch."""
