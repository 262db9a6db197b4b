"""The engine core's loop, its processes, and what crosses between them and the front ends."""
