"""The text side: requests checked and turned into tokens, and tokens turned into text. Needs no JAX."""
