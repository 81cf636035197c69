"""One commit per push: weights, config, processor, card, and code for those who do not have hf_mm."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_token, validate_repo_id
from safetensors import SafetensorError, safe_open

from .standalone import read_config, standalone_changes

CARD = "README.md"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_NAMES = 5  # in an error message

LEFT_OUT = re.compile(r"\..*|__pycache__|checkpoint-\d+")  # folders and files that are no part of a model
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
TEMPORARY = {".tmp", ".lock", ".part", ".incomplete", ".swp"}
TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|trainer_state|training_args)\b.*")
TEXTS = {".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".py", ".jinja", ".html"}
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt"}  # large, and made of any string
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")

STATUS = {
    401: "the Hub refused the token, 401; `hf auth login` gives it another",
    403: "the token may not write there, 403; one with write access to that namespace can",
    409: "someone made that repository at the same time, 409",
    412: "someone committed to it since this push began, 412, which is not overwritten",
}


class PushError(OSError):
    """A push failed: one sentence that says why, what the repository holds now, and what to run again."""


class UnfitError(ValueError):
    """The repository is not the one that was meant; nothing was sent."""


@dataclass(frozen=True)
class Push:
    """One folder on its way to one repository.

    Args:
        folder: of the saved model; it is read only.
        repo_id: of the repository.
        private: make a new repository private.
        revision: branch that the commit goes to; ``main`` by default.
        commit_message: of the commit.
        create_pr: open a pull request in place of a commit to the branch.
        standalone: add the generated code that opens the model without hf_mm.
        shim: add the short form of it, which needs hf_mm installed.
    """

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
        operations = list(self._operations())
        where = {"repo_id": self.repo_id, "revision": self.revision, "create_pr": self.create_pr}
        stage, parent, made = "looking", None, False
        try:
            parent = self._head(api)
            if parent is None:
                stage = "making"
                api.create_repo(self.repo_id, private=self.private or None)  # None: the owner's default
                stage, made = "uploading", True
                parent = self._head(api)
            stage = "uploading"
            api.preupload_lfs_files(additions=operations, free_memory=False, **where)
            stage = "committing"
            message = self.commit_message or f"Push {self.folder.resolve().name}"
            commit = api.create_commit(operations=operations, commit_message=message, parent_commit=parent, **where)
        except UnfitError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            may_be_there = stage == "committing" and _status(error) != 412
            raise PushError(
                f"the push of {self.folder} to {self.repo_id} failed ({_reason(error)}): "
                f"{self._left_after(api, stage, parent, made, may_be_there)}; to push again run `{self.command}`."
            ) from error
        return commit.pr_url or commit.commit_url

    def _operations(self) -> Iterator[CommitOperationAdd]:
        """The files of the commit: generated ones from memory, the others streamed from their places."""
        generated = standalone_changes(self.folder, self.shim) if self.standalone or self.shim else {}
        generated[CARD] = _named_card(self.folder, self.repo_id)
        names = [*files_to_push(self.folder), *generated]
        for name in sorted(set(names)):
            content = generated[name].encode() if name in generated else self.folder / name
            yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)

    def _head(self, api: HfApi) -> str | None:
        """The commit that the branch is at; None where there is no repository."""
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
        return info.sha

    def _left_after(self, api: HfApi, stage: str, parent: str | None, made: bool, may_be_there: bool) -> str:
        """What the Hub holds after a failure, in part of a sentence. Removes a repository that this push made.

        One that may hold the commit, because the answer to it was lost, is not removed.
        """
        url = f"{api.endpoint}/{self.repo_id}"
        if stage == "looking":
            return "nothing was sent"
        if stage == "making":
            return f"if a repository was made all the same, it is empty: {url}"
        if may_be_there and self.create_pr:
            return f"the pull request may be open, its answer lost, so look first at {url}/discussions"
        if may_be_there and self._has_moved(api, parent):
            return (
                f"the commit may be there, its answer lost, so look first at {url}/commits/{self.revision or 'main'}"
            )
        if not made:
            return "nothing of it is in the repository"
        try:
            api.delete_repo(self.repo_id)
        except Exception:
            return f"the repository that was made for it is empty and could not be removed: {url}"
        return "the repository that was made for it is removed again"

    def _has_moved(self, api: HfApi, parent: str | None) -> bool:
        """Whether the branch is no more at the commit it was at; True where that cannot be seen."""
        try:
            return self._head(api) != parent
        except Exception:
            return True


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

    The folder stays as it is: generated code, ``auto_map`` entries and the repository's name in the card exist in the
    commit alone. Hidden files and ``checkpoint-…`` folders are left out. The commit names the one it follows, so what
    someone else pushed in the meantime is never overwritten. A repository that does not exist is made; where the push
    then fails before its commit, it is removed again.

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
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("the name of its owner is missing")
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id of a repository (name/model): {error}".replace("\n", " ")) from error
    check_folder(folder)
    push = Push(folder, repo_id, private, revision, commit_message, create_pr, standalone, shim)
    return push.run(HfApi(token=token))


def files_to_push(folder: Path) -> list[str]:
    """Names of a folder's files, with subfolders, without hidden ones and checkpoints."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [name.as_posix() for name in names if not any(LEFT_OUT.fullmatch(part) for part in name.parts)]


