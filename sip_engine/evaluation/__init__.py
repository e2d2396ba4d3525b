"""Evaluation: held-out prefixes during a run; `sip eval` with the paper's sets, lm-eval and intervals."""
