"""Which pairs of a pool are compared, and what the wins add up to."""
