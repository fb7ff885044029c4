"""Where a model is: in this package, in a folder, or on the hub under a name."""

from importlib import resources
from pathlib import Path

from dppo_cli.config.sections import Model
from dppo_cli.errors import ModelError

EMBEDDED = "embedded:"
GGUF = ".gguf"


def resolve_path(model: Model) -> str:
    """A folder, or a name on the hub. Raises ModelError for an embedded model or a folder that is not there.

    Of a folder with a GGUF file no other files are asked for.
    """
    path = model.path
    if path.startswith(EMBEDDED):
        root = Path(str(resources.files("dppo_cli.embedded")))
        folder = root / path.removeprefix(EMBEDDED)
        if not (folder / "config.json").is_file():
            names = sorted(p.parent.name for p in root.glob("*/config.json"))
            raise ModelError(f"there is no embedded model {folder.name!r}. Choices: {', '.join(names)}")
        return str(folder)
    if Path(path).is_dir():
        if model.gguf_file is None:
            _check_folder(Path(path))
        return path
    if Path(path).is_file() and path.endswith(GGUF):
        raise ModelError(f"model.path={path} is a file; write model.path={Path(path).parent} {use(Path(path).name)}")
    looks_local = path.startswith(("/", "./", "../", "~")) or path.count("/") != 1
    if looks_local:
        raise ModelError(f"there is no model folder {path} (in {Path.cwd()})")
    return path


def use(name: str) -> str:
    """What to type for a GGUF file."""
    return f"model.gguf_file={name}"


def _check_folder(folder: Path) -> None:
    has = {p.name for p in folder.iterdir()}
    for name in sorted(has):
        if not (folder / name).is_file() and not (folder / name).is_dir():
            raise ModelError(f"{folder / name} is not a file (a pipe, or a link to nothing); a model's files are")
    if "config.json" not in has:
        named = [name for name in sorted(has) if name.endswith(GGUF)]
        more = (
            f", but a GGUF file; add {use(named[0])}" if named else "; model.path must be a Hugging Face model folder"
        )
        raise ModelError(f"{folder} has no config.json{more}")
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in has):
        found = (
            " (pickled .bin weights are not read; convert them to safetensors)"
            if any(name.endswith(".bin") for name in has)
            else ""
        )
        raise ModelError(f"{folder} has no weights (*.safetensors){found}")
    if not has & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"}:
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json); copy it from the model it belongs to")


def unavailable(location: str, path: str, what: str, error: Exception) -> ModelError:
    """What to tell of a file that is broken, or that is neither here nor on the hub."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if Path(location).is_dir() or not isinstance(error, OSError):
        return ModelError(f"the {what} in {path} cannot be loaded: {reason}")
    name = path.split("/")[-1]
    return ModelError(
        f"found no {what} of {path}, neither in the local cache nor on the hub now; with a network, "
        f"`hf download {path} --local-dir {name}`, then add model.path={name}  ({reason})"
    )
