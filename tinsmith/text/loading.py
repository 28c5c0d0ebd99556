"""Find a tokenizer in a file, a folder, an old GPT-2 folder, or on the Hugging Face Hub."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tinsmith.core.errors import UserError
from tinsmith.core.log import print_line
from tinsmith.text.specials import END_OF_TEXT, as_added

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_MODEL_FILES = ("config", "generation_config")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GPT2_CLASSES = ("", "GPT2Tokenizer", "GPT2TokenizerFast")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class FolderSettings(NamedTuple):
    """Settings of a model's folder that an export writes back unchanged."""

    tokenizer_config: dict[str, Any] = {}
    """`tokenizer_config.json` without roles and chat template."""
    special_ids: dict[str, Any] = {}
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of `config.json`."""
    generation: dict[str, Any] = {}
    """Content of `generation_config.json`, such as sampling defaults."""


class TokenizerFiles(NamedTuple):
    """A tokenizer as it is stored: path, text of `tokenizer.json`, roles, and chat template."""

    path: Path
    settings: str
    roles: dict[str, str]
    """Names of tokens by `bos_token`, `eos_token`, `pad_token` and `unk_token`."""
    chat_template: str | None
    folder_settings: FolderSettings


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
        return _open(folder, _from_vocabulary(folder), folder)
    raise UserError(f"{folder}: has no tokenizer.json (nor vocab.json with merges.txt)")


def _from_file(path: Path) -> TokenizerFiles:
    return _open(path, _read(path), path.parent)


def _open(path: Path, settings: str, folder: Path) -> TokenizerFiles:
    """Read the roles of special tokens, the chat template and the settings of a folder."""
    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path)
    model, generation = (_read_object(folder / f"{name}.json") for name in _MODEL_FILES)
    templates = config.pop("chat_template", None)
    template_path = folder / "chat_template.jinja"
    tokens = config | {
        role: token
        for role, token in _read_object(folder / "special_tokens_map.json").items()
        if config.get(role) is None
    }
    try:
        names = {role: _token_name(tokens.get(role)) for role in _ROLES}
        if isinstance(templates, list):
            templates = {item["name"]: item["template"] for item in templates}.get("default")
        template = _read(template_path) if template_path.is_file() else _token_name(templates)
    except (TypeError, KeyError):
        raise UserError(f"{config_path}: a token or a template in it is not text") from None
    roles = {role: name for role, name in names.items() if name is not None}
    for role in ("bos_token", "eos_token"):
        if role not in tokens:
            roles |= _role_from_id(role, generation | model, settings)
    return TokenizerFiles(
        path,
        settings,
        roles,
        template,
        FolderSettings(
            {key: value for key, value in config.items() if key not in _ROLES},
            {key: model[key] for key in _SPECIAL_IDS if key in model},
            generation,
        ),
    )


def _role_from_id(role: str, ids: dict[str, Any], settings: str) -> dict[str, str]:
    """Return the token with the id that a model's config gives to a role, if there is one."""
    value = ids.get(f"{role}_id")
    token_id = value[0] if isinstance(value, list) and value else value
    try:
        added = json.loads(settings)["added_tokens"]
        names = [token["content"] for token in added if token["id"] == token_id]
    except (ValueError, KeyError, TypeError):  # not a tokenizer.json; `Tokenizer` says so
        names = []
    return {role: names[0]} if names else {}


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
