"""Pure torch functions on (B, C, H, W, D) tensors in RAS+ order: no randomness, no files, no host synchronisation."""
