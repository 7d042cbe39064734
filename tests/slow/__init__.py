"""Slow checks: run by hand, see docs/reliability.md. The tests run their short forms."""
