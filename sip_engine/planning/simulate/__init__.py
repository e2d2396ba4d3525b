"""The loop on a cluster as a discrete-event model: goodput by scale and checkpoint interval, and where it breaks."""
