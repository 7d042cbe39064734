"""Any Hugging Face causal language model, run over packs. Needs torch.

Training, evaluation in training, export and the torch scorer all run a model through
`PackedModel`, so the numbers that a bundle gives are those that were trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ercbatch.errors import UsageError, foreign_errors
from ercbatch.prompts.answers import AnswerHead
from ercbatch.prompts.packs import Pack, join
from ercbatch.prompts.tokens import SegmentTokenizer, check_tokenizer, control_tokens
from ercbatch.prompts.tree import Segment, lay_out
from ercbatch.scoring.masks import Masks


def check_config(source: str) -> Mapping[str, Any]:
    """A checkpoint's `config.json`, which asks for no code.

    Raises:
        UsageError: it does, or there is none.
    """
    from transformers import PretrainedConfig
    from transformers.utils import find_adapter_config_file

    if Path(source).is_dir():
        check_model_folder(Path(source))
    try:
        adapter = find_adapter_config_file(source)
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: no model there: {error}") from error
    if adapter is not None:
        # transformers would go on with whatever model that names, and look at no other file here.
        raise UsageError(f"{source}: has an adapter_config.json: merge the adapter into its base")
    refuse_code(f"{source}: config.json", config)
    checked: Mapping[str, Any] = config
    return checked


def check_model_folder(folder: Path) -> None:
    """See that nothing in a stranger's model folder leads out of it.

    Raises:
        UsageError: a link, a shard or a tokenizer's file does.
        BundleError: its tokenizer is one that `check_tokenizer` refuses.
    """
    home = folder.resolve()
    # A hub's cache keeps the files of all snapshots in one place, with links to them.
    home = next((p for p in home.parents if p.name.startswith("models--")), home)
    for path in folder.rglob("*"):
        if path.is_symlink() and not _within(path, home):
            raise UsageError(f"{path}: a link that leads out of its folder: refused")
        if not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path}: no file: refused")
    for path in folder.glob("*.index.json"):
        shards = _json_object(path).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if Path(str(shard)).name != shard:
                raise UsageError(f"{path}: a shard is {shard!a}, no file of its folder: refused")
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        for key, value in _json_object(settings).items():
            # special_tokens_map_file is not read.
            names_file = key.endswith("_file") and key != "special_tokens_map_file"
            if names_file and isinstance(value, str) and Path(value).name != value:
                raise UsageError(f"{settings}: {key} is {value!a}, no file of its folder: refused")
    if (folder / "tokenizer.json").exists():
        check_tokenizer(folder / "tokenizer.json")


def _within(link: Path, home: Path) -> bool:
    try:
        return link.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # it leads in a circle
        return False


def _json_object(path: Path) -> dict[str, Any]:
    with foreign_errors(UsageError, f"{path}: not what it should be", "get it again"):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise TypeError("it is no object")
        return value


_BOUNDS = (("layer", 1000), ("expert", 10_000), ("num_labels", 100_000))
"""What a key contains -> its largest number: to make more of them takes for ever."""


def refuse_code(place: str, config: Mapping[str, Any]) -> None:
    """Refuse a model's configuration that runs code, or that asks for absurd sizes.

    `place` is where the configuration was read from.

    Raises:
        UsageError: it does.
    """
    for key, value in config.items():
        for part, limit in _BOUNDS:
            is_count = part in key and not key.endswith("_size")  # one is the width of an expert
            if is_count and isinstance(value, int) and value > limit:
                raise UsageError(f"{place} asks for {key} = {value}: refused")
        # `auto_map` names code to import, `attn_implementation` a kernel to fetch and run
        # (CVE-2026-4372), in the configuration of a part too. Neither has a place in a file of
        # data; a flag names nothing.
        kernel = key.lstrip("_").startswith("attn_implementation")
        if key == "auto_map" or (kernel and not isinstance(value, bool | None)):
            raise UsageError(f"{place} has {key!r}, which asks to run code: refused")
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Mapping):
                refuse_code(place, part)


def load_causal_lm(source: str, **settings: Any) -> tuple[Any, SegmentTokenizer]:
    """A causal language model and its tokenizer, from a checkpoint folder or a hub id.

    Weights come from safetensors only, and no code comes with them. They are float32 unless
    `settings` (of `from_pretrained`) say otherwise: transformers 5 would keep what the file has.

    Raises:
        UsageError: not a causal language model, or a config that asks to run code.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = check_config(source)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"{source}: {f'a {kind} model' if kind else 'config.json without model_type'}, not a "
            "causal language model: take one such as Llama, Qwen, Mistral, Gemma, Phi or BLOOM"
        )
    if kind == "bert" and not config.get("is_decoder"):
        raise UsageError(
            f"{source}: an encoder reads both ways: make it a causal language model with "
            "`python -m train base`"
        )
    if "quantization_config" not in settings:
        settings.setdefault("dtype", torch.float32)
    draw_no_bars()
    what = f"{source}: cannot be loaded as a causal language model"
    with foreign_errors(UsageError, what, "check the name, or get it again"):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if loading_info["missing_keys"]:  # transformers would make them up
        missing = ", ".join(sorted(loading_info["missing_keys"])[:3])
        raise UsageError(f"{source}: its weights lack {missing}: get it again")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"{source}: has no fast tokenizer (tokenizer.json): convert it first")
    controls = control_tokens(backend, tokenizer.special_tokens_map)
    return model, SegmentTokenizer(backend, controls)


def draw_no_bars() -> None:
    """Let transformers draw its progress on terminals alone."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write transformers' tokenizer, as a checkpoint has it, into a folder.

    Chat templates become files of the names that a stranger gave them, wherever those lead
    (CVE-2026-9856): only the one without a name is written.
    """
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    tokenizer.save_pretrained(folder)


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
        scale, softcap = logit_transform(self.model.config.get_text_config())
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
        scale, softcap = logit_transform(self.model.config.get_text_config())
        return AnswerHead(np.array(ids, dtype=np.int64), weight, bias, scale, softcap)


def logit_transform(config: Any) -> tuple[float, float]:
    """(scale, softcap) that an architecture applies to its logits; softcap 0 is none."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, float(getattr(config, "final_logit_softcapping", None) or 0.0)
