"""YAML files and flags to a `RunConfig`, and back to YAML.

Resolution order: dataclass defaults, then each YAML file left to right, then `--a.b value` flags; the last wins.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from rljax.config import ConfigError, RunConfig, field_value


def parse_config(argv: Sequence[str], *, prog: str = "rljax train") -> RunConfig:
    """Config from `[FILE.yaml ...] [--a.b value ...]`; flags win wherever they stand.

    Raises:
      ConfigError: a file is missing or holds no YAML mapping; a name is no setting; a value is not of its kind.
      SystemExit: after `--help`.
    """
    if "--help" in argv or "-h" in argv:
        import tyro  # 0.1 s

        off = tyro.conf.FlagConversionOff
        tyro.cli(RunConfig, args=["--help"], prog=prog, config=(off,), use_underscores=True)
    files, flags = _split_arguments(argv)
    given = _given([(read_yaml(file), f" in {file}") for file in files])
    for name, texts in flags:
        single = name in _KINDS and get_origin(_KINDS[name]) is not tuple
        if single and len(texts) != 1:
            raise ConfigError(
                f"--{name} was given {len(texts)} values{': ' * bool(texts)}{', '.join(texts)}; it takes one, write "
                f"--{name} VALUE, or --{name}=TEXT where the text begins with dashes"
            )
        given[name] = _read(name, texts[0] if single else texts, prefix="--")
    return _config(given)


def config_of(trees: Sequence[tuple[Mapping[str, Any], str]]) -> RunConfig:
    """Config of settings as YAML gives them, nested or by dotted name; of the trees, the last wins.

    Args:
      trees: each with the place it comes from, " in FILE", for messages.

    Raises:
      ConfigError: a name is no setting, a value is not of its kind, or together they contradict.
    """
    return _config(_given(trees))


def _given(trees: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, Any]:
    return {name: _read(name, value, where=where) for tree, where in trees for name, value in _flatten(tree).items()}


def _config(given: Mapping[str, Any]) -> RunConfig:
    """The defaults with the values `given` by dotted name."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    top, default = sections.pop("", {}), RunConfig()
    changed = {name: dataclasses.replace(getattr(default, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(default, **top, **changed)


COMMAND_LINE_ONLY = ("reward.file",)
"""Settings that name code: a file that somebody else may have written is not asked what to run."""


def _split_arguments(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(YAML files, [(name, values)]): `--a 1 2` is ("a", ["1", "2"]); after `--a=` any text is a value."""
    files: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif argument.endswith((".yaml", ".yml")):
            files.append(argument)
        elif flags:
            flags[-1][1].append(argument)
        else:
            raise ConfigError(
                f"{argument!r} is neither a YAML file nor a flag; give CONFIG.yaml files and --section.field VALUE"
            )
    return files, flags


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"algorithm": {"group_size": 8}} -> {"algorithm.group_size": 8}; a mapping where a value belongs stays one."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        descend = isinstance(value, dict) and name not in _KINDS and (value or name in _SECTIONS)
        flat |= _flatten(value, f"{name}.") if descend else {name: value}
    return flat


def _read(name: str, value: Any, *, prefix: str = "", where: str = "") -> Any:
    """`value`, as YAML or a flag gives it, as the kind of setting `name`; `prefix` and `where` are for the message."""
    if name in COMMAND_LINE_ONLY and not prefix and value:
        raise ConfigError(
            f"{name} = {value!r}{where} names code to run, and that is taken from the command line only; remove the "
            f"line and give --{name} {value}"
        )
    if value is None and (name in _KINDS or name in _SECTIONS):
        raise ConfigError(
            f"{name} = null{where}, and every field has a value; give one ('' is empty text), or remove the line to "
            "keep the default"
        )
    if name in _SECTIONS:
        field = next(known for known in _KINDS if known.startswith(f"{name}."))
        raise ConfigError(f"{prefix}{name}{where} is a section, not a value; give its fields, such as {prefix}{field}")
    if name not in _KINDS:
        nearest = " or ".join(f"{prefix}{known}" for known in _nearest(name))
        hint = f"perhaps you meant {nearest}; " if nearest else ""
        raise ConfigError(f"{prefix}{name}{where} is not a setting; {hint}`rljax train --help` lists them")
    kind = _KINDS[name]
    try:
        return _convert(value, kind)
    except (ValueError, OverflowError):
        required = _REQUIRED.get(kind) or f"one of {', '.join(get_args(kind))}"
        raise ConfigError(
            f"{prefix}{name} = {value!r}{where} must be {required}; give that, or leave it out for the default, "
            f"{field_value(RunConfig(), name)!r}"
        ) from None


def _nearest(name: str) -> list[str]:
    """Settings that `name` may be a slip of: what is spelt like it in its section, else in any."""
    section, _, field = name.rpartition(".")
    for known in ([k for k in _KINDS if k.rpartition(".")[0] == section], list(_KINDS)):
        near = difflib.get_close_matches(field, [k.rpartition(".")[2] for k in known], n=1)
        if near:
            return [k for k in known if k.rpartition(".")[2] == near[0]]
    return []


def _convert(value: Any, kind: Any) -> Any:
    """`value`, from YAML or as text, as `kind`; `ValueError` or `OverflowError` when it is something else.

    Text may be a number, for YAML 1.1 reads 1e-3 as text; nothing else becomes text, for 0012 is 10 by now.
    """
    origin = get_origin(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, get_args(kind)[0]) for item in value)
    if origin is Literal and value in get_args(kind):
        return value
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (int, float, str) and isinstance(value, str):
        return kind(value)
    if kind in (int, float) and type(value) in (int, kind):
        return kind(value)
    raise ValueError


_REQUIRED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    tuple[int, ...]: "a list of whole numbers, [1, 2] in YAML and 1 2 after a flag",
    tuple[str, ...]: "a list of texts, ['a', 'b'] in YAML and a b after a flag",
}


def _kinds(section: Any, prefix: str = "") -> dict[str, Any]:
    """{"algorithm.group_size": int} for every field of a section and of those inside it."""
    kinds: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        name = f"{prefix}{field.name}"
        kinds |= _kinds(field.type, f"{name}.") if dataclasses.is_dataclass(field.type) else {name: field.type}
    return kinds


_KINDS = _kinds(RunConfig)
_SECTIONS = {name.rpartition(".")[0] for name in _KINDS} - {""}


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; `ConfigError` when there is no such file or it is something else."""
    import yaml

    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"config file {file} does not exist; give the path of a YAML file such as configs/quickstart.yaml"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no UTF-8, a date that does not exist
        raise ConfigError(
            f"config file {file} is not YAML ({' '.join(str(error).split())}); fix the line or the bytes it names"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file {file} holds a {type(tree).__name__}; it must be a mapping: write `section:` and its "
            "`field: value` lines below"
        )
    return tree


def dump_config(config: RunConfig) -> str:
    """YAML that `parse_config` reads back to an equal config, but for what only the command line may say: a comment."""
    import yaml

    comments = [
        f"# given on the command line: --{name} {field_value(config, name)}\n"
        for name in COMMAND_LINE_ONLY
        if field_value(config, name)
    ]

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value

    tree = plain(config)
    for name in COMMAND_LINE_ONLY:
        section, _, field = name.rpartition(".")
        tree[section][field] = ""
    return "".join(comments) + yaml.safe_dump(tree, sort_keys=False)


# ------------------------------------------------------------------------------------------------- what may change

_MAY_CHANGE = (
    # Where a run is written, how long it goes on, what is seen of it.
    *("run_dir", "steps", "logging", "checkpoint", "evaluation.every", "reward.hack_meter"),
    *("watchdog_seconds", "optimizer.max_nonfinite_steps"),
    # What only other commands read.
    *("sft", "eval", "sample", "plan"),
    # Where and in which portions the same thing is computed: other devices, less memory.
    *("mesh", "model.remat", "algorithm.microbatch_tokens"),
    *("sampling.chunk_tokens", "sampling.cache_growth", "sampling.compact", "sampling.refill", "sampling.max_rows"),
    "reward.workers",
)
"""Fields, or whole sections, that a continued run may give anew; `config_differences` has the one exception."""


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any], *, but: Collection[str] = ()) -> list[str]:
    """`data.seed: 0 -> 1` for each field that changes what is computed; both are nested dicts of a RunConfig.

    Args:
      but: of the fields and sections that may change in a run, those that may not here.
    """
    old, new = dotted(saved), dotted(current)
    free = [name for name in _MAY_CHANGE if name not in but]
    if new.get("algorithm.aggregation") == "micro_batch_token_mean":  # how updates are split is part of this loss
        free.remove("algorithm.microbatch_tokens")
    lines = []
    for name in [*new, *(name for name in old if name not in new)]:
        if any(name == one or name.startswith(f"{one}.") for one in free):
            continue
        before, after = (side.get(name, "absent") for side in (old, new))
        if before != after:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def require_same_config(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to continue a run as another one.

    Raises:
      ConfigError: a field that changes what is computed differs; lists them all.
    """
    differences = config_differences(saved, current)
    if differences:
        raise ConfigError(
            f"run_dir = {current['run_dir']} holds a checkpoint of another configuration (saved -> now): "
            f"{'; '.join(differences)}. To continue it, give the saved values; to start anew, give another run_dir"
        )


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"seed": 0}} -> {"data.seed": 0}, tuples as the lists that YAML has; an empty mapping vanishes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
