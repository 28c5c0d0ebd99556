"""Find a tokenizer in a file, a folder, an old GPT-2 folder, or on the Hugging Face Hub."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.text.specials import END_OF_TEXT, as_added, our_template

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_GPT2_CLASSES = ("", "GPT2Tokenizer", "GPT2TokenizerFast")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class TokenizerFiles(NamedTuple):
    """Path, text of `tokenizer.json`, names of the BOS and EOS tokens, and chat template."""

    path: Path
    settings: str
    bos: str | None
    eos: str
    chat_template: str | None


def find_tokenizer(path_or_name: str | Path) -> TokenizerFiles:
    """Read the tokenizer at a path, or of that name on the Hub if the path does not exist."""
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        return _from_folder(path)
    name = str(path_or_name)
    if not _HUB_NAME.fullmatch(name) or ("/" in name and path.parent.exists()):
        raise UserError(f"{name}: no such file or folder; name a tokenizer.json or its folder")
    return _from_folder(_download(name))


def _from_folder(folder: Path) -> TokenizerFiles:
    for inner in (folder, folder / "final"):
        if (inner / "tokenizer.json").is_file():
            return _from_file(inner / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return TokenizerFiles(folder, _from_vocabulary(folder), *_roles(folder))
    raise UserError(f"{folder}: has no tokenizer.json (nor vocab.json with merges.txt)")


def _from_file(path: Path) -> TokenizerFiles:
    return TokenizerFiles(path, _read(path), *_roles(path.parent))


def _roles(folder: Path) -> tuple[str | None, str, str | None]:
    """Read BOS token, EOS token and the chat template (None: Tinsmith's) of a folder."""
    config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _read_object(config_path)
    templates = config.get("chat_template")
    try:
        bos, eos = (_token_name(config.get(role)) for role in ("bos_token", "eos_token"))
        if isinstance(templates, list):
            templates = {item["name"]: item["template"] for item in templates}.get("default")
        template = _read(template_path) if template_path.is_file() else _token_name(templates)
    except (TypeError, KeyError):
        raise UserError(f"{config_path}: a token or a template in it is not text") from None
    return bos, eos or END_OF_TEXT, None if template == our_template() else template


def _token_name(value: Any) -> str | None:
    """Return the name of a token, which may be given as an object with flags."""
    value = value["content"] if isinstance(value, dict) else value
    if not isinstance(value, str | None):
        raise TypeError(value)
    return value


def _from_vocabulary(folder: Path) -> str:
    """Convert GPT-2's `vocab.json` and `merges.txt` to the text of a `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    class_name = _read_object(folder / "tokenizer_config.json").get("tokenizer_class", "")
    if class_name not in _GPT2_CLASSES:
        raise UserError(
            f"{folder}: a {class_name} without tokenizer.json; transformers can write one"
        )
    vocabulary = _read_object(folder / "vocab.json")
    added = _read_object(folder / "added_tokens.json")
    lines = _read(folder / "merges.txt").replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version:")]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(a, b) for a, b in merges]))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{folder}: vocab.json and merges.txt do not agree: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [END_OF_TEXT] if END_OF_TEXT in vocabulary else []
    names += sorted((name for name in added if name not in names), key=lambda name: added[name])
    tokenizer.add_tokens(as_added(names))
    mismatched = [name for name in added if tokenizer.token_to_id(name) != added[name]]
    if mismatched:
        path = folder / "added_tokens.json"
        raise UserError(f"{path}: the id of '{mismatched[0]}' does not follow those of vocab.json")
    return tokenizer.to_str()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    print_line(f"fetching the tokenizer of {name} from the Hugging Face Hub", err=True)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: no such path, and the Hugging Face Hub answered: {reason}"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. A missing file gives an empty object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
