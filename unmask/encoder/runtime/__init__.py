"""Running packs on a device: CPU and CUDA runtimes, batch-invariant linear layers, 8-bit weights."""
