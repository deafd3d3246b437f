"""Baichuan-13B's model: a Llama that knows no positions, only distances (ALiBi, arXiv:2108.12409).

transformers has no such class. This one gives Llama's layers positions that are all zero, which makes the
rotary embedding the identity, and a causal mask with a bias against far tokens in it.
"""

from typing import Any

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast


class BaichuanAlibiConfig(LlamaConfig):
    """LlamaConfig; `max_position_embeddings` is the length of its training, which ALiBi does not enforce."""

    model_type = "baichuan_alibi"


def alibi_slopes(heads: int, device: torch.device | None = None) -> torch.Tensor:
    """float32 (heads,): what each head's attention loses with each step back (BLOOM's slopes).

    A geometric series for a power of two of heads; further heads lie between its terms.
    """
    power = 2 ** (heads.bit_length() - 1)
    exponents = torch.arange(1, power + 1, device=device, dtype=torch.float32)
    between = torch.arange(heads - power, device=device) + 0.5
    return torch.exp2(torch.cat([exponents, between]) * (-8 / power))


class BaichuanAlibiModel(LlamaModel):
    """The decoder. Eager and SDPA attention; any cache of transformers; padding on either side."""

    config_class = BaichuanAlibiConfig
    _supports_flash_attn = False  # knows no bias
    _supports_flex_attn = False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel's; `position_ids` is not used, the distance between two tokens alone counts. `cache` is what
        transformers 5.24 calls `past_key_values`."""
        named = {"cache": cache, "past_key_values": past_key_values}
        past = {name: kept for name, kept in named.items() if kept is not None}
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        mask = self._biased_mask(inputs_embeds, attention_mask, next(iter(past.values()), None))
        return super().forward(
            attention_mask=mask,
            position_ids=inputs_embeds.new_zeros(1, inputs_embeds.shape[1], dtype=torch.long),
            inputs_embeds=inputs_embeds,
            **past,
            **kwargs,
        )

    def _biased_mask(
        self, embedded: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """(batch, heads, queries, keys) in the dtype of the embeddings: minus slope times distance, or the
        dtype's least number where a query must not look."""
        allowed = create_causal_mask(self.config, embedded, attention_mask, past_key_values, allow_is_causal_skip=False)
        if allowed.dtype != torch.bool:  # eager attention's mask is 0 where a query may look
            allowed = allowed == 0
        queries, keys = allowed.shape[-2:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        query = torch.arange(queries, device=embedded.device) + seen
        distance = torch.arange(keys, device=embedded.device) - query[:, None]
        bias = alibi_slopes(self.config.num_attention_heads, embedded.device)[:, None, None] * distance
        return bias.to(embedded.dtype).where(allowed, torch.finfo(embedded.dtype).min)


class BaichuanAlibiForCausalLM(LlamaForCausalLM):
    """Baichuan-13B and Baichuan2-13B, base and chat."""

    config_class = BaichuanAlibiConfig
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: BaichuanAlibiConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # LlamaForCausalLM's would make a LlamaModel first
        self.model = BaichuanAlibiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
