"""The sampler: rollouts of many groups at once, each group reading its prefix once."""
