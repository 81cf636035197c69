"""Composed retrieval: a picture and words together ask for another picture.

Each protocol is measured on the user's own copy of its data; nothing is downloaded.
"""

from .cirr import evaluate_cirr
from .domain_conversion import evaluate_domain_conversion
from .fashioniq import evaluate_fashioniq
from .object_composition import evaluate_object_composition

PROTOCOLS = {
    "domain-conversion": evaluate_domain_conversion,
    "object-composition": evaluate_object_composition,
    "cirr": evaluate_cirr,
    "fashioniq": evaluate_fashioniq,
}
