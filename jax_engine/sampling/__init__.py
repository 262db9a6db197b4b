"""What becomes of a step's logits: the draw, what changes it, log-probabilities, and pooled vectors."""
