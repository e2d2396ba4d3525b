"""Training the judge and the rewriter themselves: data with known answers, and the grading of replies."""
