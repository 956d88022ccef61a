"""Images on disk to batches of augmented views."""
