"""Entry points: parse, validate, run."""
