"""The ground that every stage stands on."""
