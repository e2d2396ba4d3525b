"""Objectives: what of a judged pool is trained on, and by which loss."""
