"""The model in memory, the only home of torch: families, loading, compiling, attention, offload, step cache."""
