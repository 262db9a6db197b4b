"""Where the configuration of a model that is planned for comes from; nothing else of it is needed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_engine.loading.model_files import ModelLoadError, resolve_model_path

CONFIGS = Path(__file__).parent / "configs"


def built_in_models() -> tuple[str, ...]:
    """Names of the models whose configurations come with the package, for examples without a network."""
    return tuple(sorted(file.stem for file in CONFIGS.glob("*.json")))


@contextmanager
def model_folder(name: str | None, *, revision: str | None = None) -> Iterator[Path]:
    """A folder with the `config.json` of a model: a folder, a built-in name, or a model of the Hugging Face hub, of
    which no more than that file is fetched.

    Raises:
        ModelLoadError: there is no such model.
    """
    if name is None or name in ("demo", "demo-draft") or Path(name).expanduser().exists():
        yield resolve_model_path(name)
        return
    if name.lower() in built_in_models():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(CONFIGS / f"{name.lower()}.json", Path(folder) / "config.json")
            yield Path(folder)
        return
    if "/" not in name:
        raise ModelLoadError(
            f"model {name!r} is no folder here, no name of the Hugging Face hub (OWNER/NAME), and none of the built-in "
            f"configurations, which are {', '.join(built_in_models())}"
        )
    yield _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    # Imported when needed: its HTTP client takes longer to import than a local file to read.
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision)).parent
    except (OSError, HFValidationError) as error:  # OSError: no network, no such repository, no access
        reason = str(error).strip().partition("\n")[0]
        raise ModelLoadError(
            f"model {name!r} is no folder here, and its config.json could not be fetched from the Hugging Face hub "
            f"({reason}); give a folder with that file, or a built-in name: {', '.join(built_in_models())}"
        ) from error
