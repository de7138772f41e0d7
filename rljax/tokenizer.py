"""Text to token ids and back: chat template, stop ids, and a character tokenizer for procedural tasks.

A tokenizer is `tokenizer.json` plus `tokenizer_config.json`, read and applied by transformers, never by code in the
folder. transformers is imported when a tokenizer is made (1 s), not when this module is; it does not need torch.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rljax.config import ConfigError

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

_CHARACTER_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in [ROLES] -%}{{- raise_exception('unknown role ' + message.role) -}}{%- endif -%}"
    "{{- '<' + message.role + '>' + message.content -}}"
    "{%- if message.role == 'assistant' -%}{{- '<eos>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)


class Tokenizer:
    """A fast tokenizer with what sampling needs to know: when to stop and which ids exist.

    Attributes:
      stop_ids: a completion ends with any of these; base and instruct models of one family differ (paper 4.4).
      pad_id: filler that masks never look at; base models pad with their own end token.
      vocab_size: ids in use. The model may have more rows; ids >= vocab_size must never be sampled.
    """

    def __init__(self, backend: Any, stop_ids: Sequence[int], *, source: str = "built here") -> None:
        """`backend`: a `transformers.PreTrainedTokenizerFast`. `source` is for messages."""
        self._backend = backend
        self._source = source
        self.stop_ids: tuple[int, ...] = tuple(stop_ids)
        self.vocab_size: int = len(backend)
        self.pad_id: int = self.stop_ids[0] if backend.pad_token_id is None else backend.pad_token_id
        unknown = [i for i in self.stop_ids if not 0 <= i < self.vocab_size]
        if unknown:
            raise ConfigError(
                f"stop ids {unknown} do not exist in the tokenizer of {source}, which has {self.vocab_size} tokens; "
                "set sampling.stop_token_ids to ids it has"
            )

    def render_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; a template may put in its own system message (Qwen2.5 does)."""
        if not self._backend.chat_template:
            raise ConfigError(
                f"the tokenizer of {self._source} has no chat template, and prompts are chat messages; "
                "give model.tokenizer = a folder whose tokenizer_config.json has a chat_template"
            )
        from jinja2 import TemplateError

        try:
            return self._backend.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {self._source} refuses messages with roles {[m.get('role') for m in messages]} "
                f"({error}); use roles it knows"
            ) from error

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation, `{"role": ..., "content": ...}` each, ready for the assistant to continue."""
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands: nothing is added; names of special tokens in it become those tokens."""
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # what tokenizers raises for a character outside the vocabulary
            raise ConfigError(
                f"text {text[:60]!r} cannot be encoded by the tokenizer of {self._source} ({error}); "
                "use characters of its vocabulary"
            ) from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def save(self, folder: str | Path) -> None:
        """Writes the files that transformers (4 and 5) and `load_tokenizer` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend = self._backend
        backend.backend_tokenizer.save(str(folder / "tokenizer.json"))
        # Not save_pretrained: version 5 writes a class name and a list of extra tokens that version 4 cannot read.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": backend.model_max_length,
            **{f"{name}_token": getattr(backend, f"{name}_token") for name in ("bos", "eos", "pad", "unk")},
        }
        if backend.chat_template:
            config["chat_template"] = backend.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load_tokenizer(path: str | Path, *, revision: str = "", stop_ids: Sequence[int] = ()) -> Tokenizer:
    """Tokenizer of a local folder or a hub name.

    Args:
      revision: hub commit; empty: the newest.
      stop_ids: empty: `eos_token_id` of the generation_config.json beside it, else the tokenizer's own end token.

    Raises:
      ConfigError: there is no such folder or name, or it has no tokenizer.json, or nothing says when to stop.
    """
    folder = find_folder(path, revision, _FILES)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{path} has no tokenizer.json; give a folder that has one (transformers' save_pretrained of a fast "
            "tokenizer writes it)"
        )
    backend = _transformers().PreTrainedTokenizerFast.from_pretrained(str(folder))
    if not stop_ids:
        generation = folder / "generation_config.json"
        found = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        found = backend.eos_token_id if found is None else found
        stop_ids = () if found is None else (found,) if isinstance(found, int) else found
    if not stop_ids:
        raise ConfigError(
            f"{path} names no end-of-sequence token, in generation_config.json or tokenizer_config.json; "
            "set sampling.stop_token_ids"
        )
    return Tokenizer(backend, stop_ids, source=str(path))


def character_tokenizer(
    alphabet: Sequence[str], *, roles: Sequence[str] = ("system", "user", "assistant")
) -> Tokenizer:
    """A tokenizer with one token a character: ids 0 `<pad>`, 1 `<eos>`, then `<role>` each, then the alphabet in order.

    A conversation reads `<user>12+7=<assistant>19<eos>`. It saves as any other tokenizer does.

    Raises:
      ConfigError: the alphabet repeats a character or holds a longer string, or `roles` lacks "assistant".
    """
    if any(len(c) != 1 for c in alphabet) or len(set(alphabet)) != len(alphabet):
        raise ConfigError(f"alphabet = {''.join(alphabet)!r} must be single characters, each once; remove the others")
    if "assistant" not in roles:
        raise ConfigError(f"roles = {tuple(roles)} must hold 'assistant', the role that is sampled; add it")
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Rust

    special = ["<pad>", "<eos>", *(f"<{role}>" for role in roles)]
    # No unknown token: a character outside the alphabet is an error, not a silent id.
    rust = Rust(models.WordLevel({token: i for i, token in enumerate([*special, *alphabet])}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    rust.decoder = decoders.Fuse()
    rust.add_special_tokens(special)
    template = _CHARACTER_TEMPLATE.replace("ROLES", ", ".join(f"'{role}'" for role in roles))
    return wrap_tokenizer(rust, [1], "a character alphabet", template, eos_token="<eos>", pad_token="<pad>")


def wrap_tokenizer(
    rust: Any, stop_ids: Sequence[int], source: str, chat_template: str, **special_tokens: str | None
) -> Tokenizer:
    """Tokenizer from a `tokenizers.Tokenizer`; `special_tokens`: `eos_token`, `pad_token`, `bos_token`, `unk_token`."""
    backend = _transformers().PreTrainedTokenizerFast(tokenizer_object=rust, **special_tokens)
    backend.chat_template = chat_template
    return Tokenizer(backend, stop_ids, source=source)


def find_folder(path: str | Path, revision: str, patterns: Sequence[str]) -> Path:
    """The local folder `path`, or the hub's snapshot of that name holding only the files that match `patterns`.

    Raises:
      ConfigError: neither.
    """
    if Path(path).is_dir():
        return Path(path)
    name = str(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise ConfigError(
            f"{name!r} is not a folder, and not a hub name (owner/name); give the path of a folder with safetensors "
            "and tokenizer files, or a hub name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # its own, its HTTP library's (which changes between versions), the system's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name!r}{f' at revision {revision!r}' if revision else ''} is not a folder here and could not be fetched "
            f"from the hub ({reason}); check the name and the connection, or give the path of a folder"
        ) from error


def _transformers() -> Any:
    # transformers advises to install torch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
