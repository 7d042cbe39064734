"""Any Hugging Face causal language model, run over packs. Needs torch.

Training, evaluation in training, export and the torch scorer all run a model through
`PackedModel`, so the numbers that a bundle gives are those that were trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ercbatch.errors import UsageError
from ercbatch.prompts.answers import AnswerHead
from ercbatch.prompts.packs import Pack, join
from ercbatch.prompts.tree import Segment, lay_out
from ercbatch.scoring.masks import Masks


class Batch(NamedTuple):
    """Packs side by side: `tokens`, `positions`, `ends` are [packs, length]; `reads` is [reads].

    A read is an index into the flattened [packs * length].
    """

    tokens: Tensor
    positions: Tensor
    ends: Tensor
    reads: Tensor


def collate(packs: Sequence[Pack], multiple: int = 1) -> Batch:
    """Packs padded to the longest, and that to a multiple of `multiple`.

    A padding token is seen by nothing but itself. Products are prepared once for each shape: few
    different lengths make training several per cent faster on a CPU.
    """
    length = -(-max(len(pack) for pack in packs) // multiple) * multiple
    tokens = np.zeros((len(packs), length), dtype=np.int64)
    positions = np.zeros_like(tokens)
    ends = np.tile(np.arange(1, length + 1, dtype=np.int64), (len(packs), 1))
    reads: list[int] = []
    for row, pack in enumerate(packs):
        tokens[row, : len(pack)] = pack.tokens
        positions[row, : len(pack)] = pack.positions
        ends[row, : len(pack)] = pack.ends
        reads += [row * length + index for index, _, _ in pack.reads]
    return Batch(*(torch.from_numpy(a) for a in (tokens, positions, ends, np.array(reads, int))))


class _StateTap(nn.Module):
    """Stands in for the output embedding and keeps what would have been multiplied by it.

    It returns a slice, so that no vocabulary-sized product is computed and whatever the model
    does to its logits afterwards costs nothing (`AnswerHead` does it for the rows it needs).
    """

    bias = None
    states: Tensor

    def forward(self, states: Tensor) -> Tensor:
        self.states = states
        return states[..., :1]


class PackedModel(nn.Module):
    """A causal language model as a function from packs to hidden states at the answers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.tap = _StateTap()
        self.head: Any = model.get_output_embeddings()
        if self.head is None:
            raise ValueError("the model has no output embedding: it is not a causal language model")
        model.set_output_embeddings(self.tap)
        self._masks = Masks(model)
        self._bert = model.config.model_type == "bert"

    @property
    def longest_prompt(self) -> int | None:
        """How many tokens the model can read, where it has a limit."""
        config = self.model.config.get_text_config()
        limit: int | None = getattr(config, "max_position_embeddings", None)
        return limit

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with its own output embedding back in place, to save or generate with."""
        self.model.set_output_embeddings(self.head)
        try:
            yield self.model
        finally:
            self.model.set_output_embeddings(self.tap)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        ends: Tensor,
        reads: Tensor,
        order: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [reads, hidden]: what the output embedding is multiplied with.

        `order` is for tokens that stand elsewhere than in their pack: see `Masks`.
        """
        # BERT's own table of token types is as long as its positions; a pack may be longer.
        types = {"token_type_ids": torch.zeros_like(tokens)} if self._bert else {}
        self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._masks(positions, ends, order),
            use_cache=False,
            **types,
        )
        states = self.tap.states
        return states.reshape(-1, states.shape[-1])[reads]

    @torch.no_grad()
    def check_packing(self) -> None:
        """See that two branches in a pack are computed as each is alone, on a few tokens.

        Raises:
            UsageError: they aren't: the model is recurrent, say, or places tokens its own way.
        """
        embedding = self.model.get_input_embeddings().weight
        stem, *branches = (
            [(37 * i + 11) % embedding.shape[0] for i in numbers]
            for numbers in (range(10), range(10, 14), range(14, 20))
        )
        tree = lay_out(Segment(stem, [(len(stem) - 1, Segment(branch)) for branch in branches]))
        batch = Batch(*(t.to(embedding.device) for t in collate([join([(0, tree)])])))
        # Half precision, or a quantized base, rounds; another token seen is far more.
        rounds = embedding.dtype != torch.float32 or hasattr(self.model, "hf_quantizer")
        tolerance = 0.1 if rounds else 1e-3
        training = self.model.training
        self.model.eval()
        try:
            last = torch.tensor([len(stem) + 3, len(tree) - 1], device=embedding.device)
            states = self(*batch._replace(reads=last))
            if not states.isfinite().all():
                raise UsageError("the answers of the base are no numbers: its weights are broken")
            for branch, state in zip(branches, states, strict=True):
                prompt = torch.tensor([stem + branch], device=embedding.device)
                self.model(input_ids=prompt, use_cache=False)
                expected = self.tap.states[0, -1]
                if not (state - expected).norm() <= tolerance * expected.norm():
                    raise ValueError("a prompt packed with others is not what it is alone")
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UsageError(
                f"a {self.model.config.model_type} model cannot be run over packs ({error}): take "
                "a base whose attention follows a mask and positions, such as Llama, Qwen, "
                "Mistral, Gemma, Phi, GPT-NeoX or BLOOM"
            ) from error
        finally:
            self.model.train(training)

    def logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Logits [reads, tokens] of those vocabulary ids."""
        bias = None if self.head.bias is None else self.head.bias[tokens]
        scale, softcap = _logit_transform(self.model.config.get_text_config())
        logits = nn.functional.linear(states, self.head.weight[tokens].to(states.dtype), bias)
        logits = logits * scale
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def answer_head(self, tokens: Sequence[int]) -> AnswerHead:
        """The rows of the output embedding for these vocabulary ids, sorted."""
        ids = sorted(set(tokens))
        weight = self.head.weight.detach()[ids].float().cpu().numpy()
        bias = np.zeros(len(ids), dtype=np.float32)
        if self.head.bias is not None:
            bias = self.head.bias.detach()[ids].float().cpu().numpy()
        scale, softcap = _logit_transform(self.model.config.get_text_config())
        return AnswerHead(np.array(ids, dtype=np.int64), weight, bias, scale, softcap)


def _logit_transform(config: Any) -> tuple[float, float]:
    """(scale, softcap) that an architecture applies to its logits; softcap 0 is none."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, float(getattr(config, "final_logit_softcapping", None) or 0.0)
