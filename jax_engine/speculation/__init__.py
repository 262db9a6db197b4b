"""Speculative decoding: what is guessed, by whom, whether it pays, and what came of it."""
