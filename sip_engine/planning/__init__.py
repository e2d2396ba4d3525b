"""What a run will need and cost, before it starts: plan, launch, simulate. Reads configs; runs nothing."""
