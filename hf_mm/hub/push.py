"""One commit per push: weights, config, processor, card, and code for those who do not have hf_mm."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_token, validate_repo_id
from safetensors import SafetensorError, safe_open

from ..conversion.rules import listed
from ..trainers.recipes import RECIPE_FILE, RESULT_FILE
from .standalone import read_config, standalone_changes

CARD = "README.md"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORDS = {RECIPE_FILE, RESULT_FILE}  # of a run: pushed with the last part of each local path

# Folders and files that are no part of a model: logs of a training name the machine it ran on, features are of the
# pictures it saw.
LEFT_OUT = re.compile(r"\..*|__pycache__|checkpoint-\d+|runs|wandb|features|training_args\.bin")
PICTURES = "index/index.json"  # of an `ImageIndex`, whose folder is left out whole: it tells where its pictures are
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
TEMPORARY = {".tmp", ".lock", ".part", ".incomplete", ".swp"}
TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state(_\d+)?)\b.*\.(pt|pth|bin|safetensors)|trainer_state\.json"
)
# What a repository may hold of an earlier push that would be opened in place of, or on top of, this one's weights.
OPENED_FIRST = re.compile(
    r"(model|adapter_model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt"}  # large, and made of any string
MAX_TEXT = 10_000_000  # bytes; what is longer is not searched
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
ABSOLUTE_PATH = re.compile(r"~?(/[^/]+){2,}/?|[A-Za-z]:[/\\]\S.*")  # a whole string
PATH_IN_TEXT = re.compile(r"(?<![\w.%~/-])(/[^/\s'\":,]+){2,}/?")  # not the end of a URL
UNFILLED = re.compile(r"more information needed", re.IGNORECASE)

STATUS = {
    401: "the Hub refused the token, 401; `hf auth login` stores another",
    403: "the token may not write there, 403; one with write access to that namespace can",
    409: "someone made that repository at the same time, 409",
    412: "someone committed to it since this push began, 412, which is not overwritten",
}


class PushError(OSError):
    """A push failed: one sentence that says why, what the repository holds now, and what to run again."""


class UnfitError(ValueError):
    """Folder, card or repository are not fit for this push; nothing of it is in the repository."""


@dataclass(frozen=True)
class Push:
    """One folder on its way to one repository. The fields are the arguments of `push_folder`."""

    folder: Path
    repo_id: str
    private: bool = False
    revision: str | None = None
    commit_message: str | None = None
    create_pr: bool = False
    standalone: bool = True
    shim: bool = False

    @property
    def command(self) -> str:
        """What to run to do it again."""
        words = ["hf-mm", "push", str(self.folder), self.repo_id]
        words += ["--private"] * self.private + ["--create-pr"] * self.create_pr
        words += ["--revision", self.revision] if self.revision else []
        words += ["--message", self.commit_message] if self.commit_message else []
        words += ["--shim"] if self.shim else ["--no-standalone"] if not self.standalone else []
        return shlex.join(words)

    def run(self, api: HfApi) -> str:
        """Sends the commit. See `push_folder`."""
        card = _named_card(self.folder, self.repo_id)
        additions = list(self._additions(card))
        where = {"repo_id": self.repo_id, "revision": self.revision, "create_pr": self.create_pr}
        stage, head, made = "looking", None, False
        try:
            head = self._head(api)
            _ask_about_card(card)
            if head is None:
                stage = "making"
                api.create_repo(self.repo_id, private=self.private or None)  # None: the owner's default
                stage, made = "uploading", True
                head = self._head(api)
                if head is None:
                    raise OSError("the new repository cannot be seen yet")
            stage = "uploading"
            api.preupload_lfs_files(additions=additions, free_memory=False, **where)
            self._check_none_is_ignored(additions)
            stage = "committing"
            commit = api.create_commit(
                operations=[*additions, *_deletions(head, additions)],
                commit_message=self.commit_message or f"Push {self.folder.resolve().name}",
                parent_commit=head.sha,
                **where,
            )
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, UnfitError) and not made:
                raise
            raise PushError(
                f"the push of {self.folder} to {self.repo_id} failed ({_reason(error, api.token)}): "
                f"{self._left_after(api, stage, head, made, error)}; to push again run `{self.command}`."
            ) from error
        return commit.pr_url or commit.commit_url

    def _additions(self, card: str) -> Iterator[CommitOperationAdd]:
        """The files of the commit: generated ones from memory, the others streamed from their places."""
        generated = standalone_changes(self.folder, self.shim) if self.standalone or self.shim else {}
        names = files_to_push(self.folder)
        generated |= {name: _public_record(self.folder / name) for name in names if name in RECORDS}
        config = generated.get(CONFIG) or (self.folder / CONFIG).read_text(encoding="utf-8")
        generated |= {CONFIG: _public_config(self.folder / CONFIG, config), CARD: card}
        for name in sorted({*names, *generated}):
            content = generated[name].encode() if name in generated else self.folder / name
            yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)

    def _head(self, api: HfApi) -> ModelInfo | None:
        """The commit that the branch is at, with the names of its files; None where there is no repository."""
        try:
            info = api.model_info(self.repo_id, revision=self.revision)
        except RevisionNotFoundError as error:
            raise UnfitError(
                f"{self.repo_id} has no branch {self.revision!r}: make it first, or leave it out."
            ) from error
        except RepositoryNotFoundError:
            if self.revision not in (None, "main"):
                raise UnfitError(
                    f"there is no repository {self.repo_id}, and a new one has no branch {self.revision!r}: push to main "
                    "first."
                ) from None
            return None
        if self.private and not info.private:
            raise UnfitError(
                f"{self.repo_id} exists and is public: make it private there first, or leave private out."
            )
        return info

    def _check_none_is_ignored(self, additions: list[CommitOperationAdd]) -> None:
        """The client leaves what a ``.gitignore`` of the repository names out of the commit, without a word."""
        if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
            raise UnfitError(
                f"the .gitignore of {self.repo_id} leaves out {listed(ignored)}: take these patterns out of it first."
            )

    def _left_after(
        self, api: HfApi, stage: str, head: ModelInfo | None, made: bool, error: Exception | KeyboardInterrupt
    ) -> str:
        """What the Hub holds after a failure, in part of a sentence. May remove a repository that this push made."""
        url = f"{api.endpoint}/{self.repo_id}"
        is_lost = _is_answer_lost(error)
        if stage == "making" and is_lost:
            return f"if a repository was made all the same, it is empty: {url}"
        if stage in ("looking", "making"):
            return "nothing was sent"
        if stage == "committing" and is_lost:
            place = "discussions" if self.create_pr else f"commits/{self.revision or 'main'}"
            what = "pull request" if self.create_pr else "commit"
            return f"the {what} may be there, its answer lost, so look first at {url}/{place}"
        if not made:
            return "nothing of it is in the repository"
        return self._remove_if_untouched(api, head, url)

    def _remove_if_untouched(self, api: HfApi, head: ModelInfo | None, url: str) -> str:
        """Removes the repository that this push made, unless something was committed to it; what was done, in words.

        The Hub's delete takes no commit that it must find: a commit that arrives between this look and the delete, a
        moment later, is lost.
        """
        if head is None or self._has_moved(api, head):
            return (
                f"the repository that was made for it now holds something else or cannot be seen, and is left: {url}"
            )
        try:
            api.delete_repo(self.repo_id)
        except Exception:
            return f"the repository that was made for it is empty and could not be removed: {url}"
        return "the repository that was made for it is removed again"

    def _has_moved(self, api: HfApi, head: ModelInfo) -> bool:
        """Whether the branch is no more at the commit it was at; True where that cannot be seen."""
        try:
            now = self._head(api)
        except Exception:
            return True
        return now is None or now.sha != head.sha


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    standalone: bool = True,
    shim: bool = False,
) -> str:
    """Pushes a saved model to a repository of the Hub, in one commit that is there whole or not at all.

    The folder stays as it is: generated code, ``auto_map`` entries, the repository's name in the card, and a run's
    records and config without local paths exist in the commit alone. Hidden files, ``training_args.bin``, the folders
    ``checkpoint-…``, ``runs``, ``wandb`` and ``features``, and an `ImageIndex` in a folder ``index`` are left out. Files
    of the repository stay, but for weights and adapters of an earlier push that would be opened in place of these. The
    commit names the one it follows, so what someone else pushed in the meantime is never overwritten. A repository that
    does not exist is made; where the push then certainly fails before its commit and the repository is seen to be as it
    was made, it is removed again.

    Args:
        folder: with ``config.json``, weights in safetensors, ``README.md`` and what else `save_pretrained` left.
        repo_id: ``name/model``.
        private: make a new repository private.
        token: of the Hub; by default the one that is logged in.
        revision: branch that the commit goes to; ``main`` by default.
        commit_message: of the commit.
        create_pr: open a pull request in place of a commit to the branch.
        standalone: add the generated code that opens the model without hf_mm, see `hf_mm.hub.standalone`.
        shim: add the short form of it, which needs hf_mm installed.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: the folder or the id is not fit to be pushed; nothing was sent.
        PushError: the push failed; the sentence says what the repository holds and what to run again.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    check_folder(folder, token)
    push = Push(folder, repo_id, private, revision, commit_message, create_pr, standalone, shim)
    return push.run(HfApi(token=token))


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError where an id is none of a repository, or lacks its owner."""
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("the name of its owner is missing")
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id of a repository (name/model): {error}".replace("\n", " ")) from error


def files_to_push(folder: Path) -> list[str]:
    """Names of a folder's files, with subfolders, without what is no part of the model (`LEFT_OUT`, `PICTURES`)."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    indexes = {path.parent for path in folder.rglob(PICTURES)}
    names = [path.relative_to(folder) for path in paths if indexes.isdisjoint(path.parents)]
    return [name.as_posix() for name in names if not any(LEFT_OUT.fullmatch(part) for part in name.parts)]


