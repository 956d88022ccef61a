"""Fast forms of slow steps, each beside the plain PyTorch function that defines it, with a test of equality."""
