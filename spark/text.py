"""Words: two tokenizers built from the caption grammar, and CLIP and T5 encoders trained to understand it.

The encoders are trained before the transformer, as classifiers: from CLIP's pooled vector and from the mean of
T5's tokens a linear layer must read off every fact of the scene (objects, colours, which one is left, ...).
That takes minutes, reads hundreds of thousands of captions, and leaves the transformer only the drawing.

Case: CLIP's tokenizer lower-cases; T5's does not, so its vocabulary holds each word in three spellings whose
embeddings are set equal after training.
"""

import random
import string
from collections import Counter
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from spark.journal import Journal
from spark.progress import Progress, rates
from spark.scenes import COLORS, FILLER, PLACES, SHAPES, Meaning, caption, sample_meaning

CLIP_WIDTH = 96
T5_WIDTH = 96
PEAK_RATE = 2e-3
BATCH = 256
T5_LENGTHS = ((20, 45), (32, 30), (64, 15), (128, 6), (256, 3), (512, 1))  # padded tokens, share in percent
EXTRA_WORDS = (
    "one", "five", "six", "dark", "light", "shape", "shapes", "colored", "coloured", "color", "colour", "it",
    "is", "are", "of", "to", "from", "behind", "next", "sky", "paper", "wall", "scene", "single", "just", "only",
    "some", "my", "this", "that", "would", "like", "could", "you", "want", "need", "see", "let", "us", "very",
)  # fmt: skip
FACTS = {  # what a caption says -> number of answers
    "count": 5, "background": len(COLORS), "shape_a": len(SHAPES), "color_a": len(COLORS), "shape_b": len(SHAPES),
    "color_b": len(COLORS), "size": 3, "size_b": 3, "place": len(PLACES) + 1, "axis": 2,
}  # fmt: skip
SIZES = (None, "small", "large")
UNSAID = -100  # cross_entropy's ignore_index


def vocabulary() -> list[str]:
    """Every word the grammar can say and a few more, most frequent first."""
    rng, seen = random.Random(5), Counter[str]()
    for _ in range(20000):
        text = caption(sample_meaning(rng, "train"), rng).lower()
        seen.update("".join(c if c.isalnum() else " " for c in text).split())
    seen.update([*FILLER, *EXTRA_WORDS])
    return [word for word, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))]


def clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Byte-level BPE whose merges spell exactly `words`; anything else falls back to letters."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        head = word[0] if len(word) > 1 else word + "</w>"
        for i, letter in enumerate(word[1:], 2):
            tail = letter + ("</w>" if i == len(word) else "")
            merges.append((head, tail))
            head += tail
            tokens.append(head)
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=77)


def t5_tokenizer(words: list[str]) -> T5Tokenizer:
    """Unigram over whole words in lower, Title and UPPER case, with single characters as a last resort."""
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0}
    for word in words:
        for form in (word, word.capitalize(), word.upper()):
            pieces.setdefault("▁" + form, -4.0)
    for character in string.ascii_letters + string.digits + ".,!?;:'\"-()":
        pieces.setdefault(character, -3.0 if character in ".,!?" else -9.0)
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)


def encoders(clip_words: CLIPTokenizer, t5_words: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Fresh CLIP (pooled vector: 96) and T5 (96 per token) text encoders."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_words),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=clip_words.bos_token_id,
            eos_token_id=clip_words.eos_token_id,
            pad_token_id=clip_words.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_words),
            d_model=T5_WIDTH,
            d_kv=24,
            num_heads=4,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    return clip, t5


def facts(meaning: Meaning) -> list[int]:
    """The answers to `FACTS`, in order; `UNSAID` where there is nothing to know."""
    colors, shapes, places = list(COLORS), list(SHAPES), list(PLACES)
    pair = meaning.kind == "pair"
    (shape_a, color_a), (shape_b, color_b) = meaning.objects[0], meaning.objects[-1]
    return [
        4 if pair else len(meaning.objects) - 1,
        colors.index(meaning.background),
        shapes.index(shape_a),
        colors.index(color_a),
        shapes.index(shape_b) if pair else UNSAID,
        colors.index(color_b) if pair else UNSAID,
        SIZES.index(meaning.sizes[0] if pair else meaning.size),
        SIZES.index(meaning.sizes[1]) if pair else UNSAID,
        places.index(meaning.place) if meaning.place else len(places),
        int(meaning.axis == "vertical") if pair else UNSAID,
    ]


