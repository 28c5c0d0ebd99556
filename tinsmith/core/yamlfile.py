"""Read and write YAML. Errors are one line with file and line number.

Differences from PyYAML's safe loader: a key that occurs twice in a mapping is an error, numbers are
decimal (`0123` is 123, `1:30` and dates are text), and integers have at most 64 bits. PyYAML is
imported inside functions, so that importing a model does not load it.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from tinsmith.core.errors import UserError
from tinsmith.core.parse import did_you_mean

MAX_INT = 2**63 - 1


def read_yaml(path: Path) -> Any:
    """Read a YAML file. Raise UserError with file and line if it cannot be read."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_nearest_file(path)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text. Raise UserError that begins with `where` and the line if it is not valid."""
    import yaml

    try:
        return _loader()(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {reason}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None


def write_yaml(data: Any) -> str:
    """Write plain data as YAML text and keep the order of keys."""
    import yaml

    return yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )


@cache
def _loader() -> Any:
    import yaml
    from yaml.constructor import ConstructorError

    SafeLoader: Any = yaml.SafeLoader

    class Loader(SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            """Check the keys as written, before merge keys (`<<`) add those of other mappings."""
            seen: set[str] = set()
            pairs: list[tuple[Any, Any]] = [] if hasattr(node, "is_checked") else node.value
            for key_node, _ in pairs:
                key = str(getattr(key_node, "value", ""))
                if key in seen and key != "<<":
                    problem = f"the key '{key}' occurs twice"
                    raise ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
            node.is_checked = True
            SafeLoader.flatten_mapping(self, node)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return SafeLoader.construct_object(self, node, deep)
            except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
                raise ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_int(loader: Any, node: Any) -> Any:
        text = str(loader.construct_scalar(node))
        if ":" in text:
            return text
        digits = text.replace("_", "")
        if len(digits) > 100:
            raise ValueError(f"a number of {len(digits)} digits is too large")
        number = int(digits) if re.fullmatch(r"[-+]?[0-9]+", digits) else int(digits, 0)
        if abs(number) > MAX_INT:
            raise ValueError(f"{number} is too large")
        return number

    def construct_float(loader: Any, node: Any) -> Any:
        text = str(loader.construct_scalar(node))
        return text if ":" in text else loader.construct_yaml_float(node)

    def construct_text(loader: Any, node: Any) -> Any:
        return loader.construct_scalar(node)

    Loader.add_constructor("tag:yaml.org,2002:int", construct_int)
    Loader.add_constructor("tag:yaml.org,2002:float", construct_float)
    Loader.add_constructor("tag:yaml.org,2002:timestamp", construct_text)
    return Loader


def _nearest_file(path: Path) -> str:
    names = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, names)
