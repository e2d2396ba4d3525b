"""Judges: they compare continuations and say whether a suffix is safe and true to its original."""
