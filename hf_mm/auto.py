"""The table of models: what `AutoConfig`, `AutoModel…`, `AutoProcessor` and `pipeline` open for each model type."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_torchvision_available

from .models.blip2.configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig
from .models.blip2.modeling_blip2 import (
    MMBlip2ForConditionalGeneration,
    MMBlip2ForImageTextRetrieval,
    MMBlip2ForPreTraining,
    MMBlip2Model,
)
from .models.blip2.modeling_qformer import MMBlip2QFormerModel
from .models.blip2.processing_blip2 import MMBlip2Processor
from .models.clip.configuration_clip import (
    MMClipConfig,
    MMClipResNetConfig,
    MMClipTextConfig,
    MMClipVisionConfig,
)
from .models.clip.image_processing_clip import MMClipImageProcessorPil
from .models.clip.modeling_clip import MMClipModel, MMClipTextModel, MMClipVisionModel
from .models.clip.modeling_clip_resnet import MMClipResNetModel
from .models.clip.processing_clip import MMClipProcessor
from .models.clip.tokenization_clip import MMClipTokenizer
from .models.eva_vit.configuration_eva_vit import EvaViTConfig
from .models.eva_vit.modeling_eva_vit import EvaViTModel
from .models.pic2word.configuration_pic2word import Pic2WordConfig, Pic2WordMapperConfig
from .models.pic2word.modeling_pic2word import Pic2WordMapper, Pic2WordModel
from .models.pic2word.processing_pic2word import Pic2WordProcessor
from .models.vit.configuration_vit import MMViTConfig
from .models.vit.image_processing_vit import MMViTImageProcessorPil
from .models.vit.modeling_vit import MMViTForImageClassification, MMViTModel
from .pipelines import register_pipelines

if is_torchvision_available():
    from .models.clip.image_processing_clip import MMClipImageProcessor
    from .models.vit.image_processing_vit import MMViTImageProcessor

    CLIP_IMAGE_PROCESSORS = {"pil": MMClipImageProcessorPil, "torchvision": MMClipImageProcessor}
    VIT_IMAGE_PROCESSORS = {"pil": MMViTImageProcessorPil, "torchvision": MMViTImageProcessor}
else:
    CLIP_IMAGE_PROCESSORS = {"pil": MMClipImageProcessorPil}
    VIT_IMAGE_PROCESSORS = {"pil": MMViTImageProcessorPil}


@dataclass(frozen=True)
class Entry:
    """One model type: its config, its class per AutoClass, and what prepares its inputs."""

    config: type[PreTrainedConfig]
    models: dict[type, type[PreTrainedModel]]
    image_processors: dict[str, type] = field(default_factory=dict)
    tokenizer: type | None = None
    processor: type | None = None


MODELS = {
    "mm_vit": Entry(
        MMViTConfig,
        {AutoModel: MMViTModel, AutoModelForImageClassification: MMViTForImageClassification},
        image_processors=VIT_IMAGE_PROCESSORS,
    ),
    "mm_clip_text": Entry(MMClipTextConfig, {AutoModel: MMClipTextModel}, tokenizer=MMClipTokenizer),
    "mm_clip_vision": Entry(
        MMClipVisionConfig, {AutoModel: MMClipVisionModel}, image_processors=CLIP_IMAGE_PROCESSORS
    ),
    "mm_clip_resnet": Entry(
        MMClipResNetConfig, {AutoModel: MMClipResNetModel}, image_processors=CLIP_IMAGE_PROCESSORS
    ),
    "mm_clip": Entry(
        MMClipConfig,
        {AutoModel: MMClipModel, AutoModelForZeroShotImageClassification: MMClipModel},
        image_processors=CLIP_IMAGE_PROCESSORS,
        tokenizer=MMClipTokenizer,
        processor=MMClipProcessor,
    ),
    "pic2word_mapper": Entry(Pic2WordMapperConfig, {AutoModel: Pic2WordMapper}),
    "pic2word": Entry(Pic2WordConfig, {AutoModel: Pic2WordModel}, processor=Pic2WordProcessor),
    "eva_vit": Entry(EvaViTConfig, {AutoModel: EvaViTModel}, image_processors=CLIP_IMAGE_PROCESSORS),
    "mm_blip2_qformer": Entry(MMBlip2QFormerConfig, {AutoModel: MMBlip2QFormerModel}),
    "mm_blip2": Entry(
        MMBlip2Config,
        {
            AutoModel: MMBlip2Model,
            AutoModelForPreTraining: MMBlip2ForPreTraining,
            AutoModelForZeroShotImageClassification: MMBlip2ForImageTextRetrieval,
            AutoModelForImageTextToText: MMBlip2ForConditionalGeneration,
        },
        image_processors=CLIP_IMAGE_PROCESSORS,
        processor=MMBlip2Processor,
    ),
}


def register_all() -> None:
    """Tells transformers' AutoClasses about every model of the table, and `pipeline` about the tasks of
    `hf_mm.pipelines`. Calling it again changes nothing."""
    for model_type, entry in MODELS.items():
        AutoConfig.register(model_type, entry.config)
        for auto_class, model in entry.models.items():
            auto_class.register(entry.config, model)
        if entry.image_processors:
            AutoImageProcessor.register(entry.config, image_processor_classes=entry.image_processors)
        if entry.tokenizer:
            AutoTokenizer.register(entry.config, tokenizer_class=entry.tokenizer)
        if entry.processor:
            AutoProcessor.register(entry.config, entry.processor)
    register_pipelines()
