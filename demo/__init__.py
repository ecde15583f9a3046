"""The demo: an embedded Postgres, a made-up marketplace, and the same workflow a user runs."""
