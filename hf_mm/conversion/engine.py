"""From the published layout to a model of ours and back: all is checked first, then built or written."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import SAFE_WEIGHTS_NAME

from ..version import __version__
from .checkpoint import Checkpoint, merge
from .rules import ConversionError, Rule, Step, inverse, listed, plan, rename, run

RECORD = "conversion.json"
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that fits a model. Nothing has been read but names, shapes and dtypes.

    Args:
        checkpoint: the published weights.
        steps: what makes the model's tensors of them.
        empty: the model on the meta device, with its config.
    """

    checkpoint: Checkpoint
    steps: tuple[Step, ...]
    empty: PreTrainedModel

    def build(self) -> PreTrainedModel:
        """The model in memory, in eval mode; its weights are its own, not the file's."""
        config = self.empty.config
        state = dict(self._tensors(owned=True))
        return type(self.empty).from_pretrained(None, config=config, state_dict=state, dtype=config.dtype)

    def save(
        self,
        folder: str | Path,
        *,
        processor: Any = None,
        card: Any = None,
        remarks: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> Path:
        """Writes a folder that ``AutoModel.from_pretrained`` opens, whole or not at all.

        The tensors are made and written one at a time. ``conversion.json`` records the sources with their revisions and
        hashes.

        Args:
            folder: where to; it may exist if it is empty.
            processor: saved beside the weights by its ``save_pretrained``.
            card: written to ``README.md`` by its ``save``.
            remarks: what else the card says, as JSON; recorded, so that the card can be written again.
            progress: whether to show a bar.

        Returns:
            The folder.

        Raises:
            FileExistsError, NotADirectoryError: see `check_target`.
            ConversionError: the source could not be read any more.
            OSError: it could not be written; nothing is left of it.
        """
        folder = Path(folder)
        with whole_folder(folder) as aside:
            self._save_config(aside)
            if processor is not None:
                processor.save_pretrained(aside)
            if card is not None:
                card.save(aside / "README.md")
            write_json(aside / RECORD, self._record() | ({"remarks": dict(remarks)} if remarks else {}))
            write_safetensors(aside / SAFE_WEIGHTS_NAME, stored_tensors(self.empty), self._tensors(), progress)
        return folder

    def _tensors(self, owned: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's tensors in its dtypes; where they have to be its own, copied and cast in one allocation."""
        stored = stored_tensors(self.empty)
        try:
            for name, tensor in run(self.steps, self.checkpoint.tensors):
                dtype = stored[name].dtype
                yield name, tensor.detach().to(dtype, copy=owned, memory_format=torch.contiguous_format)
        except OSError as error:
            sources = listed(origin.name for origin in self.checkpoint.origins)
            raise ConversionError(f"{sources} could not be read any more ({error.strerror or error}).") from error

    def _save_config(self, folder: Path) -> None:
        config = copy.deepcopy(self.empty.config)
        config.architectures = [type(self.empty).__name__]
        config.save_pretrained(folder)
        if self.empty.can_generate():
            self.empty.generation_config.save_pretrained(folder)

    def _record(self) -> dict[str, Any]:
        return {
            "sources": [asdict(origin) for origin in self.checkpoint.origins],
            "hf_mm": __version__,
            "transformers": transformers.__version__,
        }


def convert(
    checkpoint: Checkpoint,
    *,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    rules: Iterable[Rule],
    dtype: torch.dtype = torch.float32,
) -> Conversion:
    """Checks a checkpoint against a table of names and a model. Nothing is computed or written.

    Args:
        checkpoint: the published weights.
        model_class: what they become.
        config: its config.
        rules: the table from their names to ours; for weights that are tied it sets the one that is stored.
        dtype: of the model, as in ``from_pretrained``.

    Returns:
        What `Conversion.build` and `Conversion.save` carry out.

    Raises:
        ConversionError: a name is missing, left over or doubled, or a tensor has another shape than the model's. The
            message lists the names.
    """
    empty = _empty(model_class, config, dtype)
    stored = stored_tensors(empty)
    steps = plan(rules, checkpoint.tensors, stored)
    complaints = []
    for step in steps:
        sources = {name: checkpoint.tensors[name].to("meta") for name in step.sources}
        try:
            results = dict(run([step], sources))
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sources.items())
            complaints.append(f"{shapes} cannot become {listed(step.targets)} ({error})")
        else:
            complaints += [
                f"{name} would be {_form(tensor)} where the model has {_form(stored[name])}"
                for name, tensor in results.items()
                if _form(tensor) != _form(stored[name])
            ]
    if complaints:
        raise ConversionError(f"The checkpoint does not fit: {listed(complaints)}.")
    return Conversion(checkpoint, tuple(steps), empty)


def compose(
    parts: Mapping[str, Conversion],
    *,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
) -> Conversion:
    """Conversions of all parts of a model, each from its own source, as one of the whole. Nothing is computed or written.

    Args:
        parts: by the name of the attribute that holds the part, such as ``"vision_tower"``.
        model_class, config, dtype: of the whole, see `convert`.

    Returns:
        The conversion; it records the sources of all parts, each once.

    Raises:
        ConversionError: the parts do not have the names and shapes of the whole. The message lists the names.
    """
    source = merge(*(part.checkpoint.with_prefix(f"{name}.") for name, part in parts.items()))
    source = replace(source, origins=tuple(dict.fromkeys(source.origins)))
    given = {
        f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in stored_tensors(part.empty).items()
    }
    same = [rename("{name*}", "{name*}")]
    whole = convert(replace(source, tensors=given), model_class=model_class, config=config, rules=same, dtype=dtype)
    steps = tuple(
        Step(*(tuple(f"{name}.{key}" for key in keys) for keys in (step.sources, step.targets)), step.transform)
        for name, part in parts.items()
        for step in part.steps
    )
    return replace(whole, checkpoint=source, steps=steps)


def export(model: PreTrainedModel, rules: Iterable[Rule]) -> dict[str, torch.Tensor]:
    """The model's weights in the published layout, by the table read from right to left.

    Args:
        model: a model of ours.
        rules: the table from the published names to ours.

    Returns:
        Contiguous tensors by their published names, without what the table drops.

    Raises:
        ConversionError: the model has a name that no rule reads, or a rule finds some of its tensors but not all.
    """
    tensors = {name: tensor.detach() for name, tensor in stored_tensors(model).items()}
    return {name: tensor.contiguous() for name, tensor in run(plan(inverse(rules), tensors), tensors)}


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers that a file of the model holds: of tied ones, the one that others follow."""
    stored: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in model.all_tied_weights_keys:
            stored.setdefault(id(tensor), (name, tensor))
    return dict(stored.values())


def write_safetensors(
    path: Path, layout: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], progress: bool = True
) -> None:
    """Writes a safetensors file one tensor at a time, where `safetensors.torch.save_file` wants all at once.

    Args:
        path: the file.
        layout: a tensor, also on the meta device, of the shape and dtype that each name will have.
        tensors: the names with their tensors, in any order.
        progress: whether to show a bar.

    Source:
        "Format" in the safetensors README: the length of the header, the header in JSON, the numbers of all tensors.
        Wider dtypes come first, so that all are aligned.
    """
    names = sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + layout[name].numel() * layout[name].dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[layout[name].dtype],
            "shape": list(layout[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    bar = tqdm(total=end, unit="B", unit_scale=True, desc=f"Writing {path.name}", disable=not progress)
    with path.open("wb") as file, bar:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            file.seek(8 + len(encoded) + header[name]["data_offsets"][0])
            bar.update(file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _empty(model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights; its config says the dtype, as after ``from_pretrained``."""
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        return model_class._from_config(copy.deepcopy(config), dtype=dtype)


def _form(tensor: torch.Tensor) -> str:
    """What of a tensor has to agree: its shape and, unless it is floating, its dtype."""
    kind = "" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{kind}"


def check_target(folder: str | Path) -> None:
    """Checks that a new folder can take this place, so that no work is done in vain.

    Raises:
        FileExistsError: there is a file, or a folder that is not empty.
        NotADirectoryError: it would lie below a file.
    """
    target = Path(folder).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another.")
    if not (above := _nearest(target.parent)).is_dir():
        raise NotADirectoryError(f"{folder} would lie below {above.name}, which is a file: choose another folder.")


def _nearest(path: Path) -> Path:
    """The path itself or the first of its parents that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside the one named, which gets its name at the end, or is removed if anything fails.

    Raises:
        FileExistsError, NotADirectoryError: see `check_target`; before any work.
        OSError: something could not be written. Parents made for the folder are gone again too.
    """
    check_target(folder)
    target = folder.resolve()
    home = _nearest(target.parent)
    missing = [parent for parent in target.parents if not parent.exists()]
    aside = home / f".{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir()
        yield aside
        _flush(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        os.replace(aside, target)
    except OSError as error:
        raise OSError(f"the model could not be written to {folder} ({error}); nothing is left of it.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not target.exists():
            _remove_empty(missing)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, innermost first; one that is missing or in use stays as it is."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _flush(folder: Path) -> None:
    """Has the system write the files to disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Writes what JSON can hold as indented UTF-8 with a last newline; other letters than ASCII stay as they are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
