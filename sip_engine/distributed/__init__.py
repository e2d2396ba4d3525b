"""Process groups: the parallel layout, and Megatron without CUDA."""
