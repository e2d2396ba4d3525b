"""Scripts that start a run on a cluster: rendered from templates, checked beforehand."""
