"""hf_mm: the architectures that joined vision and language, as native Hugging Face models.

Importing the package registers every model with transformers' AutoClasses:

    import hf_mm
    from transformers import AutoModel, AutoProcessor, pipeline
"""

from .auto import MODELS, register_all
from .version import __version__

register_all()

__all__ = ["MODELS", "__version__"]
