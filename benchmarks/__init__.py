"""Commands that produce the figures in docs/."""
