"""A model that says, letter by letter, what a table holds for the picture, and its processor."""

from types import SimpleNamespace

import torch
from torch import nn

PAD, END, SLOT = 0, ord("\n"), 1


class ToySpeaker(nn.Module):
    """Says ``table[picture]``, or ``table[picture, text]`` where the table knows that; pictures are numbers."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, table, is_encoder_decoder=False):
        super().__init__()
        self.table = table
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.calls = []

    def generate(self, pixel_values=None, vision_features=None, input_ids=None, attention_mask=None, **options):
        pictures = vision_features if pixel_values is None else pixel_values
        assert pictures.dtype == torch.float32 and not self.training and not torch.is_grad_enabled()
        self.calls.append(options | {"rows": len(pictures)})
        if input_ids is not None and not self.config.is_encoder_decoder:
            assert attention_mask[:, -1].all()  # a decoder goes on from the last column
        asked = [""] * len(pictures) if input_ids is None else map(spell, input_ids)
        said = [
            self.table.get((int(picture), text), self.table.get(int(picture)))
            for picture, text in zip(pictures, asked, strict=True)
        ]
        new = pad([[*map(ord, text), END] for text in said], fill=END, left=False)
        if self.config.is_encoder_decoder or input_ids is None:
            return torch.cat([torch.full((len(new), 1), END), new], dim=1)
        return torch.cat([input_ids, new], dim=1).repeat_interleave(options.get("num_return_sequences", 1), dim=0)


class ToySpeakerProcessor:
    eos_token_id = END

    def __init__(self):
        self.calls = []

    def __call__(self, images=None, text=None, num_images=None, padding_side=None, **options):
        self.calls.append(options | {"padding_side": padding_side, "num_images": num_images})
        data = {} if images is None else {"pixel_values": torch.tensor(images, dtype=torch.float64)}
        if text is not None:
            data["input_ids"] = pad([[SLOT, *map(ord, row)] for row in text], PAD, padding_side == "left")
            data["attention_mask"] = (data["input_ids"] != PAD).long()
        return data

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [f" {spell(torch.tensor(row, dtype=torch.long))} " for row in rows]


def spell(ids):
    return "".join(chr(number) for number in ids.tolist() if number not in (PAD, SLOT))


def pad(rows, fill, left):
    width = max(map(len, rows))
    return torch.tensor(
        [[fill] * (width - len(row)) + row if left else row + [fill] * (width - len(row)) for row in rows]
    )
