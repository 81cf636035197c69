"""What others have published for these protocols, in percent.

A line has the metrics by the names that the protocols use, the split or group they hold for, their source, and
`verified`: True where several papers have the figure alike, False where it was not checked against its source.
"""

from __future__ import annotations

from typing import Any

PAPER = "Saito et al. 2023, arXiv 2302.03084"
LATER = "tables of later papers"
NAMES = {
    "composed": "Pic2Word, ViT-L/14",
    "image_only": "image only, ViT-L/14",
    "text_only": "text only, ViT-L/14",
    "image_text": "image + text, ViT-L/14",
}
COMBINER_CIRR = "Combiner trained on CIRR"
COMBINER_FASHION = "Combiner trained on FashionIQ"


def published_line(
    ks: tuple[int, ...], values: tuple[float, ...], verified: bool = False, source: str = PAPER
) -> dict[str, Any]:
    """One published line: recall at each k."""
    metrics = {f"r{k}": value for k, value in zip(ks, values, strict=True)}
    return {"metrics": metrics, "source": source, "verified": verified}


PUBLISHED: dict[str, dict[str, dict[str, dict[str, Any]]]] = {  # protocol: group: name: line
    "domain-conversion": {
        "cartoon": {NAMES["composed"]: published_line((10, 50), (8.0, 21.9))},
        "origami": {NAMES["composed"]: published_line((10, 50), (13.5, 25.6))},
        "toy": {NAMES["composed"]: published_line((10, 50), (8.7, 21.6))},
        "sculpture": {NAMES["composed"]: published_line((10, 50), (10.0, 23.8))},
        "mean": {
            NAMES["composed"]: published_line((10, 50), (10.1, 23.2)),
            NAMES["image_only"]: published_line((10, 50), (0.4, 4.0)),
            NAMES["text_only"]: published_line((10, 50), (0.5, 2.3)),
            NAMES["image_text"]: published_line((10, 50), (1.7, 11.2)),
            COMBINER_CIRR: published_line((10, 50), (8.0, 18.5)),
            COMBINER_FASHION: published_line((10, 50), (6.0, 17.4)),
        },
    },
    "object-composition": {  # the paper's figures; its code has this prompt, the text another
        "code": {
            NAMES["composed"]: published_line((1, 5, 10), (11.5, 24.8, 33.4)),
            NAMES["image_only"]: published_line((1, 5, 10), (8.6, 15.4, 18.9)),
            NAMES["text_only"]: published_line((1, 5, 10), (6.1, 15.7, 23.5)),
            NAMES["image_text"]: published_line((1, 5, 10), (10.2, 20.2, 26.6)),
            COMBINER_CIRR: published_line((1, 5, 10), (9.9, 22.8, 32.2)),
            COMBINER_FASHION: published_line((1, 5, 10), (13.2, 27.1, 35.2)),
        },
    },
    "cirr": {
        "test1": {
            NAMES["composed"]: published_line((1, 5, 10, 50), (23.9, 51.7, 65.3, 87.8), verified=True),
            NAMES["image_only"]: published_line((1, 5, 10, 50), (7.4, 23.6, 34.0, 57.4)),
            NAMES["text_only"]: published_line((1, 5, 10, 50), (20.9, 44.8, 56.7, 79.1)),
            NAMES["image_text"]: published_line((1, 5, 10, 50), (12.4, 36.2, 49.1, 78.2)),
            "image only, as re-measured": published_line((1, 5, 10), (7.3, 23.0, 33.3), source=LATER),
            "text only, as re-measured": published_line((1, 5, 10), (20.9, 44.0, 55.4), source=LATER),
            "SEARLE-XL": published_line((1,), (24.2,), source=LATER),
            "LinCIR": published_line((1,), (25.0,), source=LATER),
            "Context-I2W": published_line((1,), (25.6,), source=LATER),
        },
    },
    "fashioniq": {
        "dress": {NAMES["composed"]: published_line((10, 50), (20.0, 40.2), verified=True)},
        "shirt": {NAMES["composed"]: published_line((10, 50), (26.2, 43.6), verified=True)},
        "toptee": {NAMES["composed"]: published_line((10, 50), (27.9, 47.4), verified=True)},
        "mean": {
            NAMES["composed"]: published_line((10, 50), (24.7, 43.7), verified=True),
            NAMES["image_only"]: published_line((10, 50), (7.9, 17.5)),
            NAMES["text_only"]: published_line((10, 50), (17.3, 32.9)),
            NAMES["image_text"]: published_line((10, 50), (19.8, 35.7)),
            "SEARLE-XL": published_line((10,), (25.6,), source=LATER),
            "LinCIR": published_line((10,), (26.3,), source=LATER),
            "Context-I2W": published_line((10,), (27.8,), source=LATER),
        },
    },
}
