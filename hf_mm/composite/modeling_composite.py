"""What every model with frozen parts is."""

import copy
import json
import os
import tempfile
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from ..nn.pretrained import MMPreTrainedModel
from .fingerprint import fingerprint
from .freezing import checkpoints_unheld, freeze, has_adapters, hold_frozen, is_trained

TRAINED_PART = "trained_part.safetensors"
BASE_MODELS = "base_models.json"

_as_saved = ContextVar("as_saved", default=False)


class MMCompositeModel(MMPreTrainedModel):
    """A model some of whose parts begin frozen.

    A frozen part is like any other but that it stays in eval mode and bit-equal in training. To train one,
    ``model.part.requires_grad_(True)``; to adapt it, give it PEFT adapters.

    Attributes:
        frozen_parts: the parts that begin frozen, each a `PreTrainedModel` that ``__init__`` takes by its name, with the
            AutoClass that opens one. The composite's `base_models` says where each came from:
            ``{part: {"name": folder or Hub id, "revision": commit or None}}``.
        unquantized: modules that ``quantization_config`` leaves as they are beside a `language_model`.
        part_configs: what the config calls a part's config where that is not ``<part>_config``.
    """

    frozen_parts: dict[str, type] = {}
    part_configs: dict[str, str] = {}
    unquantized: tuple[str, ...] = ()

    def post_init(self):
        super().post_init()
        self._freeze_parts()
        self.register_load_state_dict_post_hook(_refuse_adapters_of_another)

    def _part_or_new(self, name: str, part: PreTrainedModel | None) -> PreTrainedModel:
        """A part that was handed over, whose config becomes that of the composite; or a new one from its config."""
        config_name = self.part_configs.get(name, f"{name}_config")
        if part is None:
            return self.frozen_parts[name].from_config(getattr(self.config, config_name))
        setattr(self.config, config_name, part.config)
        for module in part.modules():
            module._is_hf_initialized = True  # or post_init would begin adapters and layers of the user's anew
        return part

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, quantization_config=None, **kwargs):
        """See `transformers.PreTrainedModel.from_pretrained`, which makes every parameter trainable.

        Without `dtype`, each part has that with which it was saved. Of a model with a language model, only that is
        quantised, its head excepted, unless the `quantization_config` has a list of its own (`llm_int8_skip_modules`).
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = cls._for_language_model(quantization_config)
        given = _as_saved.set(kwargs.get("dtype", kwargs.get("torch_dtype", "auto")) == "auto")
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        finally:
            _as_saved.reset(given)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True
        model._freeze_parts()
        return loaded

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """See `transformers.PreTrainedModel`, which opens a tensor that the plan does not name in the dtype that it has."""
        saved = getattr(self.config, "part_dtypes", None)
        if not (saved and _as_saved.get()):
            return super()._get_dtype_plan(dtype)
        for name, tensor in self.state_dict(keep_vars=True).items():
            own = saved.get(name) or saved.get(name.partition(".")[0])
            if own and tensor.is_floating_point():
                tensor.data = tensor.data.to(getattr(torch, own))
        return {}

    def _part_dtypes(self) -> dict[str, str]:
        """The dtype of every part, frozen or not, that has another than the model, and of every tensor that has another
        than its part: of T5 in float16, say, of what transformers keeps in float32."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}  # without what quantisation adds
        tensors = {name: own[name] for name in self.state_dict() if name in own and own[name].is_floating_point()}
        parts = {name.partition(".")[0]: one.dtype for name, one in reversed(tensors.items())}
        others = {name: dtype for name, dtype in parts.items() if dtype != self.dtype}
        others |= {name: one.dtype for name, one in tensors.items() if one.dtype != parts[name.partition(".")[0]]}
        return {name: str(dtype).removeprefix("torch.") for name, dtype in others.items()}

    @classmethod
    def _for_language_model(cls, quantization_config):
        if (
            "language_model" not in cls.frozen_parts
            or getattr(quantization_config, "llm_int8_skip_modules", ()) is not None
        ):
            return quantization_config
        quantization_config = copy.deepcopy(quantization_config)
        quantization_config.llm_int8_skip_modules = [*cls.unquantized, "lm_head"]
        return quantization_config

    def save_pretrained(self, save_directory, *args, **kwargs):
        """See `transformers.PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: a frozen part is quantised, which the saved folder could not tell from the others.
        """
        for name, part in self._parts():
            if getattr(part, "is_quantized", False) and not getattr(self, "is_quantized", False):
                raise ValueError(
                    f"{name} is quantised: use save_trained_part, or save its adapters with PEFT, over the same {name}."
                )
        if (dtypes := self._part_dtypes()) or hasattr(self.config, "part_dtypes"):
            self.config.part_dtypes = dtypes
        super().save_pretrained(save_directory, *args, **kwargs)

    def _freeze_parts(self) -> None:
        for _, part in self._parts():
            freeze(part)

    def train(self, mode: bool = True):
        """See `torch.nn.Module.train`; frozen parts stay in eval mode."""
        super().train(mode)
        for _, part in self._parts():
            hold_frozen(part)
        return self

    def hold_frozen_parts(self) -> None:
        """Undoes what a call of `train()` on a part, or on anything in it, did. Every forward begins with it."""
        if torch.compiler.is_compiling():
            return
        for _, part in self._parts():
            if any(module.training or checkpoints_unheld(module) for module in part.modules()):
                hold_frozen(part)

    def save_trained_part(self, folder: str | Path) -> None:
        """Saves everything but the frozen parts, and which these are: their names, revisions and fingerprints.

        Raises:
            ValueError: a frozen part has weights that train, or adapters.
        """
        for name, part in self._parts():
            if is_trained(part) or has_adapters(part):
                raise ValueError(
                    f"{name} has weights that train, or adapters, which the trained part alone would lose: save the whole "
                    "model with save_pretrained, or its adapters with PEFT."
                )
        bases = {
            name: {
                **(self.config.base_models or {}).get(name, {"name": None, "revision": None}),
                "dtype": str(part.dtype).removeprefix("torch."),
                "fingerprint": fingerprint(part),
            }
            for name, part in self._parts()
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as aside:
            aside = Path(aside)
            self.config.save_pretrained(aside)
            if self.can_generate():
                self.generation_config.save_pretrained(aside)
            (aside / BASE_MODELS).write_text(json.dumps(bases, indent=2))
            trained = {name: tensor.contiguous() for name, tensor in self._trained_state().items()}
            save_file(trained, aside / TRAINED_PART, metadata={"format": "pt"})
            for file in sorted(aside.iterdir()):
                os.replace(file, folder / file.name)

    @classmethod
    def from_trained_part(
        cls, folder: str, dtype: torch.dtype | None = None, **parts: str | PreTrainedModel
    ) -> "MMCompositeModel":
        """Opens what `save_trained_part` saved, over its frozen parts.

        Args:
            folder: of the trained part, or a Hub id.
            dtype: of the whole model; by default each part has that with which it was saved.
            **parts: for each frozen part that is not where it was, its folder, its Hub id, or the model itself.

        Raises:
            OSError: a file of the trained part is missing.
            ValueError: a frozen part is not the one that this was trained on, cannot be found, or the trained part's
                weights are not those of the model.
        """
        if unknown := parts.keys() - cls.frozen_parts.keys():
            raise TypeError(f"{cls.__name__} has no frozen part {sorted(unknown)}: it has {list(cls.frozen_parts)}.")
        bases = json.loads(Path(cached_file(folder, BASE_MODELS)).read_text())
        if (config_file := cached_file(folder, CONFIG_NAME)) is None:
            raise OSError(f"{folder} has no {CONFIG_NAME}: copy or download the trained part again.")
        config = cls.config_class.from_json_file(config_file)
        opened = {name: cls._open_part(name, base, parts.get(name)) for name, base in bases.items()}
        model = cls(config, **opened)
        try:
            trained = load_file(cached_file(folder, TRAINED_PART))
        except SafetensorError as error:
            raise OSError(
                f"the trained part in {folder} is cut short ({error}): copy or download it again."
            ) from error
        own = model._trained_state()
        if wrong := trained.keys() ^ own.keys() or {n for n in own if own[n].shape != trained[n].shape}:
            raise ValueError(
                f"{folder} is no trained part of a {cls.__name__} of its config: {sorted(wrong)[:3]} differ."
            )
        model.load_state_dict(trained, strict=False, assign=True)
        model.tie_weights()
        if cached_file(folder, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False):
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return (model if dtype is None else model.to(dtype)).eval()

    @classmethod
    def _open_part(cls, name: str, base: dict, given: str | PreTrainedModel | None) -> PreTrainedModel:
        source = base["name"] if given is None else given
        if not source:
            raise ValueError(
                f"where its {name} came from was not recorded: pass {name}=, a folder, a Hub id or the model."
            )
        named = "the model given" if isinstance(given, PreTrainedModel) else source
        if isinstance(source, (str, os.PathLike)):
            revision = base["revision"] if given is None else None
            dtype = getattr(torch, base["dtype"])
            try:
                source = cls.frozen_parts[name].from_pretrained(source, revision=revision, dtype=dtype)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"its {name} cannot be opened from {named} ({error}): pass {name}=, a folder, a Hub id or the model."
                ) from error
        if (dtype := str(source.dtype).removeprefix("torch.")) != base["dtype"]:
            raise ValueError(
                f"this was trained on its {name} in {base['dtype']}, but {named} is in {dtype}: open that with "
                f"dtype=torch.{base['dtype']}."
            )
        if (found := fingerprint(source)) != base["fingerprint"]:
            raise ValueError(
                f"{named} is not the {name} that this was trained on: its weights have the fingerprint "
                f"{found}, not {base['fingerprint']}"
                + (f" (revision {base['revision']})" if base["revision"] else "")
                + f"; pass the right one as {name}=."
            )
        return source

    def _parts(self):
        return ((name, self.get_submodule(name)) for name in self.frozen_parts)

    def _trained_state(self) -> dict[str, torch.Tensor]:
        """Everything outside the frozen parts, tied weights once."""
        frozen, tied = tuple(f"{name}." for name in self.frozen_parts), self.all_tied_weights_keys
        state = self.state_dict().items()
        return {name: tensor for name, tensor in state if not name.startswith(frozen) and name not in tied}


def _refuse_adapters_of_another(model: MMCompositeModel, keys) -> None:
    """PEFT passes over what an adapter has for layers that are not there, as those of another language model."""
    if not keys.unexpected_keys or not has_adapters(model):
        return
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    kinds = [f".{prefix}" for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values()]
    parts = [f"{part}." for part in model.frozen_parts]
    strange = [
        key
        for key in keys.unexpected_keys
        if any(part in key for part in parts) and any(kind in key for kind in kinds)
    ]
    if strange:
        raise ValueError(
            f"the adapter is of another base: it has {strange[0]}, which this {type(model).__name__} has not; open it on "
            "the base it was trained on."
        )
