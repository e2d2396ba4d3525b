"""From raw text to the samples of a training step: documents, tokens, cuts and their order."""
