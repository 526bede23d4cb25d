"""Commands: each parses its arguments, builds, and runs."""
