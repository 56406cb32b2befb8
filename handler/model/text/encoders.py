"""A text encoder with weights, chunks and embeddings: CLIP and T5, as ComfyUI has them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from handler.model.text.chunks import Chunk, Vocabulary

CLIP_L, CLIP_G, T5 = "clip_l", "clip_g", "t5xxl"


@dataclass(frozen=True, slots=True)
class Encoder:
    """One text encoder of a pipeline, and which of its layers tells the denoiser what to draw.

    `key` is what files of embeddings call it. `layer` counts from the end, -1 is the last; `normed` says whether the
    final norm follows an earlier layer too. The last one has it, but where `layer` -1 was asked for without.
    """

    model: Any
    vocabulary: Vocabulary
    key: str
    device: Any
    layer: int | None = None
    normed: bool = True

    @property
    def width(self) -> int:
        """Of a token's vector."""
        found: int = self._embeddings.weight.shape[1]
        return found

    def encode(self, chunks: Sequence[Chunk], skip: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden states (1, tokens, width) of all chunks, and the first one's pooled output (1, width), if any.

        `skip` is the layer to stop at instead of its own. Where words have weights, each hidden state is that of an
        empty chunk and so many times what it differs from that by, as in ComfyUI's `sd1_clip.py`.
        """
        weights = torch.tensor([[weight for _, weight in chunk] for chunk in chunks])
        plain = bool((weights == 1).all())
        ids, vectors = self._told(chunks)
        ids += [] if plain else [self.vocabulary.empty(len(ids[0]))]
        layer = self._stop(skip)
        with self._with_vectors(vectors):
            output = self.model(torch.tensor(ids, device=self.device), output_hidden_states=layer is not None)
        hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
        if layer is not None and self.normed:
            hidden = self._norm(hidden)
        if not plain:
            hidden = _weighted(hidden, weights.to(hidden.device))
        pooled = output.get("text_embeds", output.get("pooler_output"))
        return hidden.reshape(1, -1, hidden.shape[-1]), None if pooled is None else pooled[:1]

    def _told(self, chunks: Sequence[Chunk]) -> tuple[list[list[int]], list[tuple[int, int, Any]]]:
        """Numbers for all tokens, and the vectors that take the place of some: (chunk, place, vector).

        Vectors of another width are left out, and the chunk is filled with padding instead.
        """
        ids, vectors = [], []
        for i, chunk in enumerate(chunks):
            kept = [token for token, _ in chunk if isinstance(token, int) or len(token) == self.width]
            kept += [self.vocabulary.pad] * (len(chunk) - len(kept))
            vectors += [(i, at, token) for at, token in enumerate(kept) if not isinstance(token, int)]
            ids.append([token if isinstance(token, int) else 0 for token in kept])
        return ids, vectors

    @contextmanager
    def _with_vectors(self, vectors: Sequence[tuple[int, int, Any]]) -> Iterator[None]:
        """Let the vectors take the places of what the vocabulary has there."""

        def put(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
            for chunk, at, vector in vectors:
                embedded[chunk, at] = vector.to(embedded)
            return embedded

        hook = self._embeddings.register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()

    def _stop(self, skip: int | None) -> int | None:
        """The layer to stop at; None is the last with its norm, also for one that the encoder does not have."""
        layer = self.layer if skip is None else skip
        missing = layer is None or -layer > self.model.config.num_hidden_layers
        return None if missing or (layer == -1 and self.normed) else layer

    @property
    def _embeddings(self) -> Any:
        """The module that the vocabulary's vectors come from. T5 says another, which only has the same weights."""
        stack = getattr(self.model, "encoder", None)
        return getattr(stack, "embed_tokens", None) or self.model.get_input_embeddings()

    @property
    def _norm(self) -> Any:
        owners = (getattr(self.model, name, None) for name in ("text_model", "encoder"))
        found: Any = next((owner for owner in owners if hasattr(owner, "final_layer_norm")), self.model)
        return found.final_layer_norm


def clip(pipeline: Any, place: str, key: str, layer: int | None = None, normed: bool = True) -> Encoder:
    """CLIP-L or CLIP-G, whose window is 77 tokens; `place` is what follows its component's name, such as "_2".

    Their vocabulary is one. CLIP-G's own tokenizer takes every "!" for its padding, which is that word too; ComfyUI
    has CLIP-L's for both.
    """
    model, pad = getattr(pipeline, f"text_encoder{place}"), getattr(pipeline, f"tokenizer{place}").pad_token_id
    vocabulary = Vocabulary(pipeline.tokenizer, pad, window=model.config.max_position_embeddings)
    return Encoder(model, vocabulary, key, pipeline._execution_device, layer, normed)


def t5(pipeline: Any, place: str, least: int, ended: bool = True) -> Encoder:
    """T5, whose texts are filled up to `least` tokens; `ended` says whether an empty one has an end."""
    model, tokenizer = getattr(pipeline, f"text_encoder{place}"), getattr(pipeline, f"tokenizer{place}")
    vocabulary = Vocabulary(tokenizer, tokenizer.pad_token_id, least=least, ended=ended)
    return Encoder(model, vocabulary, T5, pipeline._execution_device)


def _weighted(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(chunks + 1, tokens, width), of which the last is of an empty chunk, and (chunks, tokens) to (chunks, ...)."""
    words, empty = hidden[:-1].float(), hidden[-1:].float()
    found = torch.where(weights[..., None] == 1, words, (words - empty) * weights[..., None] + empty)
    return found.to(hidden.dtype)
