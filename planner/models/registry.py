"""From a name, a Hugging Face id, a folder or a config.json to a model: its family, geometry and
modules. Nothing is read that is not asked for, and nothing from the network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem, nearest_name
from planner.models.decoder import DecoderGeometry
from planner.models.families import Family, family_of
from planner.models.tree import ModelTree

CATALOGUE = Path(__file__).with_name("catalogue")
ALIASES = "aliases.json"
_MAX_CONFIG_BYTES = 64 << 20  # Chameleon's vocabulary map is 2 MB; nothing real is near this


@dataclass(frozen=True)
class Model:
    """A model as the planner knows it.

    id: catalogue id or path; source: where its config was read (a URL or a path); verified: the
    config was read there, not inferred; note: what an unverified entry is based on.
    """

    id: str
    model_type: str
    family: Family
    geometry: Any
    config: Mapping[str, Any] = field(compare=False, repr=False)
    source: str
    verified: bool
    note: str = ""

    @property
    def text(self) -> DecoderGeometry:
        """The decoder's numbers."""
        text: DecoderGeometry = self.geometry.text
        return text

    @cached_property
    def tree(self) -> ModelTree:
        """Every module with parameters, in torch's order."""
        return ModelTree(tuple(self.family.modules(self.geometry)))

    def image_tokens(self, image_size: int | None = None) -> int:
        """Positions one square image takes; InputError for a model without images."""
        return self.family.image_tokens(self.geometry, image_size)


@lru_cache(maxsize=64)
def load_model(name_or_path: str) -> Model:
    """The model of a catalogue name or alias, of a Hugging Face id in the local Hub cache, of a
    folder with a config.json, or of a config.json.

    Raises InputError (nothing of that name; a config that cannot be read) and UnsupportedError
    (a model_type of no known family).
    """
    entry = _catalogue_path(name_or_path)
    if entry is not None:
        return _from_entry(entry)
    path = _config_path(name_or_path)
    if path is None:
        near = nearest_name(name_or_path, known_names())
        allowed = "a name of `vramwise models`, a model in the Hub cache, a folder or a config.json"
        raise InputError(Problem("model", "is not known", name_or_path, allowed, near))
    return model_from_config(_read_json(path), name_or_path, str(path))


def model_from_config(config: object, name: str, source: str = "", verified: bool = True,
                      note: str = "") -> Model:  # fmt: skip
    """A model of a parsed config.json; errors name the key that is wrong."""
    if not isinstance(config, Mapping):
        raise InputError(Problem("config", "is not a JSON object", config))
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(
            Problem("config.model_type", "is missing" if model_type is None else "is not a string",
                    model_type, "the name of a family, such as llama")
        )  # fmt: skip
    family = family_of(model_type)
    geometry = family.geometry(config)
    return Model(name, model_type, family, geometry, config, source, verified, note)


def catalogue_ids() -> list[str]:
    """Ids of the catalogue, in order of name, without opening any file."""
    names = (path.stem for path in CATALOGUE.glob("*--*.json"))
    return sorted((name.replace("--", "/", 1) for name in names), key=str.lower)


def catalogue() -> Iterator[Model]:
    """Every model of the catalogue."""
    return (load_model(name) for name in catalogue_ids())


def known_names() -> list[str]:
    """Ids and aliases."""
    return [*catalogue_ids(), *_aliases()]


def aliases_of(model_id: str) -> list[str]:
    """Other names of a catalogue id, the same shapes under another id among them."""
    return [alias for alias, target in _aliases().items() if target == model_id]


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    """The short name of each id ("facebook/chameleon-7b": "chameleon-7b"), and aliases.json."""
    short = {name.partition("/")[2].lower().removesuffix("-hf"): name for name in catalogue_ids()}
    named: dict[str, str] = json.loads((CATALOGUE / ALIASES).read_text(encoding="utf-8"))
    return {**short, **named}


@lru_cache(maxsize=1)
def _by_folded_name() -> dict[str, str]:
    names = {alias.lower(): target for alias, target in _aliases().items()}
    return {**names, **{name.lower(): name for name in catalogue_ids()}}


def _catalogue_path(name: str) -> Path | None:
    target = _by_folded_name().get(name.strip().lower())
    return CATALOGUE / f"{target.replace('/', '--', 1)}.json" if target else None


@lru_cache(maxsize=256)
def _from_entry(path: Path) -> Model:
    entry = json.loads(path.read_text(encoding="utf-8"))
    model_id = path.stem.replace("--", "/", 1)
    note = entry.get("note", "")
    return model_from_config(entry["config"], model_id, entry["source"], entry["verified"], note)


def _config_path(name: str) -> Path | None:
    cached = _cached_config(name)
    if cached is not None:
        return cached
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError):  # too long for a path; ~ of a user that does not exist
        return None
    if is_folder:
        config = path / "config.json"
        if not config.is_file():
            raise InputError(Problem("model", "is a folder without a config.json", name))
        return config
    return path if path.is_file() else None


def _cached_config(name: str) -> Path | None:
    """config.json of an id in the local Hub cache: of its main revision, or else the newest."""
    owner, slash, repository = name.partition("/")
    if not slash or "/" in repository or name.startswith((".", "/", "~")):
        return None
    hub = _hub_cache()
    if not hub.is_dir():
        return None
    wanted = f"models--{owner}--{repository}".lower()
    for folder in hub.iterdir():
        if folder.name.lower() == wanted:
            return _snapshot_config(folder)
    return None


def _snapshot_config(folder: Path) -> Path | None:
    reference = folder / "refs" / "main"
    if reference.is_file():
        revision = reference.read_text(encoding="utf-8").strip()
        config = folder / "snapshots" / revision / "config.json"
        if config.is_file():
            return config
    found = list(folder.glob("snapshots/*/config.json"))
    return max(found, key=lambda config: config.stat().st_mtime, default=None)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models: HF_HUB_CACHE, HF_HOME/hub, or the user's cache."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface" / "hub"


def _read_json(path: Path) -> object:
    problem: str
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InputError(Problem("model", "is too large for a config.json", str(path)))
        text = path.read_text(encoding="utf-8-sig")
        if text.strip():
            return json.loads(text)
        problem = "is empty"
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error}"
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        problem = f"cannot be read: {error}"
    raise InputError(Problem("model", problem, str(path)))
