"""What is compiled, for which shapes and memory, where executables are kept, and what a compiler is told."""
