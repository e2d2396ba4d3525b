"""Counts of what a step asks for (parameters, tokens, operations, bytes) and what GPUs can give."""
