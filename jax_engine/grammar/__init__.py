"""The form of an output: grammars, who tries them out, and masks of the tokens that may come. Needs no JAX."""
