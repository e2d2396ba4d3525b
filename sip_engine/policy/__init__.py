"""The policy: Megatron-core's model, its update, its weights as the sampler sees them."""

from sip_engine.utils.quiet import quiet_megatron

quiet_megatron()  # what is in this folder imports Megatron, however a process came here
