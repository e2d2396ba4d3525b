"""The model as counts: parameters, KV bytes and operations of the part that one process holds."""

from __future__ import annotations

from dataclasses import dataclass

from sip_engine.config.model import ModelConfig
from sip_engine.config.schema import ParallelConfig


@dataclass(frozen=True)
class Shape:
    """A model over `tensor` x `pipeline` processes; every count is of one process.

    H hidden, A query channels (heads x head dim), K key channels, F inner width of SwiGLU, V padded vocabulary.
    """

    model: ModelConfig
    parallel: ParallelConfig
    vocab_size: int

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding over all shards: the next multiple of 64 x tensor."""
        multiple = 64 * self.parallel.tensor
        return -(-self.vocab_size // multiple) * multiple

    @property
    def query_channels(self) -> int:
        """Of the shard."""
        return self.model.num_heads * self.model.kv_channels // self.parallel.tensor

    @property
    def key_channels(self) -> int:
        """Of the shard."""
        return self.model.num_kv_heads * self.model.kv_channels // self.parallel.tensor

    @property
    def ffn_channels(self) -> int:
        """Of the shard."""
        return self.model.ffn_size // self.parallel.tensor

    @property
    def layers(self) -> int:
        """Of one pipeline stage."""
        return self.model.num_layers // self.parallel.pipeline

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a parameter on a GPU."""
        return 4 if self.model.precision == "fp32" else 2

    @property
    def matrix_parameters(self) -> int:
        """Parameters of one layer's matrices in the shard: what a token is multiplied with."""
        h, a, k, f = self.model.hidden_size, self.query_channels, self.key_channels, self.ffn_channels
        return h * (a + 2 * k) + a * h + 3 * h * f

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer in the shard; norms are whole on every shard."""
        model = self.model
        biases = (self.query_channels + 2 * self.key_channels) if model.qkv_bias else 0
        norms = 2 * model.hidden_size + (2 * model.kv_channels if model.qk_norm else 0)
        return self.matrix_parameters + biases + norms

    @property
    def vocab_parameters(self) -> int:
        """The shard's rows of the embedding, or of the head."""
        return self.padded_vocab // self.parallel.tensor * self.model.hidden_size

    def parameters(self, stage: int) -> int:
        """Parameters of a process of pipeline stage `stage`; a tied head has a copy on the last stage."""
        first, last = stage == 0, stage == self.parallel.pipeline - 1
        tables = first + (last and not (first and self.model.tie_embeddings))
        return (
            self.layers * self.layer_parameters
            + tables * self.vocab_parameters
            + last * self.model.hidden_size
        )

    @property
    def most_parameters(self) -> int:
        """Of the fullest stage."""
        return max(self.parameters(stage) for stage in range(self.parallel.pipeline))

    @property
    def total_parameters(self) -> int:
        """Of the whole model, vocabulary unpadded."""
        whole = Shape(self.model, ParallelConfig(), self.vocab_size)
        tables = 1 if self.model.tie_embeddings else 2
        h = self.model.hidden_size
        return self.model.num_layers * whole.layer_parameters + tables * self.vocab_size * h + h

    def kv_bytes(self, kv_dtype: str) -> int:
        """Bytes that one token's keys and values take on a process."""
        size = 1 if kv_dtype == "fp8" else self.dtype_bytes
        return 2 * self.layers * self.key_channels * size


def causal_pairs(length: float) -> float:
    """Visible (query, key) pairs of `length` tokens in a row."""
    return length * (length + 1) / 2


def row_pairs(prefix: float, suffix: float, num_suffixes: float) -> float:
    """Visible pairs of one packed row: a prefix, and suffixes that see it and themselves."""
    return causal_pairs(prefix) + num_suffixes * (suffix * prefix + causal_pairs(suffix))
