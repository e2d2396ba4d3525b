"""The synthetic world: documents with known faults, and a judge and a rewriter that know the truth."""
