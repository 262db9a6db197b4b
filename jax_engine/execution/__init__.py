"""One step: its packed input, the programs that compute it, and the devices that run them."""