def check_folder(folder: Path) -> None:
    """Whether a folder is fit to be pushed.

    Raises:
        ValueError: no config of a model of the table, weights or card; weights that are cut short; pickles, temporary
            files, training state, links to files elsewhere; tokens or paths of this machine in its texts.
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
            raise ValueError(f"{folder} holds {wrong} ({_listed(found)}).")
    if CARD not in names:
        raise ValueError(
            f"{folder} has no card: write its {CARD}, or let `hf-mm card {shlex.quote(str(folder))}` do it."
        )
    _check_card(folder / CARD)
    _check_weights(folder)
    for name in names:
        _check_text(folder, name)


def _check_card(path: Path) -> None:
    try:
        ModelCard.load(path)
    except Exception as error:  # of a YAML parser
        raise ValueError(f"the metadata of {path} cannot be read: {error}".replace("\n", " ")) from error


def _check_weights(folder: Path) -> None:
    """Raises ValueError where weights are missing or cut short."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks weights: {_listed(missing)}.")
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is cut short or no safetensors file: {error}.") from error


def _check_text(folder: Path, name: str) -> None:
    """Raises ValueError where a text holds an access token or a path of this machine."""
    path = folder / name
    if path.suffix not in TEXTS or path.name in VOCABULARIES:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    token = get_token()
    if TOKEN.search(text) or (token and len(token) > 8 and token in text):
        raise ValueError(f"{path} holds an access token: take it out, and revoke it if it was ever shared.")
    found = [
        private for private in (f"{Path.home()}/", f"{folder.resolve()}/") if len(private) > 2 and private in text
    ]
    if path.suffix == ".json":
        found += [value for value in _strings(_parsed(path, text)) if _is_path_of_this_machine(value)]
    if found:
        raise ValueError(f"{path} holds a path of this machine, {found[0]!r}: take it out or leave the file out.")


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (string for item in value.items() for part in item for string in _strings(part))
    elif isinstance(value, list):
        yield from (string for part in value for string in _strings(part))


def _is_path_of_this_machine(value: str) -> bool:
    path = Path(value)
    try:
        return path.is_absolute() and len(path.parts) > 2 and path.exists()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False


def _named_card(folder: Path, repo_id: str) -> str:
    """The card, opening the model by the repository's id where it opened it by the folder's name."""
    text = (folder / CARD).read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", text, flags=re.MULTILINE)
    if not title or title[1] not in {folder.name, folder.resolve().name, folder.as_posix()}:
        return text
    name = title[1]
    for before, after in (("# ", "\n"), ('"', '"'), ("- name: ", "\n"), ("model_name: ", "\n")):
        text = text.replace(f"{before}{name}{after}", f"{before}{repo_id}{after}")
    return text


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve()) and path.exists()


def _matching(names: list[str], suffixes: set[str]) -> list[str]:
    return [name for name in names if Path(name).suffix.lower() in suffixes]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _reason(error: BaseException) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if status := _status(error):
        return STATUS.get(status, f"the Hub answered {status}")
    if isinstance(error, json.JSONDecodeError):
        return "the answer of the Hub cannot be read"
    error = _innermost(error)
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def _status(error: BaseException) -> int | None:
    """The Hub's answer, if it is what made the error."""
    error = _innermost(error)
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _innermost(error: BaseException) -> BaseException:
    """The client wraps failures of its threads."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error
