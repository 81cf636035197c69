"""Stage 1 of BLIP-2: pictures and texts compared, matched, and the texts said (Li et al. 2023, section 3.2)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...composite.freezing import upstream
from ...losses.contrastive import (
    at_least_float32,
    check_pairs,
    gather_padded,
    gather_rows,
    is_distributed,
    query_text_contrastive_loss,
    same_image,
)
from ...losses.matching import (
    IGNORED,
    draw_hard_negatives,
    image_text_matching_loss,
    matching_labels,
    mean_of_labelled,
)
from .configuration_blip2 import MMBlip2Config
from .modeling_blip2_base import MMBlip2PreTrainedModel
from .modeling_qformer import KeysValues, MMBlip2QFormerOutput, QFormerLMHead, number_of_pictures


@dataclass
class MMBlip2Output(ModelOutput):
    """What BLIP-2 makes of pictures and texts that belong together.

    Args:
        loss: the sum of the three.
        loss_itc, loss_itm, loss_itg: contrastive, matching and generation loss (section 3.2).
        logits_per_image: ``(M, N)`` cosines over the temperature, of each picture's best matching query.
        logits_per_text: ``(N, M)``.
        image_embeds: ``(M, Nq, joint_dim)`` of unit length.
        text_embeds: ``(N, joint_dim)`` of unit length.
        accuracies: ``(6,)``, see `ACCURACIES`; NaN where there is nothing to be right about.
        negatives: two of ``(b,)``, which picture was drawn for each text and which text for each picture, counted over
            all ranks.
        qformer_outputs: of pictures and texts by themselves.
    """

    loss: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    accuracies: torch.Tensor | None = None
    negatives: tuple[torch.Tensor, torch.Tensor] | None = None
    qformer_outputs: MMBlip2QFormerOutput | None = None


ACCURACIES = (
    "itc_image_to_text",
    "itc_text_to_image",
    "itm_right_pair",
    "itm_drawn_image",
    "itm_drawn_text",
    "itg_token",
)


class MMBlip2ForImageTextRetrieval(MMBlip2PreTrainedModel):
    """Compares pictures with texts: by embeddings (ITC), and pair by pair (ITM)."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: MMBlip2Config, vision_tower: PreTrainedModel | None = None):
        super().__init__(config, vision_tower)
        width = config.qformer_config.hidden_size
        if not config.qformer_config.use_text:
            raise ValueError(
                "pictures are compared with texts, which this Q-Former cannot read, as in a stage 2: open a stage 1, or "
                "set use_text."
            )
        self.vision_projection = nn.Linear(width, config.joint_dim)
        self.text_projection = nn.Linear(width, config.joint_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.empty(1))
        self._add_heads(config)
        self.post_init()

    def _add_heads(self, config: MMBlip2Config) -> None:
        """Heads of a subclass."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self:
            init.constant_(self.temperature, self.config.itc_temperature)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Picture embeddings: `pooler_output` ``(M, Nq, joint_dim)`` of unit length, one for each query."""
        self.hold_frozen_parts()
        tokens = self._picture_tokens(pixel_values, vision_features, interpolate_pos_encoding)
        queries = self.qformer(tokens, **kwargs).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=queries, pooler_output=self._embed_queries(queries))

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Text embeddings: `pooler_output` ``(N, joint_dim)`` of unit length."""
        text = self.qformer(input_ids=input_ids, attention_mask=attention_mask, text_mode="unimodal", **kwargs)
        text = text.text_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=text, pooler_output=self._embed_texts(text, attention_mask)
        )

    @torch.no_grad()
    def get_matching_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        batch_size: int = 64,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """Whether texts describe pictures, pair by pair (ITM); a picture is projected once for all its pairs.

        Args:
            input_ids, attention_mask: ``(N, T)``.
            pixel_values, vision_features: of M pictures.
            pairs: ``(P, 2)``, picture and text of each pair; by default all pairs.
            batch_size: pairs in one pass.
            interpolate_pos_encoding: accept pictures of another size than the tower's own.

        Returns:
            ``(P, 2)``, or ``(M, N, 2)`` of all pairs; class 1 is a match.

        Raises:
            ValueError: both or neither of pixels and features, or pairs of pictures or texts that are not there.
        """
        self.hold_frozen_parts()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        keys_values = self.qformer.picture_keys_values(
            self._picture_tokens(pixel_values, vision_features, interpolate_pos_encoding)
        )
        num_images, num_texts = number_of_pictures(keys_values), input_ids.shape[0]
        if pairs is None:
            chosen = torch.cartesian_prod(torch.arange(num_images), torch.arange(num_texts)).view(-1, 2)
        else:
            chosen = _check_pairs_of(pairs, num_images, num_texts)
        chosen = chosen.to(input_ids.device)
        logits = [
            self._match(
                _rows_of(keys_values, images),
                input_ids[texts],
                None if attention_mask is None else attention_mask[texts],
            )
            for images, texts in (part.unbind(1) for part in chosen.split(batch_size) if part.shape[0])
        ]
        logits = torch.cat(logits) if logits else self.itm_head.weight.new_empty(0, 2)
        return logits if pairs is not None else logits.view(num_images, num_texts, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        return_loss: bool = True,
        gather_loss: bool | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMBlip2Output:
        """Compares all pictures with all texts; of pairs, computes the losses of stage 1 (section 3.2).

        Args:
            input_ids: ``(N, T)``, texts begun by ``[CLS]``.
            pixel_values: ``(M, C, H, W)``.
            attention_mask: ``(N, T)``, 1 for tokens.
            vision_features: ``(M, N', E)`` in place of pixels, see `vision_features()`.
            image_ids: ``(M,)`` integers; texts of pictures with equal ids are right for each other.
            return_loss: compute the losses of pairs (picture i, text i). In eval mode M and N may differ; there is no
                loss then.
            gather_loss: take the losses over all ranks. By default in training only.
            generator: of the draw of hard negatives, equal on all ranks; by default torch's own in training, and one with
                a fixed seed in evaluation.
            interpolate_pos_encoding: accept pictures of another size than the tower's own.

        Raises:
            ValueError: both or neither of pixels and features; in training M and N differ; see also the Q-Former.
        """
        if input_ids is None:
            raise ValueError(f"{type(self).__name__} compares pictures with texts: give input_ids of some.")
        self.hold_frozen_parts()
        features = self._features(pixel_values, vision_features, interpolate_pos_encoding)
        num_images, num_texts = features.shape[0], input_ids.shape[0]
        with_loss = return_loss and (self.training or num_images == num_texts)
        if with_loss:
            check_pairs(num_images, num_texts, image_ids)
        keys_values = self.qformer.picture_keys_values(self.vision_norm(features))
        outputs = self._read_alone(keys_values, input_ids, attention_mask, with_loss, kwargs)
        image_embeds = self._embed_queries(outputs.last_hidden_state)
        text_embeds = self._embed_texts(outputs.text_hidden_state, attention_mask)
        if not with_loss:
            cosines = _best_cosines(image_embeds, text_embeds)
            logits_per_image = cosines / self.temperature
            return MMBlip2Output(
                logits_per_image=logits_per_image,
                logits_per_text=logits_per_image.T.contiguous(),
                image_embeds=image_embeds,
                text_embeds=text_embeds,
                qformer_outputs=outputs,
            )

        gather = self.training if gather_loss is None else gather_loss
        same = same_image(image_embeds, image_ids, gather and is_distributed())
        loss_itc, per_image, per_text = query_text_contrastive_loss(
            image_embeds,
            text_embeds,
            self.temperature,
            image_ids,
            self.config.label_smoothing,
            gather=gather,
            gather_with_grad=self.config.gather_with_grad,
            same=same,
        )
        if generator is None and not self.training and not torch.compiler.is_compiling():
            generator = torch.Generator().manual_seed(0)
        drawn_images, has_image = draw_hard_negatives(per_text, same, generator, gather)
        drawn_texts, has_text = draw_hard_negatives(per_image, same, generator, gather)
        negatives, valid = (drawn_images, drawn_texts), (has_image, has_text)
        itm_logits = self._match_drawn(features, keys_values, input_ids, attention_mask, negatives, gather)
        loss_itm = image_text_matching_loss(itm_logits, valid, gather)
        loss_itg, itg_accuracy = self._generation_loss(outputs.causal_hidden_state, input_ids, attention_mask, gather)
        loss = loss_itc + loss_itm if loss_itg is None else loss_itc + loss_itm + loss_itg
        own = _columns_of_own(per_image, gather)
        return MMBlip2Output(
            loss=loss,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_itg=loss_itg,
            logits_per_image=per_image[:, own],
            logits_per_text=per_text[:, own],
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            accuracies=torch.stack(
                [
                    _right_share(per_image, same),
                    _right_share(per_text, same),
                    *_matching_accuracies(itm_logits, valid),
                    itg_accuracy,
                ]
            ).detach(),
            negatives=negatives,
            qformer_outputs=outputs,
        )

    def _read_alone(
        self,
        keys_values: KeysValues,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        with_loss: bool,
        kwargs: dict,
    ) -> MMBlip2QFormerOutput:
        """Pictures and texts, neither seeing the other: in one pass where they are equally many."""
        if with_loss:
            return self.qformer(
                input_ids=input_ids,
                attention_mask=attention_mask,
                text_mode="unimodal",
                picture_keys_values=keys_values,
                **kwargs,
            )
        pictures = self.qformer(picture_keys_values=keys_values, **kwargs)
        texts = self.qformer(input_ids=input_ids, attention_mask=attention_mask, text_mode="unimodal", **kwargs)
        return MMBlip2QFormerOutput(
            last_hidden_state=pictures.last_hidden_state, text_hidden_state=texts.text_hidden_state
        )

    def _embed_queries(self, queries: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(at_least_float32(self.vision_projection(queries)), dim=-1)

    def _embed_texts(self, text: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        first = text[:, 0] if attention_mask is None else text[_arange(text), attention_mask.long().argmax(dim=1)]
        return nn.functional.normalize(at_least_float32(self.text_projection(first)), dim=-1)

    def _match(
        self, keys_values: KeysValues, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """``(P, 2)`` of P pairs: the head's answer at every query, averaged."""
        outputs = self.qformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            text_mode="bidirectional",
            picture_keys_values=keys_values,
        )
        return self.itm_head(outputs.last_hidden_state).mean(dim=1)

    def _match_drawn(
        self,
        features: torch.Tensor,
        keys_values: KeysValues,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        negatives: tuple[torch.Tensor, torch.Tensor],
        gather: bool,
    ) -> torch.Tensor:
        """``(3 * b, 2)``: the right pairs, the texts with drawn pictures, the pictures with drawn texts."""
        drawn_images, drawn_texts = negatives
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if gather and is_distributed():
            with upstream(self.vision_tower):
                drawn_features = gather_rows(features)[drawn_images]
            drawn = self.qformer.picture_keys_values(self.vision_norm(drawn_features))
            all_ids = gather_padded(input_ids, self.config.qformer_config.pad_token_id)
            all_masks = gather_padded(mask, 0)
            longer = all_ids.shape[1] - input_ids.shape[1]
            input_ids = nn.functional.pad(input_ids, (0, longer), value=self.config.qformer_config.pad_token_id)
            mask = nn.functional.pad(mask, (0, longer))
        else:
            drawn, all_ids, all_masks = _rows_of(keys_values, drawn_images), input_ids, mask
        pictures = [
            own and tuple(torch.cat([mine, other, mine]) for mine, other in zip(own, others, strict=True))
            for own, others in zip(keys_values, drawn, strict=True)
        ]
        texts = torch.cat([input_ids, input_ids, all_ids[drawn_texts]])
        return self._match(pictures, texts, torch.cat([mask, mask, all_masks[drawn_texts]]))

    def _generation_loss(
        self, text: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, gather: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Loss and share of right words: none and NaN, for there is no head of words here."""
        return None, self.temperature.new_full((), torch.nan)


class MMBlip2ForPreTraining(MMBlip2ForImageTextRetrieval):
    """Stage 1: contrastive, matching and generation loss together (section 3.2)."""

    _keys_to_ignore_on_load_unexpected = None
    _tied_weights_keys = {"lm_head.decoder.weight": "qformer.embeddings.word_embeddings.weight"}

    def _add_heads(self, config: MMBlip2Config) -> None:
        self.lm_head = QFormerLMHead(config.qformer_config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, QFormerLMHead):
            module.init_weights(self.config.qformer_config.initializer_range)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head.decoder = value

    def _read_alone(self, keys_values, input_ids, attention_mask, with_loss, kwargs) -> MMBlip2QFormerOutput:
        if not with_loss:
            return super()._read_alone(keys_values, input_ids, attention_mask, with_loss, kwargs)
        return self.qformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            text_mode="fused",
            picture_keys_values=keys_values,
            **kwargs,
        )

    def _generation_loss(
        self, text: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, gather: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return text_generation_loss(self.lm_head, text, input_ids, attention_mask, self.config.label_smoothing, gather)


def text_generation_loss(
    lm_head: nn.Module,
    text: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    label_smoothing: float,
    gather: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image-grounded text generation (ITG): each place's next word, ``[SEP]`` the last. Loss and share of right words."""
    labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
    text, labels = text[:, :-1], labels[:, 1:]
    if attention_mask is not None:
        labels = labels.masked_fill(attention_mask[:, :-1] == 0, IGNORED)
    text, labels = text.flatten(0, 1), labels.flatten()
    if not torch.compiler.is_compiling():
        text, labels = text[labels != IGNORED], labels[labels != IGNORED]
    logits = lm_head(text)
    told = labels != IGNORED
    right = ((logits.argmax(dim=-1) == labels) & told).sum() / told.sum()
    return mean_of_labelled(logits, labels, label_smoothing, gather), right.detach()


def _check_pairs_of(pairs: torch.Tensor, num_images: int, num_texts: int) -> torch.Tensor:
    """Raises ValueError where pairs name pictures or texts that are not there."""
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be (pairs, 2), a picture and a text each, not {tuple(pairs.shape)}.")
    limits = torch.tensor([num_images, num_texts], device=pairs.device)
    if ((pairs < 0) | (pairs >= limits)).any():
        raise ValueError(f"pairs name pictures or texts beyond the {num_images} pictures and {num_texts} texts given.")
    return pairs


def _rows_of(keys_values: KeysValues, rows: torch.Tensor) -> list:
    return [pair and tuple(part[rows] for part in pair) for pair in keys_values]


def _best_cosines(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    with torch.autocast(image_embeds.device.type, enabled=False):
        return (image_embeds @ text_embeds.T).amax(dim=1)


def _arange(rows: torch.Tensor) -> torch.Tensor:
    return torch.arange(rows.shape[0], device=rows.device)


def _columns_of_own(logits: torch.Tensor, gather: bool) -> slice:
    rank = torch.distributed.get_rank() if gather and is_distributed() else 0
    return slice(rank * logits.shape[0], (rank + 1) * logits.shape[0])


def _right_share(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    return same.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()


def _matching_accuracies(logits: torch.Tensor, valid: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Of the right pairs, the drawn pictures and the drawn texts."""
    blocks = zip(logits.argmax(dim=1).view(3, -1), matching_labels(valid).view(3, -1), strict=True)
    return [((said == label) & (label != IGNORED)).sum() / (label != IGNORED).sum() for said, label in blocks]


__all__ = ["MMBlip2ForImageTextRetrieval", "MMBlip2ForPreTraining"]
