"""From files to a model on the device: tensors, rounding, layers."""