def check_folder(folder: Path, token: str | None = None) -> None:
    """Whether a folder is fit to be pushed.

    Args:
        folder: of the saved model.
        token: of the Hub, which no file may hold; the one that is logged in is looked for in any case.

    Raises:
        ValueError: no config of a model of the table, weights or card; a card with blanks; weights that are cut short;
            pickles, temporary files, training state, links to files elsewhere; tokens or paths of this machine.
    """
    read_config(folder)
    names = files_to_push(folder)
    for wrong, found in (
        ("pickles, which run code when opened: save the weights as safetensors", _matching(names, PICKLES)),
        ("temporary files: remove them", _matching(names, TEMPORARY)),
        ("the state of a training: move it elsewhere", [n for n in names if TRAINING.fullmatch(Path(n).name)]),
        ("links to files elsewhere: copy these in", [n for n in names if not _is_inside(folder / n, folder)]),
    ):
        if found:
            raise ValueError(f"{folder} holds {wrong} ({listed(found)}).")
    if CARD not in names:
        raise ValueError(
            f"{folder} has no card: write its {CARD}, or let `hf-mm card {shlex.quote(str(folder))}` do it."
        )
    _check_card(folder)
    _check_weights(folder)
    tokens = [secret for secret in (token, get_token()) if secret and len(secret) > 8]
    for name in names:
        _check_text(folder, name, tokens)