def perturb(text: str, rng: random.Random) -> str:
    """Sometimes slip in a word nobody taught, so that unknown words do no harm."""
    if rng.random() > 0.08:
        return text
    words = text.split()
    stranger = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
    words.insert(rng.randrange(len(words) + 1), stranger)
    return " ".join(words)


def tokenize(clip_words: CLIPTokenizer, t5_words: T5Tokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids for CLIP (longest of the batch) and T5 (padded to `length`), as FluxPipeline makes them."""
    short = clip_words(texts, padding="longest", truncation=True, max_length=77, return_tensors="pt").input_ids
    long = t5_words(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return short, long


class Reader(nn.Module):
    """Both encoders with a linear exam on top."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.exams = nn.ModuleList(nn.Linear(width, sum(FACTS.values())) for width in (CLIP_WIDTH, T5_WIDTH))

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> list[tuple[Tensor, ...]]:
        """Logits per encoder and fact."""
        said = (t5_ids != 0).unsqueeze(-1)
        mean = (self.t5(t5_ids)[0] * said).sum(1) / said.sum(1)
        pooled = self.clip(clip_ids).pooler_output
        return [exam(x).split(list(FACTS.values()), -1) for exam, x in zip(self.exams, (pooled, mean), strict=True)]


def train(folder: Path, minutes: float) -> None:
    """Train both encoders for `minutes`; saves tokenizers and encoders in `folder`."""
    torch.manual_seed(0)
    rng, journal = random.Random(0), Journal(folder / "text.log")
    words = vocabulary()
    clip_words, t5_words = clip_tokenizer(words), t5_tokenizer(words)
    reader = Reader(*encoders(clip_words, t5_words))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    progress = Progress(folder / "text.pt", minutes, rng, {"reader": reader, "optimizer": optimizer})
    progress.resume()
    while progress.share < 1:
        warm, cooled = min(1, (progress.step + 1) / 100), min(1, (1 - progress.share) / 0.6 + 0.005)
        rates([optimizer], PEAK_RATE * warm * cooled)
        meanings = [sample_meaning(rng, "train") for _ in range(BATCH)]
        texts = [perturb(caption(m, rng), rng).lower() for m in meanings]
        (length,) = rng.choices([n for n, _ in T5_LENGTHS], [w for _, w in T5_LENGTHS])
        keep = max(16, BATCH * 32 // max(32, length))
        answers = torch.tensor([facts(m) for m in meanings[:keep]])
        exams = reader(*tokenize(clip_words, t5_words, texts[:keep], length))
        loss = sum(
            nn.functional.cross_entropy(logits, answers[:, i], ignore_index=UNSAID)
            for exam in exams
            for i, logits in enumerate(exam)
            if (answers[:, i] != UNSAID).any()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        progress.tick()
        if progress.step % 100 == 0:
            journal.write(step=progress.step, loss=round(float(loss), 4), progress=round(progress.share, 3))
    fold_case(reader.t5, t5_words)
    journal.write(step=progress.step, **exam_scores(reader, clip_words, t5_words))
    clip_words.save_pretrained(folder / "tokenizer")
    t5_words.save_pretrained(folder / "tokenizer_2")
    reader.clip.save_pretrained(folder / "text_encoder")
    reader.t5.save_pretrained(folder / "text_encoder_2")


@torch.no_grad()
def fold_case(t5: T5EncoderModel, t5_words: T5Tokenizer) -> None:
    """Give every spelling of a word the embedding of its lower-case form."""
    table, vocab = t5.get_input_embeddings().weight, t5_words.get_vocab()
    for piece, row in vocab.items():
        lower = piece.lower() if not piece.startswith("<") else piece
        table[row] = table[vocab.get(lower, row)]


@torch.no_grad()
def exam_scores(reader: Reader, clip_words: CLIPTokenizer, t5_words: T5Tokenizer) -> dict[str, float]:
    """Share of validation captions of which every fact is read right, per encoder."""
    rng = random.Random(3)
    meanings = [sample_meaning(rng, "validation") for _ in range(1000)]
    answers = torch.tensor([facts(m) for m in meanings])
    exams = reader.eval()(*tokenize(clip_words, t5_words, [caption(m, rng) for m in meanings], 32))
    scores = {}
    for name, exam in zip(("clip", "t5"), exams, strict=True):
        right = [(x.argmax(-1) == answers[:, i]) | (answers[:, i] == UNSAID) for i, x in enumerate(exam)]
        scores[name] = torch.stack(right).all(0).float().mean().item()
        scores |= {f"{name}_{fact}": round(r.float().mean().item(), 4) for fact, r in zip(FACTS, right, strict=True)}
    return scores
