"""Configuration: schema (what may be said), load (where it comes from), compat (what existing files also say)."""
