"""How a model lies on a mesh of devices: strategies as data, and a model laid out by one."""
