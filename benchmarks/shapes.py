"""What a Llama-shaped model weighs, computes and keeps, by arithmetic alone.

Knows formulas; tests/scaling compares each with what Isthmus itself counts on a small model. T is the tokens of a row.
"""

from dataclasses import dataclass

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a value."""


@dataclass(frozen=True)
class Shape:
    """A model without biases, with grouped-query attention and a gated feed-forward layer.

    `tied` says that the output layer is the embedding.
    """

    name: str
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def kv(self) -> int:
        """Values of a token's keys, and of its values, in one block."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def block(self) -> int:
        """Weights of a block's matrices."""
        return 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.intermediate

    @property
    def embedding(self) -> int:
        """Weights of the embedding; an output layer that is not tied has as many."""
        return self.vocabulary * self.hidden

    @property
    def embeddings(self) -> int:
        """Weights of embedding and output layer together."""
        return self.embedding * (1 if self.tied else 2)

    def ends(self, blocks: int) -> int:
        """Weights that an edge holds with `blocks` of the blocks, norms included."""
        return self.embeddings + blocks * (self.block + 2 * self.hidden) + self.hidden

    def forward_flops(self, tokens: int) -> float:
        """Of one block, per token: two a weight, and scores and mixtures over the whole row."""
        return 2 * self.block + 4 * tokens * self.hidden

    def backward_flops(self, tokens: int) -> float:
        """Of one frozen block, per token: the input's gradient alone, and attention's twice over."""
        return 2 * self.block + 8 * tokens * self.hidden

    def kept_bytes(self, value: int = BFLOAT16) -> int:
        """What autograd keeps of one frozen block, per token.

        Both norms keep their input and its scale in float32; attention keeps queries, keys, values, its output and a
        float32 logarithm a head; the feed-forward layer keeps both halves and their activation. Frozen matrices keep
        nothing of their input.
        """
        norms = 2 * FLOAT32 * (self.hidden + 1)
        attention = value * 2 * (self.hidden + self.kv) + FLOAT32 * self.heads
        return norms + attention + value * 3 * self.intermediate

    def cached_bytes(self, value: int = BFLOAT16) -> int:
        """Of one block's decode cache, per token: keys and values."""
        return value * 2 * self.kv

    def lora(self, rank: int, blocks: int) -> int:
        """Trainable values of LoRA on q and v of `blocks` blocks."""
        return blocks * rank * ((self.hidden + self.hidden) + (self.hidden + self.kv))


SMOLLM2 = Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True)
NARROW = Shape("a narrow Llama", 288, 3, 9, 3, 768, 49152, tied=True)
LLAMA_1B = Shape("Llama-3.2 1B, 3 of its blocks", 2048, 3, 32, 8, 8192, 128256, tied=True)
LLAMA_8B = Shape("Llama-3 8B", 4096, 32, 32, 8, 14336, 128256)
LLAMA_70B = Shape("Llama-3 70B", 8192, 80, 64, 8, 28672, 128256)
"""As their public config.json files say; the narrow one is made up, and of the 1B only the ends matter to an edge."""
