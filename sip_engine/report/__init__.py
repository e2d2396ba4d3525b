"""The HTML report of one or more runs: drawing and nothing else."""
