"""Model folders, their weights on the way to the devices, and converted checkpoints."""
