"""The policy: Megatron-core's model, its update, its weights as the sampler sees them."""