def _check_card(folder: Path) -> None:
    try:
        card = ModelCard.load(folder / CARD)
    except Exception as error:  # of a YAML parser
        raise ValueError(f"the metadata of {folder / CARD} cannot be read: {_one_line(error)}") from error
    if unfilled := UNFILLED.search(card.content):
        raise ValueError(
            f"{folder / CARD} says {unfilled[0]!r}: fill it in, or let `hf-mm card {shlex.quote(str(folder))}` write "
            "another."
        )


def _check_weights(folder: Path) -> None:
    """Raises ValueError where weights are missing or cut short."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        content = _parsed(folder / INDEX, (folder / INDEX).read_text(encoding="utf-8", errors="replace"))
        try:
            names = sorted(set(content["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} has no weight_map: save the model again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks weights: {listed(missing)}.")
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is cut short or no safetensors file: {error}.") from error


def _check_text(folder: Path, name: str, tokens: list[str]) -> None:
    """Raises ValueError where a text holds an access token or a path of this machine."""
    path = folder / name
    if path.name in VOCABULARIES or path.stat().st_size > MAX_TEXT:
        return
    try:
        text = _public_record(path) if name in RECORDS else path.read_text(encoding="utf-8")
        text = _public_config(path, text) if name == CONFIG else text
    except UnicodeDecodeError:
        return
    if TOKEN.search(text) or any(token in text for token in tokens):
        raise ValueError(f"{path} holds an access token: take it out, and revoke it if it was ever shared.")
    found = [home for home in (str(Path.home()), str(folder.resolve())) if len(home) > 1 and _is_named(home, text)]
    if path.suffix == ".json":
        found += [value for value in _strings(_parsed(path, text)) if ABSOLUTE_PATH.fullmatch(value)]
    if found:
        raise ValueError(f"{path} holds a path of this machine, {found[0]!r}: take it out or leave the file out.")


def _is_named(folder: str, text: str) -> bool:
    """Whether a text names something in a folder, not in a URL that ends like it."""
    return re.search(rf"(?:(?<![\w.%~/-])|(?<=file://)){re.escape(folder)}/", text) is not None


def _public_record(path: Path) -> str:
    """The record of a run, of each local path only the last part."""
    content = _parsed(path, path.read_text(encoding="utf-8"))

    def public(value: str) -> str:
        if ABSOLUTE_PATH.fullmatch(value):
            return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return PATH_IN_TEXT.sub(lambda found: PurePosixPath(found[0]).name, value)

    return json.dumps(_map_strings(content, public), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _public_config(path: Path, text: str) -> str:
    """A config, of each local path that tells where a part came from only the last part."""
    content = _parsed(path, text)
    if not isinstance(content, dict):
        return text
    named = [(base, "name") for base in (content.get("base_models") or {}).values()]
    named += [(part, "_name_or_path") for part in content.values() if isinstance(part, dict)]
    local = [(part, key) for part, key in named if ABSOLUTE_PATH.fullmatch(part.get(key) or "")]
    for part, key in local:
        part[key] = re.split(r"[/\\]", part[key].rstrip("/\\"))[-1]
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n" if local else text


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """What JSON holds, with every string in it changed, those that are keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, list) else value


