"""The built-in chat model: a small Llama, with the generator and the training code that made it (see README.md)."""

from pathlib import Path

DEMO_DIR: Path = Path(__file__).parent
"""The checkpoint's folder, in Hugging Face's layout."""

DEMO_DRAFT_DIR: Path = DEMO_DIR / "draft"
"""That of its draft model."""
