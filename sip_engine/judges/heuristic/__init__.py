"""The heuristic judge: rules over the surface of a text."""
