"""The architectures that are timed, in plain PyTorch. All map a batch of B samples to outputs; none knows its loss."""
