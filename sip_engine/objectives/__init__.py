"""Objectives: what of a step is trained on, and by which loss; one file an objective."""
