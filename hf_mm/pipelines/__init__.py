"""Tasks that transformers has no pipeline for: `pipeline(task, model=folder)` opens them once hf_mm is imported."""

from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

PIPELINES = {
    "composed-image-retrieval": "hf_mm.pipelines.composed_image_retrieval.ComposedImageRetrievalPipeline",
}


def register_pipelines() -> None:
    """Adds `PIPELINES` to transformers' registry. Calling it again changes nothing.

    Entries are names, as those of transformers are, and imported by the first `pipeline(task)`: `register_pipeline`
    takes classes only, which would load `datasets` with the package, and have every saved pipeline ask for
    `trust_remote_code`.
    """
    for task, name in PIPELINES.items():
        PIPELINE_REGISTRY.supported_tasks[task] = {"impl": name, "pt": (AutoModel,), "type": "multimodal"}
