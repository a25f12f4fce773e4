"""What learns takes minutes and several seeds: `make claims`, or `python -m tests.claims [NAME ...]`.

Each claim trains, measures, and is written to docs/claims/NAME.md with seed, time and command, whether it held or
not. Exits 1 if one did not hold.
"""