def _strings(value: Any) -> list[str]:
    found = []
    _map_strings(value, lambda string: found.append(string) or string)
    return found


def _named_card(folder: Path, repo_id: str) -> str:
    """The card, opening the model by the repository's id where it opened it by the folder's name or path."""
    text = (folder / CARD).read_text(encoding="utf-8")
    body = ModelCard(text, ignore_metadata_errors=True).text
    title = re.search(r"^# (.+)$", body, flags=re.MULTILINE)
    if not title or not _is_name_of(title[1], folder):
        return text
    name = re.escape(title[1])
    metadata = text.removesuffix(body)
    metadata = re.sub(
        rf"^(model-index:\n- name: |model_name: ){name}$", rf"\g<1>{repo_id}", metadata, flags=re.MULTILINE
    )
    body = re.sub(rf"^# {name}$", f"# {repo_id}", body, count=1, flags=re.MULTILINE)
    return metadata + re.sub(rf"(\bmodel=|from_pretrained\()([\"']){name}\2", rf"\g<1>\g<2>{repo_id}\g<2>", body)


def _is_name_of(title: str, folder: Path) -> bool:
    """Whether a card's title is what the folder is called, from wherever: the last parts of its path."""
    parts = tuple(part for part in PurePosixPath(title).parts if part not in ("..", "."))
    return bool(parts) and folder.resolve().parts[-len(parts) :] == parts


def _deletions(head: ModelInfo, additions: list[CommitOperationAdd]) -> list[CommitOperationDelete]:
    """Weights and adapters that the repository holds and this push does not: what is opened shall be what is pushed."""
    held = {sibling.rfilename for sibling in head.siblings or ()}
    stale = held - {addition.path_in_repo for addition in additions}
    return [CommitOperationDelete(path_in_repo=name) for name in sorted(stale) if OPENED_FIRST.fullmatch(name)]


def _ask_about_card(card: str) -> None:
    """Raises UnfitError where the Hub does not take the card's metadata."""
    try:
        ModelCard(card).validate(repo_type="model")
    except ValueError as error:
        try:
            reasons = "; ".join(entry["message"] for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reasons = str(error)
        raise UnfitError(f"the Hub does not take the metadata of {CARD}: {_one_line(reasons)}.") from error


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve()) and path.exists()


def _matching(names: list[str], suffixes: set[str]) -> list[str]:
    return [name for name in names if Path(name).suffix.lower() in suffixes]


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _reason(error: BaseException, token: str | bool | None) -> str:
    """What went wrong, in a few words, with what the Hub says of it."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, UnfitError):
        return _one_line(error)
    if status := _status(error):
        reason = STATUS.get(status, f"the Hub answered {status}")
        if status == 401 and not token and get_token() is None:
            reason = "there is no token, 401; `hf auth login` stores one"
        said = _one_line(_innermost(error).server_message or "")
        return f"{reason}: {said}" if said else reason
    if isinstance(error, json.JSONDecodeError):
        return "the answer of the Hub cannot be read"
    error = _innermost(error)
    return f"{type(error).__name__}: {_one_line(error)}"


def _is_answer_lost(error: BaseException) -> bool:
    """Whether the request may have taken effect all the same: there is no answer, or none that refuses it."""
    status = _status(error)
    return status is None or status == 408 or status >= 500


def _status(error: BaseException) -> int | None:
    """The Hub's answer, if it is what made the error."""
    error = _innermost(error)
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _innermost(error: BaseException) -> BaseException:
    """The client wraps failures of its threads."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error
