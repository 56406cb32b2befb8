"""What is known ahead, as frozen rows: models, licences, precisions, kernels of attention, GPUs."""
