"""LoRA adapters: their files, their weights in host memory and on the devices, and who has a slot."""
