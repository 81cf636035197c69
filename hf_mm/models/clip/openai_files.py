"""The files that OpenAI published, known by their SHA-256.

Source:
    openai/CLIP (MIT).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ...conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from ...conversion.rules import ConversionError

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI_MODELS = {  # name: (SHA-256, file)
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}


def open_clip_source(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Opens a source of `read_clip`; what OpenAI published is downloaded, and is what its SHA-256 says or refused."""
    if str(source) not in OPENAI_MODELS or Path(source).exists():
        return _name_published(open_checkpoint(source, revision=revision, token=token))
    if revision is not None:
        raise ValueError(f"{source} is a name of OpenAI's, whose files have no revisions: leave --revision out.")
    sha256, file = OPENAI_MODELS[str(source)]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"clip-{file}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"{OPENAI_URL}/{sha256}/{file}"
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{source} could not be downloaded from {url}: {error}") from error
    try:
        return _name_published(open_checkpoint(path, sha256=sha256))
    except ConversionError as error:
        raise ConversionError(f"{error} For that, delete {path} first.") from error


def _name_published(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with where OpenAI publishes it as its origin if it is one of theirs."""
    if name := published_name(checkpoint):
        sha256, file = OPENAI_MODELS[name]
        return replace(checkpoint, origins=(Origin(f"{OPENAI_URL}/{sha256}/{file}", None, sha256),))
    return checkpoint


def published_name(checkpoint: Checkpoint) -> str | None:
    """OpenAI's name of the model whose file this is, judged by the file's SHA-256."""
    names = {sha256: name for name, (sha256, _) in OPENAI_MODELS.items()}
    return next((names[origin.sha256] for origin in checkpoint.origins if origin.sha256 in names), None)
